"""Finds the line of every key in TOML text, and refuses text nested so deeply that parsing it would take minutes.

Not a parser: it knows where keys and values begin and end, and leaves it to tomllib to say what is wrong.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass

MAX_DEPTH = 16

_BLANK = re.compile(r"[ \t\r\n]*(?:#[^\n]*[ \t\r\n]*)*")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_PLAIN = re.compile(r"[^,\]}#\n]+")
_IN_SHORT = {'"': re.compile(r'["\\\n]'), "'": re.compile(r"['\n]")}
_IN_LONG = {'"': re.compile(r'"""|\\'), "'": re.compile(r"'''")}


class TooDeep(Exception):
    """Keys, arrays or tables are nested deeper than MAX_DEPTH; `line` says where."""

    def __init__(self, line: int) -> None:
        super().__init__(line)
        self.line = line


class _Torn(Exception):
    """Not valid TOML from here on."""


def key_lines(text: str) -> dict[tuple[str | int, ...], int]:
    """Line (from 1) of each table, key and list item: ("serve", "blocks"), ("swarm", "initial_peers", 1).

    Stops at the first thing that is no TOML. Takes linear time. Raises TooDeep.
    """
    scanner = _Scanner(text)
    try:
        scanner.run()
    except _Torn:
        pass
    return scanner.lines


@dataclass
class _Open:
    """An array or inline table that is not closed yet."""

    path: tuple[str | int, ...]
    close: str
    items: int = 0


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text, self.position = text, 0
        self.line, self.counted = 1, 0
        self.lines: dict[tuple[str | int, ...], int] = {}
        self.last_item: dict[tuple[str | int, ...], int] = {}  # of each array of tables

    def run(self) -> None:
        prefix: tuple[str | int, ...] = ()
        while self._skip_blank():
            if self._peek() == "[":
                prefix = self._header()
            else:
                self._value(self._key_before("=", prefix))

    def _header(self) -> tuple[str | int, ...]:
        is_array = self.text.startswith("[[", self.position)
        self.position += 1 + is_array
        path: tuple[str | int, ...] = ()
        parts = self._key(0)
        for number, part in enumerate(parts, start=1):
            path = (*path, part)
            self._note(path)
            if is_array and number == len(parts):
                self.last_item[path] = self.last_item.get(path, -1) + 1
            if path in self.last_item:
                path = (*path, self.last_item[path])
                self._note(path)
        for _ in range(1 + is_array):
            self._expect("]")
        return path

    def _value(self, path: tuple[str | int, ...]) -> None:
        """Skip one value; what is open inside it is kept in a list, for recursion has its limit."""
        stack: list[_Open] = []
        self._begin_value(path, stack)
        while stack:
            self._skip_blank()
            top, character = stack[-1], self._peek()
            if character == top.close:
                self.position += 1
                stack.pop()
            elif character == ",":
                self.position += 1
            elif top.close == "}":
                self._begin_value(self._key_before("=", top.path), stack)
            else:
                item = (*top.path, top.items)
                top.items += 1
                self._note(item)
                self._begin_value(item, stack)

    def _begin_value(self, path: tuple[str | int, ...], stack: list[_Open]) -> None:
        """Skip a plain value, or step into an array or inline table."""
        self._skip_space()
        character = self._peek()
        if character in ("[", "{"):
            if len(path) >= MAX_DEPTH:
                raise TooDeep(self._line_here())
            stack.append(_Open(path, "]" if character == "[" else "}"))
            self.position += 1
        elif character in ("'", '"'):
            self._skip_string()
        elif plain := _PLAIN.match(self.text, self.position):
            self.position = plain.end()
        else:
            raise _Torn

    def _key_before(self, sign: str, prefix: tuple[str | int, ...]) -> tuple[str | int, ...]:
        for part in self._key(len(prefix)):
            prefix = (*prefix, part)
            self._note(prefix)
        self._expect(sign)
        return prefix

    def _key(self, depth: int) -> list[str]:
        """The parts of a dotted key that is `depth` levels down already."""
        parts: list[str] = []
        while True:
            self._skip_space()
            start = self.position
            if self._peek() in ("'", '"'):
                self._skip_string()
                parts.append(_unquote(self.text[start : self.position]))
            elif bare := _BARE_KEY.match(self.text, start):
                self.position = bare.end()
                parts.append(bare[0])
            else:
                raise _Torn
            if depth + len(parts) > MAX_DEPTH:
                raise TooDeep(self._line_here())
            self._skip_space()
            if self._peek() != ".":
                return parts
            self.position += 1

    def _skip_string(self) -> None:
        quote = self.text[self.position]
        if self.text.startswith(quote * 3, self.position):
            search, close = _IN_LONG[quote], quote * 3
        else:
            search, close = _IN_SHORT[quote], quote
        self.position += len(close)
        while found := search.search(self.text, self.position):
            if found[0] == "\n":
                raise _Torn
            self.position = found.end()
            if found[0] == close:
                for _ in range(2 if len(close) == 3 else 0):  # up to two quotes may precede the closing three
                    self.position += self._peek() == quote
                return
            self.position += 1  # what the backslash escapes
        raise _Torn

    def _peek(self) -> str:
        return self.text[self.position : self.position + 1]

    def _expect(self, sign: str) -> None:
        self._skip_space()
        if self._peek() != sign:
            raise _Torn
        self.position += 1

    def _skip_space(self) -> None:
        while self._peek() in (" ", "\t"):
            self.position += 1

    def _skip_blank(self) -> bool:
        """Skip spaces, line ends and comments; True if anything is left."""
        blank = _BLANK.match(self.text, self.position)
        self.position = blank.end() if blank else self.position
        return self.position < len(self.text)

    def _line_here(self) -> int:
        self.line += self.text.count("\n", self.counted, self.position)
        self.counted = self.position
        return self.line

    def _note(self, path: tuple[str | int, ...]) -> None:
        self.lines.setdefault(path, self._line_here())


def _unquote(raw: str) -> str:
    if "\\" not in raw:
        return raw[1:-1]
    try:
        return str(tomllib.loads(f"k = {raw}")["k"])
    except ValueError:
        raise _Torn from None
