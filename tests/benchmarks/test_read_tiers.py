from __future__ import annotations

import pytest
import torch
from torch import Tensor

from apack_compile.codec import TransformLayout
from benchmarks.quality import read_tiers
from benchmarks.quality.read_tiers import Lens, Reading

from ..helpers import hand_code

LAYOUT = TransformLayout(2, 16, 1, 0, 8, 8, 1)
CODE = hand_code(LAYOUT)
PAYLOAD = LAYOUT.encode(torch.randn(1, 2, 32, 16), CODE.params)


def read(reading: Reading | None, steps: int = 1) -> tuple[Tensor, Tensor, Lens]:
    """Scores, weighted sums, and the lens, at the last of some steps."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 2, 1, 16, generator=generator, dtype=torch.float64)
    p = torch.zeros(1, 2, 1, 32, dtype=torch.float64)
    p[..., :8] = 1 / 8  # all of the attention goes to the first block of eight
    with Lens(32, reading).on() as lens:
        for _ in range(steps):
            scores = LAYOUT.scores(q, PAYLOAD, CODE.params)
            mixed = LAYOUT.mix(p, PAYLOAD, CODE.params)
    return scores, mixed, lens


def test_blocks_are_read_whole_until_their_importance_fades() -> None:
    scores, mixed, _ = read(None)
    first = read(Reading("kv", 8, 1))
    assert torch.equal(first[0], scores) and torch.allclose(first[1], mixed)
    later, still, lens = read(Reading("kv", 8, 1), 9)
    same = (later == scores).all((0, 1, 2))
    assert same[:8].all() and not same[8:].any()
    torch.testing.assert_close(still, mixed)  # where the attention goes, all is read
    assert lens.shares[0] == 1 and lens.shares[-1] == 0.25
    (known,) = lens.importance.values()
    wanted = torch.tensor([1.0, 0, 0, 0]) * (1 - 0.25**9) + 0.25**9
    torch.testing.assert_close(known[0], wanted.double())


@pytest.mark.parametrize("side", ["k", "v"])
def test_elsewhere_components_of_two_bits_are_what_they_are_in_the_mean(side: str) -> None:
    """As a code whose basis has nothing of them."""
    scores, mixed, _ = read(Reading(side, 8, 1e9))
    mean, analysis, synthesis, *rest = CODE.params
    leading = synthesis.clone()
    leading[:, 8:] = 0
    params = (mean, analysis, leading, *rest)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 2, 1, 16, generator=generator, dtype=torch.float64)
    p = torch.zeros(1, 2, 1, 32, dtype=torch.float64)
    p[..., :8] = 1 / 8
    part, whole = (params, CODE.params) if side == "k" else (CODE.params, params)
    torch.testing.assert_close(scores, LAYOUT.scores(q, PAYLOAD, part))
    torch.testing.assert_close(mixed, LAYOUT.mix(p, PAYLOAD, whole))


def test_by_the_weights_of_the_step_only_what_is_weighed_is_read() -> None:
    _, mixed, lens = read(Reading("v", 8, 1, "now, by head"))
    torch.testing.assert_close(mixed, read(None)[1])
    assert lens.shares == [0.25]


def weighed(p: Tensor, reading: Reading | None) -> tuple[Tensor, Lens]:
    with Lens(p.shape[3], reading).on() as lens:
        q = torch.ones(1, 2, 1, 16, dtype=torch.float64)
        LAYOUT.scores(q, PAYLOAD, CODE.params)
        return LAYOUT.mix(p, PAYLOAD, CODE.params), lens


@pytest.mark.parametrize("by", ["weight", "weight in split"])
def test_values_are_not_read_where_no_head_weighs_them(by: str) -> None:
    p = torch.zeros(1, 2, 1, 32, dtype=torch.float64)
    p[0, 0, 0, :9] = 0.1  # of the second block, head 0 weighs one token
    p[0, 1, 0, 31] = 0.001
    mixed, lens = weighed(p, Reading("v", 8, 0.05, by))
    only = p.clone()
    only[..., 31] = 0
    mean = CODE.params[0].double().view(2, 1, 16)  # which takes no reading
    left_out = (p - only).sum(3, keepdim=True)  # [1, heads, 1, 1]
    torch.testing.assert_close(mixed, weighed(only, None)[0] + left_out * mean)
    assert lens.shares == [0.5]


def test_in_a_split_of_little_weight_its_own_largest_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two splits of two blocks: in the second the block of 0.01 is the one that counts."""
    monkeypatch.setattr(read_tiers, "SPLIT", 16)
    p = torch.zeros(1, 2, 1, 32, dtype=torch.float64)
    p[..., 0], p[..., 31] = 0.9, 0.01
    mixed, lens = weighed(p, Reading("v", 8, 0.05, "weight in split"))
    torch.testing.assert_close(mixed, weighed(p, None)[0])
    assert lens.shares == [0.5]
