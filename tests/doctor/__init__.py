"""Tests of the checks, each on something real: files, ports, p2pds, shards."""
