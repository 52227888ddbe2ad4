"""A private swarm on this host with a small real model."""
