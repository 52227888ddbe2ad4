"""The published Petals client: greedy tokens, beam search and a gradient through a swarm. Prints one JSON object.

    generate.py MODEL --prefix P --peers MADDR [--beam] [--grad] --check
    generate.py MODEL --local [--beam] [--grad]       the same with plain transformers

With --check it does both and compares; exit status 1 means that they differ. With --again FILE it prints a line
{"event": "generated"} after the greedy tokens, waits until FILE exists, and generates them once more.
"""

import argparse
import gc
import json
import sys
import time
from pathlib import Path

import petals_peer  # noqa: F401  makes the import of petals work
import torch

GRADIENT_TOLERANCE = 1e-4  # relative, L2
WAIT_S = 60


def load(args, local):
    """The model: plain transformers, or Petals' client of the swarm."""
    if local:
        from transformers import LlamaForCausalLM

        model = LlamaForCausalLM.from_pretrained(args.model, torch_dtype=torch.float32)
    else:
        from petals import AutoDistributedModelForCausalLM

        model = AutoDistributedModelForCausalLM.from_pretrained(
            args.model,
            initial_peers=args.peers,
            dht_prefix=args.prefix,
            allowed_servers=args.via,
            torch_dtype=torch.float32,
            show_route=False,
            max_retries=args.retries,
            update_period=args.update_period,
            request_timeout=args.timeout,
        )
    model.generation_config.eos_token_id = None  # random weights may emit it at any time
    model.generation_config.pad_token_id = 0
    return model.eval().requires_grad_(False)


def greedy(model, ids, count):
    """Greedy tokens; the first step (prompt, connection) is timed apart from the others."""
    times = []

    def stamp(_ids, scores):
        times.append(time.perf_counter())
        return scores

    start = time.perf_counter()
    out = model.generate(ids, max_new_tokens=count, do_sample=False, logits_processor=[stamp])
    rate = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None
    tokens = out[0, ids.shape[1] :].tolist()
    return {"tokens": tokens, "first_s": round(times[0] - start, 3), "tokens_per_s": rate and round(rate, 2)}


def beams(model, ids, count):
    """Tokens of the best of three beams; each step reorders the servers' caches (hypo_ids)."""
    out = model.generate(ids, max_new_tokens=count, num_beams=3, do_sample=False)
    return out[0, ids.shape[1] :].tolist()


def gradient(model, ids):
    """Gradient of the loss of predicting `ids` at the input embeddings: it passes through every block."""
    inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=inputs).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    return inputs.grad.double()


def wait_for(file):
    """Wait until the file exists."""
    deadline = time.monotonic() + WAIT_S
    while not file.exists():
        if time.monotonic() > deadline:
            sys.exit(f"{file} did not appear within {WAIT_S} s")
        time.sleep(0.05)


def answers(args, local):
    """All that was asked for, as one dictionary; the gradient is a tensor."""
    ids = torch.tensor([args.ids])
    model = load(args, local)
    out = {"mode": "local" if local else "swarm", **greedy(model, ids, args.count)}
    if args.again and not local:
        print(json.dumps({"event": "generated", "tokens": out["tokens"]}), flush=True)
        wait_for(args.again)
        out["again"] = greedy(model, ids, args.count)["tokens"]
    if args.beam:
        out["beam"] = beams(model, ids, args.count)
    if args.grad:
        out["gradient"] = gradient(model, ids)
    return out


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="local model folder")
    parser.add_argument("--peers", nargs="*", default=[])
    parser.add_argument("--prefix")
    parser.add_argument("--via", nargs="+", metavar="PEER_ID", help="use no other servers")
    parser.add_argument("--again", type=Path, metavar="FILE", help="a second session when this file exists")
    parser.add_argument("-n", "--count", type=int, default=32, help="new tokens")
    parser.add_argument("--ids", type=int, nargs="+", default=[5, 17, 99, 314, 271, 828, 182, 845])
    parser.add_argument("--beam", action="store_true")
    parser.add_argument("--grad", action="store_true")
    parser.add_argument("--local", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--retries", type=int, default=5)
    parser.add_argument("--timeout", type=float, default=60)
    parser.add_argument("--update-period", type=float, default=60, help="seconds between readings of the DHT")
    args = parser.parse_args()
    if not args.local and not (args.peers and args.prefix):
        parser.error(
            "--peers and --prefix are needed unless --local is given (a folder has no prefix of its own)"
        )
    torch.set_num_threads(1)
    # An old session closes itself through the client's network thread, and waits for that for ever when the collector
    # happens to run in that very thread.
    gc.disable()

    result = answers(args, args.local)
    swarm_gradient = result.pop("gradient", None)
    equal = True
    if args.check and not args.local:
        local = answers(args, True)
        local_gradient = local.pop("gradient", None)
        same = {"tokens": result["tokens"] == local["tokens"]}
        if args.again:
            same["again"] = result["again"] == local["tokens"]
        if args.beam:
            same["beam"] = result["beam"] == local["beam"]
        if args.grad:
            difference = ((swarm_gradient - local_gradient).norm() / local_gradient.norm()).item()
            same["gradient"] = difference < GRADIENT_TOLERANCE
            result["gradient_difference"] = difference
        equal = all(same.values())
        result.update(local=local, same=same, equal=equal)
    print(json.dumps(result), flush=True)
    sys.exit(0 if equal else 1)


if __name__ == "__main__":
    main()
