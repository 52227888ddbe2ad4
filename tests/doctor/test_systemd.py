"""What is made of `systemctl show`; a booted systemd is asked in tests/e2e."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from doctor.conftest import Look
from petals_agent.doctor.check import Outcome
from petals_agent.doctor.host import Host
from petals_agent.doctor.systemd import is_running, judge, properties

UNIT = "petals-agent.service"
FINE = {
    "LoadState": "loaded",
    "UnitFileState": "enabled",
    "ActiveState": "active",
    "SubState": "running",
    "NRestarts": "0",
    "Result": "success",
    "NeedDaemonReload": "no",
}


def test_a_unit_that_runs() -> None:
    result = judge(UNIT, FINE)
    assert result.outcome is Outcome.OK and result.found == f"{UNIT} is active (running), enabled"


@pytest.mark.parametrize(
    ("change", "outcome", "found", "remedy"),
    [
        ({"LoadState": "not-found"}, "problem", "not installed", "apt install"),
        ({"LoadState": "masked"}, "problem", "masked", "systemctl unmask"),
        ({"LoadState": "bad-setting"}, "problem", "bad-setting", "systemd-analyze verify"),
        ({"LoadState": ""}, "problem", "no answer", "systemd-analyze verify"),
        ({"ActiveState": "failed", "Result": "watchdog"}, "problem", "watchdog", "journalctl -u"),
        (
            {"ActiveState": "activating", "SubState": "auto-restart", "Result": "exit-code"},
            "problem",
            "waits for its restart",
            "journalctl -u",
        ),
        ({"ActiveState": "inactive"}, "warning", "does not run", "systemctl start"),
        ({"UnitFileState": "disabled"}, "warning", "at boot", "systemctl enable --now"),
        ({"NRestarts": "3"}, "warning", "restarted 3 times", "journalctl -u"),
        ({"NeedDaemonReload": "yes"}, "warning", "changed on disk", "daemon-reload"),
    ],
)
def test_a_unit_that_does_not(change: dict[str, str], outcome: str, found: str, remedy: str) -> None:
    result = judge(UNIT, FINE | change)
    assert (result.outcome.value, found in result.found, remedy in result.remedy) == (outcome, True, True)


@given(st.text())
def test_any_answer_is_judged(text: str) -> None:
    result = judge(UNIT, properties(text))
    assert result.outcome is Outcome.OK or result.remedy


@given(
    st.dictionaries(
        st.from_regex(r"[A-Z][a-z]{1,9}", fullmatch=True), st.from_regex(r"[a-z= ]*", fullmatch=True)
    )
)
def test_properties_are_read_back(given_: dict[str, str]) -> None:
    assert properties("".join(f"{key}={value}\n" for key, value in given_.items())) == given_


def test_a_configuration_that_no_unit_runs(look: Look) -> None:
    result = look("unit")
    assert result.outcome is Outcome.SKIPPED
    assert ("/etc/petals-agent" if is_running() else "does not run systemd") in result.found


@pytest.mark.parametrize(
    ("file", "unit"),
    [
        ("/etc/petals-agent/petals-agent.toml", UNIT),
        ("/etc/petals-agent/second.toml", "petals-agent@second.service"),
        ("/srv/petals-agent.toml", None),
    ],
)
def test_which_unit_runs_a_configuration(tmp_path: Path, file: str, unit: str | None) -> None:
    assert Host(Path(file), {"HOME": str(tmp_path)}).unit == unit
