"""An own forward for Llama-like blocks: fused projections, precomputed rotary tables, no module overhead.

Measured against transformers' modules: see docs/decisions. Families: llama, mistral, qwen2, qwen3. Others, and unknown
settings of these, run through transformers' own modules.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from petals_agent.engine.backend import Prompts, add_prompts
from petals_agent.engine.kv import LayerShape
from petals_agent.engine.plan import AttentionRules, StepPlan

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_ROPE_TYPES = ("default", "linear", "llama3")


# Settings that either do not touch a block or are read below. A config.json with others is checked against
# transformers' own module before it is trusted.
KNOWN_SETTINGS = frozenset(
    """
    _name_or_path architectures attention_bias attention_dropout attn_implementation auto_map bos_token_id dtype
    eos_token_id head_dim hidden_act hidden_size initializer_range intermediate_size layer_types max_position_embeddings
    max_window_layers mlp_bias model_type num_attention_heads num_hidden_layers num_key_value_heads pad_token_id
    pretraining_tp rms_norm_eps rope_parameters rope_scaling rope_theta sliding_window tie_word_embeddings torch_dtype
    transformers_version use_cache use_sliding_window vocab_size
    """.split()
)


@dataclass(frozen=True)
class LeanConfig:
    """The numbers that a Llama-like block depends on."""

    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_size: int
    biases: str  # which of the projections q, k, v, o have one
    head_norms: bool  # of queries and keys
    eps: float
    inverse_frequencies: torch.Tensor  # [head_dim / 2]
    windows: Sequence[int | None]  # by absolute block

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> LeanConfig | None:
        """From a raw config.json; None when anything in it is not known to be handled right here."""
        if config.get("model_type") not in FAMILIES or config.get("hidden_act", "silu") not in (
            "silu",
            "swish",
        ):
            return None
        if config.get("quantization_config") or config.get("mlp_bias"):
            return None
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        frequencies = _inverse_frequencies(config, head_dim)
        windows = _windows(config)
        mlp_size = config.get("intermediate_size")
        if frequencies is None or windows is None or head_dim % 2 or not mlp_size:
            return None
        family = config["model_type"]
        chosen = "qkvo" if config.get("attention_bias") else ""
        return cls(
            hidden_size=config["hidden_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            mlp_size=mlp_size,
            biases={"mistral": "", "qwen2": "qkv"}.get(family, chosen),
            head_norms=family == "qwen3",
            eps=config.get("rms_norm_eps", 1e-6),
            inverse_frequencies=frequencies,
            windows=windows,
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Short name → shape of every weight of a block, as the checkpoint has it."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        hidden, rows = self.hidden_size, {"q": queries, "k": keys, "v": keys, "o": self.hidden_size}
        shapes: dict[str, tuple[int, ...]] = {"input_norm": (hidden,), "post_norm": (hidden,)}
        shapes |= {part: (rows[part], hidden) for part in "qkv"} | {"o": (hidden, queries)}
        shapes |= {f"{part}_bias": (rows[part],) for part in self.biases}
        if self.head_norms:
            shapes |= dict.fromkeys(("q_norm", "k_norm"), (self.head_dim,))
        gate = (self.mlp_size, hidden)
        return shapes | {"gate": gate, "up": gate, "down": gate[::-1]}


def _windows(config: Mapping[str, Any]) -> list[int | None] | None:
    count = config["num_hidden_layers"]
    family, window = config["model_type"], config.get("sliding_window")
    if family == "llama" or window is None:
        return [None] * count
    if family == "mistral":
        return [int(window)] * count
    if not config.get("use_sliding_window"):  # Qwen: off unless asked for
        return [None] * count
    types = config.get("layer_types")
    if types is not None:
        return [int(window) if kind == "sliding_attention" else None for kind in types]
    full = config.get("max_window_layers", 28)
    return [int(window) if layer >= full else None for layer in range(count)]


def _inverse_frequencies(config: Mapping[str, Any], head_dim: int) -> torch.Tensor | None:
    """Rotary frequencies; the llama3 rule is that of the Llama 3.1 model card (low/high frequency factors)."""
    rope = dict(config.get("rope_scaling") or {})
    rope.update(config.get("rope_parameters") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _ROPE_TYPES or rope.get("partial_rotary_factor", 1.0) != 1.0:
        return None
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    inverse: torch.Tensor = 1.0 / theta ** (
        torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    )
    if kind == "linear":
        inverse = inverse / rope["factor"]
    elif kind == "llama3":
        factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
        wavelength = 2 * math.pi / inverse
        old = rope["original_max_position_embeddings"]
        smooth = (old / wavelength - low) / (high - low)
        blended = (1 - smooth) * inverse / factor + smooth * inverse
        scaled = torch.where(wavelength > old / low, inverse / factor, inverse)
        middle = (wavelength <= old / low) & (wavelength >= old / high)
        inverse = torch.where(middle, blended, scaled)
    return inverse


@dataclass(frozen=True)
class _Block:
    """Weights of one block, transposed for `x @ w`; queries, keys and values in one matrix, gate and up in another."""

    input_norm: torch.Tensor
    qkv: torch.Tensor  # [hidden, (heads + 2 kv_heads) × head_dim]
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    out: torch.Tensor
    out_bias: torch.Tensor | None
    post_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    rules: AttentionRules


def tensor_names(layer: int) -> dict[str, str]:
    """Short name → name in the checkpoint, for one absolute block; those that may be absent included."""
    base = f"model.layers.{layer}."
    names = {
        "input_norm": "input_layernorm.weight",
        "post_norm": "post_attention_layernorm.weight",
        "gate": "mlp.gate_proj.weight",
        "up": "mlp.up_proj.weight",
        "down": "mlp.down_proj.weight",
        "q_norm": "self_attn.q_norm.weight",
        "k_norm": "self_attn.k_norm.weight",
    }
    for part in "qkvo":
        names[part] = f"self_attn.{part}_proj.weight"
        names[f"{part}_bias"] = f"self_attn.{part}_proj.bias"
    return {short: base + name for short, name in names.items()}


class LeanBackend:
    """Blocks of a Llama-like model."""

    name = "lean"
    solo = False

    def __init__(self, config: LeanConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.config, self.dtype, self.device = config, dtype, device
        self.hidden_size = config.hidden_size
        self.layers: dict[int, LayerShape] = {}
        self._blocks: dict[int, _Block] = {}
        # Complex rotation needs the pairs (i, i + head_dim/2) side by side; a permutation of q and k alike leaves
        # their products unchanged. Complex numbers exist for float32 only.
        self._interleaved = dtype == torch.float32
        self._frequencies = config.inverse_frequencies.to(device)
        self._angles = torch.empty(0, config.head_dim // 2, device=device)
        self._rotations = torch.empty(0, config.head_dim // 2, dtype=torch.complex64, device=device)
        self._cos = self._sin = torch.empty(0, config.head_dim, dtype=dtype, device=device)

    def append(self, tensors: Mapping[str, torch.Tensor], layer: int) -> None:
        """Add block number `layer`: short names of `tensor_names` to tensors as the checkpoint has them."""
        self._blocks[layer] = self._fuse(tensors, layer)
        self.layers[layer] = LayerShape(self.config.kv_heads, self.config.head_dim)

    def join(self, other: LeanBackend) -> None:
        self._blocks |= other._blocks
        self.layers |= other.layers

    def keep(self, start: int, end: int) -> None:
        for layer in [layer for layer in self._blocks if not start <= layer < end]:
            del self._blocks[layer], self.layers[layer]

    def _fuse(self, tensors: Mapping[str, torch.Tensor], layer: int) -> _Block:
        c = self.config

        def place(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device=self.device, dtype=self.dtype)

        def paired(tensor: torch.Tensor) -> torch.Tensor:
            """Reorder the rows of each head for the complex rotation."""
            if not self._interleaved:
                return tensor
            heads = tensor.reshape(-1, 2, c.head_dim // 2, *tensor.shape[1:])
            return heads.transpose(1, 2).reshape(tensor.shape)

        qkv = torch.cat((paired(place(tensors["q"])), paired(place(tensors["k"])), place(tensors["v"])))
        bias = None
        if "q_bias" in tensors:
            parts = (
                paired(place(tensors["q_bias"])),
                paired(place(tensors["k_bias"])),
                place(tensors["v_bias"]),
            )
            bias = torch.cat(parts)
        return _Block(
            input_norm=place(tensors["input_norm"]),
            qkv=qkv.t().contiguous(),
            qkv_bias=bias,
            q_norm=paired(place(tensors["q_norm"])) if "q_norm" in tensors else None,
            k_norm=paired(place(tensors["k_norm"])) if "k_norm" in tensors else None,
            out=place(tensors["o"]).t().contiguous(),
            out_bias=place(tensors["o_bias"]) if "o_bias" in tensors else None,
            post_norm=place(tensors["post_norm"]),
            gate_up=torch.cat((place(tensors["gate"]), place(tensors["up"]))).t().contiguous(),
            down=place(tensors["down"]).t().contiguous(),
            rules=AttentionRules(scale=c.head_dim**-0.5, window=c.windows[layer]),
        )

    # --- rotary embedding

    def _grow_tables(self, length: int) -> None:
        if self._angles.shape[0] >= length:
            return
        size = max(256, 1 << (length - 1).bit_length())
        self._angles = torch.outer(torch.arange(size, device=self.device).float(), self._frequencies)
        if self._interleaved:
            self._rotations = torch.polar(torch.ones_like(self._angles), self._angles)
        else:
            doubled = torch.cat((self._angles, self._angles), dim=-1)
            self._cos, self._sin = doubled.cos().to(self.dtype), doubled.sin().to(self.dtype)

    def _rotation(self, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What `_rotate` needs at `positions` [tokens], made once per step."""
        if self._interleaved:
            return (self._rotations[positions][:, None],)
        return self._cos[positions][:, None], self._sin[positions][:, None]

    def _rotate(self, heads: torch.Tensor, rotation: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Rotate [tokens, heads, head_dim]."""
        if self._interleaved:
            pairs = torch.view_as_complex(heads.unflatten(-1, (-1, 2)))
            return torch.view_as_real(pairs * rotation[0]).flatten(-2)
        cos, sin = rotation
        half = self.config.head_dim // 2
        turned = torch.cat((-heads[..., half:], heads[..., :half]), dim=-1)
        return heads * cos + turned * sin

    # --- blocks

    def _project(
        self, b: _Block, hidden: torch.Tensor, rotation: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries [tokens, heads, head_dim] and keys with values [tokens, 2 kv_heads, head_dim], rotated."""
        c = self.config
        normed = F.rms_norm(hidden, (c.hidden_size,), b.input_norm, c.eps)
        flat = torch.mm(normed, b.qkv) if b.qkv_bias is None else torch.addmm(b.qkv_bias, normed, b.qkv)
        qkv = flat.view(hidden.shape[0], c.heads + 2 * c.kv_heads, c.head_dim)
        if b.q_norm is not None and b.k_norm is not None:
            q = F.rms_norm(qkv[:, : c.heads], (c.head_dim,), b.q_norm, c.eps)
            k = F.rms_norm(qkv[:, c.heads : c.heads + c.kv_heads], (c.head_dim,), b.k_norm, c.eps)
            rotated = self._rotate(torch.cat((q, k), dim=1), rotation)
        else:
            rotated = self._rotate(qkv[:, : c.heads + c.kv_heads], rotation)
        values = qkv[:, c.heads + c.kv_heads :]
        return rotated[:, : c.heads], torch.cat((rotated[:, c.heads :], values), dim=1)

    def _finish(self, b: _Block, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Output projection, residual and MLP."""
        c = self.config
        hidden = torch.addmm(hidden, attended, b.out)
        if b.out_bias is not None:
            hidden = hidden + b.out_bias
        gate, up = torch.mm(F.rms_norm(hidden, (c.hidden_size,), b.post_norm, c.eps), b.gate_up).chunk(
            2, dim=-1
        )
        return torch.addmm(hidden, F.silu(gate) * up, b.down)

    def step(
        self, hidden: torch.Tensor, plan: StepPlan, start: int, end: int, prompts: Prompts
    ) -> torch.Tensor:
        self._grow_tables(plan.longest)
        rotation = self._rotation(plan.positions)
        for layer in range(start, end):
            if prompts:
                if layer == start:
                    hidden = hidden.clone()
                add_prompts(hidden, prompts, layer - start)
            b = self._blocks[layer]
            q, kv = self._project(b, hidden, rotation)
            hidden = self._finish(b, hidden, plan.attend(layer, q, kv, b.rules))
        return hidden

    def block(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        c, b = self.config, self._blocks[layer]
        batch, n, _ = hidden.shape
        self._grow_tables(n)
        rotation = self._rotation(torch.arange(n, device=self.device).repeat(batch))
        flat = hidden.reshape(batch * n, c.hidden_size)
        q, kv = self._project(b, flat, rotation)
        q = q.view(batch, n, c.heads, c.head_dim).transpose(1, 2)
        keys, values = kv.view(batch, n, 2 * c.kv_heads, c.head_dim).transpose(1, 2).chunk(2, dim=1)
        grouped = c.heads != c.kv_heads
        if b.rules.window is None or b.rules.window >= n:
            out = F.scaled_dot_product_attention(
                q, keys, values, is_causal=True, scale=b.rules.scale, enable_gqa=grouped
            )
        else:
            from petals_agent.engine.plan import causal_mask

            mask = causal_mask(0, n, n, b.rules.window, self.dtype, self.device)
            out = F.scaled_dot_product_attention(
                q, keys, values, attn_mask=mask, scale=b.rules.scale, enable_gqa=grouped
            )
        attended = out.transpose(1, 2).reshape(batch * n, c.heads * c.head_dim)
        return self._finish(b, flat, attended).view(batch, n, c.hidden_size)
