"""Whoever embeds the agent may ask it, from another thread, whether it should leave its blocks."""

from __future__ import annotations

import sys
from pathlib import Path

from harness.live import noise
from harness.plugins import write_plugins
from harness.processes import Processes
from harness.swarm import ONE_THREAD

PROGRAM = """
import json, logging, sys, threading, time

from petals_agent.config import config_from
from petals_agent.supervisor.agent import Agent

logging.basicConfig(level="INFO")


def agent(name, blocks, peers):
    config = config_from({
        "model": {"path": sys.argv[1], "dht_prefix": "tiny", "dtype": "float32"},
        "swarm": {
            "initial_peers": peers, "listen": ["/ip4/127.0.0.1/tcp/0"], "identity": f"{name}/id.key",
            "update_period": 1.0,
        },
        "serve": {"blocks": blocks, "num_blocks": 4, "device": "cpu", "throughput": 1.0},
        "balance": {"mean_balance_check_period": 0.2, "mean_block_selection_delay": 0.1},
        "plugins": {"dirs": [sys.argv[2]]},
        "control": {"socket": f"{name}/c.sock"},
    })
    made = Agent(config)
    thread = threading.Thread(target=made.run, name=name)
    thread.start()
    deadline = time.monotonic() + 90
    while made.status().state != "online" or made.status().announced != "online":
        assert time.monotonic() < deadline and thread.is_alive(), name
        time.sleep(0.02)
    return made, thread


told = {}
one, first = agent("one", "auto", [])
told["blocks"] = one.status().blocks
told["alone"] = [one.should_choose_other_blocks() for _ in range(3)]
two, second = agent("two", "0:4", one.status().maddrs)
deadline = time.monotonic() + 60
while not (crowded := one.should_choose_other_blocks()) and time.monotonic() < deadline:
    pass  # it has waited
told["crowded"] = [crowded, one.status().blocks, one.status().balance]
told["fixed"] = two.should_choose_other_blocks()
two.shutdown()
one.shutdown()
first.join(10)
second.join(10)
try:
    one.should_choose_other_blocks()
except RuntimeError as error:
    told["after"] = str(error)
print(json.dumps({"event": "told", **told}), flush=True)
"""
VETO = """
from petals_agent.hooks import Veto, hookimpl

@hookimpl
def before_rebalance(plan, swarm):
    return Veto("whoever asks decides")
"""


def test_should_choose_other_blocks(processes: Processes, tmp_path: Path, tiny_llama: Path) -> None:
    """Alone: no. Where another one serves the same blocks, and nobody the others: yes. Where blocks are fixed: no."""
    plugins = write_plugins(tmp_path / "plugins", veto=VETO)
    command = [sys.executable, "-c", PROGRAM, tiny_llama, plugins]
    program = processes.run("embedding", command, timeout=115, cwd=tmp_path, env=ONE_THREAD)
    assert program.returncode == 0, program.output()
    (told,) = [event for event in program.events() if event["event"] == "told"]
    assert told["blocks"] == "0:4"
    assert told["alone"] == [False] * 3
    crowded, blocks, balance = told["crowded"]
    assert crowded is True, balance
    assert blocks == "0:4", "it was a question"
    assert told["fixed"] is False
    assert "while the agent runs" in told["after"]
    assert noise(program) == []
