"""The options of Petals' run_server by their names there, and what each is called here.

docs/from-petals.md explains the same map; a test keeps the two equal.
"""

from __future__ import annotations

FROM_PETALS: dict[str, str] = {
    "model": "model.path",
    "converted_model_name_or_path": "model.path",
    "public_name": "swarm.public_name",
    "token": "model.token_file",
    "use_auth_token": "model.token_file",
    "num_blocks": "serve.num_blocks",
    "block_indices": "serve.blocks",
    "dht_prefix": "model.dht_prefix",
    "port": "swarm.listen",
    "public_ip": "swarm.announce",
    "host_maddrs": "swarm.listen",
    "announce_maddrs": "swarm.announce",
    "no_auto_relay": "swarm.relay",
    "daemon_startup_timeout": "swarm.daemon_startup_timeout",
    "compression": "serve.compression",
    "inference_max_length": "serve.inference_max_length",
    "max_batch_size": "serve.max_batch_size",
    "attn_cache_tokens": "serve.cache_tokens",
    "cache_dir": "model.cache_dir",
    "max_disk_space": "model.max_disk",
    "device": "serve.device",
    "torch_dtype": "model.dtype",
    "max_alloc_timeout": "serve.max_alloc_timeout",
    "revision": "model.revision",
    "throughput": "serve.throughput",
    "update_period": "swarm.update_period",
    "request_timeout": "serve.request_timeout",
    "session_timeout": "serve.session_timeout",
    "step_timeout": "serve.step_timeout",
    "initial_peers": "swarm.initial_peers",
    "new_swarm": "swarm.initial_peers",
    "identity_path": "swarm.identity",
    "balance_quality": "balance.balance_quality",
    "mean_balance_check_period": "balance.mean_balance_check_period",
    "quant_type": "model.quantization",
    "adapters": "model.adapters",
    "skip_reachability_check": "swarm.reachability",
}

NO_KEY = frozenset(
    {
        "num_handlers",
        "prefetch_batches",
        "sender_threads",
        "min_batch_size",
        "max_chunk_size_bytes",
        "expiration",
        "increase_file_limit",
        "stats_report_interval",
        "custom_module_path",
        "tensor_parallel_devices",
        "config",
    }
)
"""Options of run_server that need no key here; docs/from-petals.md says why."""
