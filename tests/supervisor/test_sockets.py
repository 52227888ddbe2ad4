"""What killed agents left in the folder of sockets goes, what lives there stays."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest

from petals_agent.config.origin import Origin
from petals_agent.errors import ConfigError
from petals_agent.supervisor.sockets import check_socket_folder, remove_stale_sockets


def bound(path: Path, *, listening: bool, age: float) -> socket.socket:
    end = socket.socket(socket.AF_UNIX)
    end.bind(str(path))
    if listening:
        end.listen()
    os.utime(path, (time.time() - age,) * 2)
    return end


def test_only_stale_ones_of_ours_go(tmp_path: Path) -> None:
    kept = [
        bound(tmp_path / "p2pd-11111111.sock", listening=True, age=100),
        bound(tmp_path / "p2pd-22222222.sock", listening=False, age=0),  # perhaps just being made
        bound(tmp_path / "control.sock", listening=False, age=100),
        bound(tmp_path / "p2pd-of-someone-else.sock", listening=False, age=100),
    ]
    names = sorted(path.name for path in tmp_path.iterdir())
    stale = [
        bound(tmp_path / "p2pd-33333333.sock", listening=False, age=100),
        bound(tmp_path / "p2pclient-44444444.sock", listening=False, age=100),
    ]
    for end in stale:
        end.close()
    remove_stale_sockets(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for end in kept:
        end.close()


def test_other_files_are_no_sockets(tmp_path: Path) -> None:
    path = tmp_path / "p2pd-55555555.sock"
    path.write_text("a file")
    os.utime(path, (0, 0))
    remove_stale_sockets(tmp_path)
    remove_stale_sockets(tmp_path / "none")


@pytest.mark.parametrize(("length", "fits"), [(83, True), (84, False)])
def test_folder_must_leave_room_for_the_longest_name(length: int, fits: bool) -> None:
    folder = Path("/" + "x" * (length - 1))
    name = "p2pclient-12345678.sock"
    assert (len(str(folder / name)) <= 107) is fits
    if fits:
        check_socket_folder(folder / "c.sock", Origin("file", "a.toml", 3))
    else:
        with pytest.raises(ConfigError, match=r"a\.toml:3: control\.socket .*at most 83 bytes"):
            check_socket_folder(folder / "c.sock", Origin("file", "a.toml", 3))
