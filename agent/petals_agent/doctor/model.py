"""The model: whether the agent may read it or fetch it, and whether what is here is whole."""

from __future__ import annotations

import os
from pathlib import Path

from petals_agent.doctor.account import Account, current_account
from petals_agent.doctor.check import Result, Skip, ok, problem, warning
from petals_agent.doctor.host import Host
from petals_agent.doctor.threads import in_thread
from petals_agent.errors import CheckpointError, ModelError, UnsupportedModel
from petals_agent.models.shard import read_header
from petals_agent.models.source import ModelSource


async def check_model(host: Host) -> Result:
    """A folder that the agent can read, or a repository that the Hub gives it; of a family that is served."""
    model, account = host.config.model, host.account
    if model.folder is not None:
        folder = model.folder
        unreadable = await in_thread(lambda: first_unreadable(folder, account))
        if unreadable is not None:
            return problem(
                f"{account.name} cannot read {unreadable}", f"Open it: sudo chmod -R a+rX {unreadable}"
            )
    try:
        source, facts = await host.model(), await host.facts()
    except UnsupportedModel as error:
        return problem(str(error), f"See what is served: petals-agent plan {model.path} --json")
    except ModelError as error:
        return problem(str(error), f"Try again when that is mended: petals-agent plan {model.path}")
    what = f"{model.path}: {facts.num_blocks} blocks, {facts.model_type}"
    if source.repo is None:
        return ok(what)
    try:
        online = await host.online()
    except CheckpointError as error:
        return problem(str(error), f"See what the Hub says to this token: petals-agent plan {model.path}")
    if online:
        return ok(f"{what}, commit {source.repo.commit[:8]}")
    return warning(
        f"{what}; the Hub does not answer, so only what is cached can be served",
        "See whether it is the network: curl -I https://huggingface.co",
    )


def first_unreadable(folder: Path, account: Account) -> Path | None:
    """The first file, or folder on the way, that the account cannot read; None if it can, or if there is none."""
    if account.uid == current_account().uid:
        paths = (path for path in (folder, *folder.glob("*")) if path.exists())
        return next((path for path in paths if not os.access(path, os.R_OK)), None)
    for parent in (*reversed(folder.parents), folder):
        if parent.exists() and not account.may_enter(parent.stat()):
            return parent
    return next((path for path in folder.glob("*") if not account.may_read(path.stat())), None)


async def check_weights(host: Host) -> Result:
    """The headers of all shards that are here parse, and promise no more than the files hold."""
    try:
        source = await host.model()
    except ModelError:
        raise Skip('the model cannot be opened, as the check "model" says') from None
    return await in_thread(lambda: look_at_shards(source))


def look_at_shards(source: ModelSource) -> Result:
    """Read the header of each shard on this disk."""
    shards = sorted(set(source.weight_map.values()))
    paths = {shard: source.path_of(shard) for shard in shards}
    here = {shard: path for shard, path in paths.items() if path is not None}
    for shard, path in here.items():
        try:
            header = read_header(path)
        except CheckpointError as error:
            return problem(str(error), f"Delete it and let the agent fetch it again, or copy it: rm {path}")
        absent = [name for name, its in source.weight_map.items() if its == shard and name not in header]
        if absent:
            return problem(
                f"{path} has no tensor {absent[0]} though the index names it",
                f"Index and weights are of different models, copy both again: rm {path}",
            )
    if source.repo is None and len(here) < len(shards):
        missing = next(shard for shard in shards if shard not in here)
        return problem(
            f"{missing} and {len(shards) - len(here) - 1} more of {len(shards)} files are missing",
            f"Copy the whole checkpoint: ls {source.folder}",
        )
    if len(here) < len(shards):
        return ok(
            f"{len(here)} of {len(shards)} files are here and whole; what is needed is downloaded at the start"
        )
    return ok(f"all {len(shards)} files are here and whole")
