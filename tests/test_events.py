"""docs/events.md names exactly the events that the code has, with their levels and fields."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "agent" / "petals_agent"
LEVELS = {"note": "info", "warn": "warning", "exception": "error"}
ALWAYS = {"state"}  # what Life adds to each event of the agent


@dataclass
class Found:
    """What is known of one event: its levels, and its fields as far as they can be read off."""

    levels: set[str] = field(default_factory=set)
    fields: set[str] = field(default_factory=set)
    open: bool = False  # some fields come from elsewhere


def calls(tree: ast.AST) -> Iterator[tuple[ast.Call, str, dict[str, ast.Dict]]]:
    """Every call with the name of what is called, and the dicts that its function gives names to."""
    for function in ast.walk(tree):
        if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        dicts = {
            ast.unparse(node.targets[0]): node.value
            for node in ast.walk(function)
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)
        }
        for node in ast.walk(function):
            if isinstance(node, ast.Call):
                yield node, ast.unparse(node.func), dicts


@cache
def in_code() -> dict[str, Found]:
    """Calls of Life's methods, and of log.event inside a call of a logger."""
    found: dict[str, Found] = defaultdict(Found)
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        levels = {}  # of an event(…), by where it stands
        extras = {}  # the names that one was given
        for node, name, _ in calls(tree):
            if re.fullmatch(r"log\.\w+", name):
                for word in node.keywords:
                    if word.arg == "extra":
                        levels[ast.unparse(word.value)] = LEVELS.get(name[4:], name[4:])
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                extras[ast.unparse(node.value)] = ast.unparse(node.targets[0])
        for node, name, dicts in calls(tree):
            method = re.fullmatch(r"(?:self|agent|(?:\w+\.)*_?life)\.(note|warn|enter)", name)
            if name == "event":
                text = ast.unparse(node)
                level = levels.get(text) or levels.get(extras.get(text, ""), "")
            elif method is not None:
                level = LEVELS.get(method[1], "info")
            else:
                continue
            if method is not None and method[1] == "enter":
                title = "state"
            elif node.args and isinstance(node.args[0], ast.Constant):
                title = node.args[0].value
            else:
                continue  # event(name, …) in Life itself
            one = found[title]
            one.levels.add(level)
            for word in node.keywords:
                if word.arg is not None:
                    one.fields.add(word.arg)
                elif (given := dicts.get(ast.unparse(word.value))) is not None:
                    one.fields |= {key.value for key in given.keys if isinstance(key, ast.Constant)}
                else:
                    one.open = True
    return found


def in_catalog() -> dict[str, Found]:
    """The rows of its tables: event, level, fields."""
    found = {}
    for row in re.findall(
        r"^\| `([a-z0-9_]+)` \| ([\w, ]+) \| (.*?) \|", (ROOT / "docs/events.md").read_text(), re.M
    ):
        found[row[0]] = Found(set(row[1].split(", ")), set(re.findall(r"`(\w+)`", row[2])))
    return found


def test_every_event_is_in_the_catalog_and_no_other() -> None:
    code, catalog = in_code(), in_catalog()
    assert len(code) > 15, "they are no longer found"
    assert sorted(code) == sorted(catalog)


def test_there_is_one_way_to_tell_an_event() -> None:
    found = [path.name for path in PACKAGE.rglob("*.py") if re.search(r"[\"']petals[\"']", path.read_text())]
    assert found == ["log.py"]


def test_levels() -> None:
    code, catalog = in_code(), in_catalog()
    assert {name: one.levels for name, one in code.items()} == {
        name: one.levels for name, one in catalog.items()
    }


def test_fields() -> None:
    code, catalog = in_code(), in_catalog()
    for name, one in code.items():
        documented = catalog[name].fields
        assert one.fields - ALWAYS <= documented, name
        assert one.open or documented <= one.fields, name


def test_the_search_finds_what_it_should() -> None:
    code = in_code()
    assert code["state"].fields >= {"state", "before", "reason", "duration_s", "span"}
    assert code["announce"].levels == {"info", "warning"}
    assert code["engine_died"].levels == {"critical"}
