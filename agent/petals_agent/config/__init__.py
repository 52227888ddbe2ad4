"""petals-agent.toml: its schema, its loading and its error messages. No torch."""

from petals_agent.config.load import Loaded, config_from, load_config, parse_overrides, read_config
from petals_agent.config.messages import InvalidConfig, Mistake, check_span
from petals_agent.config.origin import Origin
from petals_agent.config.places import Places, places
from petals_agent.config.public_swarm import PUBLIC_INITIAL_PEERS
from petals_agent.config.schema import Config

__all__ = [
    "PUBLIC_INITIAL_PEERS",
    "Config",
    "InvalidConfig",
    "Loaded",
    "Mistake",
    "Origin",
    "Places",
    "check_span",
    "config_from",
    "load_config",
    "parse_overrides",
    "places",
    "read_config",
]
