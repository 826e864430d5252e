from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from apack_compile.codec import moments
from apack_compile.codec.moments import Moments

from ..helpers import few

# float32 sums of some hundred products
CLOSE = {"rtol": 1e-5, "atol": 1e-3}


@pytest.fixture(autouse=True)
def _few_queries_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "MIN_QUERIES", 1)


def test_too_few_queries_are_no_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a first call with one query fitted keys to that query alone."""
    monkeypatch.setattr(moments, "MIN_QUERIES", 32)
    k = torch.randn(1, 2, 40, 8)
    found = Moments.of(torch.randn(1, 4, 1, 8), k, k, None)
    assert torch.equal(found.q_gram, torch.eye(8, dtype=torch.float64).expand(2, 8, 8))


def data(batch: int = 2, tokens: int = 40, dim_v: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(batch, 6, tokens, 4)
    k = torch.randn(batch, 3, tokens, 4) + 1
    return q, k, torch.randn(batch, 3, tokens, dim_v)


def assert_same(a: Moments, b: Moments) -> None:
    for mine, theirs in zip(a.tensors(), b.tensors(), strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)


def test_moments_are_sums_of_tokens_and_of_their_outer_products() -> None:
    q, k, v = data()
    m = Moments.of(q, k, v, None)
    flat_k = k.transpose(1, 2).reshape(80, 12).double()
    flat_v = v.transpose(1, 2).reshape(80, 18).double()
    assert m.count.item() == 80
    assert all(t.dtype == torch.float64 for t in m.tensors())
    torch.testing.assert_close(m.k_sum, flat_k.sum(0), **CLOSE)
    torch.testing.assert_close(m.k_gram, (flat_k.T @ flat_k)[None], **CLOSE)
    torch.testing.assert_close(m.v_sum, flat_v.sum(0), **CLOSE)
    torch.testing.assert_close(m.v_gram, (flat_v.T @ flat_v)[None], **CLOSE)
    for head in range(3):
        readers = q[:, 2 * head : 2 * head + 2].reshape(-1, 4).double()
        torch.testing.assert_close(m.q_gram[head], readers.T @ readers, **CLOSE)


def test_a_large_mean_does_not_drown_the_variance() -> None:
    """Bug: with a mean of 300 and 16,384 tokens float32 sums were off by a tenth of it."""
    k = torch.randn(1, 1, 16384, 8) + 300
    m = Moments.of(k, k, k, None)
    flat = k[0, 0].double()
    mean = m.k_sum / m.count
    found = m.k_gram[0] / m.count - torch.outer(mean, mean)
    torch.testing.assert_close(found, flat.T.cov(correction=0), rtol=0, atol=1e-4)


def test_autocast_changes_nothing() -> None:
    """Bug: under autocast sums were taken in bfloat16."""
    q, k, v = data()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = Moments.of(q, k, v, None)
    assert_same(found, Moments.of(q, k, v, None))


def test_wide_layers_have_sums_by_group_of_heads() -> None:
    k = torch.randn(1, 8, 50, 128)
    m = Moments.of(k, k, k, None)
    assert m.k_gram.shape == (2, 512, 512)
    flat = k[0, 4:].transpose(0, 1).flatten(1).double()
    torch.testing.assert_close(m.k_gram[1], flat.T @ flat, **CLOSE)


@pytest.mark.parametrize("dim", [0, 2])
def test_two_halves_equal_the_whole(dim: int) -> None:
    q, k, v = data()
    halves = [
        Moments.of(*part, None) for part in zip(*(x.chunk(2, dim) for x in (q, k, v)), strict=True)
    ]
    assert_same(halves[0] + halves[1], Moments.of(q, k, v, None))


def test_padding_is_left_out() -> None:
    q, k, v = data(batch=1)
    visible = torch.ones(1, 40, dtype=torch.bool)
    visible[0, :15] = False
    q[:, :, :15], k[:, :, :15], v[:, :, :15] = 1e3, 1e3, 1e3
    rest = [x[:, :, 15:] for x in (q, k, v)]
    assert_same(Moments.of(q, k, v, visible), Moments.of(*rest, None))


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("side", ["k", "v"])
def test_tokens_that_are_not_finite_are_left_out_on_both_sides(side: str, broken: float) -> None:
    q, k, v = data(batch=1)
    (k if side == "k" else v)[0, 1, 7, 2] = broken
    rest = [torch.cat([x[:, :, :7], x[:, :, 8:]], 2) for x in (q, k, v)]
    assert_same(Moments.of(q, k, v, None), Moments.of(*rest, None))


def test_queries_that_are_not_finite_are_left_out() -> None:
    q, k, v = data(batch=1)
    q[0, 0, 3, 1] = float("nan")
    m = Moments.of(q, k, v, None)
    assert m.q_gram.isfinite().all()
    assert m.count.item() == 40


def test_all_queries_count_where_they_are_not_the_keys_own_tokens() -> None:
    q, k, v = data(batch=1)
    visible = torch.zeros(1, 40, dtype=torch.bool)
    visible[0, 10:] = True
    recent = q[:, :, 30:]
    m = Moments.of(recent, k, v, visible)
    assert m.count.item() == 30
    expected = Moments.of(recent, k[:, :, 30:], v[:, :, 30:], None).q_gram
    torch.testing.assert_close(m.q_gram, expected, **CLOSE)


def test_nothing_but_padding_gives_zeros() -> None:
    q, k, v = data()
    m = Moments.of(q, k, v, torch.zeros(2, 40, dtype=torch.bool))
    assert all(not t.any() for t in m.tensors())


@given(
    tokens=st.integers(1, 30), share=st.floats(0, 1), sinks=st.integers(0, 4), seed=st.integers(0)
)
@few
def test_sums_over_kinds_of_tokens_add_up(tokens: int, share: float, sinks: int, seed: int) -> None:
    torch.manual_seed(seed % 2**32)
    q, k, v = data(tokens=tokens)
    visible, visual = torch.rand(2, tokens) < 0.8, torch.rand(2, tokens) < share
    k[0, 0, -1, 0] = float("inf")
    both = [Moments.of(q, k, v, visible, None, sinks, among) for among in (visual, ~visual)]
    assert_same(both[0] + both[1], Moments.of(q, k, v, visible, None, sinks))


def test_sinks_are_the_first_tokens_of_all_kinds() -> None:
    q, k, v = data(batch=1, tokens=10)
    visible, visual = torch.ones(1, 10, dtype=torch.bool), torch.zeros(1, 10, dtype=torch.bool)
    visible[0, :2], visual[0, 3:7] = False, True
    m = Moments.of(q, k, v, visible, None, 3, visual)  # sinks: tokens 2, 3 and 4
    assert m.count.item() == 2
    flat = k[0, :, 5:7].transpose(0, 1).flatten(1).double()
    torch.testing.assert_close(m.k_gram, (flat.T @ flat)[None], **CLOSE)


def test_no_token_of_a_kind_gives_zeros() -> None:
    q, k, v = data()
    m = Moments.of(q, k, v, None, None, 2, torch.zeros(2, 40, dtype=torch.bool))
    assert all(not t.any() for t in m.tensors())


def test_the_mask_of_a_kind_may_lie_on_another_device() -> None:
    """Bug: a mask on the CPU with a model on a GPU ended the first prompt."""
    q, k = torch.empty(1, 2, 9, 4, device="meta"), torch.empty(1, 1, 9, 4, device="meta")
    among = torch.ones(1, 9, dtype=torch.bool)
    assert Moments.of(q, k, k, None, among=among).k_gram.device.type == "meta"
