from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apack_compile.codec.budget import share_budget
from apack_compile.codec.quantiser import tailed_quantiser
from apack_compile.codec.spectrum import RUN, Spectrum
from apack_compile.codec.transform import TransformLayout


def side(scale: float, decay: float, heads: int = 2, dim: int = 32, groups: int = 1) -> Spectrum:
    n = heads // groups * dim
    variances = scale * torch.exp(-decay * torch.arange(n, dtype=torch.float64))
    eye = torch.eye(n, dtype=torch.float64).expand(groups, n, n)
    metric = torch.eye(dim, dtype=torch.float64).expand(heads, dim, dim)
    return Spectrum(
        dim, torch.zeros(groups, n), variances.expand(groups, n), eye, eye, metric, torch.ones(())
    )


def nbytes(pairs: list[tuple[TransformLayout, TransformLayout]]) -> int:
    return sum(layout.token_bytes(torch.float32) for pair in pairs for layout in pair)


def distortion(spectrum: Spectrum, layout: TransformLayout) -> float:
    left = float(spectrum.variances[:, layout.rank :].sum())
    start = 0
    for bits, count in layout.runs:
        energy = float(spectrum.variances[:, start : start + count].sum())
        left += tailed_quantiser(bits)[1] * energy
        start += count
    return left


def total(keys: list[Spectrum], values: list[Spectrum], pairs: list[tuple[TransformLayout, TransformLayout]]) -> float:  # fmt: skip  # noqa: E501
    return sum(
        distortion(k, a) + distortion(v, b)
        for k, v, (a, b) in zip(keys, values, pairs, strict=True)
    )


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.floats(-6, 6), st.floats(0.001, 0.3)), min_size=1, max_size=9),
    st.integers(30, 200),
    st.sampled_from([1, 2]),
)
def test_the_budget_is_kept_and_pairs_are_few(
    layers: list[tuple[float, float]], per_layer: int, groups: int
) -> None:
    keys = [side(10.0**s, d, groups=groups) for s, d in layers]
    values = [side(10.0**-s, d, groups=groups) for s, d in layers]
    pairs = share_budget(keys, values, per_layer * len(layers), most=3)
    assert nbytes(pairs) <= per_layer * len(layers)
    assert len(set(pairs)) <= 3
    for k, v in pairs:
        assert k.rank >= RUN and v.rank >= RUN and (k.gain, v.gain) == (0, 1)


def test_more_bytes_never_hurt() -> None:
    keys = [side(10.0**i, 0.05) for i in range(-3, 3)]
    values = [side(10.0**-i, 0.02) for i in range(-3, 3)]
    errors = [
        total(keys, values, share_budget(keys, values, budget * 6, most=6))
        for budget in range(30, 200, 10)
    ]
    assert errors == sorted(errors, reverse=True)


def test_sensitive_layers_get_the_bytes() -> None:
    keys = [side(1.0, 0.03), side(1000.0, 0.03)]
    values = [side(1.0, 0.03), side(1.0, 0.03)]
    (calm, _), (touchy, _) = share_budget(keys, values, 2 * 64)
    assert touchy.token_bytes(torch.float32) > calm.token_bytes(torch.float32)


def test_more_pairs_serve_layers_better() -> None:
    keys = [side(10.0**i, 0.01 * (i + 5)) for i in range(-3, 3)]
    values = [side(10.0**-i, 0.02) for i in range(-3, 3)]
    errors = [total(keys, values, share_budget(keys, values, 6 * 64, most)) for most in (1, 2, 6)]
    assert errors[0] > errors[1] > errors[2]


def test_one_budget_beats_the_same_bytes_for_all() -> None:
    keys = [side(10.0**i, 0.05) for i in range(-3, 3)]
    values = [side(10.0**-i, 0.02) for i in range(-3, 3)]
    shared = share_budget(keys, values, 6 * 60)
    alike = share_budget(keys, values, 6 * 60, most=1)
    assert total(keys, values, shared) < 0.5 * total(keys, values, alike)


def test_a_budget_below_the_smallest_code_is_refused() -> None:
    with pytest.raises(ValueError, match="1 layers of 2 KV heads of 32 have no code of 3 bytes"):
        share_budget([side(1, 0.1)], [side(1, 0.1)], 3)
