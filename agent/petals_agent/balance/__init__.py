"""Where a server helps its swarm most: pure functions on arrays, no I/O, no asyncio, no torch."""
