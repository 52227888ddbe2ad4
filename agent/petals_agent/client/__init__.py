"""A client of a Petals swarm: routes, sessions with fail-over, generation, backward."""
