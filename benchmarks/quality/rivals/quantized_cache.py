"""The quantised cache of transformers, with optimum-quanto behind it.

``transformers.cache_utils.QuantoQuantizedLayer``, as ``QuantizedCache(backend="quanto")`` makes
it: uniform levels between the extremes of 64 numbers. Its own layers quantise the whole prompt;
here, as for every method, sinks and recent tokens stay exact.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from transformers.cache_utils import QuantoQuantizedLayer

from .base import Layer, Rival, Size, between

GROUP = 64


class QuantizedCache(Rival):
    """transformers' quantised cache with 2 or 4 bits.

    Raises:
        ImportError: optimum-quanto is not installed.
    """

    def __init__(self, bits: int) -> None:
        self.bits = bits
        QuantoQuantizedLayer(nbits=bits)

    def code(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Through a cache layer of its own, and back."""
        store = QuantoQuantizedLayer(nbits=self.bits, q_group_size=GROUP)

        def through(axis: int) -> Callable[[Tensor], Tensor]:
            def code(x: Tensor) -> Tensor:
                return store._dequantize(store._quantize(x.contiguous(), axis=axis))

            return code

        return (
            between(layer.k, through(store.axis_key)),
            between(layer.v, through(store.axis_value)),
        )

    def coded_bytes(self, size: Size) -> float:
        """Levels, and 16 bits each for scale and zero point of every group."""
        return size.numbers * self.bits / 8 + size.numbers / GROUP * 4
