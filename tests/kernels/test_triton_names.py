"""Inductor puts a kernel and all that it calls into one file: a name must mean one thing there."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import triton

from apack_compile.kernels.triton import (
    attend,
    encode,
    fold,
    merge,
    prepare,
    ranks,
    settle,
    slots,
    spread,
    turned,
)

KERNELS = [
    attend.attend_kernel, fold.fold_kernel, merge.merge_kernel, turned.basis_kernel,
    encode.encode_kernel, settle.settle_kernel, settle.survey_kernel, ranks.rank_kernel,
    spread.spread_kernel, prepare.prepare_kernel, slots.value_slots_kernel,
]  # fmt: skip


def meanings(kernel: Any, found: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """What each global name stands for in a kernel and in what it calls."""
    for name in kernel.fn.__code__.co_names:
        meant = kernel.fn.__globals__.get(name)
        ours = hasattr(meant, "fn") and meant.fn.__module__.startswith("apack_compile")
        if not ours and not isinstance(meant, triton.language.constexpr):
            continue
        if not any(meant is other for other in found.setdefault(name, [])):
            found[name].append(meant)
            if ours:
                meanings(meant, found)
    return found


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.fn.__name__)
def test_no_name_means_two_things(kernel: Any) -> None:
    """Bug: ``SHIFT`` of one file was that of another, in graphs: weights left float16."""
    found = meanings(kernel, {})
    assert found
    assert [name for name, meant in found.items() if len(meant) > 1] == []
