"""`petals-agent plan MODEL`: what serving a model would take and what fits on this host, before anything large is fetched."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from petals_agent.config.schema import Config
from petals_agent.errors import ConfigError, UnsupportedModel

if TYPE_CHECKING:
    from petals_agent.models.plan import Room, Wishes
    from petals_agent.models.source import ModelSource


@dataclass(frozen=True)
class Plan:
    """What `--json` prints. Names are stable; sizes in bytes, `span` as "start:end"."""

    model: str
    supported: bool
    model_type: str
    commit: str | None
    num_blocks: int
    dtype_of_checkpoint: str
    quantization: str | None
    dht_prefix: str | None
    span: str | None  # as configured, else an example of as many blocks as fit best
    span_bytes: int  # of the shards that hold it
    download_bytes: int  # of them, those that are not here yet
    devices: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def plan(
    model: Annotated[
        str | None, typer.Argument(help="A folder or a Hub repository; default: the configured one.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="Take limits, cache and token from this file.")
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu or cuda:N; default: every one of this host.")
    ] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object, for scripts.")] = False,
) -> None:
    """What a model takes and what fits here: memory, blocks, cache, download. Fetches no weights."""
    from petals_agent.cli.settings import configured
    from petals_agent.models.families import FAMILIES

    settings = configured(config, None, require_model=False)
    configured_model = model is None or model == settings.model.path
    model = model or settings.model.path
    if not model:
        raise ConfigError("which model? Name one, as in: petals-agent plan Qwen/Qwen3-8B")
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise ConfigError(f"--dtype {dtype}: choose float32, bfloat16 or float16")
    revision = revision or (settings.model.revision if configured_model else None)
    notes: list[str] = []
    try:
        with ExitStack() as kept:
            source = _open(model, revision, settings, notes, kept)
            result = _plan(source, settings if configured_model else None, settings, device, dtype, notes)
    except UnsupportedModel as error:
        if not json_:
            raise
        said = {"model": model, "supported": False, "reason": str(error), "families": sorted(FAMILIES)}
        typer.echo(json.dumps(said))
        raise typer.Exit(error.exit_code) from None
    if json_:
        typer.echo(json.dumps(asdict(result)))
    else:
        _print(result)


def _open(
    model: str, revision: str | None, settings: Config, notes: list[str], kept: ExitStack
) -> ModelSource:
    """Raises CheckpointError when there is no such model, or no network to ask the Hub."""
    from petals_agent.models.source import open_model

    token = None
    if settings.model.token_file is not None:
        try:
            token = settings.model.token_file.read_text().strip()
        except OSError as error:
            notes.append(
                f"{settings.model.token_file} cannot be read ({error.strerror}): asking without a token"
            )
    cache = settings.model.cache_dir
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    if not os.access(existing, os.W_OK | os.X_OK) and not Path(model).is_dir():
        notes.append(
            f"{cache} cannot be used by this user, so what lies there counts as not downloaded; use sudo"
        )
        cache = Path(kept.enter_context(tempfile.TemporaryDirectory(prefix="petals-agent-plan-")))
    return open_model(model, revision, cache, token)


def _plan(
    source: ModelSource,
    of_this_model: Config | None,
    settings: Config,
    device: str | None,
    dtype: str | None,
    notes: list[str],
) -> Plan:
    from petals_agent.models.families import quantization
    from petals_agent.models.plan import fit

    facts = source.facts
    span = of_this_model.serve.span if of_this_model is not None else None
    if span is not None and span[1] > facts.num_blocks:
        raise ConfigError(
            f"serve.blocks = {span[0]}:{span[1]}, but {source.name} has {facts.num_blocks} blocks"
        )
    wishes = _wishes(of_this_model, settings, span, dtype)
    fits = [fit(facts, room, wishes) for room in _rooms(device, notes)]
    blocks = max((one.blocks for one in fits), default=0)
    if span is None and blocks:
        span = (0, blocks)
    total, missing = source.download_size(source.block_tensors(*span)) if span else (0, 0)
    prefix = facts.dht_prefix
    if of_this_model is not None and of_this_model.model.dht_prefix != "auto":
        prefix = of_this_model.model.dht_prefix
    return Plan(
        model=source.name,
        supported=True,
        model_type=facts.model_type,
        commit=facts.revision,
        num_blocks=facts.num_blocks,
        dtype_of_checkpoint=facts.dtype,
        quantization=quantization(source.config),
        dht_prefix=prefix,
        span=f"{span[0]}:{span[1]}" if span else None,
        span_bytes=total,
        download_bytes=missing,
        devices=[{**asdict(one), "fits": one.fits} for one in fits],
        notes=notes,
    )


def _wishes(
    of_this_model: Config | None, settings: Config, span: tuple[int, int] | None, dtype: str | None
) -> Wishes:
    from petals_agent.models.plan import Wishes

    serve = settings.serve

    def number(value: int | str) -> int | None:
        return None if isinstance(value, str) else value

    blocks = (span[1] - span[0] if span else number(serve.num_blocks)) if of_this_model is not None else None
    own = of_this_model.model.dtype if of_this_model is not None else "auto"
    return Wishes(dtype or own, blocks, number(serve.cache_tokens), number(serve.max_batch_size))


def _rooms(wanted: str | None, notes: list[str]) -> list[Room]:
    """The devices to plan for. Raises ConfigError for one that is not there."""
    from petals_agent.models.devices import ask_torch, has_nvidia_driver, nvidia_cards
    from petals_agent.models.memory import cpu_free, usable
    from petals_agent.models.plan import Room

    wanted = "cuda:0" if wanted == "cuda" else wanted
    rooms = [Room("cpu", "CPU", usable("cpu", cpu_free()))]
    problem = "there is no NVIDIA driver"
    if wanted != "cpu" and has_nvidia_driver():
        seen = ask_torch()
        rooms += [Room(gpu.device, gpu.name, usable("cuda", gpu.free)) for gpu in seen.gpus]
        problem = f"torch {seen.version or ''} sees {len(seen.gpus)} CUDA devices"
        if not seen.gpus:
            notes.append(
                f"torch uses no GPU of this host ({seen.problem or problem}); see petals-agent doctor"
            )
    elif wanted != "cpu" and nvidia_cards():
        notes.append("this host has an NVIDIA card but its driver is not loaded; see petals-agent doctor")
    chosen = [room for room in rooms if wanted in (None, room.device)]
    if not chosen:
        raise ConfigError(f"--device {wanted} is not there: {problem}; take cpu, or see petals-agent doctor")
    return chosen


def _print(result: Plan) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    head = Table.grid(padding=(0, 2))
    head.add_column(style="bold")
    head.add_column(overflow="fold")
    packed = f", packed as {result.quantization}" if result.quantization else ""
    at = f" at {result.commit[:8]}" if result.commit else ""
    head.add_row("model", escape(f"{result.model}{at}"))
    head.add_row("supported", f"yes, as {result.model_type}")
    head.add_row("blocks", f"{result.num_blocks}, stored in {result.dtype_of_checkpoint}{packed}")
    head.add_row("DHT prefix", escape(result.dht_prefix or "none for a folder: set model.dht_prefix"))
    if result.span:
        size, missing = _size(result.span_bytes), _size(result.download_bytes)
        local = result.commit is None
        head.add_row(
            "download",
            f"none, blocks {result.span} take {size} on disk"
            if local
            else f"{missing} for blocks {result.span} (files of {size})",
        )
    console.print(head)
    console.print(_devices(result.devices))
    for one in result.devices:
        if not one["fits"]:
            what = f"{one['blocks']} blocks" if one["blocks"] else "one block"
            console.print(
                f"{one['device']}: {what} with {one['cache_tokens']} tokens of cache would take "
                f"{_size(one['needed_bytes'])}, and {_size(one['free_bytes'])} can be used",
                style="yellow",
            )
    for note in result.notes:
        console.print(f"note: {note}", markup=False)


def _devices(devices: Sequence[dict[str, Any]]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table("device", "usable", "dtype", "per block", "KV/token", "blocks", "cache", box=None)
    for one in devices:
        name = one["device"] if one["device"] == "cpu" else f"{one['device']} {one['name']}"
        table.add_row(
            escape(name),
            _size(one["free_bytes"]),
            one["dtype"],
            _size(one["block_bytes"]),
            f"{one['kv_bytes_per_token']} B",
            str(one["fit_blocks"]),
            f"{one['max_cache_tokens']} tokens" if one["blocks"] else "none",
        )
    cache = devices[0]["cache_tokens"]
    table.caption = (
        f"blocks: that fit with {cache} tokens of cache each; cache: what fits beside the blocks to serve"
    )
    table.caption_justify = "left"
    return table


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**27 else f"{count / 2**20:.2f} MiB"
