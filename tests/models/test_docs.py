"""The page about models names what the code serves."""

from __future__ import annotations

import re
from pathlib import Path

from petals_agent.models.families import FAMILIES

PAGE = (Path(__file__).parents[2] / "docs/models.md").read_text()


def test_the_table_of_families_is_complete() -> None:
    table = PAGE.split("## Families")[1].split("Not served")[0]
    rows = [
        line.split("|")[1]
        for line in table.splitlines()
        if line.startswith("| `") and "model_type" not in line
    ]
    assert sorted(re.findall(r"`(\w+)`", " ".join(rows))) == sorted(FAMILIES)
