"""Teach a trained model not to repeat itself when it is decoded greedily.

A small model that always takes the likeliest token soon writes one phrase over and over. The cure is unlikelihood
training on its own greedy text (Welleck et al., 2020, arXiv 1908.04319): a token that completes a four-token phrase
already written is made less likely. Ordinary training goes on beside it, so that the loss on real text stays.
"""

import torch
from corpus import Corpus
from model import loss_of
from transformers import LlamaForCausalLM

PHRASE = 4
WRITTEN = 96
ROWS = 16
WINDOW = 256


def repeated(ids: torch.Tensor) -> torch.Tensor:
    """Mark the tokens that complete a phrase seen before in their row: bool [rows, tokens] for [rows, tokens] ids."""
    marks = torch.zeros_like(ids, dtype=torch.bool)
    for row, tokens in enumerate(ids.tolist()):
        seen: set[tuple[int, ...]] = set()
        for end in range(PHRASE, len(tokens) + 1):
            phrase = tuple(tokens[end - PHRASE : end])
            marks[row, end - 1] = phrase in seen
            seen.add(phrase)
    return marks


@torch.no_grad()
def write_greedily(model: LlamaForCausalLM, prompts: torch.Tensor) -> torch.Tensor:
    """Append WRITTEN greedy tokens to [rows, length] ids: [rows, length + WRITTEN]."""
    model.generation_config.eos_token_id = None  # rows must not end early
    return model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=WRITTEN, do_sample=False
    )


def draw_prompts(corpus: Corpus, length: int, generator: torch.Generator) -> torch.Tensor:
    """Draw the first `length` tokens of some paragraphs: [ROWS, length]."""
    starts = corpus.starts[corpus.starts < len(corpus.stream) - length]
    begin = starts[torch.randint(len(starts), (ROWS,), generator=generator)]
    return corpus.stream[begin[:, None] + torch.arange(length)]


def repetition(model: LlamaForCausalLM, corpus: Corpus, seed: int) -> float:
    """Share of repeated tokens in greedy continuations of a corpus; about 0.05 in the Bible itself."""
    prompts = draw_prompts(corpus, 8, torch.Generator().manual_seed(seed))
    return repeated(write_greedily(model, prompts))[:, 8:].float().mean().item()


def break_loops(model: LlamaForCausalLM, corpus: Corpus, steps: int, rate: float, seed: int) -> None:
    """Train `model` in place; the learning rate falls from `rate` to nothing."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True
    )
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        length = int(torch.randint(4, 24, (1,), generator=generator))
        written = write_greedily(model, draw_prompts(corpus, length, generator))
        logits = model(input_ids=written[:, :-1], use_cache=False).logits.float()
        chosen = logits.softmax(-1).gather(-1, written[:, 1:, None]).squeeze(-1).clamp(max=0.999)
        unlikelihood = -(torch.log1p(-chosen) * repeated(written)[:, 1:]).mean()
        real = loss_of(model, corpus.sample(ROWS // 2, WINDOW, generator))
        (real + unlikelihood).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 25 == 0:
            print(
                f"step {step + 1}/{steps}  loss {real.item():.3f}  unlikelihood {unlikelihood.item():.3f}",
                flush=True,
            )
