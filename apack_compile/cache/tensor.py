"""PackedKV: the cache tensor as the model sees it, with packed storage behind it.

A wrapper subclass with the logical shape ``[B, H, S, D]``, dtype and device of the dense cache
tensor. Its data live in a :class:`SideStore`. Compiled graphs never see it: the runtime passes the
store's tensors in and makes new handles of what comes out. Eager code may do to it whatever it
does to a tensor: the operations in ``packed_ops`` keep it packed, every other one gets the dense
tensor.

For tracing the wrapper is flattened into one empty tensor, so that Dynamo guards the logical shape
and nothing of the storage.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from ..codec import CodeRef
from ..codec.fixed import fixed_ref
from ..compat import run_uncompiled
from .policy import Policy
from .store import SideStore

log = logging.getLogger(__name__)

PACKED_OPS: dict[Any, Callable[..., Any]] = {}
"""Operators and functions that keep a handle packed; filled by ``packed_ops``."""

_VIEW_TRACKING = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)

_reported: set[Any] = set()


class PackedKV(torch.Tensor):
    """A packed cache tensor.

    Attributes:
        store: the physical storage; None for the fakes that Dynamo traces with.
    """

    store: SideStore | None

    @staticmethod
    def __new__(
        cls, store: SideStore | None, size: Sequence[int], dtype: torch.dtype, anchor: Tensor
    ) -> PackedKV:
        """A wrapper of logical shape ``size``; :meth:`of` and :meth:`pack` make useful ones."""
        return torch.Tensor._make_wrapper_subclass(
            cls, size, dtype=dtype, device=anchor.device, requires_grad=False
        )

    def __init__(
        self, store: SideStore | None, size: Sequence[int], dtype: torch.dtype, anchor: Tensor
    ) -> None:
        self.store = store
        self._anchor = anchor
        self._lease = None if store is None else store.lease(size[2])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Without view tracking: a cropped handle is a tensor of its own. Autograd would make it
        # a view that keeps the whole handle alive, and Dynamo could not trace such a view.
        with torch._C.DisableTorchFunctionSubclass():
            if torch.compiler.is_dynamo_compiling():
                return func(*args, **(kwargs or {}))
            with torch._C._ExcludeDispatchKeyGuard(_VIEW_TRACKING):
                rule = PACKED_OPS.get(func)
                result = NotImplemented if rule is None else rule(func, *args, **(kwargs or {}))
                return func(*args, **(kwargs or {})) if result is NotImplemented else result

    # Making and reading --------------------------------------------------------------------------

    @classmethod
    def of(cls, store: SideStore, length: int | None = None) -> PackedKV:
        """A handle on the first ``length`` tokens of ``store`` (all, by default)."""
        ring = store.side.ring
        size = (ring.shape[0], ring.shape[1], store.length if length is None else length,
                ring.shape[3])  # fmt: skip
        handle = cls(store, size, ring.dtype, ring.new_empty(0))
        # One decode graph for all lengths: the hint is dropped where a model insists on one length.
        with torch._C.DisableTorchFunctionSubclass():  # made at every step: our own rules take time
            torch._dynamo.maybe_mark_dynamic(handle, 2)
        return handle

    @classmethod
    def pack(
        cls, x: Tensor, ref: CodeRef | None = None, policy: Policy | None = None,
        visible: Tensor | None = None, visual: Tensor | None = None,
    ) -> PackedKV:  # fmt: skip
        """Pack a dense ``[B, H, S, D]`` cache tensor.

        Args:
            x: keys or values.
            ref: the code; the exact one by default.
            policy: what stays exact; the default one by default.
            visible: ``[B, S]``, False for padding.
            visual: ``[B, S]`` bool, True for visual tokens, where the code has one for each kind.

        Raises:
            ValueError: a tensor is not of this kind.
        """
        if x.dim() != 4:
            raise ValueError(f"x has shape {tuple(x.shape)}; a cache tensor is [B, H, S, D]")
        size = (x.shape[0], x.shape[2])
        if visual is not None and (visual.dtype != torch.bool or visual.shape != size):
            raise ValueError(
                f"visual is {tuple(visual.shape)} {visual.dtype}; accepted is a bool tensor {size}"
            )
        ref = ref or fixed_ref("exact", x.shape[1], x.shape[3])
        if (ref.layout.heads, ref.layout.dim) != (x.shape[1], x.shape[3]):
            raise ValueError(
                f"x has {x.shape[1]} heads of {x.shape[3]}; its code is for {ref.layout.heads} "
                f"heads of {ref.layout.dim}"
            )
        return cls.of(SideStore.encode(x, ref, policy or Policy(), visible, visual=visual))

    def unpack(self) -> Tensor:
        """The dense tensor; coded tokens with their coding error."""
        if self.store is None:
            return self._anchor.new_empty(self.shape, dtype=self.dtype)
        return self.store.dense(self.shape[2])

    def append(self, new: Tensor, importance: Tensor | None = None) -> PackedKV:
        """This tensor with ``new [B, H, T, D]`` behind it, as ``cat`` along dim 2; packed.

        This handle stays valid: storage is shared, or copied where histories part.

        Args:
            new: the tokens.
            importance: of all tokens then: ``[B, S + T]``, where it is known.
        """
        assert self.store is not None
        store = self.store.branch(self.shape[2])
        store.extend(new, importance)
        return PackedKV.of(store)

    def replace(self, x: Tensor) -> None:
        """Let the content be ``x [B, H, S, D]``, kept exact: what an in-place write comes to."""
        assert self.store is not None
        ref = fixed_ref("exact", x.shape[1], x.shape[3])
        before, self.store = self.store, SideStore.encode(x, ref, self.store.policy)
        before.introduce(self.store)
        self._lease = self.store.lease(x.shape[2])

    @property
    def length(self) -> int:
        """Tokens: ``shape[2]``, without the detour that attributes of a subclass take."""
        assert self._lease is not None
        return self._lease.length

    @property
    def packed_bytes(self) -> int:
        """Bytes of the storage behind this handle."""
        return 0 if self.store is None else self.store.nbytes

    @property
    def dense_bytes(self) -> int:
        """Bytes that the dense tensor would take."""
        return self.numel() * self.dtype.itemsize

    def __repr__(self, *, tensor_contents: object = None) -> str:
        if self.store is None:
            return f"PackedKV({tuple(self.shape)}, {self.dtype}, fake)"
        return (
            f"PackedKV({tuple(self.shape)}, {self.dtype}, {self.store.ref.layout.spec}, "
            f"{self.store.coded} coded, {self.packed_bytes} of {self.dense_bytes} bytes)"
        )

    def __setitem__(self, index: Any, value: Any) -> None:
        # PyTorch would write to a view of the dense tensor, which nobody keeps.
        if self.store is None:
            super().__setitem__(index, value)
            return
        dense = self.unpack()
        dense[index] = value.unpack() if isinstance(value, PackedKV) else value
        self.replace(dense)

    # Tracing -------------------------------------------------------------------------------------

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        return ["_anchor"], self.dtype

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], ctx: torch.dtype, outer_size: Any, outer_stride: Any
    ) -> PackedKV:
        return PackedKV(None, outer_size, ctx, inner["_anchor"])

    @staticmethod
    def _stable_hash_for_caching() -> str:
        return "apack_compile.PackedKV"

    # Dispatch ------------------------------------------------------------------------------------

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        handles = [a for a in pytree.arg_tree_leaves(*args, **kwargs) if isinstance(a, PackedKV)]
        if all(h.store is not None for h in handles):
            rule = PACKED_OPS.get(func)
            result = NotImplemented if rule is None else rule(func, *args, **kwargs)
            if result is not NotImplemented:
                return result
            if func not in _reported:
                _reported.add(func)
                log.info("%s on a packed cache tensor: computed on the dense tensor", func)
        return on_dense(func, args, kwargs)

    # Copying -------------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedKV:
        if id(self) not in memo:
            assert self.store is not None
            memo[id(self)] = PackedKV.of(self.store.clone(self.shape[2]))
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        assert self.store is not None
        return PackedKV.of, (self.store.clone(self.shape[2]),)


def on_dense(func: Any, args: Any, kwargs: Any) -> Any:
    """Run ``func`` with every handle unpacked.

    A handle that ``func`` writes to takes the result over, kept exact from then on.
    """
    dense: dict[int, Tensor] = {}
    owners: dict[int, PackedKV] = {}

    def unpacked(handle: PackedKV) -> Tensor:
        if id(handle) not in dense:
            dense[id(handle)] = handle.unpack()
            owners[id(handle)] = handle
        return dense[id(handle)]

    plain_args, plain_kwargs = pytree.tree_map_only(PackedKV, unpacked, (args, kwargs))
    result = func(*plain_args, **plain_kwargs)
    given = dict(zip([a.name for a in func._schema.arguments], args, strict=False)) | kwargs
    for argument in func._schema.arguments:
        value = given.get(argument.name)
        written = argument.alias_info is not None and argument.alias_info.is_write
        if written and isinstance(value, PackedKV) and value.store is not None:
            value.replace(dense[id(value)])
            if result is dense[id(value)]:
                result = value
    return result


# Between two graphs Dynamo compiles what eager code calls. It would take one `func` for another, as
# it does not guard that argument, and leave the rules out, as they do not run while it traces.
for _method in (
    PackedKV.__torch_function__.__func__,  # type: ignore[attr-defined]
    PackedKV.__torch_dispatch__.__func__,  # type: ignore[attr-defined]
    PackedKV.__setitem__,
    PackedKV.__deepcopy__,
):
    run_uncompiled(_method)

from . import packed_ops  # noqa: E402,F401  (fills PACKED_OPS)
