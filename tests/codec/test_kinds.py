from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from apack_compile.codec import Code
from apack_compile.codec.fit import Evidence, fit_transform
from apack_compile.codec.kinds import (
    LEAST_SHARE,
    MOST_WEIGHT,
    _quantiser_error,
    balance,
    kind_error,
    rest,
    token_weights,
)
from apack_compile.codec.moments import Moments
from apack_compile.codec.quantiser import tailed_quantiser
from apack_compile.codec.recipe import Recipe
from apack_compile.codec.transform import TransformLayout

from ..helpers import few

HEADS, DIM = 2, 16
WIDTH = HEADS * DIM


def kind(seed: int, tokens: int, shift: float = 0.3, size: float = 1.0) -> Tensor:
    """Tokens ``[1, H, T, D]`` of a kind with a mean and principal directions of its own."""
    of_kind = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=of_kind)).Q
    mean = torch.randn(WIDTH, generator=of_kind) * shift
    spread = torch.exp(-0.075 * torch.arange(WIDTH)) * size
    x = (torch.randn(tokens, WIDTH) * spread) @ basis + mean
    return x.view(1, tokens, HEADS, DIM).transpose(1, 2)


def moments(text: Tensor, visual: Tensor) -> tuple[Moments, Moments]:
    """Sums of all tokens, and of the visual ones, which come first."""
    x = torch.cat([visual, text], 2)
    images = torch.arange(x.shape[2])[None] < visual.shape[2]
    q = torch.randn(1, 4, x.shape[2], DIM)
    return Moments.of(q, x, x, None), Moments.of(q, x, x, None, None, 0, images)


def fit(total: Moments, visual: Moments | None, ratio: float) -> tuple[Code, Code]:
    return fit_transform([Evidence(total, visual=visual)], (DIM, DIM), Recipe(ratio), 0)[0]


def measured(code: Code, x: Tensor) -> float:
    """Relative squared error about the mean of the code."""
    back = code.layout.decode(code.layout.encode(x, code.params), code.params, x.dtype)
    about = x - code.params[0].view(1, HEADS, 1, DIM)
    return float((back - x).square().sum() / about.square().sum())


@pytest.mark.parametrize(
    ("text", "visual", "weights"),
    [
        (900, 100, (1, 3)),
        (100, 900, (3, 1)),
        (1000, 4, (1, 8)),
        (4, 1000, (8, 1)),
        (300, 100, (1, 1)),
        (7, 7, (1, 1)),
        (0, 50, (1, 1)),
        (50, 0, (1, 1)),
        (0, 0, (1, 1)),
    ],
)
def test_a_token_of_the_rarer_kind_counts_more(
    text: int, visual: int, weights: tuple[int, int]
) -> None:
    assert token_weights(text, visual) == pytest.approx(weights)


@given(text=st.integers(1, 10**6), visual=st.integers(1, 10**6))
@few
def test_each_kind_has_a_quarter_or_eight_times_its_number(text: int, visual: int) -> None:
    pair = token_weights(text, visual)
    parts = [pair[0] * text, pair[1] * visual]
    assert min(pair) == 1.0 and max(pair) <= MOST_WEIGHT
    few_count = min(text, visual)
    if max(pair) == MOST_WEIGHT:
        assert MOST_WEIGHT * few_count <= LEAST_SHARE / (1 - LEAST_SHARE) * max(text, visual)
    else:
        assert min(parts) / sum(parts) >= LEAST_SHARE - 1e-12


def test_balanced_sums_are_those_of_tokens_counted_several_times() -> None:
    text, visual = kind(1, 900), kind(2, 100)
    total, images = moments(text, visual)
    found = balance(total, images)
    thrice = torch.cat([visual] * 3 + [text], 2)
    expected = Moments.of(torch.randn(1, 4, 1200, DIM), thrice, thrice, None)
    assert found.count.item() == pytest.approx(1200)
    # float32 sums of a thousand products
    for name in ("k_sum", "k_gram", "v_sum", "v_gram"):
        mine, theirs = getattr(found, name), getattr(expected, name).double()
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-3)
    assert found.q_gram is total.q_gram, "who reads does not depend on what is read"


def test_nothing_is_weighed_without_need() -> None:
    total, images = moments(kind(1, 300), kind(2, 100))
    assert balance(total, images) is total
    assert balance(total, None) is total
    total, images = moments(kind(1, 300), kind(2, 0))
    assert balance(total, images) is total


def test_the_rest_is_the_other_kind() -> None:
    text, visual = kind(1, 90), kind(2, 10)
    total, images = moments(text, visual)
    alone = Moments.of(torch.zeros(1, 4, 90, DIM), text, text, None)
    found = rest(total, images)
    assert found.count.item() == 90
    for name in ("k_sum", "k_gram", "v_gram"):
        torch.testing.assert_close(
            getattr(found, name), getattr(alone, name).double(), rtol=1e-5, atol=1e-4
        )


@pytest.mark.parametrize("ratio", [3, 4, 8, 16])
def test_the_error_of_all_tokens_is_that_of_the_code(ratio: float) -> None:
    total, _ = moments(kind(1, 500), kind(2, 100))
    evidence = Evidence(total)
    spectra = evidence.spectra((DIM, DIM), Recipe(ratio))
    sums = (total.k_sum, total.k_gram, total.count)
    for code, side in zip(fit(total, None, ratio), spectra, strict=True):
        assert isinstance(code.layout, TransformLayout)
        assert kind_error(side, code.layout, *sums) == pytest.approx(code.error, rel=1e-4)


@pytest.mark.parametrize("ratio", [4, 8])
@pytest.mark.parametrize("size", [0.5, 1.0, 2.0])
def test_the_error_of_a_kind_is_what_new_tokens_of_it_have(ratio: float, size: float) -> None:
    text, visual = kind(1, 2000, 0.0), kind(2, 2000, 0.0, size)
    total, images = moments(text, visual)
    new = kind(1, 4000, 0.0), kind(2, 4000, 0.0, size)
    for code in fit(total, images, ratio):
        assert code.kinds is not None
        for predicted, x in zip(code.kinds, new, strict=True):
            # gains vary from token to token; queries here weigh all directions nearly alike
            assert predicted == pytest.approx(measured(code, x), rel=0.15)


@pytest.mark.parametrize("few_tokens", ["text", "visual"])
@pytest.mark.parametrize("ratio", [4, 8])
def test_the_rarer_kind_gains_much_and_the_other_loses_little(few_tokens: str, ratio: int) -> None:
    counts = (100, 2000) if few_tokens == "text" else (2000, 100)
    total, images = moments(kind(1, counts[0]), kind(2, counts[1]))
    rarer, other = (1, 2) if few_tokens == "text" else (2, 1)
    new = {seed: kind(seed, 2000) for seed in (rarer, other)}
    plain, balanced = fit(total, None, ratio), fit(total, images, ratio)
    x = new[rarer]
    for before, after in zip(plain, balanced, strict=True):
        assert before.layout.token_bytes(x.dtype) == after.layout.token_bytes(x.dtype)
        assert measured(after, x) < 0.8 * measured(before, x)
        assert measured(after, new[other]) < 1.25 * measured(before, new[other])


def test_kinds_of_tokens_that_were_not_seen_have_no_error() -> None:
    total, images = moments(kind(1, 400), kind(2, 0))
    for code in fit(total, images, 4):
        assert code.kinds is not None
        assert code.kinds[0] == pytest.approx(code.error, rel=1e-4)
        assert math.isnan(code.kinds[1])
    assert [code.kinds for code in fit(total, None, 4)] == [None, None]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("variance", [1e-4, 0.05, 1.0, 3.0, 40.0])
def test_a_quantisers_error_on_other_variances_is_what_samples_have(
    bits: int, variance: float
) -> None:
    step, half = tailed_quantiser(bits)[0], 2 ** (bits - 1)
    x = torch.randn(400_000, dtype=torch.float64) * variance**0.5
    back = ((x / step).floor().clamp(-half, half - 1) + 0.5) * step
    expected = (x - back).square().mean().item()
    # the mean of 4e5 squares, of which few are large where most are clipped
    assert _quantiser_error(bits, torch.tensor(variance)).item() == pytest.approx(
        expected, rel=0.02
    )
