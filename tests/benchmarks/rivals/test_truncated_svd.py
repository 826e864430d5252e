from __future__ import annotations

from dataclasses import replace

import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from benchmarks.quality.rivals.base import Size
from benchmarks.quality.rivals.truncated_svd import TruncatedSvd, rotate, truncate

from .cases import MIDDLE, assert_exact_outside, layer


def test_the_rotation_is_that_of_llama_and_has_an_inverse() -> None:
    given = layer(100)
    ours = rotate(given.k, given.cos, given.sin)
    theirs, _ = apply_rotary_pos_emb(given.k, given.k, given.cos[None], given.sin[None])
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(rotate(ours, given.cos, -given.sin), given.k)


def test_truncation_is_the_best_of_its_rank() -> None:
    x = torch.randn(2, 2, 50, 8, dtype=torch.float64)
    joint = x.transpose(1, 2).flatten(2)
    s = torch.linalg.svdvals(joint)
    error = (truncate(x, 5) - x).square().sum((1, 2, 3))
    best = s[:, 5:].square().sum(1)  # Eckart and Young
    torch.testing.assert_close(error, best, rtol=1e-3, atol=0)


def test_the_factors_have_16_bits() -> None:
    x = torch.randn(1, 2, 50, 8, dtype=torch.float64)
    error = (truncate(x, 16) - x).abs().max()
    assert 1e-5 < error < 5e-3


def test_keys_are_factored_without_their_rotation() -> None:
    given = layer(200)
    # Rank 1 before the rotation: nothing is lost though the rotated keys have full rank.
    raw = torch.ones_like(given.k) * torch.linspace(1, 2, 200, dtype=torch.float64)[:, None]
    k = rotate(raw, given.cos, given.sin)
    coded, v = TruncatedSvd(32).code(replace(given, k=k))
    assert TruncatedSvd(32).rank(32) == 1
    torch.testing.assert_close(coded, k, rtol=0, atol=5e-3)
    assert (v[:, :, MIDDLE] - given.v[:, :, MIDDLE]).abs().max() > 0.5
    assert_exact_outside(coded, k)
    assert_exact_outside(v, given.v)


def test_bytes_count_the_basis_of_each_sequence() -> None:
    code = TruncatedSvd(8)
    assert code.rank(192) == 24
    assert code.coded_bytes(Size(1000, 3, 64)) == 2 * 2 * 24 * (1000 + 192)
    assert 6.7 < code.ratio(Size(1000, 3, 64)) < 6.8
