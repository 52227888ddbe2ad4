"""Files stay small and say in their first line what they are for."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 400
LARGER: dict[str, int] = {}  # path → its own limit; an entry needs a reason beside it
FOLDERS = ("agent", "plugins", "packaging", "tests")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def test_files_are_small() -> None:
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in FILES}
    too_long = {name: lines for name, lines in lengths.items() if lines > LARGER.get(name, MAX_LINES)}
    assert not too_long, "one idea a file: split it"
    assert all(lengths[name] > MAX_LINES for name in LARGER), "an exception that is not needed"


def test_modules_open_with_their_purpose() -> None:
    bad = []
    for path in FILES:
        docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
        first = docstring.split("\n\n")[0].strip()
        if not first or first[-1] not in ".:":
            bad.append(f"{path.relative_to(ROOT)}: {first!r}")
    assert not bad, "a module opens with a docstring whose first paragraph is a sentence"
