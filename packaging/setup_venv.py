"""Build a virtual environment, or leave it alone if it is up to date; prefers a CPU build of torch without a GPU.

    setup_venv.py agent DIR     petals-agent itself, editable, with its test tools, as pinned in constraints.txt
    setup_venv.py peer DIR      the published Petals that interop tests and benchmarks talk to

Runs on the system's Python before anything is installed, so it imports the standard library only. The environment
variable TORCH says which build of torch to take: `auto` (default: CUDA only where there is an NVIDIA device),
`cpu` (never anything else) or `cuda` (whatever the default package index has).
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import glob
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "packaging" / "constraints.txt"
PEER_REQUIREMENTS = ROOT / "tests" / "interop" / "peer" / "requirements.txt"
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CONNECT_S = 4.0  # how long PyTorch's index may take to answer before it is passed over
INSTALL_S = 1800.0  # a whole installation; ends a download that has stalled for good


class SetupError(Exception):
    """The environment cannot be made; the message says why and what to do."""


def say(text: str) -> None:
    """Print one progress line at once, also into a pipe."""
    print(f"setup: {text}", flush=True)


class Venv:
    """A virtual environment folder and the pip inside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"
        self.stamp = folder / "setup.stamp"

    def create(self) -> None:
        """Make the folder with the running Python; an environment of another Python is replaced."""
        if sys.version_info < (3, 10):  # noqa: UP036  runs on whatever Python the machine has
            raise SetupError(
                f"Python 3.11 is needed (3.10 at least), but {sys.executable} is {platform.python_version()}; "
                "install it (Debian 12: apt install python3 python3-venv) or name one: make PYTHON=/path/to/python3.11"
            )
        try:
            import ensurepip  # noqa: F401
            import venv  # noqa: F401
        except ImportError:
            raise SetupError(
                f"{sys.executable} cannot make virtual environments (no ensurepip); "
                "on Debian and Ubuntu: sudo apt install python3-venv"
            ) from None
        say(f"creating {self.folder.name} with Python {platform.python_version()}")
        run([sys.executable, "-m", "venv", "--clear", str(self.folder)], "creating the environment", 300)

    def pip_install(self, *args: str, what: str, patience_s: float = INSTALL_S) -> None:
        """Install with the machine's own pip configuration; raises SetupError with pip's words."""
        command = [
            str(self.python),
            "-m",
            "pip",
            "install",
            "-qq",
            "--no-input",
            "--disable-pip-version-check",
        ]
        run([*command, "--progress-bar", "off", *args], what, patience_s)

    def installed_torch(self) -> str:
        """Version of torch inside, or '' when there is none."""
        code = "import importlib.metadata as m; print(m.version('torch'))"
        done = subprocess.run([str(self.python), "-c", code], capture_output=True, text=True, timeout=60)
        return done.stdout.strip()


def run(command: list[str], what: str, patience_s: float) -> None:
    """Run quietly, with a sign of life every 20 s; raises SetupError with the tail of what it printed."""
    start = time.monotonic()
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    printed: list[bytes] = []
    assert child.stdout is not None
    reader = threading.Thread(
        target=lambda pipe: printed.append(pipe.read()), args=(child.stdout,), daemon=True
    )
    reader.start()
    try:
        while True:
            try:
                code = child.wait(timeout=20)
                break
            except subprocess.TimeoutExpired:
                spent = time.monotonic() - start
                if spent > patience_s:
                    raise SetupError(
                        f"{what} was stopped after {spent:.0f} s; check the network and run again"
                    ) from None
                say(f"  still {what} ({spent:.0f} s)")
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
    reader.join(5)
    if code:
        tail = b"".join(printed).decode(errors="replace").strip()[-3000:]
        raise SetupError(f"{what} failed (exit status {code}):\n{tail}")


def has_gpu() -> bool:
    """Whether this machine shows an NVIDIA device (kernel driver, device node, WSL or the vendor's tool)."""
    nodes = glob.glob("/dev/nvidia[0-9]*") or os.path.exists("/dev/nvidiactl") or os.path.exists("/dev/dxg")
    return bool(nodes) or shutil.which("nvidia-smi") is not None


def pytorch_index_answers() -> bool:
    """Ask PyTorch's CPU index for its page; in a thread, since name resolution knows no time limit."""
    answered = threading.Event()

    def ask() -> None:
        with contextlib.suppress(OSError, ValueError):
            with urllib.request.urlopen(f"{PYTORCH_CPU_INDEX}/torch/", timeout=CONNECT_S):
                answered.set()

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(CONNECT_S)
    return answered.is_set()


def install_torch(venv: Venv, version: str, mode: str) -> None:
    """Put in the torch build that suits this machine and say which; the rest of pip's work then finds it there."""
    if mode == "auto" and has_gpu():
        return say(
            f"torch {version}: an NVIDIA device is here, so the default package index's build is taken"
        )
    if mode == "cuda" or (sys.platform != "linux" and mode == "auto"):
        return say(f"torch {version}: the default package index's build is taken")
    wanted = f"torch=={version}+cpu"
    if venv.installed_torch() == f"{version}+cpu":
        return say(f"torch {version}+cpu: already there")
    # pip as it is configured here: a wheel folder (find-links) or an index that has CPU builds
    for source in (["--no-index"], ["--timeout", "10", "--retries", "1"]):
        with contextlib.suppress(SetupError):
            venv.pip_install("--no-deps", *source, wanted, what="installing torch for CPU", patience_s=900)
            return say(f"{wanted}: the CPU build that pip's configuration offers")
    say(f"torch {version}: pip's configuration offers no CPU build, asking PyTorch's index")
    if pytorch_index_answers():
        index = ["--index-url", PYTORCH_CPU_INDEX, "--timeout", "30", "--retries", "2"]
        with contextlib.suppress(SetupError):
            venv.pip_install("--no-deps", *index, wanted, what="installing torch from PyTorch's CPU index")
            return say(f"{wanted}: the CPU build from PyTorch's own index")
    hint = "put a CPU wheel of torch in a folder and run: PIP_FIND_LINKS=FOLDER make setup"
    if mode == "cpu":
        raise SetupError(
            f"no CPU build of torch {version}: neither pip's configuration nor {PYTORCH_CPU_INDEX} has one at once; {hint}"
        )
    say(
        f"torch {version}: PyTorch's index does not answer, so the default package index's build is taken; it works"
    )
    say("  without a GPU, but brings CUDA libraries (some 3 GB). To avoid them, stop here (Ctrl-C) and")
    say(f"  {hint}")


def pinned(requirements: Path, name: str) -> str:
    """The version that a requirements file pins for one package."""
    found = re.search(rf"^{re.escape(name)}==([^\s;]+)", requirements.read_text(), re.MULTILINE)
    if not found:
        raise SetupError(f"{requirements} pins no version of {name}; add a line {name}==VERSION")
    return found.group(1)


def fill_agent(venv: Venv, mode: str) -> None:
    """petals-agent, editable, with its test tools."""
    install_torch(venv, pinned(CONSTRAINTS, "torch"), mode)
    say("installing petals-agent and what it needs (a minute or two)")
    pins = ["-c", str(CONSTRAINTS)]
    venv.pip_install(*pins, "-e", f"{ROOT}[dev,monitor]", what="installing petals-agent")


def fill_peer(venv: Venv, mode: str) -> None:
    """The published Petals; its stated requirements contradict each other, so part of it goes in without them."""
    if sys.version_info[:2] != (3, 11):
        raise SetupError(
            f"the published Petals needs Python 3.11, but {sys.executable} is {platform.python_version()}; "
            "name one: make peer-venv PYTHON=/path/to/python3.11"
        )
    install_torch(venv, pinned(PEER_REQUIREMENTS, "torch"), mode)
    say("installing the published Petals and what it needs (a minute or two)")
    venv.pip_install("-r", str(PEER_REQUIREMENTS), what="installing the requirements of Petals")
    bare = re.findall(r"^#nodeps (\S+)", PEER_REQUIREMENTS.read_text(), re.MULTILINE)
    venv.pip_install("--no-deps", *bare, what="installing Petals")


def fingerprint(kind: str, folder: Path, mode: str) -> str:
    """What the environment was made from: when any of it changes, it is installed again."""
    sources = [Path(__file__)]
    sources += [PEER_REQUIREMENTS] if kind == "peer" else [CONSTRAINTS, ROOT / "pyproject.toml"]
    digest = hashlib.sha256()
    for part in (str(folder), mode, platform.python_version(), *(path.read_text() for path in sources)):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()


def ensure(kind: str, folder: Path, mode: str) -> None:
    """Make the environment complete; two callers at once wait for each other."""
    venv, start = Venv(folder), time.monotonic()
    want = fingerprint(kind, folder, mode)

    def finished() -> bool:
        return venv.python.exists() and venv.stamp.exists() and venv.stamp.read_text() == want

    if finished():
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if finished():
            return
        venv.stamp.unlink(missing_ok=True)
        if not same_python(venv):
            venv.create()
        {"agent": fill_agent, "peer": fill_peer}[kind](venv, mode)
        venv.stamp.write_text(want)
    finally:
        os.close(lock)
    say(f"{folder.name} is ready ({time.monotonic() - start:.0f} s), with torch {venv.installed_torch()}")


def same_python(venv: Venv) -> bool:
    """Whether the folder holds a working environment of the running Python's version, at this very path."""
    if not venv.python.exists():
        return False
    code = "import platform, sys, pip; print(platform.python_version(), sys.prefix)"
    done = subprocess.run([str(venv.python), "-c", code], capture_output=True, text=True, timeout=60)
    return done.stdout.strip() == f"{platform.python_version()} {venv.folder}"


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=["agent", "peer"])
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    mode = os.environ.get("TORCH") or "auto"
    try:
        if mode not in ("auto", "cpu", "cuda"):
            raise SetupError(f"TORCH={mode} is not known; it may be auto, cpu or cuda")
        ensure(args.kind, args.folder.absolute(), mode)
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
