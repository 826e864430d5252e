"""Everything that is measured on a GPU, one script after the other, and plots of it.

    python benchmarks/gpu.py [--only attend|decode|encode|plots]

writes ``benchmarks/results/{attend,decode-step,encode}-<device>.json`` and ``.svg``. Without a GPU
there is nothing to do.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


def device_name() -> str:
    """Short: ``h100``."""
    return torch.cuda.get_device_name().replace("NVIDIA ", "").split()[0].lower()


def main() -> None:
    """Run the scripts; the first that fails ends it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=("attend", "decode", "encode", "plots"))
    only = parser.parse_args().only
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: there is nothing to measure (make bench-cpu measures a CPU)")
    device = device_name()
    RESULTS.mkdir(exist_ok=True)
    commands = {
        "attend": ["attend_gpu.py", "--sweep"],
        "encode": ["encode_gpu.py", "--out", str(RESULTS / f"encode-{device}.json")],
        "decode": ["decode_step_gpu.py", "--out", str(RESULTS / f"decode-step-{device}.json")],
        "plots": ["plots_gpu.py", str(RESULTS / f"attend-{device}.json")],
    }
    for name, (script, *arguments) in commands.items():
        if only in (None, name):
            subprocess.run([sys.executable, str(HERE / script), *arguments], check=True)


if __name__ == "__main__":
    main()
