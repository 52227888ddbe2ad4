"""`petals-agent monitor` as a process: on a live swarm in a real browser, beside systemd, and when it cannot start."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from harness.live import noise, start_live
from harness.peer import Peer
from harness.processes import Process, Processes, wait_until
from harness.swarm import PETALS_AGENT
from harness.systemd import Systemd
from monitor import synthetic
from monitor.browser import chromium, tab, wait_for_sign, why_not
from monitor.swarms import peer
from petals_agent.monitor.service import listen

COMMAND = [sys.executable, "-m", "petals_agent.cli.main", "monitor"]
UPDATE_PERIOD_S = 4


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Systemd]:
    one = Systemd(f"@petals-monitor-{os.getpid()}-{time.monotonic_ns()}")
    yield one
    one.close()


def start(
    processes: Processes, folder: Path, peers: list[str], port: int, *options: str, **more: str
) -> tuple[Process, httpx.Client]:
    """The monitor of a private swarm, read each second, with a configuration that names no model."""
    folder.mkdir(exist_ok=True)
    config = folder / "petals-agent.toml"
    config.write_text('[monitor]\nprefixes = ["tiny"]\nhistory = "history.sqlite"\n')
    given = [part for one in peers for part in ("--initial-peers", one)]
    listen = ["--listen", f"127.0.0.1:{port}", "--period", "1"]
    env = {"RUNTIME_DIRECTORY": str(folder), "STATE_DIRECTORY": str(folder), **more}
    process = processes.start(
        "monitor", [*COMMAND, "--config", config, *listen, *given, *options], env=env, grace=20
    )
    return process, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10)


def answers(process: Process, ask: httpx.Client, path: str = "/healthz", status: int = 200) -> bool:
    assert process.returncode is None, process.output()
    try:
        return ask.get(path).status_code == status
    except httpx.TransportError:
        return False


def test_beside_systemd(
    processes: Processes, bootstrap: str, tmp_path: Path, systemd: Systemd, free_port: Callable[[], int]
) -> None:
    env = systemd.environment(watchdog_s=3.0)
    process, ask = start(processes, tmp_path / "m", [bootstrap], free_port(), **env)
    ready = systemd.wait_for("READY=1")
    assert answers(process, ask), "it is ready with its first reading"
    with Peer([bootstrap]) as other:
        other.store("_petals.models", "some", {"num_blocks": 2, "repository": None}, 300)
        value = (2, 10.0, {"start_block": 0, "end_block": 2, "public_name": "<script>"})
        other.store("some.0", peer(1), value, 300)
        other.store("some.1", peer(1), value, 300)
        systemd.wait_for("STATUS=2 models (2 broken), 0 of 1 servers online, read ")
        state = ask.get("/api/v1/state").json()
        (server,) = [server for model in state["models"] for server in model["servers"]]
        assert server["state"] == "unreachable" and server["public_name"] == "<script>"
    wait_until(lambda: len(systemd.pings_after(ready)) >= 3, 10, "pings for the watchdog")
    family = process.tree()
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(20) == 0
    assert systemd.texts[-1] == "STOPPING=1" or "STOPPING=1" in systemd.texts
    assert noise(process) == []
    assert not [one for one in family if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def test_a_swarm_that_does_not_answer_is_said_and_waited_for(
    processes: Processes, tmp_path: Path, systemd: Systemd, free_port: Callable[[], int]
) -> None:
    nobody = f"/ip4/127.0.0.1/tcp/{free_port()}/p2p/{peer(9)}"
    process, ask = start(
        processes, tmp_path / "m", [nobody], free_port(), **systemd.environment(watchdog_s=3.0)
    )
    systemd.wait_for("STATUS=Reading the swarm for the first time")
    wait_until(lambda: answers(process, ask, status=503), 20, "/healthz to say that nothing was read")
    assert any("EXTEND_TIMEOUT_USEC" in text for text in systemd.texts)
    ready = systemd.wait_for("READY=1", 60)
    assert systemd.wait_for("no bootstrap peer answers") <= ready, "the reason first"
    assert "no bootstrap peer answers" in ask.get("/healthz").json()["problem"]
    wait_until(lambda: len(systemd.pings_after(ready)) >= 3, 10, "pings: a restart would not help")
    assert ask.get("/").status_code == ask.get("/api/v1/state").status_code == 503
    answer = ask.get(f"/api/v1/is_reachable/{peer(1)}")
    assert answer.status_code == 503 and answer.json()["success"] is False
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(20) == 0


@pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="this host has no IPv6")
def test_an_ipv6_address_may_serve_ipv4_too() -> None:
    with listen("[::]:0") as listener:
        port = listener.getsockname()[1]
        for host in ("127.0.0.1", "::1"):
            with socket.create_connection((host, port), timeout=5):
                assert listener.accept()[0].close() is None


def test_a_port_that_is_taken(processes: Processes, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        maddr = f"/ip4/127.0.0.1/tcp/9/p2p/{peer(1)}"
        process, _ = start(processes, tmp_path / "m", [maddr], port)
        assert process.wait(30) == 69
    assert re.search(rf"127\.0\.0\.1:{port} \(.*in use.*\).*monitor\.listen", process.output())


def run(*arguments: str, before: str = "pass") -> subprocess.CompletedProcess[str]:
    code = f"import sys; {before}; from petals_agent.cli.main import main; sys.argv = ['petals-agent', *sys.argv[1:]]; main()"
    return subprocess.run(
        [sys.executable, "-c", code, "monitor", *arguments], capture_output=True, text=True, timeout=60
    )


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    config = tmp_path / "petals-agent.toml"
    config.write_text("[swarm]\ninitial_peers = []\n")
    done = run("--config", str(config), before="sys.modules['fastapi'] = None")
    assert done.returncode == 78 and "pip install 'petals-agent[monitor]'" in done.stderr
    done = run("--config", str(config))
    assert done.returncode == 78 and "swarm.initial_peers" in done.stderr
    done = run("--config", str(config), "--listen", "nonsense")
    assert done.returncode == 78 and "monitor.listen" in done.stderr
    done = run("--config", str(config), "--initial-peers", "nonsense")
    assert done.returncode == 78 and "--initial-peers nonsense" in done.stderr


@pytest.mark.timeout(300)
def test_a_live_swarm_in_a_browser(
    processes: Processes, bootstrap: str, tiny_llama: Path, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    if reason := why_not():
        pytest.skip(reason)
    process, ask = start(processes, tmp_path / "m", [bootstrap], free_port())
    wait_until(lambda: answers(process, ask), 60, "the first reading")
    more = f'[swarm]\nupdate_period = {UPDATE_PERIOD_S}\npublic_name = "<b>lab</b>"'
    with chromium() as browser, tab(browser) as one, Peer([bootstrap]) as other:
        page = one.page
        page.goto(str(ask.base_url))
        page.wait_for_selector("html.live")
        for index, text in enumerate(synthetic.HOSTILE):  # what strangers may write, beside the real ones
            other.store(
                "tiny.0", text, (2, 1.0, {"public_name": text, "start_block": 0, "end_block": 1}), 300
            )
            other.store("_petals.models", f"{text}", {"num_blocks": 1, "repository": text}, 300)
            fields = {"public_name": text[:900], "start_block": 0, "end_block": 1, "version": text[:900]}
            other.store("tiny.0", peer(100 + index), (1, 1.0, fields), 300)
        other.store("_petals.models", "x" * 1_000_000, {"num_blocks": 1, "repository": None}, 300)

        agents = [
            start_live(processes, tmp_path / blocks[0], tiny_llama, blocks, [bootstrap], more)
            for blocks in ("0:4", "4:8")
        ]
        peers = [
            str(agent.until(lambda status: status.get("peer_id"), 60, "a peer id")["peer_id"])
            for agent in agents
        ]
        wait_for_sign(page, peer(100), "J", 60)
        for peer_id in peers:
            wait_for_sign(page, peer_id, "#", 90)
        assert page.locator("bdi.name", has_text="<b>lab</b>").count() == 2
        card = page.locator("section.model", has_text="tiny").first
        assert (card.locator(".badge").text_content() or "").strip() in ("degraded", "healthy")

        answer = ask.get(f"/api/v1/is_reachable/{peers[0]}").json()
        assert answer == {"ok": True, "success": True, "message": None, "your_ip": "127.0.0.1"}
        answer = ask.get(f"/api/v1/is_reachable/{peer(5)}").json()
        assert answer["success"] is False and answer["message"]

        page.locator("thead a").first.click()
        page.locator("input[type=search]").first.fill(peers[1][-6:])
        page.wait_for_function("() => document.querySelectorAll('a.peer').length === 1")
        agents[1].process.kill()
        wait_for_sign(page, peers[1], "?", 30)
        wait_for_sign(page, peers[1], "_", 60)
        page.wait_for_function(
            "() => document.querySelector('.model .badge').textContent.trim() === 'broken'"
        )
        assert page.evaluate("window.hurt") is None
        assert one.errors == []
        assert {urlsplit(address).hostname for address in one.requested} == {"127.0.0.1"}
    ask.close()


def test_the_command_is_listed() -> None:
    done = subprocess.run([*PETALS_AGENT, "--help"], capture_output=True, text=True, timeout=60)
    assert re.search(r"monitor +Show", done.stdout)
