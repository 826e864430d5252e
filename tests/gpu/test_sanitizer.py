"""Kernels under compute-sanitizer: what they read and write is theirs.

The whole suite of kernels takes longer; see docs/performance.md, *Sanitizer*.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SANITIZER = shutil.which("compute-sanitizer")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer is not on the path"),
]


def sanitized(tool: str, file: str, chosen: str) -> str:
    """What a tool says about the tests of a file that match ``chosen``."""
    words = [
        str(SANITIZER), "--tool", tool, "--print-limit", "4",
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, "-k", chosen,
    ]  # fmt: skip
    # The allocator would hide reads past the end of a tensor.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout and "failed" not in done.stdout
    return done.stdout


def test_masks_are_read_within_their_bounds() -> None:
    """Bug: rows that fill up a tile read the mask of heads that there are not."""
    told = sanitized("memcheck", "tests/kernels/test_triton_attend.py", "test_masks")
    assert "ERROR SUMMARY: 0 errors" in told
