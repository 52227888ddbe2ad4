"""The client of people: texts, batches, draws, ends; on the model that ships with the project."""

from __future__ import annotations

import asyncio
import gc
import json
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

import petals_agent.demo
from harness.processes import Processes
from harness.swarm import PETALS_AGENT, start_bootstrap
from petals_agent.client.generate import Client
from petals_agent.client.sampling import keep_nucleus
from petals_agent.errors import ClientError, SwarmError

from .reference_server import ReferenceServer

MODEL = Path(petals_agent.demo.__file__).parent / "model"
PROMPT = "And it came to pass"
PREFIX = "shipped"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


@pytest.fixture(scope="module")
def shipped() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def swarm(module_processes: Processes, shipped: LlamaForCausalLM) -> Iterator[str]:
    """A bootstrap node and one server of all blocks; its multiaddress."""
    maddr = start_bootstrap(module_processes)
    server = ReferenceServer(shipped, maddr, PREFIX, 0, 8)
    yield maddr
    server.stop()


@pytest.fixture(scope="module")
def client(swarm: str) -> Iterator[Client]:
    with Client(str(MODEL), [swarm], PREFIX, dtype="float32") as client:
        yield client


def expected(shipped: LlamaForCausalLM, ids: list[int], count: int, **how: object) -> list[int]:
    tensor = torch.tensor([ids])
    out = shipped.generate(
        tensor,
        attention_mask=torch.ones_like(tensor),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=1,
        **how,
    )
    return out[0, len(ids) :].tolist()


def test_a_text(client: Client, shipped: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(PROMPT).ids
    tokens = expected(shipped, ids, 24, eos_token_id=None)
    result = client.generate(PROMPT, 24)
    assert result.ids == [tokens]
    assert result.text == tokenizer.decode(tokens)
    stream = client.stream(PROMPT, 24)
    pieces = list(stream)
    assert "".join(pieces) == result.text and len(pieces) > 5
    assert stream.result.ids == result.ids and stream.result.text == result.text
    assert [(hop.start, hop.end) for hop in stream.result.route] == [(0, 8)]


def test_characters_come_whole(client: Client, tokenizer: Tokenizer) -> None:
    text = "naïve 日本語 🦙!"
    ids = tokenizer.encode(text).ids
    assert len(ids) > len(text)  # characters of several tokens
    stream = client.codec.stream([])
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) == text and "�" not in "".join(pieces) and "" in pieces


def test_it_ends_at_the_end_token(
    client: Client, shipped: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [5, 6, 7]
    tokens = expected(shipped, ids, 12, eos_token_id=None)
    end = tokens[5]
    monkeypatch.setattr(client, "end_tokens", {end})
    cut = tokens[: tokens.index(end) + 1]
    assert client.generate(ids, 12).ids == [cut]
    assert client.generate(ids, 12, num_beams=3).ids == [
        expected(shipped, ids, 12, num_beams=3, eos_token_id=end)
    ]
    other = [9, 10, 11]
    rows = client.generate([ids, other], 12).ids  # rows end apart
    assert rows[0] == cut and len(rows[1]) >= len(cut)
    assert client.end_tokens == {end}


def test_the_end_token_of_the_checkpoint(client: Client) -> None:
    assert client.end_tokens == {0}


def test_the_same_seed_draws_the_same_text(client: Client) -> None:
    def draw(seed: int | None, **how: float) -> str | None:
        return client.generate(PROMPT, 16, do_sample=True, seed=seed, **how).text

    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(4)}) == 4
    assert draw(None, temperature=1e-6) == client.generate(PROMPT, 16).text == draw(None, top_p=1e-6)


def test_the_nucleus() -> None:
    scores = torch.tensor([[0.5, 0.1, 0.3, 0.1], [0.25] * 4]).log()
    assert torch.isfinite(keep_nucleus(scores, 0.6)).tolist() == [
        [True, False, True, False],
        [True, True, True, False],
    ]
    assert torch.isfinite(keep_nucleus(scores, 1e-9)).sum(-1).tolist() == [1, 1]
    assert torch.equal(keep_nucleus(scores, 1.0), scores)


@pytest.mark.parametrize(
    ("prompt", "how", "message"),
    [
        ("", {}, "no tokens"),
        ([], {}, "same number of tokens"),
        ([[1, 2], [3]], {}, r"same number of tokens.*\[1, 2\]"),
        ([[1.5, 2.0]], {}, "integers"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens"),
        ([1], {"do_sample": True, "temperature": 0.0}, "temperature"),
        ([1], {"do_sample": True, "top_p": 1.5}, "top_p"),
        ([1], {"num_beams": 0}, "num_beams"),
        ([1], {"num_beams": 2, "do_sample": True}, "does not sample"),
    ],
)
def test_own_mistakes(client: Client, prompt: object, how: dict[str, object], message: str) -> None:
    with pytest.raises(ClientError, match=message):
        client.generate(prompt, **how)  # type: ignore[arg-type]


def test_several_threads_at_once(client: Client) -> None:
    alone = {prompt: client.generate(prompt, 8).text for prompt in ("The", "And the", "In the")}
    together: dict[str, str | None] = {}

    def run(prompt: str) -> None:
        together[prompt] = client.generate(prompt, 8).text

    threads = [threading.Thread(target=run, args=(prompt,)) for prompt in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert together == alone


async def test_asynchronous_code(client: Client) -> None:
    result, pieces = await asyncio.gather(client.agenerate(PROMPT, 8), collect(client))
    assert "".join(pieces) == result.text


async def collect(client: Client) -> list[str]:
    return [piece async for piece in client.astream(PROMPT, 8)]


def test_a_stream_can_be_left(client: Client) -> None:
    stream = client.stream(PROMPT, 200)
    next(stream)
    stream.close()
    with pytest.raises(ClientError, match="closed"):
        next(stream)


def test_nothing_is_left_of_a_closed_client(swarm: str) -> None:
    def children() -> set[int]:
        return {process.pid for process in psutil.Process().children(recursive=True)}

    def threads() -> int:
        return sum(thread.name == "petals-client" for thread in threading.enumerate())

    before, running = children(), threads()
    client = Client(str(MODEL), [swarm], PREFIX)
    client.generate([1, 2], 2)
    assert len(children() - before) == 1 and threads() == running + 1
    client.close()
    client.close()
    assert children() <= before and threads() == running
    with pytest.raises(ClientError, match="closed"):
        client.generate([1, 2], 2)
    gc.collect()


def test_nobody_answers(free_port: object) -> None:
    nobody = f"/ip4/127.0.0.1/tcp/{free_port()}/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"  # type: ignore[operator]
    with pytest.raises(SwarmError, match=r"cannot join the DHT through .*tcp"):
        Client(str(MODEL), [nobody], PREFIX)


def test_a_folder_has_no_prefix_of_its_own(swarm: str) -> None:
    with pytest.raises(ClientError, match="prefix"):
        Client(str(MODEL), [swarm])


# --- the command


def command(swarm: str, *options: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    arguments = [
        *PETALS_AGENT,
        "generate",
        "--model",
        str(MODEL),
        "--prefix",
        PREFIX,
        "--initial-peers",
        swarm,
    ]
    return subprocess.run([*arguments, *options], input=stdin, capture_output=True, text=True, timeout=90)


def test_the_command_prints_the_text_and_its_route(swarm: str, client: Client) -> None:
    done = command(swarm, "--max-new-tokens", "12", PROMPT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() != ""
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("[12 tokens, ") and "tokens/s" in last and "route 0:8 …" in last


def test_the_command_speaks_json_and_reads_from_a_pipe(swarm: str) -> None:
    done = command(
        swarm, "--max-new-tokens", "5", "--json", "--sample", "--seed", "3", "-", stdin=PROMPT + "\n"
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["prompt"] == PROMPT and len(result["tokens"]) == 5 and result["text"]
    assert result["route"][0]["start"] == 0 and result["route"][0]["end"] == 8


def test_the_command_says_what_is_wrong(swarm: str) -> None:
    done = command(swarm, "")
    assert (done.returncode, done.stdout) == (69, "")
    assert done.stderr.splitlines() == [
        "petals-agent: the prompt is empty; give a text, or - and a text on standard input"
    ]
