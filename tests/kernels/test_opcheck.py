"""Schemas, fakes and tracing of the ops, by PyTorch's own checks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.library import opcheck

from apack_compile.cache import Policy
from apack_compile.codec import Code, ExactLayout, TransformLayout
from apack_compile.codec.evicting import evicting
from apack_compile.codec.layout import KEPT_OF
from apack_compile.codec.modal import modal
from apack_compile.codec.tiered import layout_of
from apack_compile.kernels.kinds import sort_tokens

from ..helpers import encoded, hand_code

POLICY = Policy(sinks=2, extra=1, window=4, block=16, chunk=8)
CODES = {
    "exact": Code(ExactLayout(2, 4)),
    "transform": hand_code(TransformLayout(2, 4, 1, 2, 2, 4, 0)),
    "gain": hand_code(TransformLayout(2, 4, 2, 0, 4, 0, 1)),
    "some exact": hand_code(TransformLayout(2, 4, 1, 2, 2, 4, 1, exact=KEPT_OF // 4)),
    "tiers": hand_code(layout_of((2, 4, 1), (0, 8, 0), True, (24, 16))),
    "by kind": hand_code(
        modal(TransformLayout(2, 4, 1, 0, 0, 4, 0), TransformLayout(2, 4, 2, 0, 4, 0, 1))
    ),
    "evicting": hand_code(evicting(layout_of((2, 4, 1), (0, 8, 0), False), 12)),
}
# Not test_autograd_registration: gradients are not supported.
CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")

every_code = pytest.mark.parametrize("kind", CODES)


def check(op: Any, *args: Any) -> None:
    opcheck(op.default, args, test_utils=CHECKS)


def by_token(batch: int, heads: int, tokens: int, dim: int) -> torch.Tensor:
    """``[B, H, T, D]`` with the strides that models give it: heads of a token side by side."""
    return torch.randn(batch, tokens, heads, dim).transpose(1, 2)


@every_code
@pytest.mark.parametrize(("masked", "more"), [
    (False, ()), (True, ()), (False, (20.0, torch.randn(4))), (True, (0.0, torch.randn(4)))
])  # fmt: skip
def test_attend(kind: str, masked: bool, more: tuple[Any, ...]) -> None:
    code = CODES[kind]
    k, lengths = encoded(torch.randn(2, 2, 10, 4), code, POLICY)
    v, _ = encoded(torch.randn(2, 2, 10, 4), code, POLICY)
    mask = torch.rand(2, 1, 3, 10) < 0.8 if masked else None
    spec = code.layout.spec
    q = by_token(2, 4, 3, 4)
    check(torch.ops.apack.attend, q, mask, k, v, lengths, 0.5, spec, spec, *more)


@every_code
@pytest.mark.parametrize("length", [3, 10, 16])
def test_encode(kind: str, length: int) -> None:
    """Bug: gains of several groups had other strides than their fake at a multiple of the chunk."""
    code = CODES[kind]
    visible = torch.rand(2, length) < 0.8 if length == 10 else None
    check(
        torch.ops.apack.encode, by_token(2, 2, length, 4), visible, list(code.params),
        code.layout.spec, POLICY.sinks, POLICY.extra, POLICY.window, POLICY.ring, POLICY.chunk,
        *([torch.rand(2, length)] if code.layout.shares else []),
    )  # fmt: skip


@pytest.mark.parametrize("length", [3, 24])
def test_encode_by_kind(length: int) -> None:
    code = CODES["by kind"]
    tokens = sort_tokens(torch.rand(2, length) < 0.5, max(length - POLICY.window, 0), POLICY.chunk)
    check(
        torch.ops.apack.encode, by_token(2, 2, length, 4), None, list(code.params),
        code.layout.spec, POLICY.sinks, POLICY.extra, POLICY.window, POLICY.ring, POLICY.chunk,
        None, list(tokens.tensors(torch.device("cpu"))),
    )  # fmt: skip


def test_encode_of_one_head_aliases_nothing() -> None:
    code = Code(ExactLayout(1, 4))
    check(
        torch.ops.apack.encode, torch.randn(1, 1, 8, 4), None, [], code.layout.spec, 0, 0, 4, 20, 8
    )


@every_code
def test_unpack(kind: str) -> None:
    code = CODES[kind]
    side, lengths = encoded(torch.randn(2, 2, 10, 4), code, POLICY)
    check(torch.ops.apack.unpack, side, lengths, 9, code.layout.spec)


@every_code
def test_present(kind: str) -> None:
    code = CODES[kind]
    side, lengths = encoded(torch.randn(2, 2, 10, 4), code, POLICY)
    spec = code.layout.spec
    check(torch.ops.apack.present, side, side, lengths, 9, spec, spec)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("images", [False, True])
def test_moments(masked: bool, images: bool) -> None:
    visible = torch.rand(2, 6) < 0.8 if masked else None
    visual = torch.rand(2, 6) < 0.5 if images else None
    q, k, v = by_token(2, 4, 6, 4), by_token(2, 2, 6, 4), by_token(2, 2, 6, 3)
    check(torch.ops.apack.moments, q, k, v, visible, visual, None, None, False, 0)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("sinks", "extra"), [(2, 1), (0, 0)])
def test_make_pool(masked: bool, sinks: int, extra: int) -> None:
    x = by_token(2, 3, 6, 4)
    x[0, 1, 4, 2] = float("inf")  # not NaN: the check compares outputs
    visible = torch.rand(2, 6) < 0.8 if masked else None
    strain = 100 * torch.rand(2, 6) if masked else None
    check(torch.ops.apack.make_pool, x, visible, strain, sinks, extra)


@pytest.mark.parametrize("masked", [False, True])
def test_importance(masked: bool) -> None:
    mask = torch.rand(2, 1, 6, 6) < 0.8 if masked else None
    more = (20.0, torch.randn(4)) if masked else ()
    q, k = by_token(2, 4, 6, 4), by_token(2, 2, 6, 4)
    check(torch.ops.apack.importance, q, k, mask, not masked, 0.5, *more)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("op", ["running_importance", "running_importance_plain"])
def test_running_importance(op: str, masked: bool) -> None:
    lengths = torch.tensor([8, 5])
    mask = torch.rand(2, 1, 3, 13) < 0.8 if masked else None
    more = (20.0, torch.randn(4)) if masked else ()
    q, ring = by_token(2, 4, 3, 4), torch.randn(2, 2, 6, 4)
    bias = torch.ops.apack.score_bias(mask, lengths, 0, 6, q.dtype)
    called = getattr(torch.ops.apack, op)
    check(called, torch.rand(2, 6) - 0.1, q, bias, ring, lengths, 0.5, *more)


def test_update_importance_writes_to_its_first_argument_alone() -> None:
    lengths = torch.tensor([8, 5])
    q, ring = by_token(2, 4, 3, 4), torch.randn(2, 2, 6, 4)
    bias = torch.ops.apack.score_bias(None, lengths, 0, 6, q.dtype)
    check(torch.ops.apack.update_importance_, torch.rand(2, 6), q, bias, ring, lengths, 0.5)


def test_token_levels() -> None:
    check(torch.ops.apack.token_levels, torch.rand(2, 40), [26, 16, 6, 2])


def test_append_and_visible_are_seen_through_by_tracing() -> None:
    def fn(ring: torch.Tensor, new: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        torch.ops.apack.append_(ring, new, lengths)
        return torch.ops.apack.visible(ring > 0, 1, 2)

    from torch.fx.experimental.proxy_tensor import make_fx

    traced = make_fx(fn, tracing_mode="fake")(
        torch.zeros(1, 1, 4, 2), torch.ones(1, 1, 1, 2), torch.tensor([0, 1])
    )
    names = [str(n.target) for n in traced.graph.nodes if n.op == "call_function"]
    assert not any("apack" in name for name in names)
    assert any("index_copy_" in name for name in names)
