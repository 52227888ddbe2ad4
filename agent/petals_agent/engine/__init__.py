"""Continuous batching of sessions over a span of blocks: scheduler, KV cache, backends."""
