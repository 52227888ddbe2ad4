"""Single-file plugins as the agent accepts them."""

from __future__ import annotations

from pathlib import Path


def write_plugins(folder: Path, **codes: str) -> Path:
    """`folder`, with a plugin for each name and its code; nobody else may write there, whatever the umask."""
    folder.mkdir(exist_ok=True)
    folder.chmod(0o755)
    for name, code in codes.items():
        file = folder / f"{name}.py"
        file.write_text(code)
        file.chmod(0o644)
    return folder
