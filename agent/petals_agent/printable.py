"""What others said, fit for a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    """The same, with a space for each character that could steer a terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
