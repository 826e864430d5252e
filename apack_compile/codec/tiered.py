r"""A transform code whose tokens have as many bits as they are worth: bits come in planes.

Few tokens receive most of the attention, and values that nobody reads need few bits (AttentionPack,
arXiv 2603.23914, section 3.3, gives them fewer components; fewer bits cost less for the same
bytes). Every token belongs to a level 0 .. P. All tokens have the leading ``b - P`` bits of each
component of b bits; those of level ``l`` and above also have plane l, which holds one bit more of
each component, the most significant first:

    u  =  2^P base  +  2^(P-1) plane_1  +  ...  +  plane_P

A token of level l lacks the last ``d = P - l`` bits. It is read as the middle of what they could
be, its components of ``b <= d`` bits as the mean; its gain makes the step ``SHRINK[d]`` times as
large as with all bits, for 2^d cells of it should be the best cell of b - d bits. With d = 0 this
is the code of :class:`~apack_compile.codec.transform.TransformLayout`, bit for bit.

Planes have rows for the tokens that are in them, in the order of the tokens
(``kernels/planes.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .bits import pack, unpack
from .layout import Judged, tiers_of
from .quantiser import SHRINK, lacking_quantiser
from .transform import GAIN_DTYPE, TransformLayout

TIERS = (26, 16, 6, 2)
"""Of ``PARTS`` tokens, how many have planes 1 to 4: best of those tried on SmolLM2 (values alone at
2.25 bits, coded and read densely, 1,536 tokens: KL 0.0036 with the same bits for all tokens, 0.0014
with two planes, 0.0010 with three, 0.0008 with these)."""

MASS = (0.05, 0.13, 0.41, 1.4, 10.4)
"""Attention that a token of each level gets with ``TIERS``, over the mean of all (SmolLM2, measured
on the same tokens)."""


@dataclass(frozen=True)
class TieredLayout(TransformLayout):
    """Components of 8, 4 and 2 bits with planes that only some tokens have; always with a gain.

    Attributes:
        plane1 .. plane4: of ``PARTS`` tokens, how many have this plane; descending, 0: no such
            plane.

    Payload: leading bits of all groups, gains, levels; then the planes. Params: those of the
    transform code, then ``expected [P + 1]``: the error that is to be expected of a token of each
    level, over that of all tokens.
    """

    plane1: int = 0
    plane2: int = 0
    plane3: int = 0
    plane4: int = 0

    kind: ClassVar[str] = "tiered"

    @property
    def tier_shares(self) -> tuple[int, ...]:
        """Of ``PARTS`` tokens, how many have plane 1, 2, ..."""
        every = (self.plane1, self.plane2, self.plane3, self.plane4)
        return tuple(share for share in every if share)

    @property
    def shares(self) -> tuple[int, ...]:
        """The same: each plane is a payload tensor."""
        return self.tier_shares

    @property
    def planes(self) -> int:
        """Planes P."""
        return len(self.shares)

    @property
    def param_count(self) -> int:
        """Those of the transform code, and what is expected of each level."""
        return super().param_count + 1

    def digits(self, bits: int) -> list[int]:
        """The leading bits of a component of ``bits`` bits, in parts that fit into bytes."""
        left = max(bits - self.planes, 0)
        return [size for size in (8, 4, 2, 1) if left & size]

    def _in_plane(self, plane: int) -> int:
        """Components, the first ones, that have a bit in a plane."""
        lowest = self.planes - plane
        return sum(count for bits, count in self.runs if bits > lowest)

    def payload_fields(self, dtype: torch.dtype) -> tuple[tuple[int, torch.dtype], ...]:
        """Leading bits, gains, levels, planes."""
        base = sum(count * size // 8 for bits, count in self.runs for size in self.digits(bits))
        gains = super().payload_fields(dtype)[1]
        planes = [self.groups * self._in_plane(i + 1) // 8 for i in range(self.planes)]
        widths = [self.groups * base], [1, *planes]
        first, rest = ([(width, torch.uint8) for width in each] for each in widths)
        return (*first, gains, *rest)

    def _packed(
        self, y: Tensor, params: Sequence[Tensor], levels: Tensor | None
    ) -> tuple[list[Tensor], Tensor]:
        """Payload of components ``y [B, G, T, R]``, and what it stands for."""
        batch, _, tokens, _ = y.shape
        if levels is None:
            levels = torch.full((batch, tokens), self.planes, dtype=torch.uint8, device=y.device)
        lacking = self.planes - levels.long()  # [B, T]
        shrink = torch.ones_like(lacking, dtype=y.dtype)  # by kernels alone: no copy to a GPU
        for bits, less in enumerate(SHRINK[: self.planes + 1]):
            shrink = torch.where(lacking == bits, less, shrink)
        shrink = shrink[:, None]
        gains = (self._rounded_gains(y, params).to(y.dtype) * shrink).to(GAIN_DTYPE)  # [B, G, T]
        cell = torch.exp2(lacking.to(y.dtype))[:, None, :, None]
        parts, numbers, means = [], [], []
        scaled = y / gains.to(y.dtype)[..., None]
        counts = [count for _, count in self.runs]
        for (bits, _), part in zip(self.runs, scaled.split(counts, -1), strict=True):
            half = 2 ** (bits - 1)
            codes = (part.floor() + half).clamp(0, 2 * half - 1).to(torch.int32)
            numbers.append(codes)
            above = bits
            for size in self.digits(bits):
                above -= size
                parts.append(pack((codes >> above) & ((1 << size) - 1), size))
            known = cell.clamp(max=2.0**bits)
            means.append(codes.to(y.dtype).div(known).floor() * known + known / 2 - half)
        every = torch.cat(numbers, -1)
        planes = []
        for plane in range(1, self.planes + 1):
            codes = every[..., : self._in_plane(plane)] >> (self.planes - plane)
            planes.append(pack(codes & 1, 1).transpose(1, 2).flatten(2))
        base = (
            torch.cat(parts, -1).transpose(1, 2).flatten(2)
            if parts
            else levels.new_zeros(batch, tokens, 0)
        )
        back = torch.cat(means, -1) * gains.to(y.dtype)[..., None]
        return [base, gains.transpose(1, 2), levels[..., None], *planes], back

    def encode_and_judge(
        self, x: Tensor, params: Sequence[Tensor], positions: Tensor | None = None,
        levels: Tensor | None = None,
    ) -> tuple[list[Tensor], Judged | None]:  # fmt: skip
        """Strain is that of any token over the error that is expected of one of this level."""
        payload, judged = super().encode_and_judge(x, params, positions, levels)
        assert judged is not None
        expected = params[-1 - self.positional].to(judged.error.dtype)
        strain = judged.strain / expected[payload[2][..., 0].long()]
        return payload, judged._replace(strain=strain)

    def _codes(self, payload: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Codes ``[B, G, T, R]``, where bits are lacking with the mean of what they could be."""
        base, _, levels, *planes = payload
        level = levels[..., 0].long()  # [B, T]
        width = base.shape[-1] // self.groups  # may be 0
        split = base.unflatten(-1, (self.groups, width)).transpose(1, 2)  # [B, G, T, bytes]
        known = torch.exp2((self.planes - level).to(dtype))[:, None, :, None]  # width of a cell
        whole: list[Tensor] = []
        start = 0
        for bits, count in self.runs:
            codes = torch.zeros((*split.shape[:3], count), dtype=dtype, device=base.device)
            above = bits
            for size in self.digits(bits):
                above -= size
                width = size * count // 8
                read = torch.cat(unpack(split[..., start : start + width], size), -1)
                codes = codes + read.to(dtype) * 2.0**above
                start += width
            whole.append(codes + (known.clamp(max=2.0**bits) - 1) / 2)
        codes = torch.cat(whole, -1)
        for plane, bytes_ in enumerate(planes, 1):
            count = self._in_plane(plane)
            grouped = bytes_.unflatten(-1, (self.groups, -1)).transpose(1, 2)
            bit = torch.cat(unpack(grouped, 1), -1).to(dtype)
            has = (level >= plane)[:, None, :, None]
            more = torch.where(has, bit * 2.0 ** (self.planes - plane), 0.0)
            codes = codes + torch.nn.functional.pad(more, (0, self.rank - count))
        return codes


def mean_bits(bits: int, shares: Sequence[int]) -> float:
    """Bits of a component of ``bits`` bits that a token has in the mean."""
    return sum(share * max(bits - lacking, 0) for share, lacking in tiers_of(shares))


def felt_error(bits: int, shares: Sequence[int]) -> float:
    """Error of such a component for unit variance; with planes, tokens weighted by :data:`MASS`."""
    tiers = tiers_of(shares)
    if not shares:
        return lacking_quantiser(bits, 0)[1]
    weights = [share * mass for (share, _), mass in zip(tiers, MASS, strict=True)]
    errors = (lacking_quantiser(bits, lacking)[1] for _, lacking in tiers)
    return sum(w * e for w, e in zip(weights, errors, strict=True)) / sum(weights)


def layout_of(
    shape: tuple[int, int, int], counts: Sequence[int], gain: bool, shares: Sequence[int] = ()
) -> TransformLayout:
    """The layout of ``shape`` (heads, head_dim, groups) with components of 8, 4 and 2 bits.

    Args:
        shape, counts: see :class:`TransformLayout`.
        gain: whether tokens carry one.
        shares: of its planes; none: all tokens have all bits.
    """
    heads, dim, groups = shape
    r8, r4, r2 = counts
    if not shares:
        return TransformLayout(heads, dim, groups, r8, r4, r2, int(gain))
    planes = {f"plane{number}": share for number, share in enumerate(shares, 1)}
    return TieredLayout(heads, dim, groups, r8, r4, r2, int(gain), **planes)
