"""The line of a key is found in whatever form TOML allows it to be written."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petals_agent.config.lines import MAX_DEPTH, TooDeep, key_lines
from petals_agent.config.toml_text import key_text, literal

EVERY_FORM = '''\
# a comment with [brackets] and key = 1
top = 1
[serve]
blocks = "0:8" # "quoted
swarm.listen = [  # dotted, and a list over lines
  "a", # first ]
  "b",

  ["c", {d = 1}],
]
"quoted \\u0041 key" = 'literal # no comment'
'single.quoted' . after = 2
inline = { x = 1, "y z" = { w = [1, 2] } }
text = """
[not.a.table]
fake = 1 \\""" still text
"""
more = """ends in quotes"""""
last = \'\'\'
also = "no key"\'\'\'\'\'
date = 2024-01-01 10:00:00
[a . "b.c"]
k=1
[[list]]
first = 1
[[list]]
second = 2
[list.sub]
third = 3
'''


def test_every_form() -> None:
    lines = key_lines(EVERY_FORM)
    tables = tomllib.loads(EVERY_FORM)
    wanted = {
        ("top",): 2,
        ("serve",): 3,
        ("serve", "blocks"): 4,
        ("serve", "swarm", "listen"): 5,
        ("serve", "swarm", "listen", 1): 7,
        ("serve", "swarm", "listen", 2, 1, "d"): 9,
        ("serve", "quoted A key"): 11,
        ("serve", "single.quoted", "after"): 12,
        ("serve", "inline", "y z", "w", 1): 13,
        ("serve", "text"): 14,
        ("serve", "more"): 18,
        ("serve", "last"): 19,
        ("serve", "date"): 21,
        ("a", "b.c", "k"): 23,
        ("list", 0, "first"): 25,
        ("list", 1, "second"): 27,
        ("list", 1, "sub", "third"): 29,
    }
    assert {path: lines.get(path) for path in wanted} == wanted
    assert set(_paths(tables)) == set(lines)


def _paths(value: Any, prefix: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, item in items for path in ((*prefix, key), *_paths(item, (*prefix, key)))]


values = st.recursive(
    st.booleans() | st.integers(-9, 9) | st.text(max_size=8) | st.dates() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None)
@given(
    st.dictionaries(st.text(max_size=6), st.dictionaries(st.text(max_size=6), values, max_size=3), max_size=4)
)
def test_lines_of_any_document(tables: dict[str, dict[str, Any]]) -> None:
    text, wanted = "", {}
    for section, table in tables.items():
        text += f"\n# comment = 1\n[ {key_text((section,))} ]\n"
        wanted[(section,)] = text.count("\n")
        for key, value in table.items():
            text += f"{key_text((key,))} = {literal(value)} # end\n"
            wanted[(section, key)] = text.count("\n")
    parsed = tomllib.loads(text)
    lines = key_lines(text)
    assert {path: lines[path] for path in wanted} == wanted
    assert set(lines) == set(_paths(parsed))


@settings(deadline=None)
@given(st.text(max_size=60) | st.text("[]{}\"'\\=., \n#ab1", max_size=60))
def test_any_text_ends(text: str) -> None:
    lines = key_lines(text)
    assert all(1 <= line <= text.count("\n") + 1 for line in lines.values())


@pytest.mark.parametrize(
    "text",
    [
        "ok = 1\n" + ".".join("a" * 10**5) + " = 1",
        "ok = 1\na = " + "[" * 10**5,
        "ok = 1\na = " + "{b = " * 10**5,
    ],
)
def test_deep_nesting_is_refused_at_its_line(text: str) -> None:
    with pytest.raises(TooDeep) as caught:
        key_lines(text)
    assert caught.value.line == 2


def test_the_depth_that_is_allowed() -> None:
    path = ("a",) * MAX_DEPTH
    assert key_lines(".".join(path) + " = 1")[path] == 1
