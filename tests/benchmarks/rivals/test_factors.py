from __future__ import annotations

import pytest
import torch

from benchmarks.quality.rivals.factors import Factors, factor
from benchmarks.quality.rivals.kivi import GROUP, quantise

S = 200


def values(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(2, 2, S, 16, generator=generator, dtype=dtype)


def order() -> torch.Tensor:
    generator = torch.Generator().manual_seed(6)
    return torch.stack([torch.randperm(S, generator=generator) for _ in range(2)])


def test_factors_are_those_of_the_svd() -> None:
    x = values().transpose(1, 2).flatten(2)  # [2, S, 32]
    coefficients, basis = factor(x, 10)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    expected = (u[..., :10] * s[:, None, :10]) @ vh[:, :10]
    torch.testing.assert_close(coefficients @ basis, expected)
    torch.testing.assert_close(coefficients.square().sum(1), s[:, :10].square())
    torch.testing.assert_close(basis @ basis.mT, torch.eye(10, dtype=x.dtype).expand(2, 10, 10))


def test_all_heads_together_or_each_by_itself() -> None:
    x = values()
    joint = x.transpose(1, 2).flatten(2)
    s = torch.linalg.svdvals(joint)
    error = (Factors(10).through(x, order(), S) - x).square().sum((1, 2, 3))
    torch.testing.assert_close(error, s[:, 10:].square().sum(1), rtol=1e-3, atol=0)
    s = torch.linalg.svdvals(x)  # of each head
    error = (Factors(5, by_head=True).through(x, order(), S) - x).square().sum((2, 3))
    torch.testing.assert_close(error, s[..., 5:].square().sum(-1), rtol=1e-3, atol=0)


@pytest.mark.parametrize("by_head", [False, True])
def test_tokens_of_little_attention_have_the_leading_components_only(by_head: bool) -> None:
    x, first, full = values(), order(), 50
    got = Factors(8, 2, by_head).through(x, first, full)
    whole = Factors(8, by_head=by_head).through(x, first, S)
    few = Factors(2, by_head=by_head).through(x, first, S)
    for b in range(2):
        many, rest = first[b, :full], first[b, full:]
        torch.testing.assert_close(got[b][:, many], whole[b][:, many])
        torch.testing.assert_close(got[b][:, rest], few[b][:, rest], rtol=1e-3, atol=1e-3)
    assert (got - whole).abs().max() > 0.1


def test_few_bits_are_those_of_groups_of_64_tokens() -> None:
    x = values()
    first = torch.arange(S).expand(2, S)
    got = Factors(8, bits=4).through(x, first, S)
    coefficients, basis = factor(x.transpose(1, 2).flatten(2), 8)
    whole = S // GROUP * GROUP
    for start in range(0, whole, GROUP):
        some = slice(start, start + GROUP)
        coefficients[:, some] = quantise(coefficients[:, some], 4, 1)
    expected = coefficients @ quantise(basis, 4, 2)  # 32 channels are one group
    torch.testing.assert_close(got.transpose(1, 2).flatten(2), expected)


def test_bytes() -> None:
    # 16 bits: 50 tokens with 8 components, 150 with 2; the basis of all heads or of each.
    assert Factors(8, 2).stored(S, 50, 2, 16) == 2 * (50 * 8 + 150 * 2 + 8 * 32)
    assert Factors(8).stored(S, 50, 2, 16) == 2 * (S * 8 + 8 * 32)
    assert Factors(4, by_head=True).stored(S, S, 2, 16) == 2 * 2 * (S * 4 + 4 * 16)
    # 4 bits: three groups of 64 tokens with 4 bytes of scale and zero point, 8 tokens exact.
    coefficients = 8 * (3 * (64 / 2 + 4) + 8 * 2)
    assert Factors(8, bits=4).stored(S, S, 2, 16) == coefficients + 8 * (32 / 2 + 4)
    # 192 channels are three groups.
    assert Factors(8, bits=4).stored(0, 0, 3, 64) == 8 * (192 / 2 + 3 * 4)
