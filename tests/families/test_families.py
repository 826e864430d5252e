"""Every family keeps its sites, its tokens with exact codes, and close logits with ratio 8.

``APACK_FAMILIES=all`` tests all of them, prefill compiled: a quarter of an hour. Otherwise those
that differ in form are tested, some without their prefill, where most of the time goes.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from .. import versions
from .measure import measure
from .registry import FAMILIES
from .table import BEFORE_5, TABLE, Record, render, summary

ROOT = Path(__file__).parents[2]

ALL = os.environ.get("APACK_FAMILIES") == "all"

CASES = [
    (name, ALL or record.daily == "whole") for name, record in TABLE.items() if ALL or record.daily
]


def record(name: str) -> Record:
    """What becomes of a family with the transformers that there is."""
    found = BEFORE_5.get(name, TABLE[name]) if versions.BEFORE_5 else TABLE[name]
    found = versions.BROKEN.get(name, found)
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.mark.parametrize(("name", "prefill"), CASES, ids=[name for name, _ in CASES])
def test_family(name: str, prefill: bool) -> None:
    expected = record(name)
    found = measure(name, prefill, expected.differs_uncompiled)
    assert (found.packed, found.left) == (expected.packed, expected.left)
    assert found.same and found.off < 1e-4
    if expected.packed:
        assert found.first == (expected.first if prefill else 2)
        # Bounds are of the weights that transformers 5 draws.
        bound = found.spoilt if versions.BEFORE_5 else expected.bound
        assert found.error < bound <= found.spoilt


def test_every_family_is_in_the_table() -> None:
    assert set(FAMILIES) == set(TABLE)


def test_the_documents_show_the_table() -> None:
    assert render() in (ROOT / "docs" / "families.md").read_text()
    assert summary() in (ROOT / "README.md").read_text()
