"""One torch thread, as the engine uses for small batches."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
