"""One step's plan: which token of the packed batch belongs to which slot and position, and attention over it.

Tokens are packed as [decode rows grouped by slab, in slot order][chunk 1][chunk 2]…; the same plan serves every block of
the range, so masks and indices are made once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from petals_agent.engine.kv import Place, Slab
from petals_agent.engine.session import StepWork

_SPARSE = 3  # gather rows when a slab's range holds more than so many slots per active row


@dataclass(frozen=True)
class AttentionRules:
    """How a block attends; None means absent. `sinks` is [heads], `softcap` and `window` are numbers."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether torch's fused attention can do it."""
        return self.softcap is None and self.sinks is None


@dataclass(eq=False)
class Decode:
    """Rows of one slab with one token each."""

    slab: Slab
    slots: torch.Tensor  # [n] absolute
    first: int
    span: int  # slots covered: first … first + span
    dense: bool  # slots are exactly first … first + n
    gather: bool
    tokens: slice
    positions: torch.Tensor  # [n]
    longest: int
    mask: torch.Tensor  # [n or span, 1, 1, longest], additive
    offsets: torch.Tensor  # [n] slots - first
    masks: dict[int, torch.Tensor]  # by window

    def cache(self, index: int) -> torch.Tensor:
        """The slab's tensor of block `index` of the range."""
        return self.slab.kv[index]

    def write(self, index: int, kv: torch.Tensor) -> None:
        """Put one token a row, [n, 2 × kv_heads, head_dim], into the cache of block `index` of the range."""
        cache = self.slab.kv[index]
        split = kv.unflatten(1, (2, -1))
        if len(self.slots) == 1:
            cache[:, self.first, :, self.longest - 1] = split[0]
        else:
            cache[:, self.slots, :, self.positions] = split


@dataclass(eq=False)
class Chunk:
    """One session's rows with `count` tokens each, in row-major order."""

    place: Place
    rows: int
    count: int
    start: int
    tokens: slice
    masks: dict[int | None, torch.Tensor]

    def cache(self, index: int) -> torch.Tensor:
        """These rows' part of the slab's tensor of block `index` of the range."""
        return self.place.slab.kv[index][:, self.place.first : self.place.first + self.rows]

    def write(self, index: int, kv: torch.Tensor) -> torch.Tensor:
        """Put [rows, count, 2 × kv_heads, head_dim] into the cache; returns the rows' whole cache of block `index`."""
        cache = self.cache(index)
        cache[:, :, :, self.start : self.start + self.count] = kv.unflatten(2, (2, -1)).permute(2, 0, 3, 1, 4)
        return cache


class StepPlan:
    """Built from the works of one batch; `order` is the works in packed order with their token counts."""

    def __init__(self, items: list[tuple[StepWork, int]], dtype: torch.dtype, device: torch.device) -> None:
        single = [(work, n) for work, n in items if n == 1 and work.rows * n <= 64]
        chunked = [(work, n) for work, n in items if not (n == 1 and work.rows * n <= 64)]
        single.sort(key=lambda item: (id(item[0].session.place.slab), item[0].session.place.first))
        self.order = single + chunked
        self.dtype, self.device = dtype, device
        self.decodes: list[Decode] = []
        self.chunks: list[Chunk] = []
        self.first_layer = items[0][0].session.start
        positions: list[int] = []
        token = 0
        index = 0
        while index < len(single):
            slab = single[index][0].session.place.slab
            slots: list[int] = []
            starts: list[int] = []
            while index < len(single) and single[index][0].session.place.slab is slab:
                session = single[index][0].session
                slots.extend(range(session.place.first, session.place.first + session.rows))
                starts.extend([session.length] * session.rows)
                index += 1
            self.decodes.append(self._decode(slab, slots, starts, slice(token, token + len(slots))))
            positions.extend(starts)
            token += len(slots)
        for work, count in chunked:
            session = work.session
            self.chunks.append(
                Chunk(
                    session.place,
                    session.rows,
                    count,
                    session.length,
                    slice(token, token + session.rows * count),
                    {},
                )
            )
            positions.extend(list(range(session.length, session.length + count)) * session.rows)
            token += session.rows * count
        self.tokens = token
        self.positions = torch.tensor(positions, device=device)
        self.longest = max(positions) + 1

    def _decode(self, slab: Slab, slots: list[int], starts: list[int], tokens: slice) -> Decode:
        first, last = slots[0], slots[-1]
        span, n = last - first + 1, len(slots)
        dense, gather = span == n, span > _SPARSE * n
        positions = torch.tensor(starts)
        longest = max(starts) + 1
        offsets = torch.tensor(slots) - first
        visible = torch.arange(longest)[None] <= positions[:, None]
        mask = torch.zeros(n, longest).masked_fill_(~visible, float("-inf")).to(self.device, self.dtype)
        if not dense and not gather:
            full = torch.zeros(span, longest, dtype=self.dtype, device=self.device)
            full[offsets] = mask
            mask = full
        return Decode(
            slab=slab,
            slots=torch.tensor(slots, device=self.device),
            first=first,
            span=span,
            dense=dense,
            gather=gather,
            tokens=tokens,
            positions=positions.to(self.device),
            longest=longest,
            mask=mask[:, None, None],
            offsets=offsets.to(self.device),
            masks={},
        )

    def attend(self, layer: int, q: torch.Tensor, kv: torch.Tensor, rules: AttentionRules) -> torch.Tensor:
        """Write `kv` [tokens, 2 × kv_heads, head_dim] into the cache and attend with `q` [tokens, heads, head_dim].

        `layer` is the block's number in the model. Returns [tokens, heads × head_dim].
        """
        index = layer - self.first_layer
        if len(self.decodes) == 1 and not self.chunks:
            return self._attend_decode(self.decodes[0], index, q, kv, rules)
        out = q.new_empty(q.shape[0], q.shape[1] * q.shape[2])
        for decode in self.decodes:
            out[decode.tokens] = self._attend_decode(
                decode, index, q[decode.tokens], kv[decode.tokens], rules
            )
        for chunk in self.chunks:
            out[chunk.tokens] = self._attend_chunk(chunk, index, q[chunk.tokens], kv[chunk.tokens], rules)
        return out

    def _attend_decode(
        self, d: Decode, index: int, q: torch.Tensor, kv: torch.Tensor, rules: AttentionRules
    ) -> torch.Tensor:
        n, heads, head_dim = q.shape
        kv_heads = kv.shape[1] // 2
        d.write(index, kv)
        cache = d.slab.kv[index]
        q = q.reshape(n, kv_heads, heads // kv_heads, head_dim)
        if d.gather:
            keys, values = cache[:, :, :, : d.longest].index_select(1, d.slots)
        else:
            keys, values = cache[:, d.first : d.first + d.span, :, : d.longest]
            if not d.dense:
                spread = q.new_zeros(d.span, *q.shape[1:])
                spread[d.offsets] = q
                q = spread
        lone = n == 1 and (rules.window is None or rules.window >= d.longest)  # sees all of its positions
        mask = (
            d.mask if rules.window is None or rules.window >= d.longest else self._windowed(d, rules.window)
        )
        if not rules.plain:
            out = _manual(q, keys, values, mask, rules)
        else:
            out = F.scaled_dot_product_attention(
                q, keys, values, attn_mask=None if lone else mask, scale=rules.scale
            )
        if not d.dense and not d.gather:
            out = out[d.offsets]
        return out.reshape(n, heads * head_dim)

    def _windowed(self, d: Decode, window: int) -> torch.Tensor:
        mask = d.masks.get(window)
        if mask is None:
            old = torch.arange(d.longest, device=self.device)[None] <= d.positions[:, None] - window
            addition = torch.zeros(old.shape, dtype=self.dtype, device=self.device).masked_fill_(
                old, float("-inf")
            )
            if not d.dense and not d.gather:
                full = torch.zeros(d.span, d.longest, dtype=self.dtype, device=self.device)
                full[d.offsets] = addition
                addition = full
            mask = d.masks[window] = d.mask + addition[:, None, None]
        return mask

    def _attend_chunk(
        self, c: Chunk, index: int, q: torch.Tensor, kv: torch.Tensor, rules: AttentionRules
    ) -> torch.Tensor:
        heads, head_dim = q.shape[1:]
        kv_heads = kv.shape[1] // 2
        end = c.start + c.count
        cache = c.write(index, kv.view(c.rows, c.count, 2 * kv_heads, head_dim))
        keys, values = cache[:, :, :, :end]
        q = q.view(c.rows, c.count, heads, head_dim).transpose(1, 2)  # [rows, heads, count, head_dim]
        window = rules.window if rules.window is not None and rules.window < end else None
        if rules.plain and c.start == 0 and window is None:
            out = F.scaled_dot_product_attention(
                q, keys, values, is_causal=True, scale=rules.scale, enable_gqa=heads != kv_heads
            )
        else:
            mask = self._chunk_mask(c, end, window)
            if rules.plain:
                out = F.scaled_dot_product_attention(
                    q, keys, values, attn_mask=mask, scale=rules.scale, enable_gqa=heads != kv_heads
                )
            else:
                groups = heads // kv_heads
                folded = q.reshape(c.rows, kv_heads, groups * c.count, head_dim)
                tiled = mask.repeat(groups, 1)
                out = _manual(folded, keys, values, tiled, rules, c.count).view(
                    c.rows, heads, c.count, head_dim
                )
        return out.transpose(1, 2).reshape(c.rows * c.count, heads * head_dim)

    def _chunk_mask(self, c: Chunk, end: int, window: int | None) -> torch.Tensor:
        mask = c.masks.get(window)
        if mask is None:
            mask = causal_mask(c.start, c.count, end, window, self.dtype, self.device)
            c.masks[window] = mask
        return mask


def causal_mask(
    start: int, count: int, end: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Additive [count, end]: query i stands at start + i and sees positions (start + i - window, start + i]."""
    query = torch.arange(start, start + count, device=device)[:, None]
    key = torch.arange(end, device=device)[None]
    hidden = key > query
    if window is not None:
        hidden |= key <= query - window
    return torch.zeros(count, end, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))


def _manual(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    rules: AttentionRules,
    count: int = 1,
) -> torch.Tensor:
    """Attention with softcap (Gemma 2) or sinks (GPT-OSS): q [b, kv_heads, groups × count, head_dim]."""
    scores = torch.matmul(q, keys.transpose(2, 3)) * rules.scale
    if rules.softcap is not None:
        scores = torch.tanh(scores / rules.softcap) * rules.softcap
    scores = scores + mask
    if rules.sinks is None:
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32)
    else:
        kv_heads = keys.shape[1]
        sink = rules.sinks.view(1, kv_heads, -1, 1).repeat_interleave(count, dim=2).to(scores.dtype)
        both = torch.cat((scores, sink.expand(scores.shape[0], -1, -1, 1)), dim=-1)
        weights = torch.softmax(both, dim=-1, dtype=torch.float32)[..., :-1]
    return torch.matmul(weights.to(values.dtype), values)
