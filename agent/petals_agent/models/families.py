"""The model families that we serve: what each needs beyond the one generic path. Knows no torch and no transformers.

A family is a `model_type` of transformers with a decoder of like blocks: hidden states go in and come out, positions are
made inside the blocks. What a client does before block 0 (embedding, its scale or norm) is declared here too, because a
span must not do it again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from petals_agent.errors import CheckpointError, UnsupportedModel

PACKINGS = ("mxfp4", "fp8")
JSON = Mapping[str, Any]  # a config.json, or the part of one that describes the text decoder

_PREFIX = r"(?:(?:model\.language_model|language_model\.model|model|transformer|gpt_neox)\.)?"
_BLOCK = re.compile(_PREFIX + r"(?:layers|h)\.(\d+)\.(.+)")
_OUTER = re.compile(
    r"(?:(?:" + _PREFIX + r"(embed_tokens|word_embeddings|word_embeddings_layernorm|wte|embed_in"
    r"|norm|ln_f|final_layer_norm|final_layernorm))|(?:language_model\.)?(lm_head|embed_out))\.(.+)"
)


@dataclass(frozen=True)
class Family:
    """One `model_type`; `defaults` are what transformers assumes when config.json does not say."""

    model_type: str
    base: str  # module under transformers.models, and class of the bare decoder
    defaults: Mapping[str, int] = field(default_factory=dict)
    causal: str = ""  # class with the head, if its name is not that of the base with "ForCausalLM"
    layers: str = "layers"  # attribute of the base that holds the blocks
    norm: str = "norm"  # and the final norm
    embed_norm: str = ""  # norm of the embeddings, applied by the client
    embed_multiplier: str = ""  # factor of the embeddings, applied by the client

    @property
    def module(self) -> str:
        return self.base.split(".")[0]

    @property
    def base_class(self) -> str:
        return self.base.split(".")[1]

    @property
    def causal_class(self) -> str:
        return self.causal or self.base_class.removesuffix("Model") + "ForCausalLM"


def _family(
    model_type: str, base: str, *, kv: int = 0, head_dim: int = 0, heads: int = 0, **more: str
) -> Family:
    given = {"num_key_value_heads": kv, "head_dim": head_dim, "num_attention_heads": heads}
    return Family(model_type, base, {key: value for key, value in given.items() if value}, **more)


_ALL = (
    _family("apertus", "apertus.ApertusModel"),
    _family("arcee", "arcee.ArceeModel"),
    _family("bloom", "bloom.BloomModel", layers="h", norm="ln_f", embed_norm="word_embeddings_layernorm"),
    _family("cohere", "cohere.CohereModel"),
    _family("cohere2", "cohere2.Cohere2Model"),
    _family("cwm", "cwm.CwmModel", kv=8, head_dim=128),
    _family("deepseek_v2", "deepseek_v2.DeepseekV2Model"),
    _family("deepseek_v3", "deepseek_v3.DeepseekV3Model"),
    _family("ernie4_5", "ernie4_5.Ernie4_5Model", kv=2, head_dim=128),
    _family("exaone4", "exaone4.Exaone4Model", kv=32),
    _family("falcon", "falcon.FalconModel", layers="h", norm="ln_f"),
    _family("gemma", "gemma.GemmaModel", kv=16, head_dim=256),
    _family("gemma2", "gemma2.Gemma2Model", kv=4, head_dim=256),
    _family("gemma3_text", "gemma3.Gemma3TextModel", kv=4, head_dim=256, heads=8, causal="Gemma3ForCausalLM"),
    _family("glm", "glm.GlmModel", kv=2, head_dim=128),
    _family("glm4", "glm4.Glm4Model", kv=2, head_dim=128),
    _family("glm4_moe", "glm4_moe.Glm4MoeModel", kv=8),
    _family("gpt_neox", "gpt_neox.GPTNeoXModel", norm="final_layer_norm"),
    _family("gpt_oss", "gpt_oss.GptOssModel", kv=8, head_dim=64),
    _family("granite", "granite.GraniteModel", embed_multiplier="embedding_multiplier"),
    _family("granitemoe", "granitemoe.GraniteMoeModel", embed_multiplier="embedding_multiplier"),
    _family("helium", "helium.HeliumModel", kv=20, head_dim=128),
    _family("hunyuan_v1_dense", "hunyuan_v1_dense.HunYuanDenseV1Model"),
    _family("llama", "llama.LlamaModel"),
    _family("minimax_m2", "minimax_m2.MiniMaxM2Model", kv=8, head_dim=128),
    _family("ministral", "ministral.MinistralModel", kv=8),
    _family("ministral3", "ministral3.Ministral3Model", kv=8, head_dim=128),
    _family("mistral", "mistral.MistralModel", kv=8),
    _family("mixtral", "mixtral.MixtralModel", kv=8),
    _family("nemotron", "nemotron.NemotronModel"),
    _family("olmo", "olmo.OlmoModel"),
    _family("olmo2", "olmo2.Olmo2Model"),
    _family("olmo3", "olmo3.Olmo3Model"),
    _family("olmoe", "olmoe.OlmoeModel"),
    _family("phi", "phi.PhiModel", norm="final_layernorm"),
    _family("phi3", "phi3.Phi3Model"),
    _family("phimoe", "phimoe.PhimoeModel", kv=8),
    _family("qwen2", "qwen2.Qwen2Model", kv=32),
    _family("qwen2_moe", "qwen2_moe.Qwen2MoeModel", kv=16),
    _family("qwen3", "qwen3.Qwen3Model", kv=32, head_dim=128),
    _family("qwen3_moe", "qwen3_moe.Qwen3MoeModel", kv=4),
    _family("seed_oss", "seed_oss.SeedOssModel", kv=8, head_dim=128),
    _family("smollm3", "smollm3.SmolLM3Model", kv=4),
    _family("stablelm", "stablelm.StableLmModel", kv=32),
    _family("starcoder2", "starcoder2.Starcoder2Model", kv=2),
)
FAMILIES: dict[str, Family] = {family.model_type: family for family in _ALL}


def text_config(config: JSON) -> JSON:
    """The part of a config.json that describes the text decoder (multimodal models nest it)."""
    nested = config.get("text_config")
    if not isinstance(nested, Mapping):
        return config
    outer = {key: config[key] for key in ("dtype", "torch_dtype", "quantization_config") if key in config}
    return {"model_type": f"{config.get('model_type')}_text"} | outer | dict(nested)


def family_of(config: JSON) -> Family:
    """The family of a config.json; raises UnsupportedModel listing what is served."""
    model_type = text_config(config).get("model_type")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    raise UnsupportedModel(
        f"model_type {model_type!r} is not served; choose a model of one of these families: {', '.join(FAMILIES)}"
    )


def quantization(config: JSON) -> str | None:
    """How the checkpoint's weights are packed; blocks are served with the weights widened again.

    Raises UnsupportedModel for a packing that is not understood.
    """
    settings = text_config(config).get("quantization_config")
    if not settings:
        return None
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    if method not in PACKINGS:
        raise UnsupportedModel(
            f"the checkpoint is quantized with {method!r}, only {' and '.join(PACKINGS)} are understood; "
            "choose the original checkpoint"
        )
    return str(method)


def number(config: JSON, *names: str, default: int | None = None) -> int:
    """The first of `names` that config.json gives as a positive integer, else `default`."""
    for name in names:
        value = config.get(name)
        if value is None:
            continue
        if type(value) is not int or value < 1:
            raise CheckpointError(
                f"config.json: {name} is {value!r}, not a positive integer; get the file again"
            )
        return value
    if default is None:
        raise CheckpointError(f"config.json has no {names[0]}; is it the config of a language model?")
    return default


def block_of(tensor: str) -> tuple[int, str] | None:
    """Block number and name within the block of a tensor in a checkpoint; None for what lies outside the blocks."""
    match = _BLOCK.fullmatch(tensor)
    return (int(match[1]), match[2]) if match else None


def outer_name(tensor: str) -> str | None:
    """Name of an embedding, final norm or head without its prefix; None for blocks and for parts that are not text."""
    match = _OUTER.fullmatch(tensor)
    return f"{match[1] or match[2]}.{match[3]}" if match else None
