"""Where a value of the configuration was set."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Origin:
    """One place: a line of a file, an environment variable, the command line, or a default and its reason."""

    kind: Literal["default", "file", "environment", "command line", "code"]
    name: str = ""
    line: int | None = None
    base: Path | None = None  # what relative paths are relative to; None: the current folder
    item_lines: tuple[int, ...] = ()  # of a list

    @property
    def source(self) -> str:
        """The file, variable or command line to correct; empty where there is none."""
        if self.kind == "file":
            return self.name
        return "" if self.kind in ("default", "code") else f"{self.kind} {self.name}".rstrip()

    def of_item(self, index: int) -> Origin:
        """The place of one item of a list."""
        return replace(self, line=self.item_lines[index]) if index < len(self.item_lines) else self

    def __str__(self) -> str:
        if self.kind == "default":
            return f"default ({self.name})" if self.name else "default"
        return (self.source or self.kind) + (f":{self.line}" if self.line is not None else "")


DEFAULT = Origin("default")
CODE = Origin("code")
