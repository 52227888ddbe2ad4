"""Which backend serves a span: the fastest whose outputs pass the self-check at load.

lean    own forward for Llama-like blocks, checked against the textbook's formulas, or against transformers' module when
        config.json holds a setting that we do not know
packed  transformers' modules with our attention, for families that call its AttentionInterface
padded  transformers' modules as they are, for the rest
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from petals_agent import __version__
from petals_agent.engine.backend import Backend
from petals_agent.engine.lean import KNOWN_SETTINGS, LeanBackend, LeanConfig, tensor_names
from petals_agent.engine.selfcheck import TOLERANCE, Plain, error_of
from petals_agent.engine.textbook import textbook_block
from petals_agent.errors import CheckpointError, UnsupportedModel
from petals_agent.log import event
from petals_agent.models.checkpoint import Checkpoint
from petals_agent.models.memory import return_freed_memory
from petals_agent.models.source import ModelSource, OnProgress, Progress

log = logging.getLogger("petals_agent.backends")


@dataclass(frozen=True)
class SpanRequest:
    """What is to be loaded; block numbers absolute."""

    source: ModelSource
    start: int
    end: int
    dtype: torch.dtype
    device: torch.device
    progress: OnProgress


def load_backend(request: SpanRequest, verdicts: Path) -> Backend:
    """Blocks ready to run. `verdicts` is a file in which the outcome of lean's self-check is kept.

    Raises ModelError: an unsupported family, a bad checkpoint, or modules that fail every check.
    """
    lean = _lean(request, verdicts)
    return lean if lean is not None else _modules(request)


# --- lean


def _lean(request: SpanRequest, verdicts: Path) -> LeanBackend | None:
    config = LeanConfig.read(request.source.config)
    if config is None:
        return None
    key = _verdict_key(request)
    checkpoint = Checkpoint.open(
        request.source, request.source.block_tensors(request.start, request.end), request.progress
    )
    if not _has_the_shapes(checkpoint, request, config):
        return None  # transformers' modules say what is wrong, or know better
    with torch.inference_mode(False), torch.no_grad():
        if not _check_lean(config, checkpoint, request, verdicts, key):
            return None
        total = request.end - request.start
        backend = LeanBackend(config, request.dtype, request.device)
        for number in range(request.start, request.end):
            tensors = _block_tensors(checkpoint, number)
            _check_finite(checkpoint, number, tensors, request.dtype)
            backend.append(tensors, number)
            return_freed_memory()
            request.progress(Progress(f"block {number}", number + 1 - request.start, total))
    return backend


def _check_lean(
    config: LeanConfig, checkpoint: Checkpoint, request: SpanRequest, verdicts: Path, key: str
) -> bool:
    """Check the first block of each kind; the verdict on transformers' module is kept, since that one is slow to load."""
    kinds = {config.windows[number]: number for number in reversed(range(request.start, request.end))}
    if KNOWN_SETTINGS.issuperset(request.source.config):
        return all(_lean_error(config, checkpoint, request, number) for number in kinds.values())
    known = _read_verdicts(verdicts).get(key)
    if known is None:
        known = all(
            _lean_error(config, checkpoint, request, number, against_modules=True)
            for number in kinds.values()
        )
        _write_verdict(verdicts, key, known)
    return known


def _lean_error(
    config: LeanConfig,
    checkpoint: Checkpoint,
    request: SpanRequest,
    number: int,
    against_modules: bool = False,
) -> bool:
    """Whether the lean backend computes block `number` right."""
    tensors = _block_tensors(checkpoint, number)
    backend = LeanBackend(config, request.dtype, request.device)
    backend.append(tensors, number)
    plain: Plain
    if against_modules:
        from petals_agent.models.span import load_span

        plain = load_span(request.source, number, number + 1, request.dtype, request.device)
    else:
        plain = lambda hidden: textbook_block(config, tensors, number, hidden)  # noqa: E731
    error = error_of(backend, plain, number, number + 1)
    _tell_check(backend.name, error, block=number)
    return error <= TOLERANCE[request.dtype]


def _block_tensors(checkpoint: Checkpoint, number: int) -> Mapping[str, torch.Tensor]:
    stored = checkpoint.tensors
    return {short: stored[name].read() for short, name in tensor_names(number).items() if name in stored}


def _has_the_shapes(checkpoint: Checkpoint, request: SpanRequest, config: LeanConfig) -> bool:
    """Whether each block has just the weights, in the shapes, that config.json asks for."""
    shapes = config.shapes()
    expected = {
        tensor_names(number)[short]: shape
        for number in range(request.start, request.end)
        for short, shape in shapes.items()
    }
    stored = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    return expected == {name: s for name, s in stored.items() if not name.endswith("rotary_emb.inv_freq")}


def _check_finite(
    checkpoint: Checkpoint, number: int, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> None:
    """Raise a CheckpointError if a weight is NaN or infinite in the dtype that is served."""
    for short, tensor in tensors.items():
        if not tensor.to(dtype).sum(dtype=torch.float32).isfinite():
            stored = checkpoint.tensors[tensor_names(number)[short]]
            raise CheckpointError(
                f"{stored.path}: tensor {stored.name} holds NaN or Inf in {dtype}; get the file again, or set "
                "model.dtype to bfloat16 or float32"
            )


def _verdict_key(request: SpanRequest) -> str:
    """All that the verdict depends on: the model's settings, dtype, device, and the code on both sides."""
    facts = (
        json.dumps(request.source.config, sort_keys=True, default=str),
        str(request.dtype),
        request.device.type,
        __version__,
        importlib.metadata.version("transformers"),
        torch.__version__,
        Path(LeanBackend.step.__code__.co_filename).read_text(),
    )
    return hashlib.sha256("|".join(facts).encode()).hexdigest()


def _read_verdicts(path: Path) -> dict[str, bool]:
    try:
        entries = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return (
        {key: value for key, value in entries.items() if type(value) is bool}
        if isinstance(entries, dict)
        else {}
    )


def _write_verdict(path: Path, key: str, verdict: bool) -> None:
    """Kept so that a restart need not load transformers to learn the same again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".new")
        temporary.write_text(json.dumps({**_read_verdicts(path), key: verdict}, indent=1))
        temporary.rename(path)
    except OSError as error:
        log.warning("the self-check's verdict could not be kept in %s: %s", path, error)


def _tell_check(backend: str, error: float, **fields: object) -> None:
    text = f"self-check of the {backend} backend: relative error {error:.1e}"
    log.info("%s", text, extra=event("self_check", backend=backend, error=error, **fields))


# --- transformers' modules


def _modules(request: SpanRequest) -> Backend:
    from petals_agent.engine.packed import PackedBackend
    from petals_agent.engine.padded import PaddedBackend
    from petals_agent.models.span import load_span

    span = load_span(
        request.source, request.start, request.end, request.dtype, request.device, request.progress
    )
    candidates: list[type[PackedBackend] | type[PaddedBackend]] = []
    if span.uses_interface:
        candidates.append(PackedBackend)
    if not getattr(span.config, "sliding_window", None):  # rows of a padded batch are not aligned to a window
        candidates.append(PaddedBackend)
    kinds = {attention: span.start + i for i, attention in reversed(list(enumerate(span.attention)))}
    for candidate in candidates:
        backend = candidate(span)
        errors = [
            error_of(backend, partial(backend.block, index), index, index + 1) for index in kinds.values()
        ]
        _tell_check(backend.name, max(errors))
        if max(errors) <= TOLERANCE[request.dtype]:
            return backend
    raise UnsupportedModel(
        f"{request.source.name}: batched serving of {request.source.family.model_type} does not reproduce its own "
        "outputs with this version of transformers; please report it"
    )
