"""Loading takes the memory of the span, not of two, and imports no more of transformers than it needs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from models.tiny import tiny_model

_PEAK = """
import json, sys
from pathlib import Path
import torch
from petals_agent.models.source import open_model
from petals_agent.models.span import load_span

def kilobytes(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))

torch.set_num_threads(1)
small, large, cpu = open_model(sys.argv[1]), open_model(sys.argv[2]), torch.device("cpu")
load_span(small, 0, 1, torch.float32, cpu)  # imports, thread pools
found = {}
for dtype in (torch.float32, torch.bfloat16):
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = kilobytes("VmRSS")
    span = load_span(large, 0, large.facts.num_blocks, dtype, cpu)
    size = sum(weight.numel() * weight.element_size() for weight in span.blocks.parameters())
    found[str(dtype)] = {"peak": (kilobytes("VmHWM") - before) * 1024, "size": size}
    del span
print(json.dumps(found))
"""


def _run(code: str, *arguments: str) -> Any:
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=100, check=True
    )
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("variant", ["llama", "qwen3_moe"])
def test_peak_memory_of_loading(variant: str, tmp_path: Path) -> None:
    """A float32 checkpoint of about 200 MB, as it is and converted."""
    sizes = {
        "hidden_size": 512,
        "intermediate_size": 2400,
        "moe_intermediate_size": 256,
        "num_hidden_layers": 11,
    }
    experts = {"num_experts": 12, "num_local_experts": 12, "mlp_only_layers": []}
    small = tiny_model(variant, tmp_path / "small")
    with TemporaryDirectory(dir=tmp_path) as folder:  # too large to be kept with the other results
        found = _run(_PEAK, str(small), str(tiny_model(variant, Path(folder), "50MB", **sizes, **experts)))
    assert found["torch.float32"]["size"] == 2 * found["torch.bfloat16"]["size"] > 150e6
    for dtype, measured in found.items():
        assert measured["peak"] < 1.3 * measured["size"], dtype


def test_only_the_modules_of_one_family_are_imported(tmp_path: Path) -> None:
    """Of transformers' several hundred models; and nothing that the agent does not need beside."""
    code = """
import json, sys
import torch
from petals_agent.models.source import open_model
from petals_agent.models.span import load_span

load_span(open_model(sys.argv[1]), 0, 2, torch.float32, torch.device("cpu"))
families = {name.split(".")[2] for name in sys.modules if name.startswith("transformers.models.")}
heavy = {"accelerate", "peft", "torchvision", "pandas", "sklearn", "matplotlib", "transformers.pipelines"}
print(json.dumps([sorted(families), sorted(heavy & set(sys.modules))]))
"""
    assert _run(code, str(tiny_model("llama", tmp_path))) == [["auto", "llama"], []]
