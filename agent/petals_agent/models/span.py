"""Blocks [start, end) of a model as one module: transformers' own layers, loaded alone, with a plain reference runner.

`load_span` builds each block from a one-block config that keeps its behaviour at its absolute place (sliding window, no
rotary embedding, dense or experts) and numbers it from 0 within the span. What surrounds the blocks in transformers' base
model is inert: no embedding, no final norm, nothing that clients do before block 0.

The runner is slow and obviously right: the engine's backends are checked against it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from petals_agent.errors import CheckpointError
from petals_agent.models.checkpoint import Checkpoint, StoredTensor
from petals_agent.models.families import Family
from petals_agent.models.hf import build, files_of, full_config, model_class, neutralise, slice_config
from petals_agent.models.memory import return_freed_memory
from petals_agent.models.probe import BlockAttention, probe_attention
from petals_agent.models.source import ModelSource, OnProgress, Progress


class SpanCache(DynamicCache):
    """A KV cache for one view of a span, whose blocks keep their numbers within the span."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self._first = first

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return super().update(key_states, value_states, layer_idx - self._first, *args, **kwargs)


class SpanModel(nn.Module):
    """Blocks [start, end) of a model, frozen and in eval mode; one thread at a time.

    `hf` is transformers' base model with just these blocks, to be called with `inputs_embeds`; its attention modules carry
    `layer_idx` from 0. `attention[i]` describes block i; `uses_interface` says whether every block calls transformers'
    AttentionInterface, without which a packed backend is silently wrong.
    """

    hf: PreTrainedModel

    def __init__(
        self,
        family: Family,
        whole: PreTrainedConfig,
        hf: PreTrainedModel,
        start: int,
        first: int = 0,
    ) -> None:
        """`whole` is the config of the whole model; the modules' numbers begin with `first`."""
        super().__init__()
        self.family, self.whole, self.hf, self.start, self._first = family, whole, hf, start, first
        self.attention: tuple[BlockAttention, ...] = ()
        self.uses_interface = False

    @property
    def blocks(self) -> nn.ModuleList:
        return getattr(self.hf, self.family.layers)  # type: ignore[no-any-return]

    @property
    def base(self) -> int:
        """What to add to a module's `layer_idx` for its number in the model."""
        return self.start - self._first

    @property
    def config(self) -> PreTrainedConfig:
        """The config of these blocks alone; lists by block are as long as the span."""
        return self.hf.config

    @property
    def end(self) -> int:
        return self.start + len(self.blocks)

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.blocks.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.blocks.parameters()).device

    @property
    def rope_depends_on_length(self) -> bool:
        """Whether rotary frequencies change with the longest position of a batch, so that sessions must not be mixed."""
        kinds = (getattr(module, "rope_type", None) for module in self.hf.modules())
        return any(kind in ("dynamic", "longrope") for kind in kinds)

    def use_attention(self, name: str) -> None:
        """Select an attention implementation by its name in the AttentionInterface ("eager", "sdpa", or an own one)."""
        for module in (self.hf, *self.blocks.modules()):
            config = getattr(module, "config", None)
            if isinstance(config, PreTrainedConfig):
                config._attn_implementation = name

    def view(self, start: int, end: int) -> SpanModel:
        """Blocks [start, end), counted within this span, sharing its weights."""
        if not 0 <= start < end <= len(self.blocks):
            raise ValueError(f"blocks {start}:{end} of a span of {len(self.blocks)}")
        hf = copy.copy(self.hf)
        hf._modules = dict(self.hf._modules)
        setattr(hf, self.family.layers, nn.ModuleList(self.blocks[start:end]))
        hf.config = slice_config(self.config, start, end)
        view = SpanModel(self.family, self.whole, hf, self.start + start, self._first + start)
        view.attention, view.uses_interface = self.attention[start:end], self.uses_interface
        return view

    # --- the reference runner

    def forward(self, hidden: torch.Tensor, prompts: torch.Tensor | None = None) -> torch.Tensor:
        """All blocks over `hidden` [batch, n, hidden_size] from position 0; the same shape, differentiable.

        `prompts` [blocks, batch or 1, p, hidden_size]: prompts[k] is added to hidden[:, :p] before block k.
        """
        return self._run(hidden, None, prompts)

    def new_cache(self) -> SpanCache:
        """An empty KV cache for `step`."""
        return SpanCache(self._first)

    def step(
        self, hidden: torch.Tensor, cache: SpanCache, prompts: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The next tokens of a sequence whose past is in `cache`, which grows by them: prefill and decode alike."""
        return self._run(hidden, cache, prompts)

    def _run(
        self, hidden: torch.Tensor, cache: SpanCache | None, prompts: torch.Tensor | None
    ) -> torch.Tensor:
        if hidden.shape[1] == 0:
            return hidden
        with self._prompted(prompts):
            output = self.hf(inputs_embeds=hidden, past_key_values=cache, use_cache=cache is not None)
        return output.last_hidden_state  # type: ignore[no-any-return]

    @contextmanager
    def _prompted(self, prompts: torch.Tensor | None) -> Iterator[None]:
        if prompts is None:
            yield
            return
        if prompts.shape[0] != len(self.blocks):
            raise ValueError(f"{prompts.shape[0]} prompts for {len(self.blocks)} blocks")
        hooks = [
            block.register_forward_pre_hook(_add_prompt(prompt), with_kwargs=True)
            for block, prompt in zip(self.blocks, prompts, strict=True)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _add_prompt(prompt: torch.Tensor) -> Callable[..., Any]:
    def add(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        length = prompt.shape[1]
        return (torch.cat((hidden[:, :length] + prompt, hidden[:, length:]), dim=1), *rest), kwargs

    return add


def load_span(
    source: ModelSource,
    start: int,
    end: int,
    dtype: torch.dtype,
    device: torch.device,
    progress: OnProgress | None = None,
) -> SpanModel:
    """Blocks [start, end) of a model with weights in `dtype` on `device`; fetches their shards first.

    One block at a time passes through host memory. `progress` hears of downloads, then of each block loaded. Raises
    UnsupportedModel, or CheckpointError naming file and tensor.
    """
    config = full_config(source)
    checkpoint = Checkpoint.open(source, source.block_tensors(start, end), progress)
    with torch.inference_mode(False), torch.no_grad():
        shell = _shell(source.family, slice_config(config, start, end)).to(device)
        span = SpanModel(source.family, config, shell, start)
        for number in range(start, end):
            one, tensors = slice_config(config, number, number + 1), checkpoint.block(number)
            block = _load_block(source.family, one, number, tensors, dtype)
            span.blocks.append(_renumber(block, number - start, span.config).to(device))
            return_freed_memory()
            if progress:
                progress(Progress(f"block {number}", number + 1 - start, end - start))
        span.requires_grad_(False)
        _check(span)
    return span


def join_spans(parts: Sequence[SpanModel]) -> list[SpanModel]:
    """The blocks of several spans of one model as few spans, in order and renumbered; the parts are not used any more."""
    runs: list[list[SpanModel]] = []
    for part in sorted(parts, key=lambda part: part.start):
        if runs and runs[-1][-1].end == part.start:
            runs[-1].append(part)
        else:
            runs.append([part])
    return [_join(run) for run in runs]


def _join(parts: list[SpanModel]) -> SpanModel:
    first = parts[0]
    config = slice_config(first.whole, first.start, parts[-1].end)
    config._attn_implementation = first.config._attn_implementation
    with torch.inference_mode(False), torch.no_grad():
        joined = SpanModel(
            first.family, first.whole, _shell(first.family, config).to(first.device), first.start
        )
    for index, block in enumerate(block for part in parts for block in part.blocks):
        joined.blocks.append(_renumber(block, index, joined.config))
    joined.attention = tuple(attention for part in parts for attention in part.attention)
    joined.uses_interface = all(part.uses_interface for part in parts)
    return joined.requires_grad_(False)


def _shell(family: Family, config: PreTrainedConfig) -> PreTrainedModel:
    """The base model without blocks; its config says how many are to come."""
    cls, count = model_class(family, family.base_class), config.num_hidden_layers
    config.num_hidden_layers = 0
    shell = cls(config).eval()
    config.num_hidden_layers = shell.config.num_hidden_layers = count
    setattr(shell, family.norm, nn.Identity())
    neutralise(shell, family)
    return shell


def _load_block(
    family: Family,
    config: PreTrainedConfig,
    number: int,
    tensors: Mapping[str, StoredTensor],
    dtype: torch.dtype,
) -> nn.Module:
    cls, prefix = model_class(family, family.base_class), f"{family.layers}.0."
    model, missing = build(cls, config, {prefix + name: tensor for name, tensor in tensors.items()}, dtype)
    absent = sorted(name.removeprefix(prefix) for name in missing if name.startswith(prefix))
    if absent:
        raise CheckpointError(
            f"{files_of(tensors)}: weights of block {number}: {', '.join(absent)} are missing; get the whole checkpoint"
        )
    return getattr(model, family.layers)[0]  # type: ignore[no-any-return]


def _renumber(block: nn.Module, index: int, config: PreTrainedConfig) -> nn.Module:
    """Tell a block that was loaded alone its place in the span, and the span's config."""
    for module in block.modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx = index  # type: ignore[assignment]
        if isinstance(getattr(module, "config", None), PreTrainedConfig):
            module.config = config
    return block


def _check(span: SpanModel) -> None:
    """Run one token through the blocks: learn their attention, and that their weights are finite."""
    token = torch.linspace(-1, 1, span.hidden_size, device=span.device).to(span.dtype)[None, None]
    span.attention, span.uses_interface = probe_attention(span.hf, span.config.num_attention_heads, token)
    for index in range(len(span.blocks)):
        token = span.view(index, index + 1)(token)
        if not token.isfinite().all():
            raise CheckpointError(
                f"block {span.start + index} answers NaN or Inf in {span.dtype}; get its weights again, or set "
                "model.dtype to bfloat16 or float32"
            )
