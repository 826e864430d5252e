"""The variables of the cost model, and putting numbers in their place."""

from __future__ import annotations

from typing import Any

import sympy

Expr = Any
"""A sympy expression; sympy has no types that mypy knows."""

BATCH = sympy.Symbol("B", integer=True, positive=True)
"""Sequences."""

PROMPT = sympy.Symbol("S", integer=True, positive=True)
"""Tokens that prefill packs."""

LATER = sympy.Symbol("T", integer=True, nonnegative=True)
"""Tokens that come after them, one at a time."""

CODED = sympy.Symbol("C", integer=True, nonnegative=True)
"""Tokens that are coded when a step reads them."""

FIRST = sympy.Symbol("F", integer=True, nonnegative=True)
"""Of these, the ones that prefill coded."""


def value_of(expr: Expr, values: dict[Expr, int]) -> float:
    """An expression in numbers.

    Args:
        expr: what to compute.
        values: of every variable in it.
    """
    return float(sympy.sympify(expr).subs(values))
