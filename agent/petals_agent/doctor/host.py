"""What several checks look at, found out once: configuration, running agent, bootstrap peers, torch, the model."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from petals_agent.config import Config, InvalidConfig, Loaded, read_config
from petals_agent.config.load import find_file
from petals_agent.config.places import FILE_NAME, SYSTEM_FOLDER
from petals_agent.doctor import systemd
from petals_agent.doctor.account import Account, agent_account
from petals_agent.doctor.check import Skip
from petals_agent.doctor.peers import Answer, ask_peers
from petals_agent.doctor.threads import in_thread
from petals_agent.errors import ModelError, SwarmError
from petals_agent.models.devices import TorchView, ask_torch
from petals_agent.models.facts import ModelFacts
from petals_agent.models.hub import hub_answers
from petals_agent.models.memory import cpu_free, usable
from petals_agent.models.plan import Fit, Room, Wishes, fit
from petals_agent.models.source import ModelSource, open_model
from petals_agent.supervisor.control import ask

T = TypeVar("T")
_STATUS_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Running:
    """The agent of this configuration: its status, or why it did not give one."""

    status: Mapping[str, Any] | None
    why: str = ""
    forbidden: bool = False  # one may be there, but we may not ask it

    @property
    def state(self) -> str | None:
        """ "online", "joining", …; None without an agent to ask."""
        return str(self.status["state"]) if self.status is not None else None


class Host:
    """Everything is asked for at the first use and kept. Methods raise Skip where a check cannot be made."""

    def __init__(self, config_path: Path | None = None, environ: Mapping[str, str] = os.environ) -> None:
        self.loaded: Loaded | None = None
        self.mistakes: InvalidConfig | None = None
        self.file, self.looked_at = find_file(config_path, environ)
        try:
            self.loaded = read_config(config_path, None, environ)
        except InvalidConfig as error:
            self.mistakes = error
        socket = self.loaded.config.control.socket if self.loaded is not None else None
        self.account: Account = agent_account(self.file, socket)
        self._asked: dict[str, asyncio.Task[Any]] = {}

    @property
    def config(self) -> Config:
        """Raises Skip when it is not valid."""
        if self.loaded is None:
            raise Skip("there is no valid configuration to go by")
        return self.loaded.config

    @property
    def as_root(self) -> str:
        """The remedy where we have no permission to look."""
        named = f" --config {self.file}" if self.file is not None else ""
        return f"Look as root: sudo petals-agent doctor{named}"

    @property
    def unit(self) -> str | None:
        """The systemd unit that runs this configuration; None for one that is not in /etc/petals-agent."""
        if self.file is None or self.file.parent != SYSTEM_FOLDER:
            return None
        return (
            "petals-agent.service"
            if self.file.name == FILE_NAME
            else f"petals-agent@{self.file.stem}.service"
        )

    async def running(self) -> Running:
        """Ask the agent over its control socket."""
        return await self._once("running", self._ask_agent)

    async def answers(self) -> list[Answer]:
        """What each bootstrap peer answers when it is dialled."""
        peers = self.config.swarm.entry_peers
        return await self._once("answers", lambda: ask_peers(peers))

    async def torch(self) -> TorchView:
        """What the installed torch sees, from another process."""
        return await self._once("torch", lambda: in_thread(ask_torch))

    async def unit_properties(self) -> Mapping[str, str]:
        """`systemctl show` of our unit; empty without systemd or a unit of this configuration."""
        unit = self.unit
        if unit is None:
            return {}
        return await self._once("unit", lambda: in_thread(lambda: systemd.show(unit)))

    async def model(self) -> ModelSource:
        """The configured model; no weights are read. Raises ModelError, or Skip without a configuration."""
        return await self._once("model", lambda: in_thread(self._open_model))

    async def facts(self) -> ModelFacts:
        """Its sizes, from the headers of all shards. Raises ModelError."""
        source = await self.model()
        return await self._once("facts", lambda: in_thread(lambda: source.facts))

    async def online(self) -> bool:
        """Whether the Hub answers for the model's repository. Raises CheckpointError when it says no."""
        model = self.config.model

        def look() -> bool:
            return hub_answers(model.path, model.revision, self.token())

        return await self._once("online", lambda: in_thread(look))

    async def fit(self) -> Fit:
        """What of the model fits on the configured device. Raises Skip when the model or the device is not there."""
        serve, model = self.config.serve, self.config.model
        try:
            facts = await self.facts()
        except ModelError:
            raise Skip('the model cannot be opened, as the check "model" says') from None
        device = "cuda:0" if serve.device == "cuda" else serve.device
        room = Room("cpu", "CPU", usable("cpu", cpu_free()))
        if device != "cpu":
            gpus = {
                gpu.device: Room(gpu.device, gpu.name, usable("cuda", gpu.free))
                for gpu in (await self.torch()).gpus
            }
            if device != "auto" and device not in gpus:
                raise Skip(f"{device} is not there")
            room = gpus.get("cuda:0" if device == "auto" else device, room)
        span = serve.span
        blocks = span[1] - span[0] if span else None if serve.num_blocks == "auto" else serve.num_blocks
        cache = None if serve.cache_tokens == "auto" else serve.cache_tokens
        batch = None if serve.max_batch_size == "auto" else serve.max_batch_size
        return fit(facts, room, Wishes(model.dtype, blocks, cache, batch))

    def token(self) -> str | None:
        """The Hub token that is configured; raises PermissionError when we may not read it."""
        file = self.config.model.token_file
        return file.read_text().strip() if file is not None else None

    def _open_model(self) -> ModelSource:
        model = self.config.model
        return open_model(model.path, model.revision, model.cache_dir, self.token())

    async def _ask_agent(self) -> Running:
        socket = self.config.control.socket
        try:
            forbidden = socket.exists() and not os.access(socket, os.W_OK)
        except PermissionError:
            forbidden = True
        if forbidden:
            return Running(None, f"no permission to talk to the agent at {socket}", forbidden=True)
        try:
            return Running(await ask(socket, {"do": "status"}, _STATUS_TIMEOUT_S))
        except SwarmError as error:
            return Running(None, str(error))

    async def _once(self, name: str, look: Callable[[], Coroutine[Any, Any, T]]) -> T:
        if name not in self._asked:
            self._asked[name] = asyncio.create_task(look(), name=f"doctor: {name}")
        return await asyncio.shield(self._asked[name])
