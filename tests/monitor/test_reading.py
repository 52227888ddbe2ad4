"""Which models are read when the registry names more than can be."""

from __future__ import annotations

from petals_agent.monitor.reading import MAX_KEYS, choose
from petals_agent.monitor.report import MAX_MODELS
from petals_agent.swarm.records import ModelRecord

from .swarms import peer, reading, records, reported


def test_configured_first_then_those_with_servers() -> None:
    registry = {f"spam{number}": ModelRecord(1000) for number in range(500)}
    registry |= {"real": ModelRecord(80), "mine": ModelRecord(32)}
    before = reported(reading(80, records(1, 0, 80), prefix="real"), reading(4, prefix="spam7"))
    chosen = choose(registry, ["mine", "unlisted"], before)
    assert list(chosen)[:3] == ["mine", "unlisted", "real"]
    assert chosen["unlisted"] is None and chosen["mine"] == ModelRecord(32)
    assert sum(record.num_blocks for record in chosen.values() if record) <= MAX_KEYS


def test_servers_that_can_be_reached_count_for_more_than_those_that_say_so() -> None:
    registry = {f"spam{number}": ModelRecord(1000) for number in range(50)} | {"real": ModelRecord(80)}
    claims = [records(seed, 0, 80) for seed in range(1, 50)]
    before = reported(
        reading(80, records(0, 0, 80), prefix="real"),
        *(reading(80, *claims, prefix=f"spam{number}") for number in range(50)),
        unreachable={peer(seed): "refused" for seed in range(1, 50)},
    )
    assert next(iter(choose(registry, [], before))) == "real"


def test_one_that_is_too_long_leaves_room_for_others() -> None:
    registry = {f"spam{number}": ModelRecord(1000) for number in range(50)} | {
        f"real{number}": ModelRecord(20) for number in range(9)
    }
    assert {f"real{number}" for number in range(9)} <= choose(registry, [], None).keys()


def test_each_of_too_many_gets_its_turn() -> None:
    registry = {f"m{number}": ModelRecord(2) for number in range(3 * MAX_MODELS)}
    seen = set()
    for _ in range(200):
        chosen = choose(registry, [], None)
        assert len(chosen) == MAX_MODELS
        seen |= chosen.keys()
    assert seen == registry.keys()
