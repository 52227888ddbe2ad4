"""petals-agent.toml in the root documents every key with its default, and so do the docs."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from petals_agent.config import InvalidConfig, load_config, places
from petals_agent.config.keys import choices, is_not_yet, leaves, schema_keys, sections, written
from petals_agent.config.petals_names import FROM_PETALS, NO_KEY
from petals_agent.config.schema import NOT_YET, Config
from petals_agent.config.toml_text import literal

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "petals-agent.toml"
LATER = "Takes effect from a later version"


@pytest.fixture
def defaults(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, ...], Any]:
    """Defaults of the installed service, as `config show` writes them."""
    folders = places({}, Path("/etc/petals-agent/petals-agent.toml"))
    for name in ("state", "cache", "runtime"):
        monkeypatch.setenv(f"{name.upper()}_DIRECTORY", str(getattr(folders, name)))
    return {
        path: tomllib.loads(f"v = {literal(written(path, value))}")["v"] for path, value in leaves(Config())
    }


def _documented() -> Iterator[tuple[str, str, str]]:
    """Section, key and the comment above it."""
    section, comment = "", ""
    for line in SHIPPED.read_text().splitlines():
        if header := re.fullmatch(r"\[(\w+)\]", line):
            section = header[1]
        if key := re.match(r"#(\w+) = ", line):
            yield section, key[1], comment
        comment = comment + line if line.startswith("# ") else ""


def test_it_holds_every_key_with_its_default(defaults: dict[tuple[str, ...], Any]) -> None:
    text = re.sub(r"^#(?=\w+ = )", "", SHIPPED.read_text(), flags=re.MULTILINE)
    shipped = {
        (section, key): value
        for section, table in tomllib.loads(text).items()
        for key, value in table.items()
    }
    assert (
        shipped.pop(("model", "path")) and defaults.pop(("model", "path")) == ""
    )  # the only one that must be set
    assert shipped == defaults
    assert list(tomllib.loads(text)) == sections()


def test_its_keys_are_in_the_order_of_the_schema() -> None:
    assert [(section, key) for section, key, _ in _documented()] == [path for path, _ in leaves(Config())]


def test_every_key_has_a_comment_that_is_true_about_when() -> None:
    for section, key, comment in _documented():
        assert comment, f"{section}.{key} has no comment"
        assert (LATER in comment) == is_not_yet((section, key)), f"{section}.{key}"


def test_nothing_unknown_is_said_to_come_later() -> None:
    known = {".".join(path[:depth]) for path in schema_keys() for depth in (1, 2)}
    assert known >= NOT_YET


def test_every_other_key_is_read_by_something() -> None:
    package = ROOT / "agent/petals_agent"
    sources = [path for path in package.rglob("*.py") if package / "config" not in path.parents]
    read = set(re.findall(r"\.(\w+)\b", "\n".join(path.read_text() for path in sources)))
    now = {path for path, field in schema_keys().items() if not is_not_yet(path) and len(choices(field)) != 1}
    assert {path for path in now if path[-1] not in read} == set()


def test_as_shipped_it_asks_for_the_model() -> None:
    with pytest.raises(InvalidConfig) as caught:
        load_config(SHIPPED, environ={})
    assert caught.value.exit_code == 78
    assert str(caught.value).startswith(f"{SHIPPED}: model.path: it is not set")
    assert 'path = "Qwen/Qwen3-8B"' in str(caught.value)
    assert load_config(SHIPPED, environ={}, require_model=False) == load_config(
        SHIPPED, {"model.path": ""}, {}, require_model=False
    )


def test_with_a_model_it_loads() -> None:
    assert load_config(SHIPPED, {"model.path": "owner/name"}, {}).model.path == "owner/name"


def test_the_reference_lists_every_key_with_its_default(defaults: dict[tuple[str, ...], Any]) -> None:
    rows, section = {}, ""
    for line in (ROOT / "docs/configuration.md").read_text().splitlines():
        if header := re.match(r"### \[(\w+)\]", line):
            section = header[1]
        if row := re.match(r"\| `(\w+)` \| `(.*?)` \| (.*) \|$", line):
            rows[section, row[1]] = row[2], row[3]
    assert list(rows) == list(defaults)
    for path, default in defaults.items():
        shown, meaning = rows[path]
        assert shown == ("required" if path == ("model", "path") else literal(default)), path
        assert meaning.endswith("†") == is_not_yet(path), path


def test_every_option_of_run_server_is_mapped() -> None:
    text = (ROOT / "docs/from-petals.md").read_text()
    rows = re.findall(r"^\| ((?:`[^`]+`,? ?)+) \| (.*?) \|", text, flags=re.MULTILINE)
    documented = {
        name.split("--")[-1]: keys for names, keys in rows for name in re.findall(r"`([^`]+)`", names)
    }
    assert set(documented) == set(FROM_PETALS) | NO_KEY
    known = {".".join(path) for path in schema_keys()}
    for option, key in FROM_PETALS.items():
        assert f"`{key}`" in documented[option] and key in known, option
    assert all("`" not in documented[option] for option in NO_KEY)
