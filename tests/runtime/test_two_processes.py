"""What Inductor compiles, and what another process finds of it in the cache on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = """
import json
import torch
from torch._dynamo.utils import counters
import apack_compile
from tests import plain

torch.set_grad_enabled(False)
torch.manual_seed(0)
model = plain.PlainDecoder(layers=2).eval()
compiled = torch.compile(model, backend="attentionpack", options={"codec": "int8"})
ids = torch.arange(100)[None]
found = {"graphs": [], "operators": []}
for steps in (20, 150):  # payloads grow twice in the second, by 64 tokens at a time
    tokens, _ = plain.plain_generate(compiled, ids, torch.ones_like(ids), steps, "bool")
    reports = apack_compile.report(model).graph_reports
    found["graphs"].append(sum(g.compiles for g in reports))
    found["operators"].append(sum(g.regions for g in reports))
found["tokens"] = tokens.tolist()
names = ("fxgraph_cache_hit", "fxgraph_cache_miss", "fxgraph_cache_bypass")
found["cache"] = [counters["inductor"][name] for name in names]
print(json.dumps(found))
"""


def run(folder: Path) -> dict[str, Any]:
    """What a process finds that has its Inductor cache in ``folder``."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder)}
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment, cwd=root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_packed_attention_is_compiled_once_for_all_layers_lengths_and_processes(
    tmp_path: Path,
) -> None:
    """The tests of ``test_compiles_once`` run without Inductor, which compiles regions apart."""
    first, second = run(tmp_path), run(tmp_path)
    assert first["graphs"] == [2, 2], "prefill and decode"
    assert first["operators"] in ([1, 1], [2, 2]), "attention, and encoding if it is one"
    compiled = first["graphs"][1] + first["operators"][1]
    assert first["cache"] == [0, compiled, 0]
    assert second == {**first, "cache": [compiled, 0, 0]}
