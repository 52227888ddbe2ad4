"""Who may import whom: the table below is the architecture, and the processes that must stay small load no torch."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import entry_points, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from petals_agent import hooks

PACKAGE = Path(__file__).resolve().parents[1] / "agent" / "petals_agent"
HEAVY = {"torch", "transformers", "safetensors", "accelerate"}
# run in the agent or in short-lived commands; their lazy imports may be heavy only in cli and demo
LIGHT = (
    "balance",
    "config",
    "doctor",
    "health",
    "heartbeat",
    "hooks",
    "link",
    "p2p",
    "swarm",
    "supervisor",
    "monitor",
    "cli",
    "client.routing",
    "engine.scheduler",
)
LAZY_IS_FREE = ("cli", "demo")
# layer → the parts of the package that it may not know, at module level or in a function
FORBIDDEN = {
    "config": (
        "balance",
        "cli",
        "client",
        "container",
        "demo",
        "engine",
        "link",
        "models",
        "p2p",
        "serving",
        "supervisor",
        "swarm",
    ),
    "link": (
        "balance",
        "cli",
        "client",
        "container",
        "demo",
        "engine",
        "models",
        "p2p",
        "serving",
        "supervisor",
        "swarm",
    ),
    "health": (
        "balance",
        "cli",
        "client",
        "config",
        "container",
        "demo",
        "engine",
        "link",
        "models",
        "p2p",
        "serving",
        "supervisor",
        "swarm",
    ),
    "heartbeat": (
        "balance",
        "cli",
        "client",
        "container",
        "demo",
        "doctor",
        "engine",
        "health",
        "hooks",
        "link",
        "models",
        "monitor",
        "serving",
        "supervisor",
    ),
    "hooks": (
        "cli",
        "client",
        "container",
        "demo",
        "doctor",
        "engine",
        "health",
        "models",
        "p2p",
        "serving",
        "supervisor",
        "swarm",
    ),
    "p2p": (
        "balance",
        "cli",
        "client",
        "config",
        "container",
        "demo",
        "engine",
        "link",
        "models",
        "serving",
        "supervisor",
        "swarm",
    ),
    "swarm": (
        "balance",
        "cli",
        "client",
        "container",
        "demo",
        "engine",
        "link",
        "models",
        "serving",
        "supervisor",
    ),
    "balance": (
        "cli",
        "client",
        "config",
        "container",
        "demo",
        "engine",
        "link",
        "models",
        "p2p",
        "serving",
        "supervisor",
    ),
    "models": (
        "balance",
        "cli",
        "client",
        "container",
        "demo",
        "link",
        "p2p",
        "serving",
        "supervisor",
        "swarm",
    ),
    "engine": (
        "balance",
        "cli",
        "client",
        "container",
        "demo",
        "link",
        "p2p",
        "serving",
        "supervisor",
        "swarm",
    ),
    "serving": ("balance", "cli", "client", "container", "demo", "supervisor"),
    "container": ("balance", "cli", "client", "demo", "supervisor"),
    "supervisor": ("cli", "client", "demo", "engine", "models", "serving"),
    "doctor": ("balance", "cli", "client", "container", "demo", "engine", "link", "serving"),
    "client": ("balance", "cli", "container", "demo", "engine", "link", "serving", "supervisor"),
}
FORBIDDEN["monitor"] = (*FORBIDDEN["client"], "client", "doctor", "health", "heartbeat", "hooks", "models")
PLUGINS = PACKAGE.parents[1] / "plugins" / "petals_agent_plugins"
ALLOWED = {
    ("supervisor", "models.source"),  # which files a model has, without reading one
    ("monitor", "supervisor.network"),
    ("monitor", "supervisor.notify"),
    ("monitor", "supervisor.states"),
    ("monitor", "supervisor.tasks"),
}


def module_name(path: Path) -> str:
    """`swarm/view.py` → `swarm.view`; the package's own file is the empty string."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def within(name: str, part: str) -> bool:
    """Whether module `name` is `part` or lies below it."""
    return name == part or name.startswith(part + ".")


def targets(node: ast.stmt) -> Iterator[str]:
    """What an import statement may load: `from a import b` names a and a.b."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"relative import in line {node.lineno}; write it in full"
        yield node.module or ""
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


@functools.cache
def imports(name: str, lazy: bool) -> frozenset[str]:
    """Absolute names that the module imports when loaded; with `lazy`, also in its functions."""

    def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
        for node in body:
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                continue
            yield node
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not lazy:
                continue
            for field in ("body", "orelse", "finalbody"):
                yield from statements(getattr(node, field, []))
            for handler in getattr(node, "handlers", []):
                yield from statements(handler.body)

    path = MODULES.get(name) or PLUGINS.parent.joinpath(*name.split(".")).with_suffix(".py")
    tree = ast.parse(path.read_text())
    return frozenset(target for node in statements(tree.body) for target in targets(node))


def own(names: frozenset[str]) -> set[str]:
    """Those of the names that are modules of this package, without its prefix."""
    short = {name.removeprefix("petals_agent.") for name in names if within(name, "petals_agent")}
    return short & MODULES.keys()


def loaded_with(name: str) -> set[str]:
    """Every module of this package that importing `name` loads, packages on the way included."""
    found: set[str] = set()
    todo = [name]
    while todo:
        module = todo.pop()
        if module in found:
            continue
        found.add(module)
        parents = {module.rsplit(".", i)[0] for i in range(1, module.count(".") + 1)}
        todo += own(imports(module, False)) | parents
    return found


LIGHT_MODULES = [name for name in MODULES if any(within(name, part) for part in LIGHT)]


def test_light_modules_import_nothing_heavy() -> None:
    bad = set()
    for name in LIGHT_MODULES:
        lazy = not any(within(name, part) for part in LAZY_IS_FREE)
        for module in loaded_with(name):
            found = imports(module, lazy and module == name)
            bad |= {f"{name} → {module} → {target}" for target in found if target.split(".")[0] in HEAVY}
    assert not bad


@pytest.mark.parametrize("layer", FORBIDDEN)
def test_layer_knows_only_what_is_below(layer: str) -> None:
    bad = []
    for name in MODULES:
        if not within(name, layer):
            continue
        for target in own(imports(name, True)):
            forbidden = any(within(target, part) for part in FORBIDDEN[layer])
            if forbidden and not any(layer == one and within(target, part) for one, part in ALLOWED):
                bad.append(f"{name} → {target}")
    assert not bad


def test_nobody_but_commands_knows_the_monitor() -> None:
    outside = [name for name in MODULES if not within(name, "monitor") and not within(name, "cli")]
    assert not [name for name in outside if any(within(one, "monitor") for one in own(imports(name, True)))]


BUNDLED = sorted(
    f"petals_agent_plugins.{path.stem}" for path in PLUGINS.glob("*.py") if path.stem != "__init__"
)


POINTS = {point.module for point in entry_points(group="petals_agent.bundled_plugins")}


@pytest.mark.parametrize("plugin", BUNDLED)
def test_bundled_plugin_knows_the_hooks_only(plugin: str) -> None:
    """As a plugin of somebody else: what is ours comes from petals_agent.hooks, the rest from our dependencies.

    Beside the plugins lie files that several of them use; those have no entry point.
    """
    project = tomllib.loads((PACKAGE.parents[1] / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["gpu"]]
    installed = {canonicalize_name(Requirement(one).name) for one in wanted}
    distributions = packages_distributions()
    bad = set()
    for target in imports(plugin, True):
        top = target.split(".")[0]
        if top == "petals_agent":
            names = {"petals_agent.hooks", *(f"petals_agent.hooks.{name}" for name in hooks.__all__)}
            bad |= {target} - names
        elif top == "petals_agent_plugins":
            bad |= {one for one in POINTS if within(target, one)}
        elif top not in sys.stdlib_module_names:
            providers = {canonicalize_name(one) for one in distributions.get(top, ())}
            bad |= {target} if top in HEAVY or not providers & installed else set()
    assert not bad


def test_the_agent_knows_no_bundled_plugin() -> None:
    bad = [name for name in MODULES for one in imports(name, True) if within(one, "petals_agent_plugins")]
    assert BUNDLED and not bad


PROBE = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
torch = sys.modules.get("torch")
assert torch is None or torch.__version__ == "0", "the real torch is loaded"
assert "transformers" not in sys.modules, "transformers is loaded"
status = open("/proc/self/status").read()  # ru_maxrss would count the process that forked us
print(int(status.split("VmHWM:")[1].split()[0]) // 1024)
"""


@pytest.mark.parametrize(
    "entry",
    [
        "supervisor.agent",
        "supervisor.bootstrap",
        "monitor.service",
        "monitor.collector",
        "cli.main",
        "config",
        "link.messages",
    ],
)
def test_entry_point_loads_no_torch(entry: str) -> None:
    """In a fresh interpreter; the stand-in for torch (p2p/light.py) says that its version is 0."""
    command = [sys.executable, "-c", PROBE, f"petals_agent.{entry}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 120, f"{done.stdout} MB after the import alone"


def test_light_packages_load_no_torch_together() -> None:
    """All of them in one process, as in the agent."""
    names = [f"petals_agent.{name}" for name in LIGHT_MODULES if not name.endswith("__main__")]
    command = [sys.executable, "-c", PROBE, "petals_agent.supervisor.agent", *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 150, f"{done.stdout} MB"


def test_the_checks_can_fail() -> None:
    assert "torch" in imports("engine.kv", False) or any(
        within(t, "torch") for t in imports("engine.engine", False)
    )
    assert "errors" in loaded_with("supervisor.agent")
