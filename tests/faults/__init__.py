"""Processes die, are told to stop, or find what they need taken: what the agent does then."""
