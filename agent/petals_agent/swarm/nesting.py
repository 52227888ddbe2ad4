"""Makes hivemind's decoder refuse values that are nested too deep: some 200 nested tuples (1 KB) overrun the C stack.

Any peer can send them, in a DHT record or in an answer, and would end the process.
"""

from __future__ import annotations

import threading
from typing import Any

from petals_agent.p2p import light

light.install(without_torch=False)

from hivemind.utils.serializer import MSGPackSerializer  # noqa: E402

MAX_DEPTH = 16
_here = threading.local()


def limit_depth() -> None:
    """Change hivemind's MSGPackSerializer for the whole process; once is enough."""
    decode = MSGPackSerializer._decode_ext_types
    if getattr(decode, "limited", False):
        return

    def limited(code: int, data: bytes) -> Any:
        depth = getattr(_here, "depth", 0)
        if depth >= MAX_DEPTH:
            raise ValueError(f"a value nested more than {MAX_DEPTH} deep")
        _here.depth = depth + 1
        try:
            return decode(code, data)
        finally:
            _here.depth = depth

    limited.limited = True  # type: ignore[attr-defined]
    MSGPackSerializer._decode_ext_types = limited
