"""Imported first, this makes `import petals` (the published 2.2.0.post1) work on a present-day Python stack.

That package was written for hivemind 1.1.10 and pydantic 1. Since then hivemind stopped lifting the names of its
submodules to the top level, and pydantic 2 moved the old interface to `pydantic.v1`. Both are bridged here; nothing
of Petals itself is changed.
"""

import contextlib
import importlib
import os
import sys
import types

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # local model folders only
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# where a name occurs twice, the module listed first wins
_LIFTED = """
    p2p p2p.p2p_daemon dht dht.node utils utils.asyncio utils.tensor_descr utils.timed_storage utils.nested
    utils.serializer utils.streaming utils.mpfuture utils.logging compression compression.base
    compression.serialization moe moe.expert_uid moe.server.module_backend moe.server.runtime
    moe.client.remote_expert_worker proto
""".split()


def _lift_hivemind_names() -> None:
    import hivemind

    for name in _LIFTED:
        module = importlib.import_module(f"hivemind.{name}")
        for key, value in vars(module).items():
            if (
                not key.startswith("_")
                and not isinstance(value, types.ModuleType)
                and not hasattr(hivemind, key)
            ):
                setattr(hivemind, key, value)


def _import_petals() -> None:
    # these must meet the real pydantic, so they come before the swap; bitsandbytes prints a line on import
    with contextlib.redirect_stdout(sys.stderr):
        import huggingface_hub
        import peft
        import transformers

    assert huggingface_hub and peft and transformers
    import pydantic
    import pydantic.v1

    sys.modules["pydantic"] = pydantic.v1
    try:
        import petals

        assert petals
    finally:
        sys.modules["pydantic"] = pydantic


if "petals" not in sys.modules:
    _lift_hivemind_names()
    _import_petals()
