"""rpc_info, rpc_forward and rpc_backward over the wire, unary and streamed, equal the plain model."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from petals_agent.codecs import dequantize
from petals_agent.serving import wire
from serving.caller import NO_PROMPTS, P2PHandlerError, request, uid
from serving.conftest import Swarm
from serving.expect import WIDTH, close, normal

from hivemind.compression.serialization import serialize_torch_tensor  # isort: skip
from hivemind.proto import runtime_pb2  # isort: skip
from hivemind.utils.serializer import MSGPackSerializer  # isort: skip
from hivemind.utils.tensor_descr import BatchTensorDescriptor  # isort: skip

pytestmark = pytest.mark.asyncio(loop_scope="module")
CODECS = wire.COMPRESSIONS


# --- rpc_info


async def info(swarm: Swarm, name: str) -> dict[str, Any]:
    answer = await swarm.caller.stub(swarm.first.peer_id).rpc_info(
        runtime_pb2.ExpertUID(uid=name), timeout=10
    )
    return dict(MSGPackSerializer.loads(answer.serialized_info))


async def test_info_of_the_server(swarm: Swarm) -> None:
    facts = await info(swarm, "")
    assert facts == {"version": "test", "dht_client_mode": False, "cache_tokens_available": 4 * 4096}


async def test_info_of_a_block(swarm: Swarm) -> None:
    facts = await info(swarm, "tiny.2")
    assert set(facts) == {
        "version", "dht_client_mode", "cache_tokens_available", "forward_schema", "outputs_schema", "keyword_names", "inference_schema",
    }  # fmt: skip
    (hidden,), keywords = facts["forward_schema"]
    assert isinstance(hidden, BatchTensorDescriptor) and keywords == {} and facts["keyword_names"] == ()
    assert tuple(hidden.size) == (None, 1, 2048, WIDTH) and hidden.dtype == torch.float32
    assert hidden.compression == CODECS["NONE"]
    (output,) = facts["outputs_schema"]
    assert output.compression == CODECS["NONE"]
    (_, prompts, hypo_ids), _ = facts["inference_schema"]
    assert (prompts.dtype, hypo_ids.dtype) == (torch.float32, torch.int64)


@pytest.mark.parametrize(
    "name", ["tiny.4", "tiny.-1", "other.0", "tiny", "tiny.0 tiny.9", "tiny.00", "x" * 5000]
)
async def test_info_of_what_is_not_served(swarm: Swarm, name: str) -> None:
    with pytest.raises(P2PHandlerError, match="serve"):
        await info(swarm, name)


# --- rpc_forward


@pytest.mark.parametrize("blocks", [(0, 4), (0, 1), (1, 3), (3, 4)])
@pytest.mark.parametrize("streamed", [False, True])
async def test_forward_equals_the_model(swarm: Swarm, blocks: tuple[int, int], streamed: bool) -> None:
    hidden = normal(2, 9, WIDTH)
    (output,) = await swarm.caller.call(
        swarm.first.peer_id, "rpc_forward", request(uid(*blocks), (hidden, NO_PROMPTS)), streamed
    )
    assert output.dtype == torch.float32
    assert close(output, swarm.model.view(*blocks)(hidden))


@pytest.mark.parametrize("streamed", [False, True])
async def test_forward_with_prompts(swarm: Swarm, streamed: bool) -> None:
    hidden, prompts = normal(2, 9, WIDTH), normal(4, 2, 3, WIDTH, seed=1)
    message = request(uid(0, 4), (hidden, prompts))
    (output,) = await swarm.caller.call(swarm.first.peer_id, "rpc_forward", message, streamed)
    assert close(output, swarm.model.view(0, 4)(hidden, prompts))


@pytest.mark.parametrize("rows", [256, 512, 640])
async def test_large_forwards_are_streamed(swarm: Swarm, rows: int) -> None:
    """2 MiB; exactly one part of 4 MiB; 5 MiB in two parts. The empty prompts are a part of their own."""
    hidden = normal(rows, 64, WIDTH)
    (output,) = await swarm.caller.call(
        swarm.first.peer_id, "rpc_forward", request(uid(0, 1), (hidden, NO_PROMPTS)), streamed=True
    )
    assert close(output, swarm.model.view(0, 1)(hidden))


async def test_a_large_answer_to_a_unary_call_is_refused(swarm: Swarm) -> None:
    """hivemind would send nothing; 16-bit input fits into one message, the server's float32 answer does not."""
    hidden = normal(800, 64, WIDTH).half()
    with pytest.raises(P2PHandlerError, match="4 MiB"):
        await swarm.caller.call(swarm.first.peer_id, "rpc_forward", request(uid(0, 1), (hidden, NO_PROMPTS)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
async def test_input_dtypes(swarm: Swarm, dtype: torch.dtype) -> None:
    hidden = normal(1, 5, WIDTH).to(dtype)
    (output,) = await swarm.caller.call(
        swarm.first.peer_id, "rpc_forward", request(uid(0, 4), (hidden, NO_PROMPTS))
    )
    assert output.dtype == torch.float32
    assert close(output, swarm.model.view(0, 4)(hidden.float()))


async def test_both_layouts_of_bfloat16(swarm: Swarm, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = normal(1, 5, WIDTH).bfloat16()
    for legacy in (False, True):
        monkeypatch.setattr(wire.compression_base, "USE_LEGACY_BFLOAT16", legacy)
        message = request(uid(0, 4), (hidden, NO_PROMPTS))
        assert len(message.tensors[0].buffer) == (4 if legacy else 2) * hidden.numel()
        (output,) = await swarm.caller.call(swarm.first.peer_id, "rpc_forward", message)
        assert close(output, swarm.model.view(0, 4)(hidden.float()))


@pytest.mark.parametrize("codec", ["FLOAT16", "MEANSTD_16BIT", "QUANTILE_8BIT", "UNIFORM_8BIT"])
async def test_input_codecs(swarm: Swarm, codec: str) -> None:
    """The server computes with what the codec left of the values."""
    hidden = serialize_torch_tensor(normal(1, 50, WIDTH), CODECS[codec])
    left = wire.decode_tensor(hidden, 50 * WIDTH)
    (output,) = await swarm.caller.call(
        swarm.first.peer_id, "rpc_forward", request(uid(0, 4), (hidden, NO_PROMPTS))
    )
    assert close(output, swarm.model.view(0, 4)(left))


@pytest.mark.parametrize("codec", ["NONE", "FLOAT16", "MEANSTD_16BIT", "QUANTILE_8BIT", "UNIFORM_8BIT"])
async def test_output_codecs(swarm: Swarm, codec: str) -> None:
    hidden = normal(1, 50, WIDTH)
    message = request(uid(0, 4), (hidden, NO_PROMPTS), output_compression=[CODECS[codec]])
    answer = await swarm.caller.stub(swarm.first.peer_id).rpc_forward(message, timeout=10)
    assert answer.tensors[0].compression == CODECS[codec]
    expected = swarm.model.view(0, 4)(hidden)
    output = wire.decode_tensor(answer.tensors[0], 50 * WIDTH)
    assert (output - expected).abs().mean() <= 0.05 * expected.abs().mean()


@pytest.mark.parametrize("value", [[], [0, 0], [6], [-1], "NONE", 0, [True], [None], {"a": 1}])
async def test_output_compression_that_makes_no_sense(swarm: Swarm, value: Any) -> None:
    message = request(uid(0, 4), (normal(1, 2, WIDTH), NO_PROMPTS), output_compression=value)
    with pytest.raises(P2PHandlerError, match="output_compression must be a list of 1"):
        await swarm.caller.call(swarm.first.peer_id, "rpc_forward", message)


# --- rpc_backward


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("blocks", [(0, 4), (1, 3)])
async def test_backward_equals_autograd(swarm: Swarm, streamed: bool, blocks: tuple[int, int]) -> None:
    hidden, grad = normal(2, 7, WIDTH).requires_grad_(), normal(2, 7, WIDTH, seed=1)
    (expected,) = torch.autograd.grad(swarm.model.view(*blocks)(hidden), hidden, grad)
    message = request(uid(*blocks), (hidden.detach(), grad, NO_PROMPTS))
    answers = await swarm.caller.call(swarm.first.peer_id, "rpc_backward", message, streamed)
    assert len(answers) == 1 and close(answers[0], expected)


@pytest.mark.parametrize("streamed", [False, True])
async def test_backward_with_prompts(swarm: Swarm, streamed: bool) -> None:
    hidden, grad = normal(2, 7, WIDTH).requires_grad_(), normal(2, 7, WIDTH, seed=1)
    prompts = normal(4, 2, 3, WIDTH, seed=2).requires_grad_()
    expected = torch.autograd.grad(swarm.model.view(0, 4)(hidden, prompts), (hidden, prompts), grad)
    message = request(uid(0, 4), (hidden.detach(), grad, prompts.detach()))
    answers = await swarm.caller.call(swarm.first.peer_id, "rpc_backward", message, streamed)
    assert [tuple(answer.shape) for answer in answers] == [(2, 7, WIDTH), (4, 2, 3, WIDTH)]
    assert all(close(ours, theirs) for ours, theirs in zip(answers, expected, strict=True))


async def test_each_gradient_has_its_codec(swarm: Swarm) -> None:
    codecs = [CODECS["FLOAT16"], CODECS["UNIFORM_8BIT"]]
    tensors = (normal(1, 4, WIDTH), normal(1, 4, WIDTH), normal(4, 1, 2, WIDTH))
    message = request(uid(0, 4), tensors, output_compression=codecs)
    answer = await swarm.caller.stub(swarm.first.peer_id).rpc_backward(message, timeout=10)
    assert [tensor.compression for tensor in answer.tensors] == codecs
    assert len(dequantize(answer.tensors[1].buffer, codecs[1], 8 * WIDTH)) == 8 * WIDTH


async def test_tensors_are_taken_in_the_order_of_args_structure(swarm: Swarm) -> None:
    hidden, prompts = normal(2, 9, WIDTH), normal(4, 2, 3, WIDTH, seed=1)
    message = request(uid(0, 4), (prompts, hidden), args_structure=((b"__T1", b"__T0"), {}))
    (output,) = await swarm.caller.call(swarm.first.peer_id, "rpc_forward", message)
    assert close(output, swarm.model.view(0, 4)(hidden, prompts))


# --- refusals


BAD_HIDDEN = [
    (torch.zeros(2, WIDTH), r"\[batch, tokens, 32\]"),
    (torch.zeros(1, 2, WIDTH, 1), r"\[batch, tokens, 32\]"),
    (torch.zeros(1, 2, WIDTH + 1), r"\[batch, tokens, 32\]"),
    (torch.zeros(1, 2, WIDTH, dtype=torch.int64), "floating"),
    (torch.zeros(0, 2, WIDTH), "more than 0 samples"),
    (torch.zeros(1, 0, WIDTH), "more than 0 samples"),
    (torch.full((1, 2, WIDTH), float("nan")), "NaN or infinity"),
    (torch.full((1, 2, WIDTH), float("inf")), "NaN or infinity"),
    (torch.zeros(1, 2, WIDTH, dtype=torch.bool), "'bool' is not served"),
]


@pytest.mark.parametrize(("hidden", "error"), BAD_HIDDEN)
@pytest.mark.parametrize("streamed", [False, True])
async def test_hidden_states_that_cannot_be(
    swarm: Swarm, hidden: torch.Tensor, error: str, streamed: bool
) -> None:
    with pytest.raises(P2PHandlerError, match=error):
        await swarm.caller.call(
            swarm.first.peer_id, "rpc_forward", request(uid(0, 4), (hidden, NO_PROMPTS)), streamed
        )


GOOD = torch.zeros(2, 4, WIDTH)


@pytest.mark.parametrize(
    ("method", "tensors", "metadata", "error"),
    [
        ("rpc_forward", (GOOD,), {}, "2 tensors are needed .* 1 came"),
        ("rpc_forward", (), {}, "2 tensors are needed .* 0 came"),
        ("rpc_backward", (GOOD, GOOD), {}, "3 tensors are needed .* 2 came"),
        ("rpc_backward", (GOOD, GOOD[:, :2], NO_PROMPTS), {}, "differ in shape"),
        ("rpc_backward", (GOOD, GOOD / 0, NO_PROMPTS), {}, "grad_outputs contains NaN"),
        ("rpc_forward", (GOOD, torch.zeros(3, 1, 2, WIDTH)), {}, r"\[4, 2 or 1, at most 4, 32\] is expected"),
        ("rpc_forward", (GOOD, torch.zeros(4, 3, 2, WIDTH)), {}, "elements was claimed|is expected"),
        ("rpc_forward", (GOOD, torch.zeros(4, 1, 5, WIDTH)), {}, r"at most 4, 32\] is expected"),
        ("rpc_forward", (GOOD, torch.zeros(4, 1, 2, WIDTH, dtype=torch.int64)), {}, "floating and finite"),
        ("rpc_forward", (GOOD, torch.full((4, 1, 2, WIDTH), float("nan"))), {}, "floating and finite"),
        ("rpc_forward", (GOOD, NO_PROMPTS), {"active_adapter": "mine"}, "adapter 'mine' not found"),
        ("rpc_forward", (GOOD, NO_PROMPTS), {"active_adapter": 5}, "active_adapter must be a string"),
        ("rpc_forward", (GOOD, NO_PROMPTS), {"points": "many"}, "points must be a finite number"),
        (
            "rpc_forward",
            (GOOD, NO_PROMPTS),
            {"args_structure": ((b"__T7",), {})},
            "args_structure names tensor",
        ),
        ("rpc_forward", (GOOD, NO_PROMPTS), {"x": "y" * 70000}, "limit here is 65536"),
    ],
)
async def test_requests_that_cannot_be(
    swarm: Swarm, method: str, tensors: Any, metadata: dict[str, Any], error: str
) -> None:
    with pytest.raises(P2PHandlerError, match=error):
        await swarm.caller.call(swarm.first.peer_id, method, request(uid(0, 4), tensors, **metadata))


@pytest.mark.parametrize(
    "chain", ["", "tiny.4", "tiny.3 tiny.4", "tiny.1 tiny.0", "tiny.0 tiny.2", "tiny.0 tiny.0", "other.0"]
)
async def test_chains_that_are_not_served(swarm: Swarm, chain: str) -> None:
    with pytest.raises(P2PHandlerError, match=r"block|serve"):
        await swarm.caller.call(swarm.first.peer_id, "rpc_forward", request(chain, (GOOD, NO_PROMPTS)))


async def test_a_batch_beyond_the_limit(swarm: Swarm) -> None:
    swarm.first.server.limits = dataclasses.replace(swarm.first.server.limits, max_batch_tokens=6)
    with pytest.raises(P2PHandlerError, match="256 elements was claimed; the limit here is 192"):
        await swarm.caller.call(swarm.first.peer_id, "rpc_forward", request(uid(0, 4), (GOOD, NO_PROMPTS)))


async def test_uids_that_differ_within_one_request(swarm: Swarm) -> None:
    parts = [request(uid(0, 4), (GOOD,)), request(uid(0, 3), (NO_PROMPTS,))]

    async def feed() -> Any:
        for part in parts:
            yield part

    with pytest.raises(P2PHandlerError, match="Block uids differ in one request"):
        _ = [part async for part in await swarm.caller.stub(swarm.first.peer_id).rpc_forward_stream(feed())]


async def test_a_stream_without_a_request(swarm: Swarm) -> None:
    async def nothing() -> Any:
        return
        yield

    with pytest.raises(P2PHandlerError, match="ended before a request came"):
        _ = [
            part async for part in await swarm.caller.stub(swarm.first.peer_id).rpc_forward_stream(nothing())
        ]


# --- how much may wait


async def test_only_so_many_calls_may_wait(swarm: Swarm) -> None:
    """Steps of sessions do not count."""
    server = swarm.first.server
    server.limits = dataclasses.replace(server.limits, max_waiting_requests=1)
    with server.working(), server.working():
        await swarm.caller.call(swarm.first.peer_id, "rpc_forward", request(uid(0, 4), (GOOD, NO_PROMPTS)))
    with server.calling():
        with pytest.raises(P2PHandlerError, match="1 forwards and backwards wait, which is the limit"):
            await swarm.caller.call(
                swarm.first.peer_id, "rpc_forward", request(uid(0, 4), (GOOD, NO_PROMPTS))
            )


@pytest.mark.parametrize("streamed", [False, True])
async def test_only_so_many_bytes_may_wait(swarm: Swarm, streamed: bool) -> None:
    """Small requests are always taken."""
    server = swarm.first.server
    message = request(uid(0, 1), (normal(400, 64, WIDTH), NO_PROMPTS))
    with (
        server.budget.hold("somebody", server.budget.limit // 2),
        server.budget.hold("else", server.budget.limit // 2 - 2**20),
    ):
        with pytest.raises(P2PHandlerError, match="the limit for all peers; try again"):
            await swarm.caller.call(swarm.first.peer_id, "rpc_forward", message, streamed)
        await swarm.caller.call(
            swarm.first.peer_id, "rpc_forward", request(uid(0, 1), (GOOD, NO_PROMPTS)), streamed
        )
    await swarm.caller.call(swarm.first.peer_id, "rpc_forward", message, streamed)
