"""What plain transformers does in this process with the same model: the right answers, and its own speed.

    local.py MODEL --answers FILE.npz     inputs and expected outputs for load.py
    local.py MODEL --rates 1,4,16,64      decode steps/s by batch size

Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

SEED = 20


def load(folder: str) -> PreTrainedModel:
    """The decoder whose blocks are served, without what clients keep (embeddings, last norm, head)."""
    model = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False).model
    )
    model.norm = torch.nn.Identity()
    return model


def answers(
    model: PreTrainedModel, sessions: int, prefill: int, steps: int, batch: tuple[int, int]
) -> dict[str, np.ndarray]:
    """Random inputs and what the blocks make of them.

    `inputs`/`outputs`: [sessions, prefill + steps, hidden], one causal pass (a step's answer is its own position);
    `forward_*` and `gradient_*`: [*batch, hidden], the gradients those of sum(gradient_in · output) at the input.
    """
    generator = torch.Generator().manual_seed(SEED)
    hidden = model.config.hidden_size

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    inputs, forward_in, gradient_in = (
        random(sessions, prefill + steps, hidden),
        random(*batch, hidden),
        random(*batch, hidden),
    )
    with torch.inference_mode():
        outputs = model(inputs_embeds=inputs, use_cache=False).last_hidden_state
    leaf = forward_in.clone().requires_grad_()
    forward_out = model(inputs_embeds=leaf, use_cache=False).last_hidden_state
    forward_out.backward(gradient_in)
    assert leaf.grad is not None
    found = {
        "inputs": inputs,
        "outputs": outputs,
        "forward_in": forward_in,
        "forward_out": forward_out.detach(),
        "gradient_in": gradient_in,
        "gradient_out": leaf.grad,
    }
    return {"prefill": np.array(prefill), **{name: tensor.numpy() for name, tensor in found.items()}}


@torch.inference_mode()
def decode_rate(model: PreTrainedModel, batch: int, prefill: int, steps: int) -> float:
    """Steps per second over all sequences of a batch that decodes in lockstep, after a prefill that is not timed."""
    hidden = model.config.hidden_size
    cache = DynamicCache(config=model.config)
    model(inputs_embeds=torch.randn(batch, prefill, hidden), past_key_values=cache, use_cache=True)
    step = torch.randn(batch, 1, hidden)
    start = time.perf_counter()
    for _ in range(steps):
        model(inputs_embeds=step, past_key_values=cache, use_cache=True)
    return batch * steps / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--answers", type=Path)
    parser.add_argument("--rates", default="")
    parser.add_argument("--sessions", type=int, default=64)
    parser.add_argument("--prefill", type=int, default=16)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", default="4x256", help="sequences × tokens of forward and backward")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--json", action="store_true", help="accepted as everywhere here; the output always is"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load(args.model)
    if args.answers:
        batch, length = map(int, args.batch.split("x"))
        np.savez(args.answers, **answers(model, args.sessions, args.prefill, args.steps, (batch, length)))
    rates = {}
    if args.rates:
        decode_rate(model, 1, args.prefill, 5)  # first calls are slower
        for size in args.rates.split(","):
            rates[size] = round(decode_rate(model, int(size), args.prefill, args.steps), 1)
    print(json.dumps({"answers": args.answers and str(args.answers), "rates": rates}))


if __name__ == "__main__":
    main()
