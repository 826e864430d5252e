"""Operators that work on every element alone, by the names that Dynamo and Python give them.

What ``vmap`` makes of them for one score after another they make of all scores at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload

aten = torch.ops.aten

UNARY = {
    "neg": aten.neg.default,
    "abs": aten.abs.default,
    "invert": aten.bitwise_not.default,
    "bitwise_not": aten.bitwise_not.default,
    "logical_not": aten.logical_not.default,
    "tanh": aten.tanh.default,
    "sigmoid": aten.sigmoid.default,
    "exp": aten.exp.default,
    "exp2": aten.exp2.default,
    "log": aten.log.default,
    "log2": aten.log2.default,
    "sqrt": aten.sqrt.default,
    "floor": aten.floor.default,
}

Overloads = dict[tuple[bool, bool], OpOverload]
"""By whether the operands are tensors; others are numbers."""


def _either(overload: OpOverload) -> Overloads:
    """It takes numbers for tensors."""
    return dict.fromkeys([(True, True), (True, False), (False, True)], overload)


def _bits(packet: Any) -> Overloads:
    return {
        (True, True): packet.Tensor,
        (True, False): packet.Scalar,
        (False, True): packet.Scalar_Tensor,
    }


def _compare(packet: Any) -> Overloads:
    return {(True, True): packet.Tensor, (True, False): packet.Scalar}


def _tensors(packet: Any) -> Overloads:
    return {(True, True): packet.default}


_DIV, _AND, _OR, _XOR = (
    _either(aten.div.Tensor), _bits(aten.bitwise_and), _bits(aten.bitwise_or),
    _bits(aten.bitwise_xor),
)  # fmt: skip

BINARY: dict[str, Overloads] = {
    "add": _either(aten.add.Tensor),
    "sub": _either(aten.sub.Tensor),
    "mul": _either(aten.mul.Tensor),
    **dict.fromkeys(["div", "truediv", "true_divide"], _DIV),
    **dict.fromkeys(["mod", "remainder"], _bits(aten.remainder)),
    "pow": {
        (True, True): aten.pow.Tensor_Tensor,
        (True, False): aten.pow.Tensor_Scalar,
        (False, True): aten.pow.Scalar,
    },
    **dict.fromkeys(["and_", "bitwise_and"], _AND),
    **dict.fromkeys(["or_", "bitwise_or"], _OR),
    **dict.fromkeys(["xor", "bitwise_xor"], _XOR),
    "logical_and": _tensors(aten.logical_and),
    "logical_or": _tensors(aten.logical_or),
    "logical_xor": _tensors(aten.logical_xor),
    "eq": _compare(aten.eq),
    "ne": _compare(aten.ne),
    "lt": _compare(aten.lt),
    "le": _compare(aten.le),
    "gt": _compare(aten.gt),
    "ge": _compare(aten.ge),
    "minimum": _tensors(aten.minimum),
    "maximum": _tensors(aten.maximum),
}

CASTS = ("to", "float", "double", "half", "bfloat16", "int", "long", "bool")
"""To another dtype, or to the device where a tensor is."""


def plain_name(name: str) -> str:
    """``__eq__``, as Dynamo of torch 2.11 and 2.12 calls it, is ``eq``; ``__and__`` is ``and_``."""
    if not (name.startswith("__") and name.endswith("__")):
        return name
    inner = name[2:-2]
    return f"{inner}_" if inner in ("and", "or") else inner
