"""The entry nodes of the public Petals swarm: two peers, each by DNS (IPv4 and IPv6) and by fixed address."""

from __future__ import annotations

_FIRST = "p2p/QmedTaZXmULqwspJXz44SsPZyTNKxhnnFvYRajfH7MGhCY"
_SECOND = "p2p/QmQGTqmM7NKjV6ggU1ZCap8zWiyKR89RViDXiqehSiCpY5"

PUBLIC_INITIAL_PEERS = (
    f"/dns/bootstrap1.petals.dev/tcp/31337/{_FIRST}",
    f"/dns/bootstrap2.petals.dev/tcp/31338/{_SECOND}",
    f"/dns6/bootstrap1.petals.dev/tcp/31337/{_FIRST}",
    f"/dns6/bootstrap2.petals.dev/tcp/31338/{_SECOND}",
    f"/ip4/159.89.214.152/tcp/31337/{_FIRST}",
    f"/ip4/159.203.156.48/tcp/31338/{_SECOND}",
)
