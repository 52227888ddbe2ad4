"""libp2p through hivemind's daemon: start it, attach to it, stream over it. No torch."""
