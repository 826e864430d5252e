"""Operators that work on every element alone, by the names that Dynamo and Python give them.

What ``vmap`` makes of them for one score after another they make of all scores at once.
"""

from __future__ import annotations

import torch

aten = torch.ops.aten

UNARY = {
    "neg": aten.neg.default,
    "abs": aten.abs.default,
    "invert": aten.bitwise_not.default,
    "bitwise_not": aten.bitwise_not.default,
    "__invert__": aten.bitwise_not.default,
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

BINARY = {
    "add": aten.add.Tensor,
    "sub": aten.sub.Tensor,
    "mul": aten.mul.Tensor,
    "div": aten.div.Tensor,
    "truediv": aten.div.Tensor,
    "true_divide": aten.div.Tensor,
    "floordiv": aten.floor_divide.default,
    "floor_divide": aten.floor_divide.default,
    "mod": aten.remainder.Tensor,
    "remainder": aten.remainder.Tensor,
    "and_": aten.bitwise_and.Tensor,
    "bitwise_and": aten.bitwise_and.Tensor,
    "__and__": aten.bitwise_and.Tensor,
    "or_": aten.bitwise_or.Tensor,
    "bitwise_or": aten.bitwise_or.Tensor,
    "__or__": aten.bitwise_or.Tensor,
    "xor": aten.bitwise_xor.Tensor,
    "bitwise_xor": aten.bitwise_xor.Tensor,
    "__xor__": aten.bitwise_xor.Tensor,
    "logical_and": aten.logical_and.default,
    "logical_or": aten.logical_or.default,
    "logical_xor": aten.logical_xor.default,
    "eq": aten.eq.Tensor,
    "ne": aten.ne.Tensor,
    "lt": aten.lt.Tensor,
    "le": aten.le.Tensor,
    "gt": aten.gt.Tensor,
    "ge": aten.ge.Tensor,
    "minimum": aten.minimum.default,
    "maximum": aten.maximum.default,
}

CASTS = ("to", "float", "double", "half", "bfloat16", "int", "long", "bool")
"""To another dtype, or to the device where a tensor is."""
