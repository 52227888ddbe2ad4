"""rpc_inference over the wire: every answer equals the plain model over what the session really said."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from harness.waiting import until
from petals_agent.serving import wire
from serving.caller import NO_IDS, NO_PROMPTS, Session, request
from serving.conftest import Swarm
from serving.expect import WIDTH, close, normal, refused

from hivemind.compression.serialization import serialize_torch_tensor  # isort: skip

pytestmark = pytest.mark.asyncio(loop_scope="module")


def session(swarm: Swarm, start: int = 0, end: int = 4) -> Session:
    return swarm.caller.session(swarm.first.peer_id, start, end)


# --- steps


@pytest.mark.parametrize("blocks", [(0, 4), (1, 3), (3, 4)])
@pytest.mark.parametrize("prefill", [[7], [3, 4], [1, 1, 5], [2, 0, 5]])
async def test_prefill_and_decode_equal_the_model(
    swarm: Swarm, blocks: tuple[int, int], prefill: list[int]
) -> None:
    hidden = normal(2, 12, WIDTH)
    expected = swarm.model.view(*blocks)(hidden)
    one, position, answers = session(swarm, *blocks), 0, []
    for count in [*prefill, 1, 1, 1, 1, 1]:
        answers.append(await one.step(hidden[:, position : position + count], max_length=12))
        position += count
    await one.close()
    assert close(torch.cat(answers, dim=1), expected)


async def test_an_answer_has_the_shape_and_dtype_of_the_server(swarm: Swarm) -> None:
    one = session(swarm)
    answer = await one.step(normal(1, 3, WIDTH).half(), max_length=8)
    assert answer.dtype == torch.float32 and answer.shape == (1, 3, WIDTH)
    await one.close()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("codec", ["NONE", "FLOAT16", "MEANSTD_16BIT", "QUANTILE_8BIT", "UNIFORM_8BIT"])
async def test_input_codecs_and_dtypes(swarm: Swarm, dtype: torch.dtype, codec: str) -> None:
    hidden = normal(1, 20, WIDTH).to(dtype)
    if dtype == torch.bfloat16 and codec in ("FLOAT16", "MEANSTD_16BIT"):
        return  # hivemind refuses to write it
    message = serialize_torch_tensor(
        hidden.float() if codec == "QUANTILE_8BIT" else hidden, wire.COMPRESSIONS[codec]
    )
    left = wire.decode_tensor(message, hidden.numel()).float()
    one = session(swarm)
    assert close(await one.step(message, max_length=20), swarm.model.view(0, 4)(left))
    await one.close()


async def test_an_empty_first_step_reserves_the_cache(swarm: Swarm) -> None:
    ledger = swarm.first.server.ledger
    before = ledger.left
    one = session(swarm, 1, 4)
    answer = await one.step(torch.empty(2, 0, WIDTH), max_length=50)
    assert answer.shape == (2, 0, WIDTH)
    assert before - ledger.left == 2 * 2 * 50 * 3
    hidden = normal(2, 4, WIDTH)
    assert close(await one.step(hidden), swarm.model.view(1, 4)(hidden))
    await one.close()
    await until(lambda: ledger.left == before, 1, "the cache is free again")


async def test_two_sessions_do_not_see_each_other(swarm: Swarm) -> None:
    hidden = [normal(1, 6, WIDTH, seed=seed) for seed in range(2)]
    both = [session(swarm) for _ in hidden]
    for position in range(6):
        for one, x in zip(both, hidden, strict=True):
            answer = await one.step(x[:, position : position + 1], max_length=6)
            assert close(answer, swarm.model.view(0, 4)(x)[:, position : position + 1])
    for one in both:
        await one.close()


async def test_without_ids_every_request_is_a_step(swarm: Swarm) -> None:
    """session_id and step_id are optional; so is the uid after the first request."""
    hidden = normal(1, 3, WIDTH)
    one = session(swarm)
    answers = []
    for position in range(3):
        tensors = (hidden[:, position : position + 1], NO_PROMPTS, NO_IDS)
        await one.send(request(one.chain if position == 0 else "", tensors, max_length=3))
        answers.append(await one.receive())
    await one.close()
    assert close(torch.cat(answers, dim=1), swarm.model.view(0, 4)(hidden))


# --- max_length


@pytest.mark.parametrize(
    ("metadata", "error"),
    [
        ({}, "max_length must be an int, not NoneType"),
        ({"max_length": "7"}, "max_length must be an int, not str"),
        ({"max_length": 7.0}, "max_length must be an int, not float"),
        ({"max_length": True}, "max_length must be an int, not bool"),
        ({"max_length": -1}, r"inference_max_length \(512\), not -1"),
        ({"max_length": 513}, r"inference_max_length \(512\), not 513"),
        ({"max_length": 2**63}, "inference_max_length"),
    ],
)
async def test_max_length_that_cannot_be(swarm: Swarm, metadata: dict[str, Any], error: str) -> None:
    one = session(swarm)
    await refused(one, one.step_request(normal(1, 1, WIDTH), **metadata), error)


async def test_beyond_max_length(swarm: Swarm) -> None:
    one = session(swarm)
    await one.step(normal(1, 5, WIDTH), max_length=6)
    await one.step(normal(1, 1, WIDTH))
    await refused(
        one, one.step_request(normal(1, 1, WIDTH)), "prefix 6 . current 1 exceeds pre-allocated maximum 6"
    )
    await until(lambda: swarm.first.idle, 1, "its cache is free")


async def test_the_whole_length_can_be_used_again_after_a_rollback(swarm: Swarm) -> None:
    hidden = normal(1, 6, WIDTH)
    one = session(swarm)
    await one.step(hidden, max_length=6)
    again = await one.step(hidden[:, 2:], start_from_position=2)
    assert close(again, swarm.model.view(0, 4)(hidden)[:, 2:])
    await one.close()


# --- start_from_position


@pytest.mark.parametrize("position", [0, 1, 4, 5])
async def test_rollback_recomputes(swarm: Swarm, position: int) -> None:
    """Other tokens after `position`; 5 is the present length, which stock clients send in every step."""
    hidden, other = normal(2, 5, WIDTH), normal(2, 3, WIDTH, seed=1)
    one = session(swarm)
    await one.step(hidden, max_length=20, start_from_position=0)
    answer = await one.step(other, start_from_position=position)
    said = torch.cat((hidden[:, :position], other), dim=1)
    assert close(answer, swarm.model.view(0, 4)(said)[:, position:])
    await one.close()


async def test_an_empty_step_can_roll_back(swarm: Swarm) -> None:
    hidden, other = normal(1, 5, WIDTH), normal(1, 2, WIDTH, seed=1)
    one = session(swarm)
    await one.step(hidden, max_length=20)
    await one.step(torch.empty(1, 0, WIDTH), start_from_position=3)
    answer = await one.step(other)
    said = torch.cat((hidden[:, :3], other), dim=1)
    assert close(answer, swarm.model.view(0, 4)(said)[:, 3:])
    await one.close()


@pytest.mark.parametrize("position", [-1, 6, 2**40, "2", 2.0, [2]])
async def test_rollback_to_where_nothing_is(swarm: Swarm, position: Any) -> None:
    one = session(swarm)
    await one.step(normal(1, 5, WIDTH), max_length=20)
    message = one.step_request(normal(1, 1, WIDTH), start_from_position=position)
    await refused(one, message, "start_from_position must be an int within 0 and the session's length 5")


# --- hypo_ids


@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 0, 1], [1, 1, 1], [0, 0, 2]])
async def test_beams_are_reordered_before_the_step(swarm: Swarm, rows: list[int]) -> None:
    hidden, after = normal(3, 4, WIDTH), normal(3, 2, WIDTH, seed=1)
    one = session(swarm)
    await one.step(hidden, max_length=10)
    answer = await one.step(after, NO_PROMPTS, torch.tensor(rows))
    said = torch.cat((hidden[rows], after), dim=1)
    assert close(answer, swarm.model.view(0, 4)(said)[:, 4:])
    await one.close()


async def test_beams_after_a_rollback(swarm: Swarm) -> None:
    hidden, after = normal(2, 4, WIDTH), normal(2, 1, WIDTH, seed=1)
    one = session(swarm)
    await one.step(hidden, max_length=10)
    answer = await one.step(after, NO_PROMPTS, torch.tensor([1, 0]), start_from_position=2)
    said = torch.cat((hidden[[1, 0], :2], after), dim=1)
    assert close(answer, swarm.model.view(0, 4)(said)[:, 2:])
    await one.close()


@pytest.mark.parametrize(
    ("ids", "error"),
    [
        (torch.tensor([0, 1], dtype=torch.int32), "hypo_ids must be int64"),
        (torch.empty(0), "hypo_ids must be int64"),
        (torch.tensor([0.0, 1.0]), "hypo_ids must be int64"),
        (torch.tensor([0, 2]), "values from 0 to 1"),
        (torch.tensor([-1, 0]), "values from 0 to 1"),
        (torch.tensor([[0, 1]]), r"hypo_ids must be \[2\]"),
        (torch.tensor([0]), r"hypo_ids must be \[2\]"),
        (torch.tensor([0, 1, 0]), "3 elements was claimed; the limit here is 2"),
    ],
)
async def test_hypo_ids_that_cannot_be(swarm: Swarm, ids: torch.Tensor, error: str) -> None:
    one = session(swarm)
    await refused(one, one.step_request(normal(2, 1, WIDTH), NO_PROMPTS, ids, max_length=5), error)


# --- deep prompts


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("position", [0, 2])
async def test_deep_prompts(swarm: Swarm, rows: int, position: int) -> None:
    """They count from the start of their message, wherever that stands."""
    hidden, prompts = normal(2, position + 6, WIDTH), normal(3, rows, 4, WIDTH, seed=1)
    one = session(swarm, 1, 4)
    if position:
        await one.step(hidden[:, :position], max_length=20)
    answer = await one.step(hidden[:, position:], prompts, max_length=20)
    last = await one.step(normal(2, 1, WIDTH, seed=2))
    everything = torch.cat((hidden, normal(2, 1, WIDTH, seed=2)), dim=1)
    added = torch.zeros(3, 2, position + 7, WIDTH)
    added[:, :, position : position + 4] = prompts
    expected = swarm.model.view(1, 4)(everything, added)
    assert close(torch.cat((answer, last), dim=1), expected[:, position:])
    await one.close()


@pytest.mark.parametrize(
    "shape", [(2, 1, 2, WIDTH), (4, 3, 2, WIDTH), (4, 1, 4, WIDTH), (4, 1, 2, 8), (4, 2, WIDTH)]
)
async def test_prompts_that_do_not_fit(swarm: Swarm, shape: tuple[int, ...]) -> None:
    one = session(swarm)
    message = one.step_request(normal(2, 3, WIDTH), torch.zeros(shape), max_length=5)
    await refused(one, message, "is expected|was claimed; the limit")


# --- the request's form


async def test_args_structure_of_the_first_request_counts(swarm: Swarm) -> None:
    hidden = normal(1, 3, WIDTH)
    one = session(swarm)
    structure = ((b"__T2", b"__T0", b"__T1"), {})
    tensors = (NO_PROMPTS, NO_IDS, hidden[:, :2])
    await one.send(request(one.chain, (*tensors[:2], hidden[:, :1]), max_length=3, args_structure=structure))
    first = await one.receive()
    await one.send(request(one.chain, (*tensors[:2], hidden[:, 1:])))
    answer = torch.cat((first, await one.receive()), dim=1)
    assert close(answer, swarm.model.view(0, 4)(hidden))
    await one.close()


async def test_the_usual_args_structure_and_extra_tensors(swarm: Swarm) -> None:
    hidden = normal(1, 3, WIDTH)
    one = session(swarm)
    tensors = (hidden, NO_PROMPTS, NO_IDS, torch.zeros(5))
    usual = ((b"__T0", b"__T1", b"__T2"), {})
    await one.send(request(one.chain, tensors, max_length=3, args_structure=usual))
    assert close(await one.receive(), swarm.model.view(0, 4)(hidden))
    await one.close()


@pytest.mark.parametrize(
    "structure",
    [
        ((b"__T3", b"__T1", b"__T2"), {}),
        ((b"__T0",) * 20_000, {}),
        ((b"__T0",), {}),
        "x",
        ((((((b"__T0",),),),),), {}),
    ],
)
async def test_malicious_args_structure(swarm: Swarm, structure: Any) -> None:
    one = session(swarm)
    message = one.step_request(normal(1, 1, WIDTH), max_length=5, args_structure=structure)
    await refused(
        one,
        message,
        "args_structure|needs hidden_states, prompts and hypo_ids|limit here is 65536|must be|int64",
    )


@pytest.mark.parametrize(
    ("tensors", "error"),
    [
        ((torch.zeros(1, 1, WIDTH),), "needs hidden_states, prompts and hypo_ids; 1 tensors came"),
        ((torch.zeros(1, WIDTH), NO_PROMPTS, NO_IDS), r"floating \[batch, tokens, hidden\]"),
        ((torch.zeros(1, 1, WIDTH, dtype=torch.int64), NO_PROMPTS, NO_IDS), "floating"),
        ((torch.zeros(1, 1, 8), NO_PROMPTS, NO_IDS), r"\[1, tokens, 32\] is expected"),
        ((torch.full((1, 1, WIDTH), float("nan")), NO_PROMPTS, NO_IDS), "NaN or infinity"),
        ((torch.zeros(0, 1, WIDTH), NO_PROMPTS, NO_IDS), "a batch of 0 sequences .* 1 to 256"),
        ((torch.zeros(257, 1, WIDTH), NO_PROMPTS, NO_IDS), "a batch of 257 sequences .* 1 to 256"),
    ],
)
async def test_a_first_step_that_cannot_be(swarm: Swarm, tensors: Any, error: str) -> None:
    one = session(swarm)
    await refused(one, request(one.chain, tensors, max_length=5), error)


async def test_another_batch_than_at_first(swarm: Swarm) -> None:
    one = session(swarm)
    await one.step(normal(2, 1, WIDTH), max_length=5)
    await refused(one, one.step_request(normal(3, 1, WIDTH)), r"\[2, tokens, 32\] is expected")


@pytest.mark.parametrize("chain", [(0, 5), (4, 6), (0, 0)])
async def test_blocks_that_are_not_served(swarm: Swarm, chain: tuple[int, int]) -> None:
    one = session(swarm, *chain)
    await refused(one, one.step_request(normal(1, 1, WIDTH), max_length=5), "serve|no block is named")


async def test_an_adapter_that_is_not_loaded(swarm: Swarm) -> None:
    one = session(swarm)
    message = one.step_request(normal(1, 1, WIDTH), max_length=5, active_adapter="mine")
    await refused(one, message, "adapter 'mine' not found: this server has loaded no adapters")


# --- step_id


async def test_a_step_sent_twice_is_answered_once(swarm: Swarm) -> None:
    hidden = normal(1, 3, WIDTH)
    expected = swarm.model.view(0, 4)(hidden)
    one = session(swarm)
    await one.step(hidden[:, :1], max_length=3)
    twice = one.step_request(hidden[:, 1:2], step_id="the same")
    await one.send(twice)
    await one.send(twice)
    await one.send(one.step_request(hidden[:, 2:]))
    assert close(await one.receive(), expected[:, 1:2])
    assert close(await one.receive(), expected[:, 2:])
    await one.close()


async def test_a_session_id_is_used_once_at_a_time(swarm: Swarm) -> None:
    one, two = session(swarm), session(swarm)
    await one.step(normal(1, 1, WIDTH), max_length=5)
    await refused(
        two, two.step_request(normal(1, 1, WIDTH), max_length=5, session_id=one.session_id), "not unique"
    )
    await one.step(normal(1, 1, WIDTH))  # goes on
    await one.close()
    three = session(swarm)
    three.session_id = one.session_id
    await three.step(normal(1, 1, WIDTH), max_length=5)
    await three.close()
