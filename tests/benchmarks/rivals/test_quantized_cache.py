from __future__ import annotations

import pytest
import torch
from transformers.utils import is_optimum_quanto_available

from benchmarks.quality.methods import METHODS
from benchmarks.quality.rivals.base import Size
from benchmarks.quality.runner import Setting, Unavailable

from ... import versions
from .cases import assert_exact_outside, layer

needs_quanto = pytest.mark.skipif(
    not is_optimum_quanto_available(), reason="optimum-quanto is not installed"
)


@needs_quanto
@pytest.mark.parametrize("bits", [2, 4])
def test_each_head_of_a_token_has_levels_of_its_own(bits: int) -> None:
    from benchmarks.quality.rivals.quantized_cache import QuantizedCache

    given = layer(132, dim=64, dtype=torch.float32)
    given.k[0, 0, 20] *= 1000
    k, v = QuantizedCache(bits).code(given)
    assert_exact_outside(k, given.k)
    assert_exact_outside(v, given.v)
    for coded, x in ((k, given.k), (v, given.v)):
        step = (x.amax(-1) - x.amin(-1)) / (2**bits - 1)
        error = (coded - x).abs().amax(-1)
        assert (error <= 0.51 * step)[:, :, 4:-64].all()
    assert len(v[1, 1, 50].unique()) <= 2**bits


@needs_quanto
def test_bytes() -> None:
    from benchmarks.quality.rivals.quantized_cache import QuantizedCache

    # 100 tokens, keys and values of 3 heads of 64: 4 bits a number, 4 bytes a head
    assert QuantizedCache(4).coded_bytes(Size(100, 3, 64)) == 100 * 2 * (192 / 2 + 3 * 4)


@pytest.mark.skipif(is_optimum_quanto_available(), reason="optimum-quanto is installed")
@pytest.mark.skipif(versions.BEFORE_5, reason="the benchmarks want transformers 5")
def test_without_its_backend_the_method_is_left_out() -> None:
    method = next(m for m in METHODS if m.name == "QuantizedCache 4 bit")
    with pytest.raises(Unavailable, match="optimum-quanto"):
        method.start(Setting(None, torch.empty(0), 0, "", (1,)))  # type: ignore[arg-type]
