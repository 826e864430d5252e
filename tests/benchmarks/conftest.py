from __future__ import annotations

import sys
from pathlib import Path

# `python -m benchmarks.quality` finds the benchmarks beside it; pytest's importlib mode does not.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
