"""Takes secrets out of text that is about to be logged: Hub tokens, authorization headers, signed addresses."""

from __future__ import annotations

import re

_HIDDEN = "[hidden]"
_SHORTEST = 8  # characters; a shorter "secret" would also be found in ordinary words
_secrets: set[str] = set()  # exact texts, by `keep_secret`

_PATTERNS = (
    re.compile(r"()\bhf_[A-Za-z0-9]{8,}"),
    # a header in any of the ways that it is printed, with a scheme or without
    re.compile(
        r"""(\bauthorization\b["']?\)?\s*[:=,]\s*\(?(?:b?["'])?)(?:(?:bearer|basic|token)\s+)?[^\s"',;]+""",
        re.I,
    ),
    re.compile(r"(\bbearer\s+)[\w.~+/=-]{8,}", re.I),
    re.compile(r"(://[^/\s:@]*:)[^/\s@]+(?=@)"),  # a password in an address
    re.compile(r"(\b(?:signature|x-amz-signature|x-amz-security-token)=)[^&\s\"']+", re.I),
)


def keep_secret(text: str) -> None:
    """From now on `text` (such as what a token file holds) appears in no log line of this process."""
    if len(text.strip()) >= _SHORTEST:
        _secrets.add(text.strip())


def redact(text: str) -> str:
    """`text` with each secret replaced."""
    for secret in _secrets:
        text = text.replace(secret, _HIDDEN)
    for pattern in _PATTERNS:
        text = pattern.sub(rf"\1{_HIDDEN}", text)
    return text
