"""Peers' texts and figures as a page may show them: nothing that steers the reader's terminal, browser or eyes."""

from __future__ import annotations

import re
import time
from urllib.parse import quote, urlsplit

MAX_SHOWN = 80

# controls, and what turns or hides text: bidirectional marks, zero width space, byte order mark, tags, surrogates
_TRICKS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)
# marks upon the letter before them; no language needs more than three, and many of them cover the lines around
_MARKS = "[\u0300-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f]"
_PILE = re.compile(f"({_MARKS}{{3}}){_MARKS}+")


def visible(text: str) -> str:
    """`text` with each character that would steer instead of show replaced by �, and without piles of marks."""
    return text if text.isascii() and text.isprintable() else _PILE.sub(r"\1", _TRICKS.sub("\ufffd", text))


def short(text: str | None, limit: int = MAX_SHOWN) -> str:
    """At most `limit` characters of it; an ellipsis stands for the rest."""
    text = text or ""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def tail(peer_id: str) -> str:
    """The end of a peer id, as the classic monitor names servers."""
    return "…" + peer_id[-6:]


def web_address(text: str | None) -> str | None:
    """`text` if it is an http(s) URL that a reader may be led to, else None."""
    if not text or len(text) > 2000 or _TRICKS.search(text):
        return None
    try:
        parts = urlsplit(text)
    except ValueError:
        return None
    return text if parts.scheme in ("http", "https") and parts.hostname and not parts.username else None


def segment(text: str) -> str:
    """`text` as one part of a URL's path."""
    return quote(text, safe="")


def figure(value: float | None, digits: int = 3) -> str:
    """A rate or count with about `digits` digits: 1,235 · 12.3 · 0.41; – when it is not known."""
    if value is None:
        return "–"
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    return f"{value:,.{max(0, digits - whole) if value % 1 else 0}f}"


def rate(value: float) -> str:
    """tokens/s in a column, so that decimal points stand below each other: 1,234.6 · 0.41."""
    return f"{value:,.1f}" if value >= 1 or value == 0 else f"{value:.2g}"


def share(value: float | None) -> str:
    """0.9876 as 98.7 %; never rounded up to 100.0 %."""
    if value is None:
        return "–"
    return f"{int(value * 1000) / 10:.1f} %"


def milliseconds(seconds: float | None) -> str:
    """A ping."""
    return "no answer" if seconds is None else f"{seconds * 1000:.3g} ms"


def utc(seconds: float | None) -> str:
    """A moment in UTC, to the second."""
    return "–" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def machine_time(seconds: float) -> str:
    """The same for programs (RFC 3339)."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def span_of_time(seconds: float | None) -> str:
    """A length of time in its two largest units: 3 d 4 h."""
    if seconds is None:
        return "–"
    left, parts = max(0, int(seconds)), list[str]()
    for name, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count or (name == "s" and not parts):
            parts.append(f"{count} {name}")
    return " ".join(parts[:2])
