"""The plugin that `petals-agent plugins new NAME` writes, with its test."""

from __future__ import annotations

PLUGIN = '''"""{name}: never moves to other blocks between two hours of the day.

[plugins.{name}]
begin = 9
end = 17
"""

from datetime import datetime

from pydantic import BaseModel, Field

from petals_agent.hooks import Veto, hookimpl


class Config(BaseModel, extra="forbid"):
    """The keys of [plugins.{name}]."""

    begin: int = Field(default=9, ge=0, le=23)
    end: int = Field(default=17, ge=1, le=24)


class Plugin:
    def __init__(self, config: Config) -> None:
        self.config = config

    @hookimpl
    def before_rebalance(self, plan):
        if self.is_quiet(datetime.now().hour):
            return Veto(f"no move to {{plan.new}} before {{self.config.end}} o'clock")
        return None

    def is_quiet(self, hour: int) -> bool:
        return self.config.begin <= hour < self.config.end
'''

TEST = '''"""Run it with `pytest test_{name}.py`."""

from {name} import Config, Plugin

from petals_agent.hooks import Plan, Span, Veto

PLAN = Plan(old=Span(0, 4), new=Span(4, 8), gain=0.2, reason="a test")


def test_a_whole_day_is_quiet():
    assert isinstance(Plugin(Config(begin=0, end=24)).before_rebalance(PLAN), Veto)


def test_hours():
    plugin = Plugin(Config(begin=9, end=17))
    assert [plugin.is_quiet(hour) for hour in (8, 9, 16, 17)] == [False, True, True, False]
'''
