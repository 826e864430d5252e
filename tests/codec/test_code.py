from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch

from apack_compile.codec import Code, CodeRef, ExactLayout, TransformLayout
from apack_compile.codec.code import total_bytes

from ..helpers import hand_code

LAYOUT = TransformLayout(2, 4, 1, 2, 2, 4, 1)


def test_bytes_of_a_code_are_those_of_its_parameters() -> None:
    code = hand_code(LAYOUT)
    # analysis, synthesis and metric; mean, units, whiten, scales, spans
    assert code.nbytes == 2 * (2 * 8 * 8 + 2 * 4 * 4) + 4 * (8 + 2 * 8 + 8 + 8 + 2)
    assert Code(ExactLayout(2, 4)).nbytes == 0


def test_parameters_are_placed_on_a_device_once() -> None:
    code = hand_code(LAYOUT)
    cpu = torch.device("cpu")
    assert code.on(cpu) is code.on(cpu)
    assert all(a is b for a, b in zip(code.on(cpu), code.params, strict=True))


def test_a_ref_leads_to_its_code_and_keeps_it_alive() -> None:
    code = hand_code(LAYOUT)
    alive = weakref.ref(code)
    ref = CodeRef(code)
    assert ref.code is code
    assert ref.layout == LAYOUT
    del code
    gc.collect()
    assert alive() is not None
    del ref
    gc.collect()
    assert alive() is None


def test_a_deep_copy_of_a_ref_is_the_ref() -> None:
    ref = CodeRef(hand_code(LAYOUT))
    assert copy.deepcopy([ref])[0] is ref


def test_a_pickled_ref_brings_its_code_along_without_placed_copies() -> None:
    code = Code(LAYOUT, hand_code(LAYOUT).params, 0.25)
    code.on(torch.device("cpu"))
    back = pickle.loads(pickle.dumps(CodeRef(code))).code
    assert back.layout == LAYOUT
    assert back.error == 0.25
    assert all(torch.equal(a, b) for a, b in zip(back.params, code.params, strict=True))
    assert back._placed == {}


def test_bytes_of_codes_that_several_refs_share_count_once() -> None:
    """Bug: two refs to one code counted twice."""
    code, other = hand_code(LAYOUT), hand_code(LAYOUT, 1)
    refs = [CodeRef(code), CodeRef(code), CodeRef(other)]
    assert total_bytes([refs[0], refs[0]]) == code.nbytes
    assert total_bytes(refs) == code.nbytes + other.nbytes
    assert total_bytes([]) == 0


def test_a_code_of_another_version_is_refused() -> None:
    """Bug: a cache that was pickled with fewer parameters was read by the wrong ones."""
    code = hand_code(LAYOUT)
    with pytest.raises(ValueError, match=r"has 6 parameters; accepted are 8: it is of another"):
        CodeRef(Code(LAYOUT, code.params[:6]))
