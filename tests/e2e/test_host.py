"""The mirror is the host's own, and what is cached is made once; needs neither root nor a machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from e2e import cache
from e2e.host import CannotRun, Mirror, check_answers, mirror, prepare

STANZAS = """\
# a comment
Types: deb deb-src
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/some.gpg

Types: deb
URIs: http://security.example
Suites: bookworm-security
Components: main
"""
OTHERS = """\
deb http://tools.example/apt stable main
# deb http://commented.example/debian bookworm main
deb-src http://sources.example/debian bookworm main
deb http://security.example bookworm-security main
"""


def write(apt: Path, name: str, text: str) -> None:
    (apt / name).parent.mkdir(exist_ok=True)
    (apt / name).write_text(text)


def test_mirror_of_stanzas(tmp_path: Path) -> None:
    write(tmp_path, "sources.list.d/a.list", OTHERS)
    write(tmp_path, "sources.list.d/debian.sources", STANZAS)
    assert mirror(tmp_path) == Mirror("http://mirror.example/debian", "/usr/share/keyrings/some.gpg")


def test_mirror_of_lines(tmp_path: Path) -> None:
    line = "deb [arch=amd64 signed-by=/k.gpg] https://lines.example/debian bookworm main\n"
    write(tmp_path, "sources.list", OTHERS + line)
    assert mirror(tmp_path) == Mirror("https://lines.example/debian", "/k.gpg")


def test_no_mirror(tmp_path: Path) -> None:
    write(tmp_path, "sources.list", OTHERS)
    write(tmp_path, "sources.list.d/off.sources", f"Enabled: no\n{STANZAS.splitlines(True)[1]}")
    with pytest.raises(CannotRun, match="bookworm"):
        mirror(tmp_path)


def test_without_root_it_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(CannotRun, match="not root"):
        prepare()


def test_mirror_that_answers_and_one_that_does_not(tmp_path: Path) -> None:
    here = Mirror(tmp_path.as_uri(), "")
    with pytest.raises(CannotRun, match="does not answer"):
        check_answers(here)
    (tmp_path / "dists/bookworm").mkdir(parents=True)
    (tmp_path / "dists/bookworm/Release").touch()
    check_answers(here)
    with pytest.raises(CannotRun, match="does not answer"):
        check_answers(Mirror("tor+https://mirror.example", ""))


def test_things_are_made_once_and_old_ones_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made: list[str] = []

    def make(folder: Path) -> None:
        made.append(folder.name)
        (folder / "file").touch()

    first = cache.cached("thing", "1", make)
    assert cache.cached("thing", "1", make) == first and len(made) == 1
    second = cache.cached("thing", "2", make)
    assert first.exists(), "it is in use"
    for lock in cache._in_use[-3:]:
        lock.close()
    cache.cached("thing", "2", make)
    assert second.exists() and not first.exists()

    def fail(folder: Path) -> None:
        raise RuntimeError("half of it")

    with pytest.raises(RuntimeError):
        cache.cached("thing", "3", fail)
    assert sorted(path.name for path in cache.root().iterdir() if path.is_dir()) == ["thing-2"]


def test_scratch_of_processes_that_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    mine = cache.scratch()
    dead = mine.with_name(f"{2**22 + 1}-x")  # above the largest pid
    dead.mkdir()
    other = cache.scratch()
    assert mine.exists() and other.exists() and not dead.exists()
    assert mine.name.startswith(f"{os.getpid()}-")
