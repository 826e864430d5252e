from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apack_compile.codec.bits import CLASSES, pack, unpack
from apack_compile.kernels.reference import unpack_bits_reference

from ..helpers import few


def codes_of(bits: int, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, shape, generator=generator)


@given(
    bits=st.sampled_from(CLASSES),
    per_byte_run=st.integers(1, 9),
    lead=st.lists(st.integers(0, 3), max_size=3),
    seed=st.integers(0, 1000),
)
@few
def test_packing_is_undone_by_unpacking(
    bits: int, per_byte_run: int, lead: list[int], seed: int
) -> None:
    codes = codes_of(bits, (*lead, per_byte_run * 8 // bits), seed)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*lead, per_byte_run)
    assert torch.equal(torch.cat(unpack(packed, bits), -1).long(), codes)


@given(bits=st.sampled_from(CLASSES), width=st.integers(1, 6), seed=st.integers(0, 1000))
@few
def test_byte_by_byte_unpacking_agrees(bits: int, width: int, seed: int) -> None:
    codes = codes_of(bits, (width * 8 // bits,), seed)
    assert unpack_bits_reference(pack(codes, bits).tolist(), bits, len(codes)) == codes.tolist()


@pytest.mark.parametrize(
    ("bits", "codes", "expected"),
    [
        (8, [0, 255, 7], [0, 255, 7]),
        (4, [1, 2, 3, 4], [1 | 3 << 4, 2 | 4 << 4]),
        (2, [0, 1, 2, 3], [0 | 1 << 2 | 2 << 4 | 3 << 6]),
        (2, [1, 2, 3, 0, 0, 1, 2, 3], [1 | 3 << 2 | 0 << 4 | 2 << 6, 2 | 0 << 2 | 1 << 4 | 3 << 6]),
    ],
)
def test_plane_i_is_in_bits_from_i_times_the_width_up(
    bits: int, codes: list[int], expected: list[int]
) -> None:
    assert pack(torch.tensor(codes), bits).tolist() == expected


@pytest.mark.parametrize("bits", CLASSES)
def test_every_byte_is_planes_of_its_bits(bits: int) -> None:
    every = torch.arange(256, dtype=torch.uint8)
    planes = unpack(every, bits)
    assert len(planes) == 8 // bits
    for i, plane in enumerate(planes):
        assert plane.tolist() == [byte >> (bits * i) & (2**bits - 1) for byte in range(256)]


@pytest.mark.parametrize("bits", CLASSES)
def test_codes_may_be_floating_point_whole_numbers(bits: int) -> None:
    codes = codes_of(bits, (3, 16), 0)
    assert torch.equal(pack(codes.float(), bits), pack(codes, bits))


@pytest.mark.parametrize("bits", [4, 2])
def test_a_run_that_does_not_fill_its_bytes_is_refused(bits: int) -> None:
    with pytest.raises(RuntimeError):
        pack(torch.zeros(8 // bits + 1), bits)
