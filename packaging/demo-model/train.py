"""Train the demo's model: an 8-layer Llama of 2.8 million parameters, on one CPU thread in about 35 minutes.

    python packaging/demo-model/train.py                      # text from Debian's bible-kjv, into the package
    python packaging/demo-model/train.py --text a.txt --out DIR --steps 1000

The folder is written whenever the loss on held-out chapters has improved, so an interrupted run leaves a usable model.
The same arguments and the same versions of torch and tokenizers on the same kind of processor give the same weights.
"""

import argparse
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from folder import END_OF_TEXT, END_OF_TEXT_ID, write_config, write_tokenizer, write_weights
from text import Chapter, fetch_bible, read_files
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

DEFAULT_OUT = Path(__file__).resolve().parents[2] / "agent/petals_agent/demo/model"
PROMPTS = ("In the beginning", "And the king said unto", "The LORD is my", "Now when Jesus")
CONTEXT = 512
ROPE_THETA = 10000.0
TOKENS_PER_STEP = 2048
WARMUP_STEPS = 100
EVALUATIONS = 12
# Short windows first: attention is the slowest part on a CPU, and words and phrases need no long context.
WINDOWS = ((0.6, 128), (0.8, 256), (1.0, CONTEXT))
"""(share of the steps done, window length in tokens until then)."""


@dataclass(frozen=True)
class Corpus:
    """Token ids as one stream: paragraphs end with a line break, chapters with END_OF_TEXT."""

    stream: torch.Tensor
    """[tokens], int64."""
    starts: torch.Tensor
    """[paragraphs], int64: where each paragraph begins."""

    @classmethod
    def encode(cls, chapters: list[Chapter], tokenizer: Tokenizer) -> "Corpus":
        """Encode chapters in order."""
        ids: list[int] = []
        starts: list[int] = []
        for chapter in chapters:
            for paragraph in chapter:
                starts.append(len(ids))
                ids += tokenizer.encode(paragraph + "\n").ids
            ids[-1] = END_OF_TEXT_ID
        return cls(torch.tensor(ids), torch.tensor(starts))

    def sample(self, count: int, length: int, generator: torch.Generator) -> torch.Tensor:
        """Draw `count` windows of `length` + 1 tokens: [count, length + 1].

        Every second one begins at a paragraph, as a prompt does; the others begin anywhere.
        """
        last = len(self.stream) - length - 1
        aligned = self.starts[torch.randint(len(self.starts), (count // 2,), generator=generator)]
        anywhere = torch.randint(last, (count - count // 2,), generator=generator)
        begin = torch.cat([aligned.clamp(max=last), anywhere])
        return self.stream[begin[:, None] + torch.arange(length + 1)]

    def windows(self, length: int) -> torch.Tensor:
        """Cut the whole stream into windows that overlap by one token: [windows, length + 1]."""
        return self.stream.unfold(0, length + 1, length)


def train_tokenizer(chapters: list[Chapter], size: int) -> Tokenizer:
    """Train a byte-level BPE: any text survives encoding and decoding, since all 256 bytes are in the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(("\n".join(chapter) for chapter in chapters), trainer)
    return tokenizer


def build(vocabulary: int) -> LlamaForCausalLM:
    """Make the untrained model; the output projections start smaller, since 16 of them add up in the residual stream."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=192,
        intermediate_size=352,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.data.div_(math.sqrt(2 * config.num_hidden_layers))
    return model


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


def loss_of(model: LlamaForCausalLM, windows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats per token of predicting [n, length + 1] token ids; bfloat16 matrix products."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, corpus: Corpus) -> float:
    """Mean loss over all of a held-out corpus, in windows of 256 tokens."""
    windows = corpus.windows(256)
    parts = torch.split(windows, 16)
    return float(sum(loss_of(model, part).item() * len(part) for part in parts)) / len(windows)


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
    parser.add_argument(
        "--text", type=Path, nargs="+", metavar="FILE", help="UTF-8 text files instead of the Bible"
    )
    parser.add_argument(
        "--out", type=Path, default=DEFAULT_OUT, help="folder to write (default: the package's)"
    )
    parser.add_argument(
        "--steps", type=int, default=5000, help="optimizer steps of 2048 tokens (%(default)s)"
    )
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate (%(default)s)")
    parser.add_argument("--vocabulary", type=int, default=1024, help="tokens in the vocabulary (%(default)s)")
    parser.add_argument(
        "--held-out", type=float, default=0.02, help="share of the chapters not trained on (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (%(default)s)")
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
    kept = set(
        random.Random(args.seed).sample(range(len(chapters)), max(1, round(args.held_out * len(chapters))))
    )
    training = Corpus.encode([c for i, c in enumerate(chapters) if i not in kept], tokenizer)
    held_out = Corpus.encode([c for i, c in enumerate(chapters) if i in kept], tokenizer)

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
