"""Inductor's cache on disk: another process finds what one compiled, unless our sources changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json, sys
import torch
from torch._dynamo.utils import counters
import apack_compile.source_hash as sources
from tests import plain

if sys.argv[1] == "edited":
    sources.source_hash = lambda: "of other kernels"
torch.set_grad_enabled(False)
torch.manual_seed(0)
model = plain.PlainDecoder(layers=1).eval()
compiled = torch.compile(model, backend="attentionpack", options={"codec": "int8"})
ids = torch.arange(80)[None]
tokens, _ = plain.plain_generate(compiled, ids, torch.ones_like(ids), 4, "bool")
found = counters["inductor"]
names = ("fxgraph_cache_hit", "fxgraph_cache_miss", "fxgraph_cache_bypass")
print(json.dumps([tokens.tolist(), [found[name] for name in names]]))
"""


def run(kind: str, folder: Path) -> tuple[list[list[int]], list[int]]:
    """The tokens that a process generates, and what it found: hits, misses, bypasses."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder)}
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, kind],
        env=environment, cwd=root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    tokens, counts = json.loads(done.stdout.splitlines()[-1])
    return tokens, counts


@pytest.mark.slow
def test_a_second_process_hits_and_an_edited_kernel_misses(tmp_path: Path) -> None:
    tokens, (hits, misses, bypasses) = run("first", tmp_path)
    assert (hits, bypasses) == (0, 0) and misses >= 3, "prefill, decode, and packed attention"
    assert run("second", tmp_path) == (tokens, [misses, 0, 0])
    assert run("edited", tmp_path) == (tokens, [0, misses, 0])
