"""Random swarms as hypothesis strategies."""

from __future__ import annotations

from hypothesis import strategies as st

from petals_agent.balance.snapshot import Server

rates = st.one_of(st.floats(0, 1e4), st.sampled_from([0.0, 1.0, 1e-300, 1e300, float("inf"), float("nan")]))


@st.composite
def spans(draw: st.DrawFn, blocks: int) -> tuple[int, int]:
    """(start, length) inside a model of `blocks`."""
    length = draw(st.integers(1, blocks))
    return draw(st.integers(0, blocks - length)), length


@st.composite
def swarms(draw: st.DrawFn) -> tuple[int, list[Server]]:
    """A number of blocks and up to 12 servers; some lie about rates, load, are relayed, or follow other rules."""
    blocks = draw(st.integers(1, 24))
    servers = []
    for i in range(draw(st.integers(1, 12))):
        start, length = draw(spans(blocks))
        flags = draw(st.tuples(st.booleans(), st.booleans(), st.booleans()))
        servers.append(Server(f"p{i:02d}", start, length, draw(rates), *flags))
    return blocks, servers
