"""Generate text with a model whose blocks are served by a swarm.

from petals_agent.client.generate import Client

with Client("models/tiny", ["/ip4/127.0.0.1/tcp/31337/p2p/12D3Koo…"], dht_prefix="tiny") as client:
    for piece in client.stream("Once upon a time", max_new_tokens=30):
        print(piece, end="", flush=True)
    print(client.generate("Once upon a time", do_sample=True, temperature=0.8, top_p=0.9, seed=1).text)
    best = client.generate([1, 17, 99], num_beams=4).ids[0]
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from types import TracebackType
from typing import Any

import torch

from petals_agent.client.decode import Decoder, Generation, beam_search, decode
from petals_agent.client.loop import LoopThread
from petals_agent.client.network import ClientOptions, Network
from petals_agent.client.remote import RemoteBlocks
from petals_agent.client.sampling import Sampler, Sampling
from petals_agent.client.session import InferenceSession
from petals_agent.client.sync import SyncSession
from petals_agent.client.text import TextCodec, end_tokens
from petals_agent.errors import ClientError
from petals_agent.models.client_parts import client_parts
from petals_agent.models.facts import num_blocks
from petals_agent.models.source import open_model

Prompt = str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]] | torch.Tensor


class Client:
    """One model in one swarm; usable from several threads. A context manager, or call `close`.

    `model` is a local folder or a Hub repository, of which only embeddings and head are loaded; `dtype` ("auto": the
    checkpoint's) is theirs. A local folder needs `dht_prefix`. Raises SwarmError when no initial peer answers.
    """

    def __init__(
        self,
        model: str,
        initial_peers: Sequence[str],
        dht_prefix: str | None = None,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        options: ClientOptions | None = None,
    ) -> None:
        source = open_model(model, revision)
        prefix = dht_prefix or source.facts.dht_prefix
        if prefix is None:
            raise ClientError(
                f"{model} is a local folder, so its DHT prefix is not known: give the one of its servers"
            )
        self.parts = client_parts(source, getattr(torch, source.facts.dtype if dtype == "auto" else dtype))
        self.codec = TextCodec(source)
        self.end_tokens = end_tokens(source)
        self.network = Network(initial_peers, prefix, num_blocks(source.config), options)
        self._loop = LoopThread("petals-client")
        try:
            self._loop.run(self.network.start())
        except BaseException:
            self._loop.close()
            raise

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the swarm; idempotent."""
        if self._loop.alive:
            self._loop.run(self.network.stop())
            self._loop.close()

    def blocks(self, start: int = 0, end: int | None = None) -> RemoteBlocks:
        """Blocks [start, end) as a differentiable function of hidden states [batch, n, hidden]."""
        return RemoteBlocks(
            self.network, start, self.network.num_blocks if end is None else end, self._loop.run
        )

    def session(self, max_length: int, batch_size: int = 1, *, push: bool = False) -> SyncSession:
        """A decoding session over all blocks, for callers who choose the tokens themselves."""
        blocks = self.network.num_blocks
        inner = InferenceSession(self.network, 0, blocks, max_length, batch_size=batch_size, push=push)
        return SyncSession(inner, self._loop)

    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int = 64,
        *,
        num_beams: int = 1,
        push: bool = False,
        **sampling: Any,
    ) -> Generation:
        """Continue a prompt: a text, token ids, or a batch of either (of equal length in tokens).

        Greedy by default; drawn with `do_sample`, `temperature`, `top_p`, `seed` (see `Sampling`); or the best of
        `num_beams` beams. Ends at the model's end token. `push` asks servers to hand activations on directly. Raises
        ClientError when the request is wrong or no servers can be found.
        """
        if num_beams == 1:
            tokens = self.tokens(prompt, max_new_tokens, push=push, **sampling)
            for _ in tokens:
                pass
            return tokens.result
        if num_beams < 1 or sampling.get("do_sample"):
            raise ClientError("beam search needs num_beams of at least 2 and does not sample")
        ids = self._ids(prompt)
        result = Generation([])
        with self.session(
            ids.shape[1] + _positive(max_new_tokens), len(ids) * num_beams, push=push
        ) as session:
            decoder = Decoder(self.parts, session, result)
            result.ids = beam_search(decoder, ids, max_new_tokens, num_beams, self.end_tokens)
        result.texts = [self.codec.decode(row) for row in result.ids]
        return result

    def tokens(
        self, prompt: Prompt, max_new_tokens: int = 64, *, push: bool = False, **sampling: Any
    ) -> TokenStream:
        """Iterate over steps: for each row of the batch its token, None once it has ended. Arguments as of `generate`."""
        ids = self._ids(prompt)
        session = self.session(ids.shape[1] + _positive(max_new_tokens), len(ids), push=push)
        return TokenStream(self, ids, max_new_tokens, Sampler(Sampling(**sampling)), session)

    def stream(self, prompt: str, max_new_tokens: int = 64, **how: Any) -> TextStream:
        """Iterate over pieces of the text as they come. Arguments as of `tokens`, for one text."""
        return TextStream(self, self.tokens(prompt, max_new_tokens, **how))

    async def agenerate(self, prompt: Prompt, max_new_tokens: int = 64, **how: Any) -> Generation:
        """`generate` for asynchronous code: runs in a thread."""
        return await asyncio.to_thread(self.generate, prompt, max_new_tokens, **how)

    async def astream(self, prompt: str, max_new_tokens: int = 64, **how: Any) -> AsyncIterator[str]:
        """`stream` for asynchronous code: each step runs in a thread."""
        pieces = self.stream(prompt, max_new_tokens, **how)
        try:
            while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
                yield piece
        finally:
            await asyncio.to_thread(pieces.close)

    def _ids(self, prompt: Prompt) -> torch.Tensor:
        """Token ids [batch, n]."""
        if isinstance(prompt, str):
            return torch.tensor([self.codec.encode(prompt)])
        if isinstance(prompt, torch.Tensor):
            ids = prompt if prompt.dim() == 2 else prompt[None]
        else:
            rows: list[Any] = [self.codec.encode(item) if isinstance(item, str) else item for item in prompt]
            rows = [rows] if rows and isinstance(rows[0], int) else rows
            lengths = {len(row) for row in rows}
            if len(lengths) != 1 or 0 in lengths:
                raise ClientError(
                    f"the prompts of a batch must have the same number of tokens, at least 1, not {sorted(lengths)}; "
                    "generate for each length apart"
                )
            ids = torch.tensor(rows)
        if ids.dim() != 2 or 0 in ids.shape or ids.is_floating_point():
            raise ClientError(f"token ids must be integers [batch, n], not {ids.dtype} {list(ids.shape)}")
        return ids.long()


class TokenStream(Iterator[list[int | None]]):
    """Steps of a generation; `result` grows with them and is complete when they are exhausted."""

    def __init__(
        self, client: Client, ids: torch.Tensor, max_new_tokens: int, sampler: Sampler, session: SyncSession
    ) -> None:
        self.result = Generation([[] for _ in ids])
        self.prompt_ids = ids
        self._client = client
        self._session = session
        decoder = Decoder(client.parts, session, self.result)
        self._steps = decode(decoder, ids, max_new_tokens, sampler, client.end_tokens)

    def __next__(self) -> list[int | None]:
        try:
            return next(self._steps)
        except BaseException:  # also the end
            self.close()
            raise

    def close(self) -> None:
        """Stop here and free the servers' caches; idempotent."""
        self._session.close()
        self.result.texts = [self._client.codec.decode(row) for row in self.result.ids]


class TextStream(Iterator[str]):
    """Pieces of a text; `result` is complete when they are exhausted."""

    def __init__(self, client: Client, tokens: TokenStream) -> None:
        self.result = tokens.result
        self._tokens = tokens
        self._text = client.codec.stream(tokens.prompt_ids[0].tolist())

    def __next__(self) -> str:
        piece = ""
        while not piece:
            (token,) = next(self._tokens)
            assert token is not None  # a single row ends with its end token
            piece = self._text.push(token)
        return piece

    def close(self) -> None:
        """Stop here and free the servers' caches; idempotent."""
        self._tokens.close()


def _positive(max_new_tokens: int) -> int:
    if max_new_tokens < 1:
        raise ClientError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    return max_new_tokens
