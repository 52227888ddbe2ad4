"""Train the demo's model: an 8-layer Llama of 2.8 million parameters, on one CPU thread in about ten minutes.

    python packaging/demo-model/train.py                      # text from Debian's bible-kjv, into the package
    python packaging/demo-model/train.py --text a.txt --out DIR --steps 1000

The folder is written whenever the loss on held-out chapters has improved, so an interrupted run leaves a usable model.
The same arguments and the same versions of torch and tokenizers on the same kind of processor give the same weights.
"""

import argparse
import math
import random
import time
from pathlib import Path

import torch
from corpus import Corpus, train_tokenizer
from folder import write_config, write_tokenizer, write_weights
from model import CONTEXT, ROPE_THETA, build, evaluate, loss_of
from text import fetch_bible, read_files
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

DEFAULT_OUT = Path(__file__).resolve().parents[2] / "agent/petals_agent/demo/model"
PROMPTS = ("In the beginning", "And the king said unto", "The LORD is my", "Now when Jesus")
TOKENS_PER_STEP = 2048
WARMUP_STEPS = 50
EVALUATIONS = 12
# Short windows first: attention is the slowest part on a CPU, and words and phrases need no long context.
WINDOWS = ((0.6, 128), (0.8, 256), (1.0, CONTEXT))
"""(share of the steps, window length in tokens until then)."""


def make_optimizer(model: LlamaForCausalLM, rate: float) -> torch.optim.AdamW:
    """AdamW; only the matrices inside the blocks decay."""
    blocks = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    inside = {id(weight) for weight in blocks}
    others = [weight for weight in model.parameters() if id(weight) not in inside]
    groups = [{"params": blocks, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.99), fused=True)


def learning_rate(step: int, steps: int) -> float:
    """Share of the peak rate: a linear warm-up, then half a cosine down to 2 %."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))


def train(model: LlamaForCausalLM, training: Corpus, held_out: Corpus, args: argparse.Namespace) -> None:
    """Run all steps, print progress and write the weights whenever the held-out loss is the best so far."""
    optimizer = make_optimizer(model, args.rate)
    generator = torch.Generator().manual_seed(args.seed)
    best, began = math.inf, time.monotonic()
    for step in range(args.steps):
        length = next(length for share, length in WINDOWS if step < share * args.steps)
        for group in optimizer.param_groups:
            group["lr"] = args.rate * learning_rate(step, args.steps)
        loss = loss_of(model, training.sample(TOKENS_PER_STEP // length, length, generator))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) * EVALUATIONS // args.steps > step * EVALUATIONS // args.steps:
            value = evaluate(model, held_out)
            minutes = (time.monotonic() - began) / 60
            speed = (step + 1) * TOKENS_PER_STEP / minutes / 60
            print(
                f"step {step + 1}/{args.steps}  {minutes:.1f} min  {speed:.0f} tokens/s  window {length}  "
                f"loss {loss.item():.3f}  held-out {value:.4f}",
                flush=True,
            )
            if value < best:
                best = value
                write_weights(model.state_dict(), args.out)


@torch.no_grad()
def print_samples(model: LlamaForCausalLM, tokenizer: Tokenizer, seed: int) -> None:
    """Print completions of 96 tokens, greedy and at temperature 0.8."""
    torch.manual_seed(seed)
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        mask = torch.ones_like(ids)
        greedy = model.generate(ids, attention_mask=mask, max_new_tokens=96, do_sample=False)
        sampled = model.generate(
            ids, attention_mask=mask, max_new_tokens=96, do_sample=True, temperature=0.8, top_k=0
        )
        print(f"--- greedy: {tokenizer.decode(greedy[0].tolist())}")
        print(f"--- at temperature 0.8: {tokenizer.decode(sampled[0].tolist())}")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--text", type=Path, nargs="+", metavar="FILE", help="UTF-8 text files instead of the Bible")
    add("--out", type=Path, default=DEFAULT_OUT, help="folder to write (default: the package's)")
    add("--steps", type=int, default=4000, help="optimizer steps of 2048 tokens (%(default)s)")
    add("--rate", type=float, default=3e-3, help="peak learning rate (%(default)s)")
    add("--vocabulary", type=int, default=1024, help="tokens in the vocabulary (%(default)s)")
    add("--held-out", type=float, default=0.02, help="share of the chapters not trained on (%(default)s)")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=1, help="CPU threads (%(default)s)")
    return parser.parse_args()


def main() -> None:
    """Obtain the text, train tokenizer and model, and write the folder."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)

    chapters = read_files(args.text) if args.text else fetch_bible()
    tokenizer = train_tokenizer(chapters, args.vocabulary)
    write_tokenizer(tokenizer, args.out, CONTEXT)
    count = max(1, round(args.held_out * len(chapters)))
    kept = set(random.Random(args.seed).sample(range(len(chapters)), count))
    training = Corpus.encode([c for i, c in enumerate(chapters) if i not in kept], tokenizer)
    held_out = Corpus.encode([c for i, c in enumerate(chapters) if i in kept], tokenizer)
    if min(len(training.stream), len(held_out.stream)) <= CONTEXT + 1:
        raise SystemExit(
            f"too little text: {len(training.stream)} tokens to train on and {len(held_out.stream)} held out, "
            f"each must be more than {CONTEXT + 1}; give more --text or another --held-out"
        )

    model = build(tokenizer.get_vocab_size())
    write_config(model.config, ROPE_THETA, args.out)
    size = sum(weight.numel() for weight in model.parameters())
    print(
        f"{size} parameters, {len(training.stream)} tokens to train on, {len(held_out.stream)} held out",
        flush=True,
    )
    train(model, training, held_out, args)
    print_samples(LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32), tokenizer, args.seed)


if __name__ == "__main__":
    main()
