"""hivemind without its package root and torch, and with the real torch where that is wanted."""

from __future__ import annotations

import subprocess
import sys

import pytest

DHT_NODE = """
import sys
{before}
from petals_agent.p2p import light
light.install(without_torch={without_torch})
light.install(without_torch={without_torch})
from hivemind.dht.node import DHTNode
from hivemind.p2p import P2P
{after}
"""


def run(before: str, without_torch: bool, after: str) -> subprocess.CompletedProcess[str]:
    program = DHT_NODE.format(before=before, without_torch=without_torch, after=after)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=110)


def test_light_process_is_small_and_has_no_torch() -> None:
    done = run(
        "",
        True,
        "maps, status = open('/proc/self/maps').read(), open('/proc/self/status').read()\n"
        "print('torch' in maps, 'hivemind.moe' in sys.modules, int(status.split('VmHWM:')[1].split()[0]) // 1024)",
    )
    torch, moe, megabytes = done.stdout.split()
    assert (torch, moe) == ("False", "False"), done.stderr
    assert int(megabytes) < 110


@pytest.mark.parametrize("without_torch", [True, False])
def test_real_torch_stays_when_it_was_there_first(without_torch: bool) -> None:
    done = run("import torch", without_torch, "import torch.nn; print(torch.ones(2).sum().item())")
    assert done.stdout.split() == ["2.0"], done.stderr


def test_real_torch_may_come_later_where_it_is_allowed() -> None:
    done = run("", False, "import torch; print(torch.ones(2).sum().item())")
    assert done.stdout.split() == ["2.0"], done.stderr


@pytest.mark.parametrize(
    ("use", "told"),
    [
        (
            "import torch; torch.zeros(2)",
            "AttributeError: torch.zeros: this program imported the agent before torch",
        ),
        ("from torch import zeros", "cannot import name 'zeros' from 'torch'"),
        ("import torch.nn", "No module named 'torch.nn'"),
    ],
)
def test_a_program_that_wanted_the_real_torch_is_told(use: str, told: str) -> None:
    done = run("", True, use)
    assert done.returncode == 1 and told in done.stderr
