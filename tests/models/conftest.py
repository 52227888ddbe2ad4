"""One torch thread, and no progress bars in what a failed test shows."""

from __future__ import annotations

import torch
from transformers.utils import logging

torch.set_num_threads(1)
logging.disable_progress_bar()
