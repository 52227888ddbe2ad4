"""The network: ports to listen on, peers to join through, and whether others can reach us."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from petals_agent.config.values import parse_host_port
from petals_agent.doctor.check import Outcome, Result, Skip, ok, problem, warning, worst
from petals_agent.doctor.host import Host, Running
from petals_agent.errors import DaemonError
from petals_agent.p2p.daemon import check_ports

_UNPRIVILEGED = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")


async def check_listen_ports(host: Host) -> Result:
    """Each fixed port is free, or held by our own agent."""
    config, running = host.config, await host.running()
    listen = [(maddr, _port(maddr)) for maddr in config.swarm.listen if "/tcp/" in maddr]
    if config.metrics.listen != "off":
        listen.append(_metrics(config.metrics.listen))
    results = [
        port_result(maddr, port, running, host.account.uid, host.as_root) for maddr, port in listen if port
    ]
    if not results:
        return ok("a random port; fix one in swarm.listen to open it in a firewall")
    return worst(results)


def port_result(maddr: str, port: int, running: Running, uid: int, as_root: str) -> Result:
    """Look at one port by binding it for a moment."""
    if uid and port < _first_free_port():
        return problem(
            f"port {port} is for root alone, and the agent runs without privileges",
            "Choose one from 1024 on: petals-agent config show --origins | grep listen",
        )
    try:
        check_ports([maddr])
    except DaemonError as error:
        holder = holder_of(port)
        if is_ours(port, holder, running.status):
            return ok(f"port {port} is held by our own agent")
        unseen = running.status is not None and holder is None  # an agent of another user
        if running.forbidden or unseen:
            return Result(
                Outcome.SKIPPED, f"port {port} is taken, whether by our own agent is not known", as_root
            )
        by = f" (process {holder})" if holder else ""
        return problem(f"{error}{by}", f"See who has it: sudo ss -ltnp 'sport = :{port}'")
    return ok(f"port {port} is free")


def is_ours(port: int, holder: int | None, status: Mapping[str, Any] | None) -> bool:
    """Whether the agent with this status listens there, by its addresses or its processes."""
    if status is None:
        return False
    return any(_port(maddr) == port for maddr in status["maddrs"]) or (
        holder is not None and holder in status["pids"].values()
    )


def holder_of(port: int) -> int | None:
    """Who listens on a TCP port, where we may know."""
    try:
        connections = psutil.net_connections("tcp")
    except (psutil.Error, OSError):
        return None
    pids = (
        one.pid
        for one in connections
        if one.status == psutil.CONN_LISTEN and one.laddr and one.laddr.port == port
    )
    return next((pid for pid in pids if pid), None)


def _metrics(listen: str) -> tuple[str, int]:
    host, port = parse_host_port(listen)
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError:
        return listen, 0
    return f"/{'ip6' if family == socket.AF_INET6 else 'ip4'}/{address[0]}/tcp/{port}", port


def _first_free_port() -> int:
    try:
        return int(_UNPRIVILEGED.read_text())
    except (OSError, ValueError):
        return 1024


def _port(maddr: str) -> int:
    parts = maddr.split("/")
    return int(parts[parts.index("tcp") + 1]) if "tcp" in parts else 0


async def check_bootstrap(host: Host) -> Result:
    """Each bootstrap peer answers when it is dialled."""
    peers = host.config.swarm.entry_peers
    if not peers:
        return ok("none: this is the first host of its swarm")
    try:
        answers = await host.answers()
    except DaemonError as error:
        return problem(str(error), "Reinstall it: pip install --force-reinstall hivemind")
    silent = [answer for answer in answers if answer.problem is not None]
    if not silent:
        return ok(f"{len(answers)} of {len(answers)} answer")
    host_name, port = endpoint(silent[0].maddrs[0])
    remedy = f"See whether it is the network, a firewall or that host: nc -vz {host_name} {port}"
    words = (
        f"{len(silent)} of {len(answers)} do not answer, such as {silent[0].maddrs[0]} ({silent[0].problem})"
    )
    return problem(words, remedy) if len(silent) == len(answers) else warning(words, remedy)


def endpoint(maddr: str) -> tuple[str, str]:
    """Host and port of a multiaddress."""
    parts = maddr.split("/")
    return parts[2], parts[4]


async def check_reachability(host: Host) -> Result:
    """What peers say to the running agent."""
    swarm = host.config.swarm
    if swarm.reachability == "off":
        raise Skip('swarm.reachability is "off"')
    running = await host.running()
    if running.status is None:
        raise Skip(
            f"only peers can tell, and only a running agent can ask them: {running.why}",
            host.as_root if running.forbidden else "Start it and ask again: petals-agent status",
        )
    return judge_reachability(running.status["relayed"], swarm.relay)


def judge_reachability(relayed: bool | None, relay: bool) -> Result:
    """From what the agent found out; a pure function."""
    if relayed is None:
        raise Skip("the agent has not found out yet", "Ask again when it is online: petals-agent status")
    if not relayed:
        return ok("peers reach us directly")
    remedy = "Forward a fixed swarm.listen port to this host and name it in swarm.announce, then: petals-agent config check"
    if relay:
        return warning("most peers cannot dial us, and reach us through slower relays", remedy)
    return problem("most peers cannot dial us, and swarm.relay is off", remedy)


async def check_addresses(host: Host) -> Result:
    """A public swarm needs an address that the whole internet can dial."""
    swarm = host.config.swarm
    running = await host.running()
    if swarm.announce:
        maddrs, source = list(swarm.announce), "swarm.announce"
    elif running.status is not None:
        maddrs, source = list(running.status["maddrs"]), "the agent announces"
    else:
        maddrs, source = interface_addresses(), "this host has"
    return judge_addresses(maddrs, source, any(map(is_public, swarm.entry_peers)))


def judge_addresses(maddrs: Sequence[str], source: str, public_swarm: bool) -> Result:
    """Whether these addresses fit the swarm; a pure function."""
    public = [maddr for maddr in maddrs if is_public(maddr)]
    if public:
        return ok(f"{source}: {', '.join(public[:3])}")
    if not public_swarm:
        return ok("private addresses, as the swarm's own are")
    return warning(
        f"{source} only private addresses, and the swarm is public",
        "Forward a port to this host and name it in swarm.announce, such as /ip4/$(curl -s ifconfig.me)/tcp/31330",
    )


def is_public(maddr: str) -> bool:
    """Whether everybody can dial it: a global IP address, or a name that is not local."""
    _, family, address, *rest = [*maddr.split("/"), "", "", ""]
    if "p2p-circuit" in rest:  # a relay's address
        return False
    if family in ("dns", "dns4", "dns6"):
        return "." in address.rstrip(".") and not address.rstrip(".").endswith(
            (".local", ".internal", ".lan")
        )
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:
        return False


def interface_addresses() -> list[str]:
    """Addresses of this host's interfaces, as multiaddresses without a port."""
    found: Iterable[Any] = (one for of in psutil.net_if_addrs().values() for one in of)
    families = {socket.AF_INET: "ip4", socket.AF_INET6: "ip6"}
    return [f"/{families[one.family]}/{one.address.split('%')[0]}" for one in found if one.family in families]
