"""From a checkpoint to blocks: families, shards, memory."""
