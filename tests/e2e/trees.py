"""The file trees that machines boot from: Debian 12, and on top of it the agent's package, built from this checkout and installed."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from e2e.cache import cached, root, scratch
from e2e.host import SUITE, Mirror, check_answers
from e2e.lintian import Lintian
from e2e.machine import Machine
from harness.processes import Processes

ROOT = Path(__file__).resolve().parents[2]
BASE_PACKAGES = (
    "bash-completion",
    "ca-certificates",
    "dbus",
    "libstdc++6",
    "procps",
    "python3",
    "systemd-sysv",
)
# what the packages are made of
LOCKS = {"cpu": "packaging/lock-cpu.txt", "monitor": "packaging/lock-monitor.txt"}
SOURCES = ("agent", "plugins", "systemd", "packaging/debian", *LOCKS.values(), "packaging/build_deb.sh")
SOURCES += ("packaging/make_wheels.py", "packaging/man_pages.py", "petals-agent.toml", "pyproject.toml")
SOURCES += ("README.md", "LICENSE", "Makefile")
BUILD_S = 900.0
INSTALL_LOG = "root/install.log"


@dataclass(frozen=True)
class Trees:
    """`base` is Debian, `installed` what the installation of `package` added to it; `lintian` looks at it and at `monitor`."""

    base: Path
    package: Path
    monitor: Path
    installed: Path
    lintian: Lintian


def make_trees(mirror: Mirror, processes: Processes) -> Trees:
    """Make what is not in the cache, side by side; what goes on after that ends with `processes`. Raises CannotRun."""
    if not (root() / f"base-{_base_key()}").exists():
        check_answers(mirror)
    with ThreadPoolExecutor(2) as pool:
        building = pool.submit(_package)
        base = _base(mirror)
        folder = building.result()
    package, monitor = (
        next(folder.glob(f"{name}_*.deb")) for name in ("petals-agent", "petals-agent-monitor")
    )
    lintian = Lintian(digest([ROOT / name for name in SOURCES if name.startswith(("packaging", "systemd"))]))
    lintian.start(processes, package, monitor)
    key = f"{base.name.split('-', 1)[1]}-{package.parent.name.split('-', 1)[1]}"
    installed = cached("installed", key, lambda fresh: _install(processes, base, package, fresh))
    return Trees(base, package, monitor, installed, lintian)


def digest(paths: Sequence[Path]) -> str:
    """Of names, modes and contents of files."""
    total = hashlib.sha256()
    for path in paths:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            if file.is_file() and "__pycache__" not in file.parts and ".egg-info" not in str(file):
                total.update(f"{file.relative_to(ROOT)} {os.access(file, os.X_OK)}\0".encode())
                total.update(file.read_bytes())
    return total.hexdigest()[:16]


def run(command: Sequence[str | Path], timeout: float, **more: object) -> None:
    """Run to its end; a failure shows its output."""
    done = subprocess.run(
        [str(part) for part in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        **more,  # type: ignore[call-overload]
    )
    assert done.returncode == 0, (
        f"{' '.join(map(str, command))} ended with {done.returncode}\n{done.stdout[-5000:]}"
    )


def _base(mirror: Mirror) -> Path:
    """Debian as debootstrap makes it; anew each month."""

    def make(folder: Path) -> None:
        keyring = ["--keyring", mirror.keyring] if mirror.keyring.startswith("/") else []
        include = f"--include={','.join(BASE_PACKAGES)}"
        run(["debootstrap", "--variant=minbase", include, *keyring, SUITE, folder, mirror.uri], BUILD_S)
        for name in ("etc/resolv.conf", "etc/hostname"):  # debootstrap copies this host's
            (folder / name).unlink(missing_ok=True)
        for archive in (folder / "var/cache/apt/archives").glob("*.deb"):
            archive.unlink()

    return cached("base", _base_key(), make)


def _base_key() -> str:
    packages = hashlib.sha256(" ".join(BASE_PACKAGES).encode()).hexdigest()[:8]
    return f"{SUITE}-{time.strftime('%Y%m')}-{packages}"


def _package() -> Path:
    """The folder with both packages, as `make deb` builds them; their wheels are kept for the next time."""

    def make_wheels(folder: Path) -> None:
        for kind in LOCKS:
            script = ROOT / "packaging/make_wheels.py"
            run(["/usr/bin/python3.11", script, "fill", kind, folder / kind], BUILD_S)

    def make_packages(folder: Path) -> None:
        wheels = cached("wheels", digest([ROOT / lock for lock in LOCKS.values()]), make_wheels)
        settings = {"WHEELS": str(wheels / "cpu"), "MONITOR_WHEELS": str(wheels / "monitor")}
        settings |= {"DIST": str(folder), "TORCH": "cpu", "DEBCOMP": "-Zzstd -z3"}
        run(["make", "-C", ROOT, "deb"], BUILD_S, env={**os.environ, **settings})

    return cached("package", digest([ROOT / name for name in SOURCES]), make_packages)


def _install(processes: Processes, base: Path, package: Path, fresh: Path) -> None:
    """What a person types, without network; what it printed is kept in the tree."""
    folder = scratch() / "install"
    machine = Machine(processes, [base], folder, options=[f"--bind-ro={package.parent}:/deb"])
    command = ["apt-get", "install", "-y", "-o", "Dpkg::Options::=--force-unsafe-io", f"/deb/{package.name}"]
    done = machine.run(*command, timeout=600)
    machine.path(INSTALL_LOG).write_text(done.stdout + done.stderr)
    machine.power_off()
    fresh.rmdir()
    (folder / "upper").rename(fresh)
    shutil.rmtree(folder.parent, ignore_errors=True)
