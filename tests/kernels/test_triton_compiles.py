"""Kernels compiled for a GPU that need not be there, as Inductor hands them over.

A scalar that is the same in every call of a graph is a constant to Inductor, a float one among
them; what is launched by hand never sees that.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

TYPES = """
pointers = dict.fromkeys(("k_scores", "v_scores", "part", "stats", "exact", "shift", "centre",
                          "mean", "units", "bias", "k_offsets", "k_spans", "k_waves"), "*fp32")
pointers |= dict.fromkeys(("q", "k_pool", "v_pool", "k_ring", "v_ring"), "*bf16")
pointers |= dict.fromkeys(("q16", "k_gain", "v_gain", "k_basis", "synthesis"), "*fp16")
pointers |= dict.fromkeys(("k_codes", "v_codes", "lacks", "found", "k_levels", "v_levels"), "*u8")
pointers |= dict.fromkeys(("lengths", "k_pos", "v_pos"), "*i64")
pointers |= dict.fromkeys(("k_ranks", "v_ranks", "k_totals", "v_totals", "entries", "counts",
                          "table"), "*i32")
"""
"""Of the arguments that are pointers."""

COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from apack_compile.codec import TransformLayout
from apack_compile.kernels.triton import attend, fold, plan, prepare, ranks

spec = TransformLayout(2, 64, 1, 16, 32, 16, 1).spec
config = plan.Config(beside=5)
made = plan.make_plan(spec, spec, 4, 1, (8, 8), 32, config, {listed}, {listed})
sizes = {{name: made.attend[name] for name in made.attend}}
sides = {{"KPLANES": 2, "VPLANES": 10, "KPLANE": 1, "VPLANE": 5, "DROPS": 1, "T": 1024, "E": 64}}
levels = {{side + name: 3 for side in "KV" for name in ("PLANES", "LAST", "FIRST1", "LOST1")}}
levels |= {{side + name: 0 for side in "KV" for name in ("FIRST", "LOST")}} | {{"KINDS": 2}}
levels |= {{"KLAST1": 7, "VLAST1": 7, "KPAD": 4, "VPAD": 4, "T": 1024, "BLOCK": 2048}}
kernel, constants = {{
    "fold": (fold.fold_kernel, made.fold | {{"STEPS": 64}}),
    "attend": (attend.attend_kernel, sizes | {{"BIAS": 1, "CAP": 0.0, "WHOLE": 1, "ASM": True}}),
    "prepare": (prepare.prepare_kernel, sizes | sides | {{"ASM": True}}),
    "rank": (ranks.rank_kernel, levels),
}}["{name}"]
constants = {{name: constants[name] for name in kernel.arg_names if name in constants}}
if "scale2" in kernel.arg_names:
    constants["scale2"] = 0.18
signature = {{
    name: "constexpr" if name in constants else pointers.get(name, "i32")
    for name in kernel.arg_names
}}
given = {{(kernel.arg_names.index(name),): value for name, value in constants.items()}}
made = triton.compile(ASTSource(kernel, signature, given), target=GPUTarget("cuda", 90, 32))
assert "pure = false" not in made.asm["ttir"], "Inductor would copy all arguments"
print(len(made.asm["ptx"]))
"""


def printed(script: str, folder: Path) -> str:
    """What a script prints in a process of its own, which compiles kernels into ``folder``."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder)
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize(
    ("name", "listed"),
    [("fold", False), ("attend", False), ("attend", True), ("prepare", True), ("rank", True)],
)
def test_a_float_may_be_a_constant(name: str, listed: bool, tmp_path: Path) -> None:
    """Bug: ``prepare_kernel`` made a tensor of it in one branch alone, and did not compile.

    ``rank_kernel`` has no such number: it is compiled for two kinds of tokens.

    Bug: with an assembler line that has effects (a prefetch) Inductor took all arguments for
    written ones, and copied the codes in each step: 156 us instead of 67.
    """
    out = printed(TYPES + COMPILE.format(name=name, listed=listed), tmp_path)
    assert int(out) > 1000


MERGE = """
import subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from apack_compile.codec import TransformLayout
from apack_compile.kernels.triton import merge, plan

k, v = (TransformLayout(4, 128, 1, 128, 256, 128, gain).spec for gain in (0, 1))
config = plan.default_config(k, v, 28)
made = plan.make_plan(k, v, 28, 1, (12, 12), 96, config, {listed}, {listed})
slots = plan.merge_slots(made, config, 132, {tails})
constants = made.merge | {{"SINKS": 0, "LSE": 0, "SLOTS": slots}}
kernel = merge.merge_kernel
pointers = dict.fromkeys(("part", "stats", "exact", "units", "mean"), "*fp32")
pointers |= {{"sinks": "*i64", "lse": "*i64", "synthesis": "*fp16", "out": "*bf16"}}
signature = {{
    name: "constexpr" if name in constants else pointers.get(name, "i32")
    for name in kernel.arg_names
}}
given = {{(kernel.arg_names.index(name),): value for name, value in constants.items()}}
attributes = {{(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in pointers}}
source = ASTSource(kernel, signature, given, attributes)
options = {{"num_warps": plan.MERGE.warps}}
made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
    file.write(made.asm["cubin"])
    file.flush()
    print(subprocess.check_output([tool, "-res-usage", file.name], text=True))
"""


@pytest.mark.parametrize(("listed", "tails"), [(False, 0), (True, 8)])
def test_the_merge_keeps_wide_values_in_registers(listed: bool, tails: int, tmp_path: Path) -> None:
    """Bug: with 512 components the basis lay in memory, and each row took tens of microseconds."""
    out = printed(MERGE.format(listed=listed, tails=tails), tmp_path)
    (stack,) = re.findall(r"STACK:(\d+)", out)
    assert int(stack) < 64, out


ATTEND = """
import subprocess, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from apack_compile.codec import TransformLayout
from apack_compile.kernels.triton import attend, plan

k, v = TransformLayout(32, 128, 8, 128, 0, 0, 0), TransformLayout(32, 128, 8, 112, 0, 0, 1)
config = plan.default_config(k.spec, v.spec, 32)
made = plan.make_plan(k.spec, v.spec, 32, 1, (8, 8), 96, config)
kernel = attend.attend_kernel
constants = made.attend | {"BIAS": 0, "CAP": 0.0, "WHOLE": 1, "ASM": True}
constants = {name: constants[name] for name in kernel.arg_names if name in constants}
pointers["scale2"] = "fp32"
signature = {
    name: "constexpr" if name in constants else pointers.get(name, "i32")
    for name in kernel.arg_names
}
given = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
aligned = ({*pointers} - {"scale2"} | {"capacity", "k_rows", "v_rows"}) & {*kernel.arg_names}
attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
source = ASTSource(kernel, signature, given, attributes)
options = {"num_warps": config.warps}
made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
    file.write(made.asm["cubin"])
    file.flush()
    print(subprocess.check_output([tool, "-res-usage", file.name], text=True))
"""


def test_ring_and_pool_take_no_registers_from_codes_of_8_bits(tmp_path: Path) -> None:
    """Bug: with a loop around ring and pool, programs over codes had 255 instead of 168, and four
    instead of six of them ran at once: 59 instead of 56 us."""
    out = printed(TYPES + ATTEND, tmp_path)
    (registers,) = re.findall(r"REG:(\d+)", out)
    assert int(registers) <= 168, out
