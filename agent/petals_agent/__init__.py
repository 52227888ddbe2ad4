"""petals-agent: a host agent that serves transformer blocks in a Petals swarm."""

__version__ = "0.1.0"
