"""A bare DHT node on loopback, the entry of a test swarm: prints {"event": "listening", "maddrs": […]} and stays."""

from __future__ import annotations

import asyncio
import json
import signal

from petals_agent.p2p import light

light.install(without_torch=True)

from hivemind.dht.node import DHTNode  # noqa: E402


async def main() -> None:
    """Run until SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    node = await DHTNode.create(
        host_maddrs=["/ip4/127.0.0.1/tcp/0"],
        use_relay=False,
        use_auto_relay=False,
        nat_port_map=False,
        auto_nat=False,
    )
    maddrs = await node.protocol.p2p.get_visible_maddrs()
    print(json.dumps({"event": "listening", "maddrs": [str(maddr) for maddr in maddrs]}), flush=True)
    await stop.wait()
    await node.shutdown()


if __name__ == "__main__":
    asyncio.run(main())
