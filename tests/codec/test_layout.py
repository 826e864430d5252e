from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apack_compile.codec import (
    ExactLayout,
    Layout,
    TieredLayout,
    TransformLayout,
    parse_layout,
)
from apack_compile.codec.layout import working_dtype

from ..helpers import few

sizes = st.integers(1, 4096)
layouts = st.one_of(
    st.builds(ExactLayout, sizes, sizes),
    st.builds(TransformLayout, sizes, sizes, sizes, sizes, sizes, sizes, st.integers(0, 1)),
    st.builds(TieredLayout, *[sizes] * 6, st.just(1), st.just(0), st.just(0), sizes, sizes),
)


@given(layout=layouts)
@few
def test_a_spec_gives_its_layout_back(layout: Layout) -> None:
    assert parse_layout(layout.spec) == layout
    assert hash(parse_layout(layout.spec)) == hash(layout)


def test_specs_are_what_graphs_have_carried_so_far() -> None:
    assert ExactLayout(2, 64).spec == "exact:heads=2,dim=64"
    assert (
        TransformLayout(4, 64, 2, 16, 32, 64, 1).spec
        == "transform:heads=4,dim=64,groups=2,r8=16,r4=32,r2=64,gain=1"
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "",
            r"unknown code layout '' in ''; "
            r"known: \['evicting', 'exact', 'lowrank', 'modal', 'tiered', 'transform'\]",
        ),
        ("int4:heads=2,dim=64", "unknown code layout 'int4' in 'int4:heads=2,dim=64'"),
        ("exact", "malformed code layout 'exact'"),
        ("exact:", "malformed code layout 'exact:'"),
        ("exact:heads=2", "malformed code layout 'exact:heads=2'.*dim"),
        ("exact:heads=2,dim=x", "malformed code layout 'exact:heads=2,dim=x'.*'x'"),
        ("exact:heads=2,dim=64,rank=3", "malformed code layout.*'rank'"),
        ("exact:heads=2,dim=64=8", "malformed code layout"),
        ("transform:heads=2,dim=64", "malformed code layout 'transform:heads=2,dim=64'.*groups"),
    ],
)
def test_a_malformed_spec_is_refused_with_its_text(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_layout(spec)


def test_work_is_done_in_float32_or_in_float64() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert working_dtype(dtype) == torch.float32
    assert working_dtype(torch.float64) == torch.float64
