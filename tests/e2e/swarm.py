"""A swarm inside one machine: the packaged entry node, and the packaged agent with the demo's model."""

from __future__ import annotations

import json
import re
from typing import Any

from e2e.machine import Machine
from harness.processes import wait_until

APP = "/usr/lib/petals-agent"
MODEL = f"{APP}/lib/python3.11/site-packages/petals_agent/demo/model"
CONFIG = "/etc/petals-agent/petals-agent.toml"
BLOCKS = 8
AGENT, ENTRY = "petals-agent.service", "petals-agent-bootstrap.service"
LISTEN = "/ip4/127.0.0.1/tcp/31337"
# a reader of its own, with the installed code: prints {peer id: state of its first block}
READ_STATES = """
import asyncio, json, sys
from petals_agent.p2p import light
light.install(without_torch=True)
from hivemind.dht.node import DHTNode
from petals_agent.swarm.view import read_view
async def main():
    node = await DHTNode.create(initial_peers=[sys.argv[1]], client_mode=True, use_relay=False, use_auto_relay=False)
    view = await read_view(node, "demo", 8, timeout=20)
    assert not view.unread, view.unread
    print(json.dumps({record.peer_id: record.info.state.name for record in view.records}))
    await node.shutdown()
asyncio.run(main())
"""


class Swarm:
    """Made: the entry node is up and the agent's configuration is edited, as a person would with an editor."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        drop_in = machine.path("/etc/systemd/system/petals-agent-bootstrap.service.d/listen.conf")
        drop_in.parent.mkdir()
        drop_in.write_text(f'[Service]\nEnvironment="BOOTSTRAP_OPTIONS=--listen {LISTEN}"\n')
        machine.run("systemctl", "daemon-reload")
        machine.run("systemctl", "start", ENTRY)
        self.entry = wait_until(self._address, 60, "the entry node's address in the journal")
        self.edit(
            model__path=MODEL,
            model__dht_prefix="demo",
            model__dtype="float32",
            swarm__initial_peers=[self.entry],
            swarm__listen=["/ip4/127.0.0.1/tcp/31330"],
            serve__blocks=f"0:{BLOCKS}",
            serve__throughput=1.0,
        )

    def _address(self) -> str:
        found = re.search(rf"{LISTEN}/p2p/\w+", self.machine.log(ENTRY))
        return found[0] if found else ""

    def edit(self, path: str = CONFIG, **values: Any) -> None:
        """Remove the # before keys (section__key) and set them."""
        file = self.machine.path(path)
        text = file.read_text()
        for name, value in values.items():
            section, key = name.split("__")
            pattern = rf"(?ms)^(\[{section}\]$.*?)^#?{key} = [^\n]*$"
            line = f"{key} = {json.dumps(value)}".replace("\\", r"\\")
            text, count = re.subn(pattern, rf"\g<1>{line}", text, count=1)
            assert count == 1, f"{path} has no {section}.{key}"
        file.write_text(text)

    def start(self) -> None:
        """systemctl start, which returns when the agent is READY."""
        done = self.machine.run("systemctl", "start", AGENT, check=False, timeout=150)
        assert done.returncode == 0, f"{done.stderr}\n{self.machine.log(AGENT)}"

    def status(self) -> dict[str, Any]:
        """What `petals-agent status --json` says."""
        return dict(json.loads(self.machine.run("petals-agent", "status", "--json").stdout))

    def states(self) -> dict[str, str]:
        """Announced state of each peer, read from the DHT by somebody else."""
        reader = [f"{APP}/bin/python", "-c", READ_STATES, self.entry]
        return dict(json.loads(self.machine.run(*reader, timeout=90).stdout))

    def generate(self, prompt: str, tokens: int) -> dict[str, Any]:
        """A text through the swarm, by the packaged client."""
        command = ["petals-agent", "generate", prompt, "--config", CONFIG, "--max-new-tokens", str(tokens)]
        return dict(json.loads(self.machine.run(*command, "--json", timeout=120).stdout))
