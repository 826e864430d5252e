from __future__ import annotations

import torch

from apack_compile.codec.fit import Evidence, fit_transform
from apack_compile.codec.moments import Moments
from apack_compile.codec.recipe import Recipe
from apack_compile.codec.sensitivity import Sensitivity


def test_gradients_of_tokens_that_are_not_coded_do_not_count() -> None:
    g = torch.randn(2, 3, 10, 4)
    coded = torch.zeros(2, 10, dtype=torch.bool)
    coded[0, 2:7], coded[1, 4:6] = True, True
    found = Sensitivity.of(g, 2 * g, coded, 5, None)
    expected = torch.zeros(3, 4, 4, dtype=torch.float64)
    for b, t in coded.nonzero().tolist():
        for h in range(3):
            expected[h] += torch.outer(g[b, h, t], g[b, h, t]).double() / 5
    torch.testing.assert_close(found.k, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.v, 4 * expected, rtol=1e-5, atol=1e-6)
    assert found.is_finite
    assert not Sensitivity.of(g / 0, g, coded, 5, None).is_finite


def test_a_code_spends_its_bits_where_errors_count() -> None:
    """Two directions of equal variance, one that nothing reads: the metric decides."""
    x = torch.randn(1, 1, 4000, 64)
    moments = Moments.of(x, x, x, None)
    metric = torch.zeros(1, 64, 64, dtype=torch.float64)
    metric[0].diagonal()[:16] = 1.0
    even = torch.eye(64, dtype=torch.float64)[None]
    for k, v, side in ((metric, even, 0), (even, metric, 1)):
        layer = Evidence(moments, None, Sensitivity(k, v))
        code = fit_transform([layer], (64, 64), Recipe(6), 0)[0][side]
        back = code.layout.decode(code.layout.encode(x, code.params), code.params, torch.float32)
        error = (back - x).square().mean((0, 1, 2))
        assert error[:16].mean() < 0.2 * error[16:].mean()


def test_layers_that_count_more_are_coded_better() -> None:
    x = torch.randn(1, 2, 2000, 32)
    moments = Moments.of(x, x, x, None)
    even = torch.eye(32, dtype=torch.float64).expand(2, -1, -1)
    layers = [Evidence(moments, None, Sensitivity(s * even, s * even)) for s in (1, 1000)]
    codes = fit_transform(layers, (32, 32), Recipe(6), 0)
    assert codes[1][0].error < codes[0][0].error and codes[1][1].error < codes[0][1].error
    chosen = [(k.layout, v.layout) for k, v in codes]
    kept = fit_transform([layers[0]] * 2, (32, 32), Recipe(6), 0, chosen)
    assert [k.layout for k, _ in kept] == [k.layout for k, _ in codes]
