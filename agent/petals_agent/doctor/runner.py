"""Runs checks side by side, each with a deadline; what hangs costs its own check and nothing else."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import cast

from petals_agent.doctor.check import Check, Checked, Result, Skip, problem, warning
from petals_agent.doctor.host import Host
from petals_agent.doctor.threads import in_thread


async def run_checks(checks: Sequence[Check], host: Host) -> AsyncIterator[Checked]:
    """Yield each as it is done; none raises."""
    for done in asyncio.as_completed([_run(check, host) for check in checks]):
        yield await done


async def _run(check: Check, host: Host) -> Checked:
    began = time.monotonic()
    try:
        async with asyncio.timeout(check.timeout):
            if inspect.iscoroutinefunction(check.look):
                result: Result = await check.look(host)
            else:
                look = cast(Callable[[Host], Result], check.look)
                result = await in_thread(lambda: look(host))
    except Skip as skip:
        result = skip.result
    except TimeoutError:
        result = problem(
            f"no answer within {check.timeout:g} s",
            "See what is stuck (state D waits for a disk or a driver): ps -eo pid,stat,wchan:30,args | grep ' D'",
        )
    except PermissionError as error:
        result = Skip(f"no permission: {error.filename or error}", host.as_root).result
    except Exception as error:
        result = warning(
            f"the check itself failed: {error!r}",
            "Please report it with what this prints: petals-agent doctor --json",
        )
    return Checked(check.name, result, time.monotonic() - began)
