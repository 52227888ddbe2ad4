"""Looks after the agent: findings → verdict → repair, and a ping to systemd only from here and only while that is right."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import replace
from typing import NoReturn

from petals_agent.config.schema import Config
from petals_agent.config.values import PROBES
from petals_agent.errors import AgentError
from petals_agent.health.findings import Finding, Probe, Status
from petals_agent.health.probing import Probing
from petals_agent.health.recovery import Budget, Ladder
from petals_agent.health.steps import Step
from petals_agent.health.verdict import EXCUSES, Health, Verdict, judge
from petals_agent.hooks.caller import PluginCaller
from petals_agent.hooks.values import AgentFacts, Recovery
from petals_agent.supervisor.announcing import Announcing
from petals_agent.supervisor.container_probes import ContainerProbes
from petals_agent.supervisor.gpu_probes import GpuProbes
from petals_agent.supervisor.heartbeat import Heartbeat
from petals_agent.supervisor.host_probes import HostProbes
from petals_agent.supervisor.illness import Illness, recovery_of, shown_verdict
from petals_agent.supervisor.network import Network
from petals_agent.supervisor.notify import Notifier
from petals_agent.supervisor.plugin_probes import plugin_probes
from petals_agent.supervisor.served import Caller
from petals_agent.supervisor.serving import Serving
from petals_agent.supervisor.states import SETTLED, Life, State
from petals_agent.supervisor.swarm_probes import SwarmProbes
from petals_agent.supervisor.telling import Telling

_TICK_S = 0.25
_PING_S = 1.0
_REPAIR_TIMEOUT_S = 60.0
_CONSULT_S = 30.0  # between questions to plugins about an illness that no step of ours cures
_ABORT_S = 10.0  # systemd's SIGABRT comes at once


class Care:
    """`run()` as a task. `verdict` and `findings` for status and metrics."""

    def __init__(
        self,
        config: Config,
        network: Network,
        serving: Serving,
        announcing: Announcing,
        caller: Caller,
        heartbeat: Heartbeat,
        budget: Budget,
        notifier: Notifier,
        plugins: PluginCaller,
        telling: Telling,
        life: Life,
    ) -> None:
        self._config = config.health
        self._network, self._serving, self._announcing = network, serving, announcing
        self._notifier, self._life = notifier, life
        folders = (config.state_dir, config.model.cache_dir)
        probes = (
            *ContainerProbes(serving, self._adjusted).all,
            *SwarmProbes(network, serving, announcing, caller, config.swarm, self._adjusted).all,
            *HostProbes(folders, self._adjusted).all,
            *GpuProbes(self._device, self._adjusted).all,
            heartbeat.probe(self._adjusted),
        )
        self.probing = Probing(probes, self._tell_finding)
        self.verdict = Verdict(Health.HEALTHY)
        self._budget = budget
        self._ladder = Ladder(budget, random.Random())
        self._repair: asyncio.Task[None] | None = None
        self._consult_at = 0.0
        self._plugins, self._telling = plugins, telling
        self._illness: Illness | None = None
        self._pinged = 0.0
        self._withheld = self._giving_up = False

    def _device(self) -> str | None:
        model = self._serving.model
        return model.device if model is not None else None

    def take(self, config: Config) -> None:
        """Go by another configuration from now on; probes stay as they are."""
        self._config = config.health
        self._budget.per_hour = config.health.recoveries_per_hour

    def _adjusted(self, probe: Probe) -> Probe:
        table = self._config.probes.get(probe.name)
        return replace(probe, **table.model_dump(exclude_none=True)) if table is not None else probe

    async def invite(self, facts: AgentFacts) -> None:
        """Take in the probes that plugins bring, instead of those that they brought before."""
        invited = await plugin_probes(self._plugins, facts, self._adjusted)
        self.probing.invite(invited)
        for name in self._config.probes.keys() - {probe.name for probe in invited} - set(PROBES):
            text = f'[health.probes."{name}"] changes nothing: no plugin that is in use has such a probe'
            self._life.warn("probe", text, probe=name, reason=text)

    def tell_verdict(self) -> None:
        """To plugins that were not there when it was drawn."""
        if self.verdict.health is not Health.HEALTHY:
            self._telling.tell("on_verdict", verdict=shown_verdict(self.verdict))

    async def run(self) -> NoReturn:
        """Until cancelled; raises AgentError when repairs are exhausted and nobody but a new process can help."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.probing.run(), name="probes")
                await self._watch(group)
        except* AgentError as errors:
            raise errors.exceptions[0] from None
        raise AssertionError("never ends by itself")

    async def _watch(self, group: asyncio.TaskGroup) -> NoReturn:
        while True:
            now = time.monotonic()
            self._judge()
            if self.verdict.cure is not None:
                self._serving.doubt(self.verdict.text)
            elif self._serving.doubted:
                self._serving.attach_again()
            if self._config.repair and (self._repair is None or self._repair.done()):
                serving = self._life.state in SETTLED
                can_move = self._serving.can_move
                step = self._ladder.next(self.verdict, now, serving, can_move=can_move)
                if step is not None or self._is_consultation_due(now):
                    self._repair = group.create_task(self._treat(step), name="repair")
            self._speak_to_systemd(now)
            await asyncio.sleep(_TICK_S)

    def _is_consultation_due(self, now: float) -> bool:
        if self.verdict.health is not Health.UNHEALTHY or self.verdict.cure is not None:
            self._consult_at = 0.0
        elif now >= self._consult_at:
            self._consult_at = now + _CONSULT_S
            return True
        return False

    def _judge(self) -> None:
        verdict = judge(self.probing.findings.values())
        before, self.verdict = self.verdict, verdict
        if verdict.health is Health.UNHEALTHY and self._illness is None:
            self._illness = Illness(time.monotonic(), verdict.reasons)
        if (verdict.health, verdict.probes) != (before.health, before.probes):
            self._telling.tell("on_verdict", verdict=shown_verdict(verdict))
        if verdict.health is before.health:
            return
        fields = {"health": verdict.health.value, "reason": verdict.text}
        if verdict.health is Health.HEALTHY:
            self._life.note("health", "healthy again", **fields)
            if self._illness is not None:
                self._telling.tell("on_recovered", report=self._illness.report(time.monotonic()))
                self._illness = None
        else:
            self._life.warn("health", f"{verdict.health.value}: {verdict.text}", **fields)

    def _tell_finding(self, finding: Finding) -> None:
        fields = {"probe": finding.probe, "status": finding.status.value, "reason": finding.reason}
        if finding.status in (Status.OK, Status.NOT_APPLICABLE):
            self._life.note("probe", f"{finding.probe} is content again", **fields)
            self.probing.forget(tuple(EXCUSES.get(finding.probe, ())))  # they looked through a broken glass
        else:
            self._life.warn("probe", f"{finding.probe} {finding.status.value}: {finding.reason}", **fields)

    # --- repairs

    async def _treat(self, step: Step | None) -> None:
        """Take `step` (None: nothing), or what a plugin chooses instead."""
        chosen = await self._asked(step)
        if chosen is Step.GIVE_UP:
            await self._give_up()
        if chosen is None:
            if step is not None:
                self._ladder.waited(time.monotonic())
        else:
            if step is None:
                self._budget.spend(time.monotonic())  # else the ladder did
            if self._illness is not None:
                self._illness.steps.append(chosen)
            await self._carry_out(chosen)

    async def _asked(self, step: Step | None) -> Step | None:
        outcome = await self._plugins.call(
            "on_unhealthy", verdict=shown_verdict(self.verdict), proposed=recovery_of(step)
        )
        chosen = outcome.value
        if chosen is None or outcome.failures or chosen is recovery_of(step):
            return step
        if chosen is Recovery.CHOOSE_OTHERS and not self._serving.can_move:
            instead = step.words if step is not None else "nothing is done"
            text = f"plugin {outcome.by} wants other blocks, which serve.blocks fixes: {instead}"
            self._life.warn("recovery", text, reason=text)
            return step
        text = f"plugin {outcome.by} chose {chosen.value} instead of {recovery_of(step).value}"
        self._life.note("recovery", text, step=chosen.value, reason=text)
        self._life.decided("recovery", chosen.value, text)
        return None if chosen is Recovery.NOTHING else Step[chosen.name]

    async def _carry_out(self, step: Step) -> None:
        reason = self.verdict.text
        self._life.warn("recovery", f"{step.words}: {reason}", step=step.name.lower(), reason=reason)
        self._life.decided("recovery", step.words, reason)
        began = time.monotonic()
        try:
            async with asyncio.timeout(_REPAIR_TIMEOUT_S):
                if step in (Step.RESTART_CONTAINER, Step.RESTART_BOTH):
                    self._serving.replace_container(reason)
                    self.probing.forget(ContainerProbes.NAMES)
                if step in (Step.RESTART_P2PD, Step.RESTART_BOTH):
                    await self._network.restart(reason)
                    self.probing.forget(SwarmProbes.NAMES)
                if step is Step.CHOOSE_OTHERS:
                    self._serving.choose_others(reason)
                    self.probing.forget(ContainerProbes.NAMES)
                if step is Step.REATTACH:
                    self._serving.attach_again()
                self.probing.forget(("swarm.served",))
            took = time.monotonic() - began
            self._life.note("recovery", f"{step.words}: done", step=step.name.lower(), duration_s=took)
        except TimeoutError:
            self._life.warn(
                "recovery",
                f"{step.words}: not done after {_REPAIR_TIMEOUT_S:g} s",
                step=step.name.lower(),
            )
        self._ladder.settled(time.monotonic())

    async def _give_up(self) -> NoReturn:
        self._giving_up = True
        tried = "every repair was tried in vain"
        if self._budget.exhausted(time.monotonic()):
            tried = (
                f"health.recoveries_per_hour = {self._budget.per_hour} repairs within an hour did not help"
            )
        reason = f"{tried}: {self.verdict.text}"
        self._life.warn("give_up", reason, reason=reason)
        self._life.decided("give_up", "announce OFFLINE and let systemd restart us", reason)
        self._notifier.status(f"giving up: {reason}")
        await self._announcing.say_offline()
        if self._notifier.trigger():
            await asyncio.sleep(_ABORT_S)
        raise AgentError(f"{reason}; start the agent again once the cause is gone")

    # --- systemd

    def _speak_to_systemd(self, now: float) -> None:
        life, notifier = self._life, self._notifier
        if life.state in SETTLED or (life.state is State.JOINING and self._config.ready == "joining"):
            notifier.ready()
        notifier.status(self.line)
        if now - self._pinged < _PING_S or self._giving_up:
            return
        self._pinged = now
        withheld = self.verdict.cure is not None and not self._config.repair
        if withheld and not self._withheld:
            why = f"the watchdog's ping is withheld, since health.repair is off: {self.verdict.text}"
            life.warn("ping_withheld", why, reason=self.verdict.text)
            life.decided("ping_withheld", "no ping to systemd", self.verdict.text)
        self._withheld = withheld
        if not withheld:
            notifier.ping()
            notifier.extend_start()

    @property
    def line(self) -> str:
        """What we do, in one line."""
        serving, state = self._serving, self._life.state
        span = f"blocks {serving.span[0]}:{serving.span[1]}" if serving.span is not None else "blocks"
        progress = serving.progress
        text = state.value
        if serving.loaded is None and progress is not None:
            text = f"{state.value}: loading {span}, {progress.text} {progress.done}/{progress.total}"
        elif serving.beat is not None:
            text = f"{state.value}: {span}, {serving.beat.sessions} sessions"
        elif self._network.problem is not None:
            text = f"{state.value}: {self._network.problem}"
        return text if self.verdict.health is Health.HEALTHY else f"{text}; {self.verdict.text}"
