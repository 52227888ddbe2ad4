"""Swarm states and history made up from a seed: for tests, screenshots and benchmarks that need no live swarm."""

from __future__ import annotations

import random
from collections.abc import Sequence

from petals_agent.monitor.state import Entry, Model, ModelState, Server, ServerState, SwarmState

NOW = 1_795_000_000.0
"""When made-up states were taken, unless told otherwise."""

_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_NAMES = ("lab-garage", "Universität Basel", "https://example.org/gpu", "blue whale", None, None, None)
_VERSIONS = ("petals-agent 0.1.0", "petals-agent 0.1.0", "2.3.0.dev2", "2.2.0")
HOSTILE = (
    "<script>window.hurt = 1</script>",
    '"><img src=x onerror="window.hurt = 1">',
    "javascript:window.hurt=1//\\u003c/script>",
    "\u202egnirts desrever\u202c \u2066isolated\u2069 \u200f",
    "x" * 1024,
    "{{ 7 * 7 }} {% raw %} ${7*7} <!-- --> ]]>",
    "\ufeff\u0000\u0007\u001b[31mred",
    "&lt;b&gt;&#x202e;",
)


def peer_id(rng: random.Random) -> str:
    """A peer id as hivemind's RSA identities have: a SHA-256 multihash in base58."""
    number = int.from_bytes(b"\x12\x20" + rng.randbytes(32))
    text = ""
    while number:
        number, digit = divmod(number, 58)
        text = _BASE58[digit] + text
    return text


def server(
    rng: random.Random,
    start: int,
    end: int,
    state: ServerState = "online",
    peers: Sequence[str] = (),
    now: float = NOW,
    public_name: str | None = None,
) -> Server:
    """One server of blocks [start, end); it pings the first few of `peers`."""
    network, compute = rng.uniform(100, 3000), rng.uniform(20, 900)
    adapters = ("lora/alpaca-tiny", "lora/code") if rng.random() < 0.1 else ()
    return Server(
        peer_id=peer_id(rng),
        state=state,
        reason="it did not answer within 5 s" if state == "unreachable" else "",
        start=start,
        end=end,
        throughput=round(min(network, compute), 2),
        network_rps=round(network, 2),
        forward_rps=round(compute * 3, 2),
        inference_rps=round(compute, 2),
        public_name=public_name or rng.choice(_NAMES),
        version=rng.choice(_VERSIONS),
        dtype=rng.choice(("bfloat16", "float16")),
        quantization=rng.choice(("none", "none", "nf4", "int8")),
        adapters=adapters,
        relayed=rng.random() < 0.15,
        cache_tokens_left=rng.randrange(0, 65536),
        pings={peer: rng.choice((None, 0.003, 0.045, 0.21)) for peer in peers[:5]},
        pings_to_me={peer: round(rng.uniform(0.002, 0.3), 5) for peer in peers[2:7]},
        expires=round(now + rng.uniform(10, 240), 1),
        first_seen=round(now - rng.uniform(600, 40 * 86400), 1),
        uptime=round(min(1.0, rng.uniform(0.8, 1.1)), 4),
    )


def model(
    rng: random.Random,
    prefix: str,
    num_blocks: int,
    servers: Sequence[Server],
    repository: str | None = None,
    **more: object,
) -> Model:
    """A model of these servers; counts, state and reason follow from them."""
    online, joining, throughput = [0] * num_blocks, [0] * num_blocks, [0.0] * num_blocks
    for one in servers:
        for block in range(one.start, one.end):
            online[block] += one.state == "online"
            joining[block] += one.state == "joining"
            throughput[block] += one.throughput if one.state == "online" else 0.0
    state, reason = _judged(online)
    return Model.model_validate(
        {
            "dht_prefix": prefix,
            "name": repository.rsplit("/", 1)[-1] if repository else prefix,
            "repository": repository,
            "num_blocks": num_blocks,
            "state": state,
            "reason": reason,
            "online": tuple(online),
            "joining": tuple(joining),
            "throughput": tuple(round(rate, 2) for rate in throughput),
            "servers": tuple(servers),
            **more,
        }
    )


def _judged(online: Sequence[int]) -> tuple[ModelState, str]:
    gaps = [block for block, count in enumerate(online) if count == 0]
    if gaps:
        return "broken", f"no server is online for {len(gaps)} blocks, the first is block {gaps[0]}"
    single = sum(count == 1 for count in online)
    if single:
        return "degraded", f"{single} blocks depend on a single server"
    return "healthy", ""


def swarm(models: Sequence[Model], now: float = NOW, problem: str = "") -> SwarmState:
    """A state taken at `now`, with two entry peers."""
    rng = random.Random(1)
    return SwarmState(
        taken_at=now,
        duration_s=3.2,
        update_period_s=60.0,
        entries=(
            Entry(address=f"/dns/entry1.example.org/tcp/31337/p2p/{peer_id(rng)}", reachable=True),
            Entry(
                address=f"/ip4/192.0.2.7/tcp/31337/p2p/{peer_id(rng)}",
                reachable=not problem,
                reason="it does not answer" if problem else "",
            ),
        ),
        models=tuple(models),
        problem=problem,
    )


def covered(
    rng: random.Random,
    num_blocks: int,
    count: int,
    now: float = NOW,
    states: Sequence[ServerState] = ("online",),
) -> list[Server]:
    """`count` servers of random spans that cover all blocks, mostly several times, when all are online."""
    length = max(min(8, num_blocks), min(num_blocks, -(-3 * num_blocks // count)))
    peers = [peer_id(rng) for _ in range(8)]
    found = []
    for index in range(count):
        wide = min(num_blocks, length + rng.randrange(0, 4))
        start = (index * length) % num_blocks
        start = min(start, num_blocks - wide)
        found.append(server(rng, start, start + wide, rng.choice(states), peers, now))
    return found


def big(models: int = 10, servers: int = 1000, num_blocks: int = 80, now: float = NOW) -> SwarmState:
    """`servers` servers of each of `models` models."""
    rng = random.Random(7)
    states: tuple[ServerState, ...] = ("online",) * 17 + ("joining", "unreachable", "offline")
    return swarm(
        [
            model(
                rng,
                f"Model-{index}-hf",
                num_blocks,
                covered(rng, num_blocks, servers, now, states),
                f"https://huggingface.co/example/Model-{index}",
            )
            for index in range(models)
        ],
        now,
    )


def small(now: float = NOW) -> SwarmState:
    """Three models: healthy, degraded, and broken with a joining server in the gap."""
    rng = random.Random(3)
    peers = [peer_id(rng) for _ in range(6)]
    hub = "https://huggingface.co/example/"
    sound = [*covered(rng, 32, 8, now), server(rng, 0, 32, "online", peers, now)]
    weak = [
        server(rng, 0, 14, "online", peers, now, "lab-garage"),
        server(rng, 10, 24, "online", peers, now),
        server(rng, 20, 40, "online", peers, now, "blue whale"),
        server(rng, 30, 40, "unreachable", peers, now),
    ]
    gap = [
        server(rng, 0, 30, "online", peers, now, "lab-garage"),
        server(rng, 22, 48, "online", peers, now),
        server(rng, 44, 62, "joining", peers, now, "new here"),
        server(rng, 60, 80, "online", peers, now),
        server(rng, 40, 60, "offline", peers, now),
    ]
    return swarm(
        [
            model(rng, "Llama-4-70B-hf", 80, gap, hub + "Llama-4-70B"),
            model(rng, "Mixtral-8x22B", 40, weak, hub + "Mixtral-8x22B", rejected=2),
            model(rng, "lab-private", 32, sound),
        ],
        now,
    )


def healthy(now: float = NOW) -> SwarmState:
    """One model of a lab, all well."""
    rng = random.Random(4)
    servers = covered(rng, 32, 12, now)
    return swarm([model(rng, "Llama-4-8B-hf", 32, servers, "https://huggingface.co/example/Llama-4-8B")], now)


def hostile(now: float = NOW) -> SwarmState:
    """Every text that a peer can choose is meant to hurt."""
    rng = random.Random(5)
    servers = []
    for index, text in enumerate(HOSTILE):
        one = server(rng, index, index + 4, "online", [], now)
        servers.append(
            one.model_copy(
                update={
                    "public_name": text,
                    "version": text,
                    "dtype": text,
                    "quantization": text,
                    "adapters": (text, text),
                    "reason": text,
                    "pings": {text: 0.1, "<b>": None},
                }
            )
        )
    prefix = '<script>window.hurt=1</script>/"%2e%2e#?&'
    return swarm([model(rng, prefix, 16, servers, "javascript:window.hurt=1")], now)
