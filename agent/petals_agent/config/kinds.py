"""The kinds of values that the schema is made of, each with the words that tell a person what is allowed."""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field

from petals_agent.config.multiaddr import Purpose, check_multiaddr, check_peer_id
from petals_agent.config.values import (
    MAX_BYTES,
    check_probe,
    format_duration,
    format_size,
    parse_duration,
    parse_host_port,
    parse_size,
    parse_span,
)

MAX_ITEMS = 1000


@dataclass(frozen=True)
class Allowed:
    """What a key accepts, as error messages say it."""

    text: str


@dataclass(frozen=True)
class Written:
    """How `config show` writes a value, where that is not as it is held."""

    form: Any


class Located:
    """Marks a key whose relative paths belong to the folder of the file that set them."""


def locate(value: object, base: Path | None = None) -> object:
    """An absolute path for text; "" (none) and other types pass unchanged."""
    if not isinstance(value, str) or not value:
        return value
    return os.path.normpath(os.path.join(base or Path.cwd(), os.path.expanduser(value)))


def locate_model(value: object, base: Path | None = None) -> object:
    """An absolute path if `value` names a folder; a Hub repository ("owner/name") passes unchanged.

    "owner/name" could be either: it is the folder if there is one, so write "./owner/name" to be sure.
    """
    path = locate(value, base)
    if not isinstance(value, str) or not isinstance(path, str):
        return value
    return path if value.startswith((".", "/", "~")) or os.path.isdir(path) else value


def _one_line(value: str) -> str:
    if not value.isprintable():
        raise ValueError("it holds a character that cannot be printed")
    if len(value) > 1024:
        raise ValueError("it is longer than 1024 characters")
    return value


def _to_path(value: object) -> object:
    if value == "":
        raise ValueError("it is empty")
    path = locate(str(value) if isinstance(value, Path) else value)
    return _one_line(path) if isinstance(path, str) else path


def _no_token(value: object) -> object:
    if isinstance(value, str) and re.search(r"hf_[A-Za-z0-9]{20}", value):
        raise ValueError(
            "it looks like a token itself; put the token into a file that only the agent can read"
        )
    return None if value == "" else value


def _model(value: str) -> str:
    _one_line(value)
    is_repository = re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", value, re.ASCII)
    if value and not value.startswith("/") and not is_repository:
        raise ValueError("it is neither a folder nor a Hub repository")
    return value


def _prefix(value: str) -> str:
    if not value or not value.isprintable() or any(letter in " ." for letter in value) or len(value) > 256:
        raise ValueError("block names in the DHT are PREFIX.NUMBER, parted by spaces")
    return value


def _reachability(value: str) -> str:
    if value in ("peers", "off"):
        return value
    url = urlsplit(value)  # raises ValueError for torn brackets and bad ports
    if url.scheme not in ("http", "https") or not url.hostname or not (url.port or 1):
        raise ValueError("it is no http:// or https:// address")
    return _one_line(value)


def _blocks(value: str) -> str:
    if value == "auto":
        return value
    start, end = parse_span(value)
    return f"{start}:{end}"


def _device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", value):
        raise ValueError("no such device")
    return value


def _probe_name(name: str) -> str:
    check_probe(name)
    return name


def _host_port(value: str) -> str:
    parse_host_port(value)
    return value


def _host_port_or_off(value: str) -> str:
    return value if value == "off" else _host_port(value)


def _network(value: str) -> str:
    ipaddress.ip_network(value, strict=False)
    return value


def _socket(value: Path) -> Path:
    if len(os.fsencode(value)) > 107:
        raise ValueError(f"{len(os.fsencode(value))} bytes are too long for a Unix socket (at most 107)")
    return value


def _few(value: object) -> object:
    if isinstance(value, (list, tuple)) and len(value) > MAX_ITEMS:
        raise ValueError(f"it has {len(value)} items (at most {MAX_ITEMS})")
    return value


Text = Annotated[str, AfterValidator(_one_line), Allowed("text on one line")]
Switch = Annotated[bool, Allowed("true or false")]

Duration = Annotated[
    float,
    BeforeValidator(parse_duration),
    Allowed('a number of seconds, or text such as "2m", "1h30m", "500ms"'),
    Written(format_duration),
]
Size = Annotated[int, Field(ge=0, le=MAX_BYTES), BeforeValidator(parse_size)]
DiskLimit = Annotated[
    Literal["unlimited"] | Size,
    BeforeValidator(lambda value: value if value == "unlimited" else parse_size(value)),
    Allowed('"unlimited", a number of bytes, or text such as "50GB", "200GiB"'),
    Written(lambda value: value if isinstance(value, str) else format_size(value)),
]

Count = Annotated[int, Field(ge=1, le=2**31 - 1), Allowed("a whole number from 1 to 2147483647")]
AutoCount = Annotated[Literal["auto"] | Count, Allowed('"auto" or a whole number from 1 to 2147483647')]
CountLimit = Annotated[
    Literal["unlimited"] | Count, Allowed('"unlimited" or a whole number from 1 to 2147483647')
]
Throughput = Annotated[
    Literal["auto", "measure"] | Annotated[float, Field(gt=0, le=1e12)],
    Allowed('"auto", "measure", or a number above 0 (tokens per second through the span)'),
]

FilePath = Annotated[Path, Field(strict=False), BeforeValidator(_to_path), Located(), Allowed("a path")]
TokenPath = Annotated[
    FilePath | None,
    BeforeValidator(_no_token),
    Located(),
    Allowed('the path of a file that holds the token, or "" for none'),
]
SocketPath = Annotated[FilePath, AfterValidator(_socket), Allowed("a path of at most 107 bytes")]
FilePaths = Annotated[
    tuple[FilePath, ...], Field(strict=False), BeforeValidator(_few), Located(), Allowed("a list of paths")
]
ModelSource = Annotated[
    str,
    BeforeValidator(locate_model),
    AfterValidator(_model),
    Located(),
    Allowed('a folder such as "./my-model", or a Hub repository such as "Qwen/Qwen3-8B"'),
]
ModelSources = Annotated[
    tuple[Annotated[str, BeforeValidator(locate_model), AfterValidator(_model)], ...],
    Field(strict=False),
    BeforeValidator(_few),
    Located(),
    Allowed("a list of folders or Hub repositories"),
]

Prefix = Annotated[
    str, AfterValidator(_prefix), Allowed('"auto", or a name without dots and spaces (up to 256 characters)')
]
ListenAddresses = Annotated[
    tuple[Annotated[str, AfterValidator(lambda text: check_multiaddr(text, Purpose.LISTEN))], ...],
    Field(strict=False, min_length=1),
    BeforeValidator(_few),
    Allowed('a list of multiaddresses such as ["/ip4/0.0.0.0/tcp/31330"]; port 0 is a random one'),
]
AnnounceAddresses = Annotated[
    tuple[Annotated[str, AfterValidator(lambda text: check_multiaddr(text, Purpose.ANNOUNCE))], ...],
    Field(strict=False),
    BeforeValidator(_few),
    Allowed('a list of multiaddresses such as ["/ip4/203.0.113.7/tcp/31330"], with fixed ports'),
]
PeerAddresses = Annotated[
    Literal["public"]
    | Annotated[
        tuple[Annotated[str, AfterValidator(lambda text: check_multiaddr(text, Purpose.DIAL))], ...],
        Field(strict=False),
        BeforeValidator(_few),
    ],
    Allowed(
        '"public", a list of multiaddresses such as ["/ip4/203.0.113.7/tcp/31337/p2p/Qm…"], or [] to start a swarm'
    ),
]
PeerIds = Annotated[
    tuple[Annotated[str, AfterValidator(check_peer_id)], ...],
    Field(strict=False),
    BeforeValidator(_few),
    Allowed("a list of peer ids in base58 (Qm… or 12D3Koo…)"),
]
Texts = Annotated[tuple[Text, ...], Field(strict=False), BeforeValidator(_few), Allowed("a list of texts")]

Reachability = Annotated[
    str,
    AfterValidator(_reachability),
    Allowed('"peers", "off", or a monitor such as "https://health.petals.dev"'),
]
Blocks = Annotated[
    str, AfterValidator(_blocks), Allowed('"auto", or "START:END" such as "0:8" (the end is not counted)')
]
Device = Annotated[str, AfterValidator(_device), Allowed('"auto", "cpu", "cuda" or "cuda:N"')]
HostPort = Annotated[
    str,
    AfterValidator(_host_port),
    Allowed('HOST:PORT such as "127.0.0.1:8099"'),
]
OptionalHostPort = Annotated[
    str, AfterValidator(_host_port_or_off), Allowed('"off", or HOST:PORT such as "127.0.0.1:9464"')
]
Networks = Annotated[
    tuple[Annotated[str, AfterValidator(_network)], ...],
    Field(strict=False),
    BeforeValidator(_few),
    Allowed('a list of addresses or networks such as "10.0.0.0/8"'),
]
ProbeName = Annotated[str, AfterValidator(_probe_name)]
