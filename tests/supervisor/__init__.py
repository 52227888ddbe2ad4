"""The agent's process: its life, its children, what it tells and asks."""
