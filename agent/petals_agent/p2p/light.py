"""Import parts of hivemind without its package root, which would pull in all of it and torch.

Call `install()` before the first `import hivemind.…`. A plain `import hivemind.dht.node` costs 563 MB and 4.7 s;
with a stand-in for the package root and for torch the same DHT node costs about 50 MB and 0.3 s.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterator
from importlib.abc import Loader, MetaPathFinder
from typing import Any


class _Meta(type):
    """Class attributes of the stand-in are stand-ins too, so `torch.nn.Module | None` and the like evaluate."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything

    def __or__(cls, other: Any) -> Any:
        return cls

    def __ror__(cls, other: Any) -> Any:
        return cls


class _Anything(metaclass=_Meta):
    """Whatever hivemind's import-time code asks of torch: subclassed, called, used as decorator, annotated."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args and callable(args[0]) else _Anything()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()

    def __class_getitem__(cls, item: Any) -> Any:
        return cls

    def __hash__(self) -> int:
        return id(self)

    def __iter__(self) -> Iterator[Any]:
        return iter(())


def _asked_by_hivemind() -> bool:
    """Whether the code that looks into torch, past the import machinery and this file, is hivemind's."""
    frame = sys._getframe(1)
    while (name := str(frame.f_globals.get("__name__"))) == __name__ or "importlib" in name:
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return name.split(".")[0] == "hivemind"


class _TorchStandIn(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if not _asked_by_hivemind():
            raise AttributeError(
                f"{self.__name__}.{name}: this program imported the agent before torch, so that torch is a stand-in "
                "that holds nothing; import torch first"
            )
        return _Anything


class _TorchFinder(MetaPathFinder, Loader):
    """Answers `import torch` and its submodules with a module that holds nothing."""

    def find_spec(
        self, name: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name == "torch" or (name.startswith("torch.") and _asked_by_hivemind()):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _TorchStandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__version__ = "0"  # type: ignore[attr-defined]


def install(*, without_torch: bool) -> None:
    """Let `import hivemind.X` load just X; with `without_torch`, also answer `import torch` with an empty stand-in.

    Idempotent. A process that needs the real torch passes False (and may import torch before or after), or imports torch
    before this: whoever but hivemind looks into the stand-in is told so.
    """
    if "hivemind" not in sys.modules:
        spec = importlib.util.find_spec("hivemind")
        if spec is None or spec.submodule_search_locations is None:
            raise ImportError("hivemind is not installed; install petals-agent with its dependencies")
        root = types.ModuleType("hivemind")
        root.__path__ = list(spec.submodule_search_locations)
        root.__spec__ = spec
        root.__version__ = "1.1.12"  # type: ignore[attr-defined]
        sys.modules["hivemind"] = root
    if without_torch and "torch" not in sys.modules:
        # imported for real first: they look at torch only when it is there
        import multiprocessing.connection
        import multiprocessing.reduction  # noqa: F401

        sys.meta_path.insert(0, _TorchFinder())
