"""Probes that look at our place in the swarm: p2pd, what a caller sees, what others know of us, the company, the clock."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable
from typing import Any

from petals_agent.config.schema import SwarmConfig
from petals_agent.errors import DaemonError, SwarmError
from petals_agent.health.findings import OK, Probe, Reading, failed, not_applicable
from petals_agent.health.findings import degraded as worse
from petals_agent.health.steps import Step
from petals_agent.p2p import control
from petals_agent.supervisor.announcing import Announcing
from petals_agent.supervisor.container_probes import stopped
from petals_agent.supervisor.network import Connection, Network
from petals_agent.supervisor.served import Caller
from petals_agent.supervisor.serving import Serving
from petals_agent.swarm.reachability import ask_peers
from petals_agent.swarm.uids import block_uid

_ASKED = 3  # peers
_CALL_TIMEOUT_S = 5.0
_CLOCK_LIMIT_S, _CLOCK_WARN_S = 3.0, 1.5  # the DHT drops records whose time is off by more (hivemind)


class SwarmProbes:
    """`all` of them."""

    NAMES = ("swarm.p2pd", "swarm.served", "swarm.announced", "swarm.peers", "swarm.reachable", "host.clock")

    def __init__(
        self,
        network: Network,
        serving: Serving,
        announcing: Announcing,
        caller: Caller,
        swarm: SwarmConfig,
        adjusted: Callable[[Probe], Probe],
    ) -> None:
        """`adjusted` gives a probe with what the configuration says of it."""
        self._network, self._serving, self._announcing = network, serving, announcing
        self._caller = caller
        self._update_period = swarm.update_period
        self._asks_peers = swarm.reachability == "peers"
        p2pd = Step.RESTART_P2PD
        probes = (
            Probe("swarm.p2pd", self._p2pd, 1.0, 6.0, 2, p2pd),
            Probe("swarm.served", self._served, 15.0, 20.0, 3, Step.REATTACH),
            Probe("swarm.announced", self._announced, 30.0, 20.0, 4, p2pd),
            Probe("swarm.peers", self._peers, 10.0, 20.0, 3),
            Probe("swarm.reachable", self._reachable, 300.0, 30.0, 2),
            Probe("host.clock", self._clock, 60.0, 20.0, 2),
        )
        self.all = tuple(map(adjusted, probes))

    async def _p2pd(self) -> Reading:
        connection = self._network.connection
        if connection is None:
            problem = self._network.problem
            return worse(problem) if problem is not None else not_applicable("p2pd is being started")
        if stopped(connection.daemon.pid):
            return failed(f"process {connection.daemon.pid} is stopped")
        try:
            await control.identify(connection.daemon.maddr, timeout=_CALL_TIMEOUT_S)
        except DaemonError as error:
            if connection.lost.is_set():
                return worse("p2pd is being replaced")
            return failed(str(error))
        return OK

    async def _served(self) -> Reading:
        connection, model, span = self._network.connection, self._serving.model, self._serving.span
        if connection is None or model is None or span is None or not self._serving.attached:
            return not_applicable("no handlers are registered")
        if connection.client or not self._network.maddrs:
            return not_applicable("nobody can dial us directly; peers come through relays")
        try:
            await self._caller.check(
                connection.daemon.peer_id, block_uid(model.dht_prefix, span[0]), model.hidden_size
            )
        except SwarmError as error:
            if connection.lost.is_set() or not self._serving.attached:
                return not_applicable("what was asked was replaced meanwhile")
            return failed(str(error))
        return OK

    async def _announced(self) -> Reading:
        connection, model, said = (
            self._network.connection,
            self._serving.model,
            self._announcing.announced,
        )
        if connection is None or model is None or said is None:
            return not_applicable("nothing was announced")
        age = time.time() - said.at
        if age > 2 * self._update_period + 1:
            return failed(f"the DHT has taken no record of ours for {age:.0f} s")
        answers = await self._ask(connection, block_uid(model.dht_prefix, said.start))
        if not answers:
            return not_applicable("no other peer can be asked")
        if not any(answers):
            self._serving.changed.set()  # say it again: whoever came since does not know us
            return failed(f"none of {len(answers)} peers that should know our record has it")
        return OK

    async def _ask(self, connection: Connection, key: str) -> list[bool]:
        """Whether each of the peers nearest to `key` that answer has our record of it."""
        from hivemind.dht.node import DHTID

        protocol: Any = connection.node.protocol
        key_id = DHTID.generate(source=key)
        near = protocol.routing_table.get_nearest_neighbors(key_id, _ASKED, exclude=protocol.node_id)
        subkey = connection.daemon.peer_id

        async def has(peer: Any) -> bool | None:
            try:
                async with asyncio.timeout(_CALL_TIMEOUT_S):
                    found = await protocol.call_find(peer, [key_id])
            except Exception:  # hivemind raises what it likes; who does not answer has no say
                return None
            if not found:
                return None
            value = found[key_id][0]
            return value is not None and subkey in getattr(value.value, "data", {})

        answers = await asyncio.gather(*(has(peer) for _, peer in near))
        return [answer for answer in answers if answer is not None]

    async def _peers(self) -> Reading:
        connection = self._network.connection
        if connection is None:
            return not_applicable("p2pd is not up")
        if not self._network.expects_peers:
            return not_applicable("this is the first host of its swarm")
        if not self._network.peers:
            return failed("no other peer is known any more; check the network of this host")
        return OK

    async def _reachable(self) -> Reading:
        connection = self._network.connection
        if connection is None or connection.client or not self._asks_peers:
            return not_applicable("peers are not asked whether they can dial us")
        share = await ask_peers(connection.node)
        if share is None:
            return not_applicable("no peer has an opinion")
        if share < 0.5:
            return failed(
                f"only {share:.0%} of the peers that were asked can dial us; check port, firewall and swarm.announce"
            )
        return OK

    async def _clock(self) -> Reading:
        from hivemind.proto import dht_pb2
        from hivemind.utils.timed_storage import get_dht_time

        connection = self._network.connection
        if connection is None:
            return not_applicable("p2pd is not up")
        protocol: Any = connection.node.protocol
        peers = list(protocol.routing_table.peer_id_to_uid)[:_ASKED]

        async def offset(peer: Any) -> float | None:
            try:
                async with asyncio.timeout(_CALL_TIMEOUT_S):
                    asked = get_dht_time()
                    stub = protocol.get_stub(peer)
                    answer = await stub.rpc_ping(dht_pb2.PingRequest(validate=False))
                    return float(answer.dht_time - (asked + get_dht_time()) / 2)
            except Exception:  # hivemind raises what it likes
                return None

        offsets = [value for value in await asyncio.gather(*map(offset, peers)) if value is not None]
        if not offsets:
            return not_applicable("no peer can be asked for the time")
        return clock_reading(offsets)


def clock_reading(offsets: list[float]) -> Reading:
    """From peers' clocks minus ours, in seconds; the median, so that one peer's wrong clock says nothing."""
    middle = statistics.median(offsets)
    if abs(middle) > _CLOCK_LIMIT_S:
        return failed(f"our clock is {-middle:+.1f} s off: peers drop our records; set it by NTP")
    if abs(middle) > _CLOCK_WARN_S:
        return worse(f"our clock is {-middle:+.1f} s off; set it by NTP")
    return OK
