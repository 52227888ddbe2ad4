"""Makes plugins of their sources, in the plugin host: imports them, checks their configuration and their hooks."""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import logging
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pluggy import PluginManager, PluginValidationError
from pydantic import BaseModel, ValidationError

from petals_agent.errors import PluginError
from petals_agent.hooks import hookspecs
from petals_agent.hooks.discovery import read_source
from petals_agent.hooks.messages import PluginReport, PluginSource, WrongKey
from petals_agent.hooks.signatures import SIGNATURES

log = logging.getLogger("petals_agent.plugins")


class WrongTable(PluginError):
    """[plugins.NAME] is not as the plugin's Config wants it."""

    def __init__(self, wrong_keys: list[WrongKey]) -> None:
        super().__init__("its table in the configuration is wrong")
        self.wrong_keys = wrong_keys


class Plugins:
    """The loaded plugins: which are asked for a hook, in which order, and the function of each."""

    def __init__(self) -> None:
        self._manager = PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)

    def load(self, source: PluginSource, level: int) -> PluginReport:
        """Import and register one plugin, the last to be asked first; its loggers speak from `level` on."""
        try:
            module = _module(source)
            logging.getLogger(module.__name__.split(".")[0]).setLevel(level)
            plugin = _plugin(module, None if source.table is None else json.loads(source.table))
            return PluginReport(name=source.name, hooks=self._register(plugin, source.name))
        except WrongTable as error:
            return PluginReport(name=source.name, problem=str(error), wrong_keys=error.wrong_keys)
        except PluginError as error:
            return PluginReport(name=source.name, problem=str(error))
        except BaseException as error:  # the plugin's own, SystemExit among them
            log.debug("plugin %s was not loaded", source.name, exc_info=error)
            return PluginReport(name=source.name, problem=describe(error))

    def _register(self, plugin: object, name: str) -> list[str]:
        """Returns its hooks. Raises PluginError when it has none, or one that no agent calls so."""
        try:
            self._manager.register(plugin, name)
        except PluginValidationError as error:
            self._manager.unregister(name=name)
            raise PluginError(" ".join(str(error).split())) from None
        hooks = [caller.name for caller in self._manager.get_hookcallers(plugin) or ()]
        problem = "" if hooks else "it has no hook; mark one with @hookimpl"
        for caller in self._manager.get_hookcallers(plugin) or ():
            mine = [impl for impl in caller.get_hookimpls() if impl.plugin is plugin]
            if any(impl.hookwrapper or impl.wrapper for impl in mine):
                problem = f"{caller.name} is a hook wrapper, and plugins cannot be wrapped around each other"
            elif not caller.has_spec() and not any(impl.optionalhook for impl in mine):
                near = difflib.get_close_matches(caller.name, SIGNATURES, n=1)
                hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(SIGNATURES)}"
                problem = f"there is no hook {caller.name}{hint}"
        if problem:
            self._manager.unregister(name=name)
            raise PluginError(problem)
        return [hook for hook in hooks if hook in SIGNATURES]

    def order(self) -> dict[str, list[str]]:
        """For each hook that somebody has: the plugins, first to last, as pluggy would call them."""
        found = {name: [impl.plugin_name for impl in self._asked(name)] for name in SIGNATURES}
        return {name: plugins for name, plugins in found.items() if plugins}

    def function(self, plugin: str, hook: str) -> tuple[Callable[..., Any], tuple[str, ...]]:
        """The plugin's function and the arguments that it takes. Raises LookupError when it has none."""
        for impl in self._asked(hook):
            if impl.plugin_name == plugin:
                return impl.function, tuple(impl.argnames)
        raise LookupError(f"plugin {plugin} has no {hook}")

    def _asked(self, hook: str) -> list[Any]:
        return list(reversed(getattr(self._manager.hook, hook).get_hookimpls()))


def _module(source: PluginSource) -> types.ModuleType:
    if source.kind == "module":
        return importlib.import_module(source.where)
    path = Path(source.where)
    code = compile(read_source(path), str(path), "exec")
    module = types.ModuleType(f"petals_agent_plugin_{source.name.replace('-', '_')}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses and pickle look their module up there
    exec(code, vars(module))
    return module


def _plugin(module: types.ModuleType, table: dict[str, Any] | None) -> object:
    """An instance of the module's class Plugin, made with its Config; the module itself when it has no such class."""
    model, kind = getattr(module, "Config", None), getattr(module, "Plugin", None)
    if model is None:
        if table is not None:
            raise WrongTable([WrongKey(key=[], problem="this plugin has no settings; remove the table")])
        return module if kind is None else kind()
    if not (inspect.isclass(model) and issubclass(model, BaseModel)):
        raise PluginError("its Config is no pydantic model; write `class Config(BaseModel)`")
    if kind is None:
        raise PluginError(
            "it has a Config and nobody who takes it; write `class Plugin` with `__init__(self, config)`"
        )
    try:
        config = model.model_validate(table or {})
    except ValidationError as error:
        raise WrongTable([_wrong_key(detail, table is None) for detail in error.errors()[:20]]) from None
    return kind(config)


def _wrong_key(detail: Any, no_table: bool) -> WrongKey:
    missing = detail["type"] == "missing"
    words = {"missing": "it is needed and not set", "extra_forbidden": "this plugin has no such key"}
    problem = words.get(detail["type"], str(detail["msg"]).removeprefix("Value error, "))
    return WrongKey(key=list(detail["loc"]), problem=problem[:500], missing=missing or no_table)


def describe(error: BaseException) -> str:
    """`ModuleNotFoundError: No module named 'requests' (file.py:3)`; short, whatever the error's own __str__ does."""
    try:
        text = str(error)
    except BaseException:
        text = "it cannot say why"
    place, trace = "", error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if "petals_agent/hooks" not in file and not file.startswith("<"):
            place = f" ({Path(file).name}:{trace.tb_lineno})"
            break  # the plugin's own line, not that of what it called
        trace = trace.tb_next
    return f"{type(error).__name__}{': ' if text else ''}{' '.join(text.split())[:500]}{place}"
