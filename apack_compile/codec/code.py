"""A fitted code, and the token by which caches refer to it.

The bases belong to the model, not to a cache: every sequence shares them. A cache therefore holds
a small :class:`CodeRef`; the tensors live here as long as any ref to them does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .layout import Layout


@dataclass(frozen=True)
class Code:
    """A layout with its fitted parameters.

    Attributes:
        layout: how tokens are stored.
        params: what the layout needs to encode and decode.
        error: relative squared error on the tokens it was fitted on, in the metric that the basis
            is optimal for (keys: error of the scores); 0 for exact codes.
        kinds: the same on text and on visual tokens alone (NaN: none were seen); None: kinds of
            tokens were not known.
    """

    layout: Layout
    params: tuple[Tensor, ...] = ()
    error: float = 0.0
    kinds: tuple[float, float] | None = None
    _placed: dict[torch.device, tuple[Tensor, ...]] = field(default_factory=dict, compare=False)

    def on(self, device: torch.device) -> tuple[Tensor, ...]:
        """The parameters on ``device``, copied there once."""
        if device not in self._placed:
            self._placed[device] = tuple(p.to(device) for p in self.params)
        return self._placed[device]

    @property
    def nbytes(self) -> int:
        """Bytes of the parameters, on one device."""
        return sum(p.untyped_storage().nbytes() for p in self.params)


class CodeRef:
    """Keeps a :class:`Code` alive without being the path by which a cache owns its tensors."""

    __slots__ = ("__weakref__", "layout")

    def __init__(self, code: Code) -> None:
        if len(code.params) != code.layout.param_count:  # of a cache that was pickled long ago
            raise ValueError(
                f"a code {code.layout.spec!r} has {len(code.params)} parameters; accepted are "
                f"{code.layout.param_count}: it is of another version of attentionpack"
            )
        self.layout = code.layout
        _CODES[self] = code

    @property
    def code(self) -> Code:
        """The code itself."""
        return _CODES[self]

    def select(self, rows: Tensor) -> CodeRef:
        """The ref for sequences ``rows``: this one, unless sequences have parameters."""
        code = self.code
        if not code.layout.per_sequence:
            return self
        first = code.params[0]
        chosen = first.index_select(0, rows.to(first.device))
        return CodeRef(Code(code.layout, (chosen, *code.params[1:]), code.error))

    @property
    def cache_bytes(self) -> int:
        """Bytes of parameters that belong to a cache, not to the model."""
        return self.code.nbytes if self.layout.per_sequence else 0

    def __reduce__(self) -> tuple[type[CodeRef], tuple[Code]]:
        code = self.code
        return CodeRef, (Code(code.layout, code.params, code.error),)

    def __deepcopy__(self, memo: object) -> CodeRef:
        return self  # fitted codes never change


_CODES: WeakKeyDictionary[CodeRef, Code] = WeakKeyDictionary()


def total_bytes(refs: Sequence[CodeRef]) -> int:
    """Bytes of all distinct codes behind ``refs`` that belong to the model."""
    codes = {id(ref.code): ref.code for ref in refs if not ref.layout.per_sequence}
    return sum(code.nbytes for code in codes.values())
