"""From what was read and dialled to the swarm's state, with a reason in words wherever something is not well.

Pure: no I/O, no clock. A block is healthy when a server that can be reached is ONLINE with it (protocol.md §10.2).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from petals_agent.monitor.history import Presence
from petals_agent.monitor.state import Entry, Model, ModelState, Server, ServerState, SwarmState
from petals_agent.swarm import records
from petals_agent.swarm.uids import runs
from petals_agent.swarm.view import Span, SwarmView

MAX_MODELS = 64
MAX_SERVERS = 2000  # of one model
MAX_PINGS = 64  # of one server, to and from others that are shown
MAX_ADAPTERS = 32
MAX_RATE = 1e9  # tokens/s; what is claimed beyond would spoil every sum
GONE_S = 300.0  # a server whose record has expired or vanished is shown as offline for so long
MAX_LIFE_S = 86400.0  # of a record; who claims more, even for ever, is believed no more
WEAK_SHARE = 0.25  # of the mean; a slower block is worth a warning
UNREACHABLE_SHARE = 1 / 3  # of the servers that say they are online
_RANGES_NAMED = 5
_STATES: dict[records.ServerState, ServerState] = {
    records.ServerState.OFFLINE: "offline",
    records.ServerState.JOINING: "joining",
    records.ServerState.ONLINE: "online",
}


@dataclass(frozen=True)
class Reading:
    """What the DHT holds of one model; `repository` is known for those in the registry."""

    view: SwarmView
    repository: str | None = None


def report(
    readings: Iterable[Reading],
    *,
    taken_at: float,
    duration_s: float,
    period_s: float,
    unreachable: Mapping[str, str] | None = None,
    presence: Mapping[str, Presence] | None = None,
    entries: Sequence[Entry] = (),
    previous: SwarmState | None = None,
    problem: str = "",
) -> SwarmState:
    """The state at `taken_at` (Unix time); `unreachable` tells by peer id why a server could not be dialled.

    Servers of the `previous` state whose records are gone are shown as offline for a while. Those of a model that was not
    read stay as they were until their records expire.
    """
    before = {model.dht_prefix: model for model in previous.models} if previous else {}
    read = {reading.view.prefix: reading for reading in readings}
    lost = [
        Reading(_unread(model, taken_at), model.repository)
        for prefix, model in before.items()
        if prefix not in read and any(_is_kept(server, taken_at) for server in model.servers)
    ]
    models = [
        _model(reading, before.get(prefix), taken_at, unreachable or {}, presence or {})
        for prefix, reading in [*read.items(), *((one.view.prefix, one) for one in lost)]
    ]
    return SwarmState(
        taken_at=taken_at,
        duration_s=duration_s,
        update_period_s=period_s,
        entries=tuple(entries),
        models=tuple(sorted(models[:MAX_MODELS], key=lambda model: (-model.num_blocks, model.dht_prefix))),
        problem=problem,
    )


def _model(
    reading: Reading,
    before: Model | None,
    now: float,
    unreachable: Mapping[str, str],
    presence: Mapping[str, Presence],
) -> Model:
    view = reading.view
    spans = sorted(view.spans(records.ServerState.OFFLINE), key=lambda span: _rank(span, presence))
    hidden, spans = spans[MAX_SERVERS:], spans[:MAX_SERVERS]
    expires = _expirations(view)
    to_me = _pings_to(spans)
    servers = [
        _server(
            span,
            min(expires[span.peer_id], now + MAX_LIFE_S),
            unreachable.get(span.peer_id),
            to_me,
            presence.get(span.peer_id),
        )
        for span in spans
    ]
    servers += _departed(before, view, expires, now)
    servers = sorted(servers[:MAX_SERVERS], key=lambda server: (server.start, server.end, server.peer_id))

    online, joining = [0] * view.num_blocks, [0] * view.num_blocks
    throughput = [0.0] * view.num_blocks
    for server in servers:
        for block in range(server.start, server.end):
            if server.state == "online":
                online[block] += 1
                throughput[block] += server.throughput
            elif server.state == "joining":
                joining[block] += 1
    state, reason = judge(servers, online, joining, throughput, view.unread)
    return Model(
        dht_prefix=view.prefix,
        name=(reading.repository or "").rstrip("/").rsplit("/", 1)[-1] or view.prefix,
        repository=reading.repository,
        num_blocks=view.num_blocks,
        state=state,
        reason=reason,
        online=tuple(online),
        joining=tuple(joining),
        throughput=tuple(throughput),
        servers=tuple(servers),
        unread_blocks=len(view.unread),
        rejected=view.rejected_count + len(hidden),
    )


def _unread(model: Model, now: float) -> SwarmView:
    """What is known of a model that was left out this time: nothing."""
    return SwarmView(model.dht_prefix, model.num_blocks, (), (), 0, tuple(range(model.num_blocks)), now)


def _rank(span: Span, presence: Mapping[str, Presence]) -> tuple[int, float, str]:
    """Who is shown if not all are: those that serve, and of these the ones known for longest, whom a flood cannot hide."""
    known = presence.get(span.peer_id)
    return -span.info.state, known.first_seen if known else math.inf, span.peer_id


def _server(
    span: Span,
    expires: float,
    failure: str | None,
    to_me: Mapping[str, dict[str, float | None]],
    presence: Presence | None,
) -> Server:
    info = span.info
    state = _STATES[info.state]
    if state == "online" and failure is not None:
        state = "unreachable"
    tokens = info.cache_tokens_left
    return Server(
        peer_id=span.peer_id,
        state=state,
        reason=_cut(failure or "", 200) if state == "unreachable" else "",
        start=span.start,
        end=span.end,
        throughput=_brief(min(info.throughput, MAX_RATE)),
        network_rps=_rate(info.network_rps),
        forward_rps=_rate(info.forward_rps),
        inference_rps=_rate(info.inference_rps),
        public_name=_cut_optional(info.public_name, 100),
        version=_cut_optional(info.version, 40),
        dtype=_cut_optional(info.torch_dtype, 20),
        quantization=_cut_optional(info.quant_type, 20),
        adapters=tuple(_cut(adapter, 100) for adapter in info.adapters[:MAX_ADAPTERS]),
        relayed=info.using_relay,
        # the record counts K and V of each block apart
        cache_tokens_left=None if tokens is None or not span.length else tokens // (2 * span.length),
        pings=_finite(info.next_pings or {}, to_me),
        pings_to_me=to_me[span.peer_id],
        expires=round(expires, 1),
        first_seen=round(presence.first_seen, 1) if presence else None,
        uptime=math.floor(presence.uptime * 1e4) / 1e4 if presence and presence.uptime is not None else None,
    )


def _expirations(view: SwarmView) -> dict[str, float]:
    """Until when each peer's newest record holds."""
    newest: dict[str, float] = {}
    for record in view.records:
        newest[record.peer_id] = max(record.expires, newest.get(record.peer_id, 0.0))
    return newest


def _pings_to(spans: Sequence[Span]) -> dict[str, dict[str, float | None]]:
    """For each server shown, who measured how far it is."""
    found: dict[str, dict[str, float | None]] = {span.peer_id: {} for span in spans}
    for span in spans:
        for peer, rtt in _finite(span.info.next_pings or {}, found).items():
            if len(found[peer]) < MAX_PINGS:
                found[peer][span.peer_id] = rtt
    return found


def _finite(pings: Mapping[str, float], shown: Mapping[str, object]) -> dict[str, float | None]:
    known = [(peer, rtt) for peer, rtt in pings.items() if peer in shown][:MAX_PINGS]
    return {peer: _brief(rtt) if math.isfinite(rtt) else None for peer, rtt in known}


def _departed(
    before: Model | None, view: SwarmView, present: Mapping[str, float], now: float
) -> list[Server]:
    """Servers seen before that this reading lacks: as they were while their keys do not answer, else as offline."""
    departed = []
    unread = frozenset(view.unread)
    for server in before.servers if before else ():
        if server.peer_id in present or not _is_kept(server, now) or server.end > view.num_blocks:
            continue
        if server.expires > now and unread.issuperset(range(server.start, server.end)):
            departed.append(server)
        else:
            until = min(server.expires, now)  # it may vanish before that, with those who held its records
            departed.append(server.model_copy(update={"state": "offline", "reason": _GONE, "expires": until}))
    return departed


_GONE = "it no longer announces itself"


def _is_kept(server: Server, now: float) -> bool:
    return now - GONE_S < server.expires


def judge(
    servers: Sequence[Server],
    online: Sequence[int],
    joining: Sequence[int],
    throughput: Sequence[float],
    unread: Iterable[int] = (),
) -> tuple[ModelState, str]:
    """The model's state, and in words why it is not healthy.

    Broken: a block has no server online. Degraded, although each block is served: keys did not answer; blocks hang on
    one server while another one that should hold them is unreachable; a third of the servers is unreachable; or a block
    has less than a quarter of the mean throughput. That each block has a single server is healthy for a small swarm.
    """
    if not online:
        return "broken", "no server announces it, so its number of blocks is not known"
    silent = set(unread)
    missing = [block for block, count in enumerate(online) if not count]
    failed = [server for server in servers if server.state == "unreachable"]
    if missing:
        return "broken", _why_broken(missing, joining, failed, silent)
    reasons = []
    if silent:
        reasons.append(f"the DHT did not answer for {_blocks(silent)}, which may have more servers")
    lost = {block for server in failed for block in range(server.start, server.end)}
    if alone := [block for block in sorted(lost) if online[block] == 1]:
        reasons.append(
            f"{_blocks(alone)} {'hangs' if len(alone) == 1 else 'hang'} on one server, while "
            f"{_some(len(failed))} unreachable"
        )
    claiming = len(failed) + sum(server.state == "online" for server in servers)
    if failed and not alone and len(failed) >= UNREACHABLE_SHARE * claiming:
        reasons.append(f"{len(failed)} of {claiming} servers cannot be reached")
    mean = sum(throughput) / len(throughput)
    weakest = min(throughput)
    if weakest < WEAK_SHARE * mean:
        slow = [block for block, rate in enumerate(throughput) if rate < WEAK_SHARE * mean]
        limit = "limits" if len(slow) == 1 else "limit"
        reasons.append(f"{_blocks(slow)} {limit} it to {weakest:.3g} tokens/s, where the mean is {mean:.3g}")
    return ("degraded", "; ".join(reasons)) if reasons else ("healthy", "")


def _why_broken(
    missing: Sequence[int], joining: Sequence[int], failed: Sequence[Server], silent: set[int]
) -> str:
    text = f"{_blocks(missing)} {'has' if len(missing) == 1 else 'have'} no server online"
    lacking = set(missing)
    notes = []
    if coming := [block for block in missing if joining[block]]:
        notes.append(
            "servers are joining there" if coming == list(missing) else f"joining: {_blocks(coming)}"
        )
    beyond = [one for one in failed if lacking.intersection(range(one.start, one.end))]
    if beyond:
        notes.append(f"{_some(len(beyond))} unreachable there")
    if unknown := lacking & silent:
        notes.append(f"the DHT did not answer for {_blocks(unknown)}")
    return text + "".join(f"; {note}" for note in notes)


def _some(count: int) -> str:
    return "1 server is" if count == 1 else f"{count} servers are"


def _blocks(blocks: Iterable[int]) -> str:
    """`block 7`, or `blocks 0:4, 6 and 8:12`."""
    ranges = runs(blocks)
    names = [str(start) if end == start + 1 else f"{start}:{end}" for start, end in ranges[:_RANGES_NAMED]]
    if more := len(ranges) - _RANGES_NAMED:
        names = [*names, f"{more} more ranges"] if more > 0 else names
    text = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return f"block {text}" if len(ranges) == 1 and ranges[0][1] == ranges[0][0] + 1 else f"blocks {text}"


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _cut_optional(text: str | None, limit: int) -> str | None:
    return None if text is None else _cut(text, limit)


def _rate(rate: float | None) -> float | None:
    return None if rate is None else _brief(min(rate, MAX_RATE))


def _brief(value: float) -> float:
    """Five digits are more than anybody measures, and make what is sent a third smaller."""
    return float(f"{value:.5g}")
