"""What the agent needs to know of a model before any weight is read: shapes, sizes, names in the swarm."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from petals_agent.errors import CheckpointError
from petals_agent.models.families import JSON, Family, number, text_config
from petals_agent.models.shard import TensorInfo

HUB = "https://huggingface.co"
DTYPE_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}


@dataclass(frozen=True)
class ModelFacts:
    """Read from config.json and the headers of the shards; the same on every host for one revision."""

    model_type: str
    num_blocks: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    kv_width: int  # elements that one token leaves in the KV cache of one block, keys and values together
    block_parameters: tuple[int, ...]  # weights of each block
    dtype: str  # of the checkpoint: "bfloat16", …
    max_positions: int | None  # longest sequence that the model was made for
    repository: str | None  # the model's page at the Hub; None for a local folder
    revision: str | None  # commit at the Hub
    dht_prefix: str | None  # by the swarm's rule; a local folder has none

    def block_bytes(self, dtype: str) -> int:
        """Bytes of the largest block with its weights in `dtype`."""
        return max(self.block_parameters) * dtype_bytes(dtype)

    def span_bytes(self, start: int, end: int, dtype: str) -> int:
        """Bytes of blocks [start, end) with their weights in `dtype`."""
        return sum(self.block_parameters[start:end]) * dtype_bytes(dtype)

    def kv_bytes_per_token(self, dtype: str) -> int:
        """KV cache bytes of one token in one block."""
        return self.kv_width * dtype_bytes(dtype)


def dtype_bytes(dtype: str) -> int:
    """Bytes of one element; raises CheckpointError for a dtype that blocks cannot be served in."""
    if dtype not in DTYPE_BYTES:
        raise CheckpointError(f"dtype {dtype!r} is not known; choose one of {', '.join(DTYPE_BYTES)}")
    return DTYPE_BYTES[dtype]


def parameters(name: str, info: TensorInfo) -> int:
    """How many weights a stored tensor stands for once it is loaded; quantized ones hold two in a byte, or scales."""
    if name.endswith("_blocks") and info.dtype == "U8":  # mxfp4
        return 2 * info.elements
    if name.endswith(("_scales", "_scale_inv")):
        return 0
    return info.elements


def model_facts(
    config: JSON,
    family: Family,
    block_parameters: Iterable[int],
    dtype: str,
    repo: str | None,
    revision: str | None,
) -> ModelFacts:
    """Facts from a config.json; raises CheckpointError naming the key that is missing or wrong."""
    text = text_config(config)
    hidden = number(text, "hidden_size", "n_embed", "n_embd")
    heads = number(text, "num_attention_heads", "n_head", default=family.defaults.get("num_attention_heads"))
    head_dim = number(text, "head_dim", default=family.defaults.get("head_dim", hidden // heads))
    kv_heads = _kv_heads(text, family, heads)
    return ModelFacts(
        model_type=family.model_type,
        num_blocks=num_blocks(config),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        kv_width=_kv_width(text, family, heads, kv_heads, head_dim),
        block_parameters=tuple(block_parameters),
        dtype=dtype,
        max_positions=number(text, "max_position_embeddings", "n_positions", default=0) or None,
        repository=f"{HUB}/{repo}" if repo else None,
        revision=revision,
        dht_prefix=default_prefix(repo, family.model_type) if repo else None,
    )


def num_blocks(config: JSON) -> int:
    """How many blocks the decoder of a config.json has."""
    return number(text_config(config), "num_hidden_layers", "n_layer")


def _kv_heads(text: JSON, family: Family, heads: int) -> int:
    if family.model_type == "falcon":
        if text.get("new_decoder_architecture"):
            return number(text, "num_kv_heads", default=heads)
        return 1 if text.get("multi_query", True) else heads
    return number(text, "num_key_value_heads", default=family.defaults.get("num_key_value_heads", heads))


def _kv_width(text: JSON, family: Family, heads: int, kv_heads: int, head_dim: int) -> int:
    if family.model_type in (
        "deepseek_v2",
        "deepseek_v3",
    ):  # transformers caches the expanded heads, not the latent
        keys = number(text, "qk_nope_head_dim", default=128) + number(text, "qk_rope_head_dim", default=64)
        return heads * (keys + number(text, "v_head_dim", default=128))
    if family.model_type == "falcon" and text.get("new_decoder_architecture"):
        kv_heads = heads  # its keys and values are repeated before they are cached
    return 2 * kv_heads * head_dim


def default_prefix(repo: str, model_type: str) -> str:
    """The DHT prefix that published Petals clients derive from a Hub repository `owner/name`.

    Families that Petals does not know follow its newest rule, that of Mixtral: the full name with its owner.
    """
    short = repo.split("/")[-1]
    if model_type == "llama":
        prefix = short if short.endswith("-hf") else f"{short}-hf"
    elif model_type == "falcon":
        prefix = short
    elif model_type == "bloom":
        owner, _, name = repo.rpartition("/")
        if owner == "bigscience":  # Petals' converted copies share the swarm of the original
            repo = f"{owner}/{name.removesuffix('-petals')}"
        prefix = f"{repo}-petals"
    else:
        prefix = repo
    return prefix.replace(".", "-")
