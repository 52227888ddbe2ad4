"""Fill a folder with the wheels of a Debian package, each checked against a hash, and write the files with the hashes.

    make_wheels.py fill cpu DIR     what packaging/lock-cpu.txt names, and nothing else
    make_wheels.py own DIR          petals-agent itself, in place of an earlier one
    make_wheels.py lock cpu         make packaging/lock-cpu.txt anew from pyproject.toml and constraints.txt

`cuda` in place of `cpu` is the default package index's build of torch with its CUDA libraries; `monitor` is the other package, of
what requirements-monitor.txt names. The wheels fit the Python that runs this: Debian's own, since the environments are made with it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "packaging" / "constraints.txt"
MONITOR = ROOT / "packaging" / "requirements-monitor.txt"
KINDS = ("cpu", "cuda", "monitor")
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PATIENCE_S = 1800.0  # one call of pip; ends a download that has stalled for good
HEADER = """\
# What {package} is made of, with the SHA-256 of each file; for Python {python} on x86-64 Linux.
# Made by: packaging/make_wheels.py lock {kind}
"""


class WheelError(Exception):
    """The folder or the lock cannot be made; the message says why and what to do."""


def lock_file(kind: str) -> Path:
    """The file with names, versions and hashes of one kind of package."""
    return ROOT / "packaging" / f"lock-{kind}.txt"


def package_name(kind: str) -> str:
    """What a person calls that package."""
    return "petals-agent-monitor" if kind == "monitor" else f"petals-agent's {kind} package"


def pip(*args: str) -> None:
    """Run pip as it is configured on this machine; raises WheelError with the tail of what it said."""
    command = [sys.executable, "-m", "pip", *args, "--no-input", "--disable-pip-version-check", "--quiet"]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE_S)  # fmt: skip
    except subprocess.TimeoutExpired:
        raise WheelError(f"pip {args[0]} took longer than {PATIENCE_S:.0f} s; check the network") from None
    if done.returncode:
        raise WheelError(f"pip {args[0]} failed (exit status {done.returncode}):\n{done.stderr[-3000:]}")


# --- filling


def fill(kind: str, folder: Path) -> None:
    """Make `folder` hold the wheels of the lock; one that does already is left alone."""
    lock = lock_file(kind)
    stamp = hashlib.sha256(lock.read_bytes()).hexdigest()
    if (folder / "lock.sha256").is_file() and (folder / "lock.sha256").read_text() == stamp:
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".wheels-") as temporary:
        fresh = Path(temporary, "wheels")
        lines = [line for line in lock.read_text().splitlines() if line and not line.startswith("#")]
        torch = [line for line in lines if line.startswith("torch==")]
        print(f"wheels: {len(lines)} for {package_name(kind)}", flush=True)
        if torch:
            take(torch, fresh, fallback=PYTORCH_CPU_INDEX if kind == "cpu" else None)
        take([line for line in lines if line not in torch], fresh)
        check_torch(kind, fresh)
        (fresh / "lock.sha256").write_text(stamp)
        if folder.exists():
            shutil.rmtree(folder)
        fresh.rename(folder)


def take(lines: list[str], folder: Path, fallback: str | None = None) -> None:
    """Put wheels of the given lock lines into `folder`; source archives are built into wheels."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as requirements:
        requirements.write("\n".join(lines))
        requirements.flush()
        command = ["wheel", "--no-deps", "--require-hashes", "-r", requirements.name, "-w", str(folder)]
        try:
            pip(*command)
        except WheelError as error:
            if fallback is None:
                raise
            try:
                pip(*command, "--index-url", fallback, "--timeout", "30", "--retries", "2")
            except WheelError as second:
                raise WheelError(
                    f"{lines[0].split()[0]} is neither where pip looks here nor at {fallback}; put its wheel into "
                    f"a folder and set PIP_FIND_LINKS=FOLDER. Here:\n{error}\nthere:\n{second}"
                ) from None


def check_torch(kind: str, folder: Path) -> None:
    """A package says what it is: exactly one torch, and of the right build; the monitor's has none."""
    found = [unquote(path.name) for path in folder.glob("torch-*.whl")]
    if kind == "monitor":
        if found:
            raise WheelError(f"the monitor's package needs no torch, but {folder} has {found}")
    elif len(found) != 1 or ("+cpu" in found[0]) != (kind == "cpu"):
        raise WheelError(f"the {kind} package needs one torch of that build, but {folder} has {found}")


def own(folder: Path) -> None:
    """Put petals-agent's own wheel into `folder`, made from a copy, so that the checkout stays as it is."""
    for old in folder.glob("petals_agent-*.whl"):
        old.unlink()
    with tempfile.TemporaryDirectory(prefix="petals-agent-") as temporary:
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, temporary)
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        for name in ("agent", "plugins"):
            shutil.copytree(ROOT / name, Path(temporary, name), ignore=ignored)
        pip("wheel", "--no-deps", temporary, "-w", str(folder))


# --- locking


def lock(kind: str) -> None:
    """Let pip resolve the dependencies within the constraints, and note what it would install."""
    entries = lock_monitor() if kind == "monitor" else lock_agent(kind)
    header = HEADER.format(
        package=package_name(kind), kind=kind, python=".".join(map(str, sys.version_info[:2]))
    )
    lock_file(kind).write_text(header + "\n".join(sorted(entries, key=str.lower)) + "\n")
    print(f"{lock_file(kind).relative_to(ROOT)}: {len(entries)} packages")


def lock_agent(kind: str) -> list[str]:
    """All that pyproject.toml names, with that build of torch."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + (project["optional-dependencies"]["gpu"] if kind == "cuda" else [])
    pins = CONSTRAINTS.read_text()
    torch = re.search(r"^torch==\S+$", pins, re.MULTILINE)
    if torch is None:
        raise WheelError(f"{CONSTRAINTS} pins no torch")
    requirements = [one for one in wanted if not re.match(r"torch\b", one)]
    requirements.append(torch[0] + ("+cpu" if kind == "cpu" else ""))
    if kind == "cuda":  # a folder with a CPU build would win, since its version sorts higher
        os.environ.update(PIP_CONFIG_FILE="/dev/null", PIP_FIND_LINKS="")
    return resolve(requirements, pins.replace(torch[0], ""))


def lock_monitor() -> list[str]:
    """What the monitor imports, and hivemind alone."""
    lines = MONITOR.read_text().splitlines()
    names = [line for line in lines if line and not line.startswith("#") and line != "hivemind"]
    pins = CONSTRAINTS.read_text()
    return resolve(names, pins) + resolve(["--no-deps", "hivemind"], pins)


def resolve(requirements: list[str], pins: str) -> list[str]:
    """The lines of a lock for what pip would install."""
    with tempfile.TemporaryDirectory() as temporary:
        report, constraints = Path(temporary, "report.json"), Path(temporary, "constraints.txt")
        constraints.write_text(pins)
        dry = ["install", "--dry-run", "--ignore-installed", "--report", str(report)]
        pip(*dry, "-c", str(constraints), *requirements)
        return [entry(item) for item in json.loads(report.read_text())["install"]]


def entry(item: dict[str, dict[str, object]]) -> str:
    """One line of the lock, from one entry of pip's report; no address in it."""
    digest = str(item["download_info"]["archive_info"]["hash"])  # type: ignore[index]
    if not digest.startswith("sha256="):
        raise WheelError(
            f"{urlsplit(str(item['download_info']['url'])).path} came with {digest}, not a sha256"
        )
    return f"{item['metadata']['name']}=={item['metadata']['version']} --hash=sha256:{digest[7:]}"


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    filling, owning, locking = (commands.add_parser(name) for name in ("fill", "own", "lock"))
    for command in (filling, locking):
        command.add_argument("kind", choices=KINDS)
    for command in (filling, owning):
        command.add_argument("folder", type=Path)
    args = parser.parse_args()
    try:
        if args.command == "fill":
            fill(args.kind, args.folder.absolute())
        elif args.command == "own":
            own(args.folder.absolute())
        else:
            lock(args.kind)
    except WheelError as error:
        print(f"wheels: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
