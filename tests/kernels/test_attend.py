from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from apack_compile.cache import Policy
from apack_compile.codec import Code, ExactLayout, TransformLayout
from apack_compile.kernels.reference import attend_reference, unpack_reference

from ..helpers import encoded, few, hand_code, poison

# float64 all through: rounding of some thousand products of numbers up to 1e2
CLOSE = {"rtol": 1e-9, "atol": 1e-9}

POOLLESS = Policy(sinks=0, extra=0, window=7, block=16, chunk=16)
POOLED = Policy(sinks=3, extra=2, window=7, block=16, chunk=16)


def code_of(kind: str, heads: int, dim: int, groups: int = 1) -> Code:
    if kind == "exact":
        return Code(ExactLayout(heads, dim))
    code = hand_code(TransformLayout(heads, dim, groups, 2, 4, 4, int(kind == "gain")))
    mean, analysis, synthesis, units, *rest = code.params
    smaller = torch.tensor([1.0, 0.1])[:, None, None]
    return Code(code.layout, (mean, analysis, synthesis, units * smaller, *rest))


def attend(
    q: Tensor, mask: Tensor | None, k: list[Tensor], v: list[Tensor], lengths: Tensor,
    scale: float, codes: tuple[Code, Code], softcap: float = 0.0, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    specs = [code.layout.spec for code in codes]
    return torch.ops.apack.attend(q, mask, k, v, lengths, scale, *specs, softcap, sinks)


def expected(
    q: Tensor, mask: Tensor | None, k: list[Tensor], v: list[Tensor], lengths: Tensor,
    scale: float, codes: tuple[Code, Code], softcap: float = 0.0, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    length = int(lengths.sum())
    dense = [
        unpack_reference(side, lengths, length, code.layout.spec)
        for side, code in zip((k, v), codes, strict=True)
    ]
    return attend_reference(q, *dense, mask, scale, softcap, sinks)


def case(
    kind: str = "gain", *, batch: int = 2, heads: int = 2, groups: int = 2, queries: int = 1,
    length: int = 20, dim: int = 4, dim_v: int = 4, policy: Policy = POOLED, code_groups: int = 1,
) -> dict[str, Any]:  # fmt: skip
    codes = (code_of(kind, heads, dim, code_groups), code_of(kind, heads, dim_v, code_groups))
    k, lengths = encoded(torch.randn(batch, heads, length, dim).double(), codes[0], policy)
    v, _ = encoded(torch.randn(batch, heads, length, dim_v).double(), codes[1], policy)
    q = torch.randn(batch, heads * groups, queries, dim).double()
    return {"q": q, "mask": None, "k": k, "v": v, "lengths": lengths, "scale": 0.3, "codes": codes}


def check(given: dict[str, Any]) -> Tensor:
    out = attend(**given)
    torch.testing.assert_close(out, expected(**given), **CLOSE)
    return out


@pytest.mark.parametrize("queries", [1, 2, 5, 16])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kind", ["exact", "plain", "gain"])
def test_attention_on_codes_is_attention_on_the_unpacked_tokens(
    kind: str, groups: int, queries: int
) -> None:
    check(case(kind, groups=groups, queries=queries))


@given(
    kind=st.sampled_from(["exact", "plain", "gain"]), batch=st.integers(1, 3),
    heads=st.sampled_from([2, 4]), groups=st.integers(1, 3), queries=st.integers(1, 16),
    length=st.integers(1, 40), dim_v=st.sampled_from([4, 6]),
    policy=st.sampled_from([POOLED, POOLLESS]), code_groups=st.integers(1, 2),
    poisoned=st.booleans(), softcap=st.sampled_from([0.0, 0.0, 0.3, 5.0]), sinks=st.booleans(),
)  # fmt: skip
@few
def test_any_shape_agrees_with_the_oracle(
    poisoned: bool, softcap: float, sinks: bool, **shape: Any
) -> None:
    given = case(shape.pop("kind"), **shape) | {"softcap": softcap}
    if sinks:
        given["sinks"] = torch.randn(given["q"].shape[1]) * 3
    if poisoned:
        for side, code in zip("kv", given["codes"], strict=True):
            given[side] = poison(given[side], given["lengths"], code.layout)
    check(given)


MASKS = [
    (2, 1, 3, 20),
    (1, 1, 3, 20),
    (2, 4, 3, 20),
    (1, 4, 1, 20),
    (2, 1, 3, 1),
    (1, 1, 1, 1),
    (3, 20),
]


@pytest.mark.parametrize("shape", MASKS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float64, torch.float32])
@pytest.mark.parametrize("policy", [POOLED, POOLLESS])
def test_masks_broadcast_as_they_do_in_sdpa(
    shape: tuple[int, ...], dtype: torch.dtype, policy: Policy
) -> None:
    given = case(queries=3, policy=policy)
    hidden = torch.rand(shape) < 0.3
    given["mask"] = (
        ~hidden
        if dtype == torch.bool
        else torch.randn(shape).to(dtype).masked_fill(hidden, float("-inf"))
    )
    check(given)


def test_a_mask_is_never_taken_for_causal() -> None:
    given = case("exact", queries=4)
    future_only = torch.arange(20) > torch.arange(16, 20)[:, None] - 10
    given["mask"] = future_only.expand(2, 1, 4, 20)
    check(given)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
def test_rows_that_see_nothing_are_zero(dtype: torch.dtype) -> None:
    given = case(queries=3)
    mask = torch.ones(2, 1, 3, 20, dtype=torch.bool)
    mask[0, :, 1] = False
    given["mask"] = (
        mask
        if dtype == torch.bool
        else torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, float("-inf"))
    )
    out = check(given)
    assert not out[0, :, 1].any()
    assert out[0, :, 0].all()


def test_a_row_masked_with_the_least_number_sees_all_alike_as_in_sdpa() -> None:
    given = case("exact", queries=2)
    given["mask"] = torch.full((2, 1, 2, 20), torch.finfo(torch.float32).min)
    x = given["v"][0].unflatten(-1, (2, 4)).transpose(1, 2)  # all but the window
    recent = given["v"][3][:, :, :7]
    mean = torch.cat([x[:, :, :13], recent], 2).mean(2, keepdim=True).repeat_interleave(2, 1)
    torch.testing.assert_close(attend(**given), mean.expand(2, 4, 2, 4), **CLOSE)


def test_scores_are_capped_before_the_mask_is_added() -> None:
    given = case("exact", queries=3) | {"softcap": 0.5}
    plain = attend(**given | {"softcap": 0.0})
    assert (check(given) - plain).abs().max() > 0.01
    given["mask"] = torch.randn(2, 4, 3, 20).masked_fill(torch.rand(2, 4, 3, 20) < 0.3, -1e30)
    check(given)


def test_sinks_take_part_of_every_row_and_give_nothing() -> None:
    given = case("exact", queries=3)
    plain = attend(**given)
    given["sinks"] = torch.tensor([float("-inf"), 0.0, 100.0, 1e4])
    out = check(given)
    torch.testing.assert_close(out[:, 0], plain[:, 0], **CLOSE)
    assert (out[:, 1].abs() < plain[:, 1].abs()).all()
    assert out[:, 2:].abs().max() < 1e-30
    hidden = torch.zeros(1, 1, 3, 20, dtype=torch.bool)
    assert not attend(**given | {"mask": hidden}).any()


@pytest.mark.parametrize("kind", ["exact", "plain", "gain"])
@pytest.mark.parametrize("length", [3, 7, 8, 20, 32])
def test_stale_slots_do_not_leak(kind: str, length: int) -> None:
    """Bug: 0 * NaN of stale payload and pool slots reached the output."""
    given = case(kind, length=length, policy=POOLED)
    clean = check(given)
    for side, code in zip("kv", given["codes"], strict=True):
        given[side] = poison(given[side], given["lengths"], code.layout)
    assert torch.equal(attend(**given), clean)


def test_keys_and_values_may_differ_in_head_dim_and_code() -> None:
    given = case("exact", dim=4, dim_v=6)
    code = code_of("gain", 2, 6)
    given["v"], _ = encoded(torch.randn(2, 2, 20, 6).double(), code, POOLED)
    given["codes"] = (given["codes"][0], code)
    assert check(given).shape == (2, 4, 1, 6)


def test_pooled_tokens_count_once_and_exactly() -> None:
    code = code_of("gain", 2, 4)
    x = torch.randn(2, 2, 20, 4).double()
    v, lengths = encoded(x, code, POOLED)
    given = case("gain") | {"v": v, "lengths": lengths}
    mask = torch.zeros(2, 1, 1, 20, dtype=torch.bool)
    mask[..., 1] = True  # one sink, nothing else: the output is that token
    given["mask"] = mask
    out = attend(**given)
    sink = x[:, :, 1:2].repeat_interleave(2, 1)
    torch.testing.assert_close(out, sink, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_output_has_the_dtype_of_the_queries(dtype: torch.dtype) -> None:
    given = case("exact")
    low = {s: [t.to(dtype) if t.is_floating_point() else t for t in given[s]] for s in "kv"}
    given |= low | {"q": given["q"].to(dtype)}
    out = attend(**given)
    assert out.dtype == dtype
    # attended in float32, rounded once
    torch.testing.assert_close(out, expected(**given).to(dtype))


def test_a_visible_token_that_is_not_a_number_spoils_its_row_as_in_sdpa() -> None:
    code = code_of("plain", 2, 4)
    x = torch.randn(2, 2, 20, 4).double()
    x[0, 1, 5, 2] = float("nan")
    k, lengths = encoded(x, code, POOLED)
    given = case("plain") | {"k": k, "lengths": lengths}
    out = attend(**given)
    assert out[0, 2:].isnan().all()
    assert out[0, :2].isfinite().all()  # query heads of the other KV head
    assert out[1].isfinite().all()
