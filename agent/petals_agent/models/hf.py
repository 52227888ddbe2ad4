"""transformers' classes and configs for a family, imported one model at a time."""

from __future__ import annotations

import copy
import importlib
import logging
import re
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging as hf_logging

from petals_agent.errors import CheckpointError, UnsupportedModel
from petals_agent.models.checkpoint import StoredTensor
from petals_agent.models.families import Family, quantization, text_config
from petals_agent.models.source import ModelSource

logger = logging.getLogger(__name__)
# transformers' loader patches its classes for a while: two at once would keep each other's patches for good
_loading = threading.Lock()


def model_class(family: Family, name: str) -> type[PreTrainedModel]:
    """A model class of the family's own module."""
    try:
        module = importlib.import_module(f"transformers.models.{family.module}.modeling_{family.module}")
        return getattr(module, name)  # type: ignore[no-any-return]
    except (ImportError, AttributeError) as error:
        raise UnsupportedModel(
            f"this transformers has no {name} for model_type {family.model_type!r}; install a newer transformers"
        ) from error


def full_config(source: ModelSource) -> PreTrainedConfig:
    """The config of the whole text model; raises CheckpointError when transformers refuses config.json."""
    raw = dict(text_config(source.config))
    packing = quantization(source.config)
    if packing == "fp8":  # widened as it is read
        del raw["quantization_config"]
    elif packing:
        raw["quantization_config"] = {**raw["quantization_config"], "dequantize": True}
    config_class = model_class(source.family, source.family.base_class).config_class
    try:
        config: PreTrainedConfig = config_class.from_dict(raw)
    except Exception as error:  # its validators raise many kinds
        raise CheckpointError(
            f"{source.name}: config.json is refused: {error!s:.300}; get the file again"
        ) from error
    config._attn_implementation = "eager"
    return config


def slice_config(config: PreTrainedConfig, start: int, end: int) -> PreTrainedConfig:
    """A copy for blocks [start, end) alone, in which each behaves as it does at its place in the whole model.

    The vocabulary shrinks to one token, so that embeddings cost nothing.
    """
    part = copy.deepcopy(config)
    count = config.num_hidden_layers
    for key, value in vars(config).items():
        if "layer" in key and isinstance(value, list) and len(value) == count:
            setattr(part, key, value[start:end])
    if hasattr(config, "mlp_only_layers"):  # which blocks have no experts, counted from 0
        step = getattr(config, "decoder_sparse_step", 1)
        dense = (k for k in range(start, end) if k in config.mlp_only_layers or (k + 1) % step)
        part.mlp_only_layers = [k - start for k in dense]
        part.decoder_sparse_step = 1
    if hasattr(config, "first_k_dense_replace"):
        part.first_k_dense_replace = max(0, config.first_k_dense_replace - start)
    part.num_hidden_layers = end - start
    part.vocab_size = 1
    part.pad_token_id = None
    return part


def build(
    cls: type[PreTrainedModel],
    config: PreTrainedConfig,
    tensors: Mapping[str, StoredTensor],
    dtype: torch.dtype,
) -> tuple[PreTrainedModel, set[str]]:
    """A model on the CPU whose weights are read from `tensors`, and the names of the weights that they lack.

    transformers' own loader converts names and shapes (experts stored one by one are fused) and initialises what is absent.
    Loads in several threads wait for one another.
    """
    try:
        with _loading, _quiet():
            model, info = (
                cls.from_pretrained(  # the dict is not copied: each tensor is read when its turn comes
                    None,
                    config=config,
                    state_dict=dict(tensors),
                    dtype=dtype,
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                )
            )
    except RuntimeError as error:  # what it says of a failed conversion
        raise CheckpointError(
            f"{_odd_one(tensors)} does not fit the others, so that transformers cannot convert these weights; "
            "are all shards of the same model? Get them again"
        ) from error
    for name, found, expected in sorted(info["mismatched_keys"]):
        where = (
            f"{tensors[name].path}: tensor {tensors[name].name}"
            if name in tensors
            else f"{files_of(tensors)}: weight {name}"
        )
        raise CheckpointError(
            f"{where} has shape {list(found)} where config.json asks for {list(expected)}; "
            "are both of the same model? Get both again"
        )
    if info["unexpected_keys"]:
        logger.warning(
            "ignoring tensors that %s does not know: %s", cls.__name__, sorted(info["unexpected_keys"])
        )
    return model, set(info["missing_keys"])


def files_of(tensors: Mapping[str, StoredTensor]) -> str:
    """The files that hold these tensors, for messages."""
    return ", ".join(sorted({str(tensor.path) for tensor in tensors.values()}))


def _odd_one(tensors: Mapping[str, StoredTensor]) -> str:
    """Of tensors that differ in a number (experts), the first with a shape of its own; else all their files."""
    groups: dict[str, list[StoredTensor]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(re.sub(r"\d+", "*", name), []).append(tensor)
    for group in groups.values():
        shapes = Counter(tensor.shape for tensor in group)
        for tensor in group:
            if shapes[tensor.shape] < len(group) - shapes[tensor.shape]:
                return f"{tensor.path}: tensor {tensor.name} of shape {list(tensor.shape)}"
    return files_of(tensors)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' progress bars and its report of the weights that we leave out on purpose."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def neutralise(model: Any, family: Family) -> None:
    """Turn off what a base model does before block 0 and clients have done already."""
    if family.embed_norm:
        setattr(model, family.embed_norm, torch.nn.Identity())
    if family.embed_multiplier:
        setattr(model, family.embed_multiplier, 1.0)
