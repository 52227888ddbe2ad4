"""What the agent learns of its plugins: the result of asking for a hook, and how each of them does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["raised", "junk", "late", "died", "lost"]
"""How a plugin failed. `lost` is nobody's fault, or not known to be: the plugin host was not there, or ended with
several plugins in it; it is not counted."""


@dataclass(frozen=True)
class Failure:
    """One plugin that did not answer; `hook` is "probe NAME" for a look through a probe."""

    plugin: str
    hook: str
    kind: Kind
    reason: str

    def __str__(self) -> str:
        return f"plugin {self.plugin} failed in {self.hook}: {self.reason}"


@dataclass(frozen=True)
class Given:
    """One plugin's answer that was not None."""

    plugin: str
    value: Any


@dataclass(frozen=True)
class Outcome:
    """Answers in the order of asking (one at most, where the first one ends the asking), and who failed before it."""

    given: tuple[Given, ...] = ()
    failures: tuple[Failure, ...] = ()

    @property
    def value(self) -> Any:
        """The first answer; None when nobody gave one."""
        return self.given[0].value if self.given else None

    @property
    def by(self) -> str | None:
        """Whose answer that is."""
        return self.given[0].plugin if self.given else None


@dataclass
class PluginState:
    """One plugin, for `status`, metrics and `petals-agent plugins list`."""

    name: str
    where: str
    hooks: tuple[str, ...] = ()
    state: Literal["ready", "refused", "disabled"] = "ready"
    reason: str = ""
    calls: int = 0
    failures: int = 0
    in_a_row: int = 0
