"""A swarm without a network: the instances, the published rules and a seeded simulator of hours in seconds."""
