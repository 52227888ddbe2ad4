"""Text to token ids and back, with the tokenizer that lies beside the model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from petals_agent.errors import ClientError
from petals_agent.models.source import ModelSource


class TextCodec:
    """The model's tokenizer.json; a model without one takes token ids only."""

    def __init__(self, source: ModelSource) -> None:
        path = source.file("tokenizer.json")
        self._name = source.name
        self._tokenizer = None if path is None else Tokenizer.from_file(str(path))

    def encode(self, text: str) -> list[int]:
        """Token ids with the special tokens that the model expects; ClientError without a tokenizer or for no text."""
        ids = list(self._require().encode(text).ids)
        if not ids:
            raise ClientError("the prompt has no tokens; give at least one character")
        return ids

    def decode(self, ids: Sequence[int]) -> str | None:
        """Text of token ids, None if there is no tokenizer."""
        return (
            None
            if self._tokenizer is None
            else str(self._tokenizer.decode(list(ids), skip_special_tokens=True))
        )

    def stream(self, prompt: Sequence[int]) -> PieceDecoder:
        """Decode what follows `prompt` token by token."""
        return PieceDecoder(self._require(), prompt)

    def _require(self) -> Tokenizer:
        if self._tokenizer is None:
            raise ClientError(f"{self._name} has no tokenizer.json; give the prompt as token ids")
        return self._tokenizer


class PieceDecoder:
    """Turns tokens into pieces of text that end on whole characters."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(ids=list(prompt), skip_special_tokens=True)

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""
        return self._stream.step(self._tokenizer, token) or ""


def end_tokens(source: ModelSource) -> set[int]:
    """Token ids that end a text, from generation_config.json or config.json."""
    configs: list[Any] = [source.config]
    path = source.file("generation_config.json")
    if path is not None:
        try:
            configs.insert(0, json.loads(path.read_bytes()))
        except ValueError as error:
            raise ClientError(f"{path} is not readable as JSON ({error}); get the file again") from error
    for config in configs:
        value = config.get("eos_token_id") if isinstance(config, dict) else None
        if isinstance(value, int):
            return {value}
        if isinstance(value, list) and all(isinstance(item, int) for item in value):
            return set(value)
    return set()
