"""From a checkpoint to blocks: families, shards, memory.

Without torch, for the agent too: `source` opens a model (`hub` and `disk` fetch and keep its files, `shard` reads their
headers), `families` and `facts` describe it, `memory` says how many blocks fit.
With torch, for the container and clients: `checkpoint` reads weights, `hf` builds transformers' modules from them, `span`
makes blocks [start, end) of them and `probe` learns their attention, `client_parts` is what lies before and after.
"""
