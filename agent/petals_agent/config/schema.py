"""Every section and key of petals-agent.toml with its default; pure data, checked when it is made."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator
from pydantic_core import PydanticCustomError

from petals_agent.config.kinds import (
    AnnounceAddresses,
    AutoCount,
    Blocks,
    Count,
    CountLimit,
    Device,
    DiskLimit,
    Duration,
    FilePath,
    FilePaths,
    HostPort,
    ListenAddresses,
    ModelSource,
    ModelSources,
    Networks,
    OptionalHostPort,
    PeerAddresses,
    PeerIds,
    Prefix,
    ProbeName,
    Reachability,
    SocketPath,
    Switch,
    Text,
    Texts,
    Throughput,
    TokenPath,
)
from petals_agent.config.origin import DEFAULT, Origin
from petals_agent.config.places import places
from petals_agent.config.public_swarm import PUBLIC_INITIAL_PEERS
from petals_agent.config.values import YEAR_S, parse_span

NOT_YET = frozenset(
    {
        "model.adapters",
        "access",
    }
)
"""Keys and whole sections that are checked but take effect from a later version; who makes one work removes it here."""


class Section(BaseModel):
    """Base of all sections: frozen, no unknown keys, no silent conversions."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelConfig(Section):
    """[model]: which model, in which form, kept where."""

    path: ModelSource = ""
    revision: Text = Field(default="main", min_length=1)
    dht_prefix: Prefix = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["none"] = "none"
    adapters: ModelSources = ()
    token_file: TokenPath = None
    cache_dir: FilePath = Field(default_factory=lambda: places(os.environ).cache / "models")
    max_disk: DiskLimit = "unlimited"

    @property
    def folder(self) -> Path | None:
        """The model's folder, or None when `path` is a Hub repository."""
        return Path(self.path) if self.path.startswith("/") else None

    @model_validator(mode="after")
    def _folder_has_prefix(self) -> ModelConfig:
        if self.folder is not None and self.dht_prefix == "auto":
            raise conflict("dht_prefix", "a model in a folder has no repository name to derive it from")
        return self


class SwarmConfig(Section):
    """[swarm]: how this host joins and what it announces; times in seconds."""

    initial_peers: PeerAddresses = "public"
    listen: ListenAddresses = ("/ip4/0.0.0.0/tcp/0", "/ip6/::/tcp/0")
    announce: AnnounceAddresses = ()
    identity: FilePath = Field(default_factory=lambda: places(os.environ).state / "identity.key")
    public_name: Text = Field(default="", max_length=100)
    relay: Switch = True
    reachability: Reachability = "peers"
    update_period: Duration = Field(default=120.0, ge=1, le=3600)
    daemon_startup_timeout: Duration = Field(default=60.0, ge=1, le=3600)

    @property
    def entry_peers(self) -> tuple[str, ...]:
        """Multiaddresses to join through; empty for the first node of a new swarm."""
        return PUBLIC_INITIAL_PEERS if self.initial_peers == "public" else tuple(self.initial_peers)


class ServeConfig(Section):
    """[serve]: which blocks, on what, within which limits; times in seconds, lengths and batches in tokens."""

    blocks: Blocks = "auto"
    num_blocks: AutoCount = "auto"
    device: Device = "auto"
    throughput: Throughput = "auto"
    cache_tokens: AutoCount = "auto"
    max_batch_size: AutoCount = "auto"
    inference_max_length: AutoCount = "auto"
    max_sessions: Count = 1024
    compression: Literal[
        "none", "float16", "meanstd_16bit", "quantile_8bit", "uniform_8bit", "blockwise_8bit"
    ] = "none"
    request_timeout: Duration = Field(default=180.0, gt=0, le=YEAR_S)
    session_timeout: Duration = Field(default=1800.0, gt=0, le=YEAR_S)
    step_timeout: Duration = Field(default=300.0, gt=0, le=YEAR_S)
    max_alloc_timeout: Duration = Field(default=600.0, ge=0, le=YEAR_S)
    drain_timeout: Duration = Field(default=5.0, ge=0, le=YEAR_S)

    @property
    def span(self) -> tuple[int, int] | None:
        """Blocks [start, end) when they are fixed, else None."""
        return None if self.blocks == "auto" else parse_span(self.blocks)

    @model_validator(mode="after")
    def _count_fits_span(self) -> ServeConfig:
        if self.span is not None and self.num_blocks not in ("auto", self.span[1] - self.span[0]):
            raise conflict(
                "num_blocks", f'serve.blocks = "{self.blocks}" fixes the number already; leave one out'
            )
        return self


class BalanceConfig(Section):
    """[balance]: when to check the swarm's balance, and what a move must bring; times in seconds, gain as a share."""

    enabled: Switch = True
    balance_quality: float = Field(default=0.75, ge=0, le=100)
    mean_balance_check_period: Duration = Field(default=120.0, gt=0, le=YEAR_S)
    mean_block_selection_delay: Duration = Field(default=5.0, ge=0, le=3600)
    min_gain: float = Field(default=0.1, ge=0, le=100)
    cooldown: Duration = Field(default=600.0, ge=0, le=YEAR_S)
    drain_timeout: Duration = Field(default=300.0, ge=0, le=YEAR_S)


class ProbeConfig(Section):
    """[health.probes.NAME]: overrides of one probe; what is left out stays as the probe declares it."""

    period: Duration | None = Field(default=None, gt=0, le=YEAR_S)
    timeout: Duration | None = Field(default=None, gt=0, le=YEAR_S)
    failures: Count | None = None


class HealthConfig(Section):
    """[health]: how probes are run and how much is repaired."""

    repair: Switch = True
    ready: Literal["online", "joining"] = "online"
    recoveries_per_hour: int = Field(default=12, ge=0, le=3600)
    probes: dict[ProbeName, ProbeConfig] = {}


class PluginsConfig(BaseModel):
    """[plugins], and one free table [plugins.NAME] per plugin, which that plugin's own model checks."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)
    __pydantic_extra__: dict[str, dict[str, Any]] = Field(init=False)

    enabled: Switch = True
    dirs: FilePaths = (Path("/etc/petals-agent/plugins"),)
    timeout: Duration = Field(default=5.0, gt=0, le=3600)
    pause_period: Duration = Field(default=10.0, ge=0.1, le=3600)

    @property
    def tables(self) -> dict[str, dict[str, Any]]:
        """The table of each plugin by its name, unchecked."""
        return dict(self.__pydantic_extra__ or {})


class AccessConfig(Section):
    """[access]: which peers are served (empty `allow_peers`: all that are not denied), and how much of each."""

    allow_peers: PeerIds = ()
    deny_peers: PeerIds = ()
    max_sessions_per_peer: CountLimit = "unlimited"
    max_requests_per_minute: CountLimit = "unlimited"


class HeartbeatConfig(Section):
    """[heartbeat]: a fleet that must stay consistent; off without a group and members. Period in seconds."""

    group: Text = Field(default="", max_length=100)
    members: PeerIds = ()
    size: AutoCount = "auto"
    period: Duration = Field(default=60.0, ge=1, le=YEAR_S)
    on_failure: Literal["exit", "unhealthy", "log"] = "unhealthy"


class MetricsConfig(Section):
    """[metrics]: Prometheus text over HTTP."""

    listen: OptionalHostPort = "off"


class MonitorConfig(Section):
    """[monitor]: the swarm's web page and API, run by its own unit. Period and retention in seconds."""

    listen: HostPort = "127.0.0.1:8099"
    prefixes: Texts = ()
    period: Duration = Field(default=30.0, ge=1, le=3600)
    trusted_proxies: Networks = ()
    history: FilePath = Field(default_factory=lambda: places(os.environ).state / "monitor.sqlite")
    retention: Duration = Field(default=30 * 86400.0, gt=0, le=YEAR_S)


class ControlConfig(Section):
    """[control]: the socket that `petals-agent status` and its siblings talk to."""

    socket: SocketPath = Field(default_factory=lambda: places(os.environ).runtime / "control.sock")


class LogConfig(Section):
    """[log]: how much is logged, in which form."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "text", "json"] = "auto"


class Config(Section):
    """The whole configuration. Get one from `load_config`, or from `config_from` without files."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    swarm: SwarmConfig = Field(default_factory=SwarmConfig)
    serve: ServeConfig = Field(default_factory=ServeConfig)
    balance: BalanceConfig = Field(default_factory=BalanceConfig)
    health: HealthConfig = Field(default_factory=HealthConfig)
    plugins: PluginsConfig = Field(default_factory=PluginsConfig)
    access: AccessConfig = Field(default_factory=AccessConfig)
    heartbeat: HeartbeatConfig = Field(default_factory=HeartbeatConfig)
    metrics: MetricsConfig = Field(default_factory=MetricsConfig)
    monitor: MonitorConfig = Field(default_factory=MonitorConfig)
    control: ControlConfig = Field(default_factory=ControlConfig)
    log: LogConfig = Field(default_factory=LogConfig)

    _origins: dict[tuple[str, ...], Origin] = PrivateAttr(default_factory=dict)

    @property
    def state_dir(self) -> Path:
        """Where the agent keeps what must outlive it: beside its identity, so that two agents never share it."""
        return self.swarm.identity.parent

    def origin(self, key: str, *names: str) -> Origin:
        """Where "section.key" was set, for error messages; `names` of tables in it may hold dots."""
        return self._origins.get((*key.split("."), *names), DEFAULT)

    @model_validator(mode="after")
    def _dtype_is_possible(self) -> Config:
        if self.serve.device == "cpu" and self.model.dtype == "float16":
            raise conflict(
                "model", "dtype", 'float16 does not compute on serve.device = "cpu"; take another dtype'
            )
        if self.model.dtype == "bfloat16" and self.serve.compression in ("float16", "meanstd_16bit"):
            raise conflict("serve", "compression", 'it cannot carry model.dtype = "bfloat16"')
        return self

    def __eq__(self, other: object) -> bool:
        """By values: where they came from makes no difference."""
        return isinstance(other, Config) and self.model_dump() == other.model_dump()

    __hash__ = None  # type: ignore[assignment]


def conflict(*key_and_reason: str) -> PydanticCustomError:
    """A key that is right by itself but not beside another; the last argument is the reason."""
    *key, reason = key_and_reason
    return PydanticCustomError("conflict", "{reason}", {"reason": reason, "key": tuple(key)})
