"""What entered a span since its session began: enough to rebuild a lost server's KV cache on another one."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Message:
    """One step's input: hidden states [batch, tokens, hidden], and deep prompts [blocks, batch or 1, tokens, hidden]."""

    hidden: torch.Tensor
    prompts: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        return self.hidden.shape[1]


class History:
    """Inputs in order, with the beam reorders between them.

    A reorder changes the order of everything before it, so it is kept beside the next message and applied only when the
    history is replayed: a step of beam search costs nothing here.
    """

    def __init__(self) -> None:
        self._messages: list[tuple[torch.Tensor | None, Message]] = []  # reorder before it, message
        self._reorder: torch.Tensor | None = None  # since the last message
        self.position = 0

    def append(self, message: Message) -> None:
        """The span has processed this input."""
        self._messages.append((self._reorder, message))
        self._reorder = None
        self.position += message.tokens

    def reorder(self, hypo_ids: torch.Tensor) -> None:
        """Row i of the cache becomes what row hypo_ids[i] was (int64 [batch])."""
        self._reorder = _compose(self._reorder, hypo_ids)

    def truncate(self, position: int) -> None:
        """Forget the tokens from `position` on; reorders stay, since the cache that is kept was reordered by them."""
        while self.position > position:
            reorder, message = self._messages.pop()
            self.position -= message.tokens
            keep = position - self.position
            if keep > 0:
                prompts = None if message.prompts is None else message.prompts[:, :, :keep]
                self._messages.append(
                    (reorder, replace(message, hidden=message.hidden[:, :keep], prompts=prompts))
                )
                self.position = position
            elif reorder is not None:
                self._reorder = reorder if self._reorder is None else reorder[self._reorder]

    def replay(self, max_tokens: int) -> list[Message]:
        """Messages that rebuild the cache as it is now, without reorders; runs without prompts are joined.

        None has more than `max_tokens` tokens over its batch, unless it has a single position or prompts that long.
        """
        ordered: list[Message] = []
        order = self._reorder
        for reorder, message in reversed(self._messages):
            ordered.append(_take(message, order))
            order = reorder if order is None else _compose(reorder, order)
        joined: list[list[Message]] = []
        for message in reversed(ordered):
            if message.prompts is not None or not joined:
                joined.append([message])
            else:
                joined[-1].append(message)
        return [piece for run in joined for piece in split(_join(run), max_tokens)]


def split(message: Message, max_tokens: int) -> list[Message]:
    """Cut along the sequence into pieces of at most `max_tokens` tokens over the batch; prompts stay in the first."""
    batch, tokens, _ = message.hidden.shape
    step = max(1, max_tokens // max(batch, 1))
    prefix = 0 if message.prompts is None else message.prompts.shape[2]
    first = min(tokens, max(step, prefix))
    rest = range(first, tokens, step)
    return [
        Message(message.hidden[:, :first], message.prompts),
        *(Message(message.hidden[:, i : i + step]) for i in rest),
    ]


def _join(run: list[Message]) -> Message:
    if len(run) == 1:
        return run[0]
    return Message(torch.cat([message.hidden for message in run], dim=1), run[0].prompts)


def _take(message: Message, order: torch.Tensor | None) -> Message:
    if order is None:
        return message
    prompts = message.prompts
    if prompts is not None and prompts.shape[1] > 1:
        prompts = prompts[:, order]
    return Message(message.hidden[order], prompts)


def _compose(first: torch.Tensor | None, then: torch.Tensor) -> torch.Tensor:
    return then if first is None else first[then]
