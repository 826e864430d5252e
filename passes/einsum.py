"""Products of attention that are written as ``einsum``.

    einsum("bhqd,bhkd->bhqk", q, k)     scores
    einsum("bhqk,bhkd->bhqd", p, v)     weighted sums

Letters are free, operands may stand the other way round, and ``bh`` may be one dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .base import argument, calls

_SCORES = {
    "abcd,abed->abce": (0, 1), "abcd,abed->abec": (1, 0),
    "abc,adc->abd": (0, 1), "abc,adc->adb": (1, 0),
}  # fmt: skip
"""Equations, letters in the order in which they come; where queries and keys are."""

_SUMS = {
    "abcd,abde->abce": (0, 1), "abcd,abec->abed": (1, 0),
    "abc,acd->abd": (0, 1), "abc,adb->adc": (1, 0),
}  # fmt: skip
"""The same of weights and values."""


def scores_operands(node: fx.Node) -> tuple[Any, Any] | None:
    """Queries and keys ``[B, H, tokens, D]`` of which ``node`` is all products."""
    return _operands(node, _SCORES)


def sum_operands(node: fx.Node) -> tuple[Any, Any] | None:
    """Weights ``[B, H, Q, S]`` and values ``[B, H, S, D]`` whose weighted sums ``node`` is."""
    return _operands(node, _SUMS)


def _operands(node: fx.Node, equations: dict[str, tuple[int, int]]) -> tuple[Any, Any] | None:
    if not calls(node, torch.einsum):
        return None
    operands = node.args[1:]
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    order = equations.get(_plain(argument(node, 0, "equation")))
    if order is None or len(operands) != 2:
        return None
    return operands[order[0]], operands[order[1]]


def _plain(equation: Any) -> str:
    """The equation with letters by the order in which they come; ``...`` are two of them."""
    if not isinstance(equation, str):
        return ""
    names: dict[str, str] = {}
    found = []
    for letter in equation.replace(" ", "").replace("...", "{}"):
        if letter in ",->":
            found.append(letter)
        else:
            found.append(names.setdefault(letter, "abcdefghijklmnop"[len(names) % 16]))
    return "".join(found)
