"""What the end-to-end suite needs of this host: root, Debian's tools (installed if that is possible), and a mirror."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from harness.debian import install

SUITE = "bookworm"
TOOLS = {  # program or file → the package that has it
    "systemd-nspawn": "systemd-container",
    "debootstrap": "debootstrap",
    "dpkg-buildpackage": "dpkg-dev",
    "dh": "debhelper",
    "lintian": "lintian",
    "/usr/share/perl5/Debian/Debhelper/Sequence/bash_completion.pm": "bash-completion",
    "/usr/lib/python3.11/ensurepip/__init__.py": "python3-venv",
    "/usr/lib/python3/dist-packages/pip/__init__.py": "python3-pip",
    "zstd": "zstd",
}
ANSWER_S = 30.0


class CannotRun(Exception):
    """The suite is left out; the message is the reason."""


@dataclass(frozen=True)
class Mirror:
    """Where apt takes this suite from, and the key that signs it ('' : the system's keyring)."""

    uri: str
    keyring: str


def prepare() -> Mirror:
    """Make sure that everything is here; raises CannotRun with the reason."""
    if os.geteuid() != 0:
        raise CannotRun("not root")
    if platform.machine() != "x86_64":
        raise CannotRun(f"the package is for amd64, this is {platform.machine()}")
    if shutil.which("apt-get") is None:
        raise CannotRun("no apt-get here")
    lacking = missing()
    if lacking:
        try:
            install(lacking)
        except TimeoutError as error:
            raise CannotRun(str(error)) from None
        if lacking := missing():
            raise CannotRun(f"lacks {' '.join(lacking)}, and apt-get did not bring it")
    probe = subprocess.run(["unshare", "--mount", "true"], capture_output=True, text=True, timeout=10)
    if probe.returncode:
        raise CannotRun(f"no mount namespaces: {probe.stderr.strip()}")
    return mirror(Path("/etc/apt"))


def missing() -> list[str]:
    """The packages whose tools are not here."""
    return sorted(
        package
        for tool, package in TOOLS.items()
        if not (Path(tool).exists() if tool.startswith("/") else shutil.which(tool))
    )


def mirror(apt: Path) -> Mirror:
    """The first archive that apt is configured to take the suite's main section from; raises CannotRun."""
    files = [apt / "sources.list", *sorted((apt / "sources.list.d").glob("*"))]
    for file in files:
        if file.suffix in (".list", ".sources") and file.is_file():
            read = _one_line if file.suffix == ".list" else _stanzas
            for found in read(file.read_text(errors="replace")):
                return found
    raise CannotRun(f"apt has no source of {SUITE} main here")


def check_answers(found: Mirror) -> None:
    """Ask the mirror for the suite's index; raises CannotRun when it has none for us."""
    try:
        with urllib.request.urlopen(f"{found.uri.rstrip('/')}/dists/{SUITE}/Release", timeout=ANSWER_S):
            pass
    except (OSError, ValueError) as error:
        raise CannotRun(f"the mirror for {SUITE} does not answer: {error}") from None


def _one_line(text: str) -> Iterator[Mirror]:
    """deb [signed-by=KEY] URI SUITE main …"""
    for line in text.splitlines():
        found = re.match(r"deb\s+(?:\[([^]]*)\]\s+)?(\S+)\s+(\S+)\s+(.*)", line)
        if found and found[3] == SUITE and "main" in found[4].split():
            key = re.search(r"signed-by=(\S+)", found[1] or "")
            yield Mirror(found[2], key[1] if key else "")


def _stanzas(text: str) -> Iterator[Mirror]:
    """Types:, URIs:, Suites:, Components:, Signed-By:, with an empty line between two sources."""
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    for stanza in re.split(r"\n\s*\n", lines):
        fields = {name.lower(): value.strip() for name, value in re.findall(r"^([\w-]+):(.*)$", stanza, re.M)}
        wanted = {"types": "deb", "suites": SUITE, "components": "main"}
        if all(value in fields.get(name, "").split() for name, value in wanted.items()):
            if fields.get("enabled", "yes").lower() not in ("no", "false") and fields.get("uris"):
                yield Mirror(fields["uris"].split()[0], fields.get("signed-by", ""))
