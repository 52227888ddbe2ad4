"""Who may be called beside whom, so that it is known whose fault the end of the plugin host is; a plain object."""

from __future__ import annotations


class Turns:
    """No plugin is called twice at once. Those that were in a host when it ended without a culprit are called alone."""

    def __init__(self) -> None:
        self.running: set[str] = set()
        self.suspects: set[str] = set()

    def free(self, plugin: str) -> bool:
        """Whether it may be called now."""
        if plugin in self.running or self.suspects & self.running:
            return False
        return plugin not in self.suspects or not self.running

    def begin(self, plugin: str) -> None:
        self.running.add(plugin)

    def end(self, plugin: str) -> None:
        """It has answered, failed, or was lost."""
        self.running.discard(plugin)

    def clear(self, plugin: str) -> None:
        """It was called, and the host lived: no longer a suspect."""
        self.suspects.discard(plugin)

    def suspect(self, plugins: frozenset[str]) -> None:
        self.suspects |= plugins
