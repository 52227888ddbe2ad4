"""The published client on our servers, alone and in a chain with published ones: what local transformers computes."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness import swarm
from harness.processes import Processes, wait_until

from .members import ROUTES, Swarm

pytestmark = pytest.mark.usefixtures("calm")


@pytest.mark.parametrize("route", ROUTES)  # the last one is the control: published servers among themselves
def test_tokens_beams_and_gradients(shared: Swarm, route: str) -> None:
    result = shared.published_result(shared.route(route), "--check", "--grad", "--beam", "-n", "16")
    assert result["same"] == {"tokens": True, "beam": True, "gradient": True}
    assert len(result["tokens"]) == 16


def test_a_prompt_that_is_streamed(shared: Swarm) -> None:
    """1100 tokens are over 1 MiB, above which the client streams forward and backward."""
    ids = [str(token) for token in range(5, 505)] * 3
    options = ("--check", "--grad", "-n", "3", "--ids", *ids[:1100])
    result = shared.published_result(shared.route("ours 0:4 + ours 4:8"), *options)
    assert result["same"] == {"tokens": True, "gradient": True}


def test_the_check_notices_other_weights(
    shared: Swarm, processes: Processes, peer_python: Path, tmp_path: Path
) -> None:
    """A check that could not fail would prove nothing: compare with a model of another seed."""
    other = tmp_path / "other"
    processes.run("model", [peer_python, swarm.PEER_SCRIPTS / "model.py", other, "--seed", "1"], timeout=60)
    options = ("--via", shared["ours 0:8"].peer_id, "--check", "-n", "4")
    client = swarm.start_stock_client(processes, peer_python, other, [shared.maddr], *options)
    assert client.wait(110) == 1
    assert client.events()[-1]["same"] == {"tokens": False}


def test_a_new_session_goes_through_after_a_server_was_killed(shared: Swarm, tmp_path: Path) -> None:
    """Two of ours hold all blocks; the one that served the first session is killed before the second.

    This client does not ban whom it cannot connect to: it tries the same one until its next pings, 3 s here.
    """
    two = [shared.launch("ours 0:8"), shared.launch("ours 0:8")]
    for member in two:
        member.server.wait_online()
    go_on = tmp_path / "go-on"
    options = ("--again", str(go_on), "--update-period", "3", "--retries", "9")
    client = shared.published_client(two, "--check", "-n", "16", *options)
    client.wait_event("generated", 90)
    used = wait_until(
        lambda: [member for member in two if member.status()["tokens"] > 0], 15, "steps at one of them"
    )
    assert len(used) == 1
    used[0].kill()
    go_on.touch()
    result = swarm.stock_result(client)
    assert result["same"] == {"tokens": True, "again": True}
    (other,) = (member for member in two if member is not used[0])
    other.until(lambda status: status["tokens"] >= 16 and status["sessions"] == 0, "16 tokens, no session")
