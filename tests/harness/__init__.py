"""What tests and benchmarks share: processes that cannot be left behind, and the peers that they talk to."""
