"""Every hook of the agent; each docstring is the reference of its hook (docs/plugins.md is made from them)."""

from __future__ import annotations

from pluggy import HookspecMarker

from petals_agent.hooks.values import (
    AgentFacts,
    Candidate,
    Metric,
    MoveReport,
    Pause,
    Plan,
    Probe,
    Recovery,
    RecoveryReport,
    Span,
    StateChange,
    StopReport,
    SwarmSummary,
    Verdict,
    Veto,
)

PROJECT = "petals_agent"
hookspec = HookspecMarker(PROJECT)


@hookspec(firstresult=True)
def on_unhealthy(verdict: Verdict, proposed: Recovery) -> Recovery | None:
    """Choose what is done about an illness.

    When: the verdict is unhealthy and a recovery is due, before each step of the ladder. When only the fleet's heartbeat has failed
        `proposed` is Recovery.NOTHING, once in 30 s.
    Where: the plugin host; `def` in a thread, `async def` on the plugin's own loop.
    Returns: another Recovery that is done instead; Recovery.NOTHING waits; None leaves it to the next plugin. When nobody
        answers, or somebody fails, `proposed` is done.
    Time limit: `plugins.timeout` (5 s). A late answer counts as none.
    Example:
        @hookimpl
        def on_unhealthy(verdict, proposed):
            if any("gpu" in reason for reason in verdict.reasons):
                return Recovery.RESTART_CONTAINER
    """


@hookspec(firstresult=True)
def before_rebalance(plan: Plan, swarm: SwarmSummary) -> Veto | Span | None:
    """Veto or replace a move to other blocks.

    When: the agent has decided to move and confirmed it with fresh readings, before anything is loaded.
    Where: the plugin host; `def` in a thread, `async def` on the plugin's own loop.
    Returns: Veto(reason) stays; a Span is moved to instead of `plan.new`; None leaves it to the next plugin, and the move is
        made when nobody objects. When a plugin fails or is late nothing moves.
    Time limit: `plugins.timeout` (5 s). A late answer counts as a veto.
    Example:
        @hookimpl
        def before_rebalance(plan, swarm):
            if 9 <= datetime.now().hour < 17:
                return Veto("office hours")
    """


@hookspec
def after_shutdown(report: StopReport) -> None:
    """Act once the agent has stopped.

    When: exactly once for each stop, after OFFLINE was announced; also after SIGKILL or the watchdog, then by
        `petals-agent post-stop` in a plugin host of its own.
    Where: the plugin host; `def` in a thread, `async def` on the plugin's own loop.
    Returns: nothing.
    Time limit: `plugins.timeout` (5 s), and 20 s for all plugins together (10 s in `post-stop`). What is late is killed.
    Example:
        @hookimpl
        def after_shutdown(report):
            if not report.clean:
                subprocess.run(["notify", report.reason], check=True)
    """


@hookspec(firstresult=True)
def choose_blocks(swarm: SwarmSummary, candidates: list[Candidate], num_blocks: int) -> Span | None:
    """Choose the blocks that this host serves.

    When: at the start, at each check of the balance, and when the ladder says "choose others". `candidates` are the best
        spans that the agent found, best first; `num_blocks` is how many may be served here at most.
    Where: the plugin host; `def` in a thread, `async def` on the plugin's own loop.
    Returns: a Span to serve, of at most `num_blocks` blocks and within the model; None leaves it to the next plugin, and in the
        end to the agent's own choice. When a plugin fails, the agent chooses.
    Time limit: `plugins.timeout` (5 s). A late answer counts as none.
    Example:
        @hookimpl
        def choose_blocks(swarm, candidates, num_blocks):
            return Span(0, min(16, num_blocks))
    """


@hookspec(firstresult=True)
def should_pause(paused: bool) -> Pause | None:
    """Free the device for somebody else, and take it back.

    When: at the start before anything is loaded, then each `plugins.pause_period` (10 s); `paused` is whether nothing is
        loaded for that reason now.
    Where: the plugin host; `def` in a thread, `async def` on the plugin's own loop.
    Returns: Pause(reason) while the host is needed otherwise: nobody new is let in, open sessions get `drain_s` seconds to end,
        then the blocks are unloaded and their memory is free. None when the agent may serve; the first answer with
        nobody's Pause loads the blocks again. When a plugin fails, is late or disabled, what is stays until a reload or
        `petals-agent resume`.
    Time limit: `plugins.timeout` (5 s). A late answer changes nothing.
    Example:
        @hookimpl
        def should_pause(paused):
            if datetime.now().hour >= 18:
                return Pause("somebody plays in the evening", drain_s=60)
    """


@hookspec
def health_probes(config: AgentFacts) -> list[Probe] | None:
    """Add probes of your own to the agent's.

    When: after the plugins were loaded, so at the start, on a reload and when the plugin host was restarted.
    Where: the plugin host; `def` in a thread, `async def` on the plugin's own loop. So does each probe's `check`.
    Returns: a list of Probe, or None. A probe counts as the agent's own do: only `failures` bad looks in a row, and a `cure`
        makes the agent unhealthy and is what it does about it.
    Time limit: `plugins.timeout` (5 s), and the probe's `timeout` for each look.
    Example:
        @hookimpl
        def health_probes(config):
            return [Probe(name="fan", check=look_at_fan, period=60)]
    """


@hookspec
def on_verdict(verdict: Verdict) -> None:
    """Follow the agent's health.

    When: each time the health changes, or which probes are the reasons for it, in their order; also when nothing is repaired.
    Where: the plugin host; `def` in a thread, `async def` on the plugin's own loop.
    Returns: nothing.
    Time limit: `plugins.timeout` (5 s). The agent does not wait for it.
    Example:
        @hookimpl
        def on_verdict(verdict):
            Path("/run/lab/health").write_text("; ".join((verdict.health, *verdict.reasons)))
    """


@hookspec
def on_recovered(report: RecoveryReport) -> None:
    """Learn that an illness is over.

    When: the verdict is healthy again after it was unhealthy.
    Where: the plugin host; `def` in a thread, `async def` on the plugin's own loop.
    Returns: nothing.
    Time limit: `plugins.timeout` (5 s).
    Example:
        @hookimpl
        def on_recovered(report):
            log.info("well again after %.0f s", report.unhealthy_s)
    """


@hookspec
def after_rebalance(plan: Plan, report: MoveReport) -> None:
    """Learn how a move ended.

    When: after each move that was begun, whether it succeeded or was rolled back.
    Where: the plugin host; `def` in a thread, `async def` on the plugin's own loop.
    Returns: nothing.
    Time limit: `plugins.timeout` (5 s).
    Example:
        @hookimpl
        def after_rebalance(plan, report):
            log.info("asked for %s, now at %s", plan.new, report.span)
    """


@hookspec
def on_state_change(change: StateChange) -> None:
    """Follow the agent's life.

    When: after each transition (starting, joining, online, rebalancing, recovering, draining, paused, stopping, offline), in
        their order.
    Where: the plugin host; `def` in a thread, `async def` on the plugin's own loop.
    Returns: nothing.
    Time limit: `plugins.timeout` (5 s). The agent does not wait for it.
    Example:
        @hookimpl
        def on_state_change(change):
            Path("/run/lab/petals").write_text(change.after)
    """


@hookspec
def on_start(config: AgentFacts) -> None:
    """Prepare something when the agent starts.

    When: once for each start of the agent, after its plugins were loaded and before it joins the swarm.
    Where: the plugin host; `def` in a thread, `async def` on the plugin's own loop.
    Returns: nothing.
    Time limit: `plugins.timeout` (5 s), which the start waits for.
    Example:
        @hookimpl
        async def on_start(config):
            await announce_in_chat(f"{config.public_name} starts to serve {config.model}")
    """


@hookspec
def swarm_metrics(swarm: SwarmSummary, metrics: dict[str, float]) -> list[Metric] | None:
    """Add gauges to the agent's metrics, or take its figures elsewhere.

    When: after each reading of the swarm, about once in `swarm.update_period`. `metrics` are the agent's own figures without
        labels, by their names in /metrics.
    Where: the plugin host; `def` in a thread, `async def` on the plugin's own loop.
    Returns: a list of Metric, shown in /metrics as `petals_plugin_NAME` with the plugin's name as a label; None adds nothing.
    Time limit: `plugins.timeout` (5 s).
    Example:
        @hookimpl
        def swarm_metrics(swarm, metrics):
            return [Metric("weakest_block_tokens_per_second", min(swarm.throughput))]
    """
