"""Which DHT prefix a hub repository has by default: everyone must derive the same one, or the swarms do not meet."""

from __future__ import annotations

from petals_agent.swarm.uids import check_prefix


def default_prefix(model_type: str, repository: str) -> str:
    """The prefix of hub repository `owner/name` whose config has this `model_type` (protocol.md §1.5).

    Families that Petals does not know get the rule of its latest, Mixtral: the full name. A local folder has no
    default: its prefix must be configured. Raises ValueError if the name gives no valid prefix.
    """
    owner, _, name = repository.rpartition("/")
    if model_type == "bloom":
        if owner == "bigscience":
            name = name.removesuffix("-petals")
        prefix = f"{owner}/{name}-petals" if owner else f"{name}-petals"
    elif model_type == "llama":
        prefix = name if name.endswith("-hf") else f"{name}-hf"
    elif model_type == "falcon":
        prefix = name
    else:
        prefix = repository
    return check_prefix(prefix.replace(".", "-"))
