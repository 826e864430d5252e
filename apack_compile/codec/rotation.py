r"""Rotary position embedding seen from the codec: take it out of moments, spread it over positions.

Keys as attention sees them are rotated by their position, k_t = R_t x_t. Moments of a prompt of
1,000 tokens therefore say nothing of position 3,000: on SmolLM2 a basis fitted on 1,024 tokens
gives a KL of 0.26 at 3,072 tokens of context, one fitted on all positions 0.004 (keys at 1.75
bits). So moments are taken of x, and the moments of k are those of R_p x averaged over all
positions p up to the reach of the code:

    E[k k^T] = mean_p R_p E[x x^T] R_p^T,    R_p = diag(cos p w) + diag(sin p w) J

with J the signed permutation that pairs components (halves, or neighbours). Expanding the product
gives four elementwise products of E[x x^T] with averages of cosines and sines of sums and
differences of frequencies, which have a closed form.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def partner(x: Tensor, interleaved: bool) -> Tensor:
    """``J x`` along the last dimension: ``(-x2, x1)`` of halves, or of neighbours."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def rotate(x: Tensor, positions: Tensor, waves: Tensor, interleaved: bool) -> Tensor:
    """Rotate tokens to their positions; ``rotate(x, positions, -waves, ...)`` takes it back.

    Args:
        x: ``[B, H, T, D]``; the first R components of a head are rotated.
        positions: ``[B|1, T]``.
        waves: radians a position and at position 0, ``[2, R]``.
        interleaved: pairs are neighbours, not halves.
    """
    waves = waves.to(x.dtype)
    angles = (positions.to(x.dtype)[..., None] * waves[0] + waves[1])[:, None]  # [B|1, 1, T, R]
    turned, rest = x.split([waves.shape[1], x.shape[-1] - waves.shape[1]], -1)
    turned = turned * angles.cos() + partner(turned, interleaved) * angles.sin()
    return torch.cat((turned, rest), -1)


@dataclass(frozen=True)
class Turn:
    """The rotation of each token of a prompt.

    Attributes:
        cos, sin: ``[B|1, S, R]``; the first R components of a head are rotated.
        interleaved: pairs are neighbours, not halves.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool

    @classmethod
    def of(
        cls, cos: Tensor | None, sin: Tensor | None, interleaved: bool, length: int
    ) -> Turn | None:
        """From what the graph multiplies with; None if it does not cover ``length`` tokens."""
        if cos is None or sin is None:
            return None
        width = cos.shape[-1]
        sizes = cos.shape[:-1] if cos.dim() > 2 else (1, *cos.shape[:-1])
        if cos.shape != sin.shape or [n for n in sizes[1:] if n != 1] != [length] * (length != 1):
            return None  # tables of other tokens, or by head
        shape = (sizes[0], length, width)
        return cls(cos.reshape(shape), sin.reshape(shape), interleaved)

    def undo(self, x: Tensor) -> Tensor:
        """``x [B, H, S, D]`` float32 as it was before the rotation; lengths stay as they are."""
        cos, sin = self.cos.float()[:, None], self.sin.float()[:, None]  # [B|1, 1, S, R]
        norm = (cos.square() + sin.square()).sqrt()
        turned, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], -1)
        back = (turned * cos - partner(turned, self.interleaved) * sin) / norm
        return torch.cat((back, rest), -1)

    def rotation(self, dim: int, visible: Tensor | None = None) -> Rotation | None:
        """The angle that one position adds; None if too few tokens show it.

        Args:
            dim: head_dim; components beyond R are not rotated.
            visible: ``[B, S]``: positions count from the first visible token of each sequence.
        """
        angles = torch.atan2(self.sin.double(), self.cos.double())  # [B|1, S, R]
        if angles.shape[1] < 2:
            return None
        if visible is None:
            visible = torch.ones(angles.shape[:2], dtype=torch.bool, device=angles.device)
        first = visible.to(torch.int8).argmax(1, keepdim=True)  # [B, 1]
        shared = visible.any(0, keepdim=True) if len(angles) == 1 else visible  # [B|1, S]
        frequencies = _frequencies(angles, shared)
        if frequencies is None:
            return None
        positions = torch.arange(angles.shape[1], device=angles.device) - first  # [B, S]
        phases = angles[0, first[0, 0]]
        away = _wrap(angles - positions[..., None] * frequencies - phases).abs().amax(-1)
        strays = ((away > STRAY) & visible).sum() / visible.sum().clamp_min(1)

        def wide(x: Tensor) -> Tensor:
            return torch.cat((x, x.new_zeros(dim - len(x))))

        width = len(frequencies)
        return Rotation(wide(frequencies), width, self.interleaved, wide(phases), float(strays))


MOVING = 0.02
"""Radians that a table in bfloat16 does not show by mistake."""

STRAY = 0.1
"""Radians by which the angle of a token may differ from that of its position; tables in bfloat16
are off by up to 0.01."""


def _wrap(angles: Tensor) -> Tensor:
    return torch.remainder(angles + torch.pi, 2 * torch.pi) - torch.pi


def _frequencies(angles: Tensor, visible: Tensor) -> Tensor | None:
    """Radians a position, from steps between neighbours, then over doubling distances.

    From one word to the next all components turn; between tokens of an image only those of a row
    or a column do, and between tokens of padding none. Over a distance of n the error of the
    angles counts only 1/n; distances that span anything but words are not used.

    Args:
        angles: ``[B, S, R]``; visible: ``[B, S]`` bool.
    """
    steps = _wrap(angles.diff(dim=1))  # [B, S - 1, R]
    both = visible[:, 1:] & visible[:, :-1]
    moving = ((steps.abs() > MOVING) & both[..., None]).sum(-1)  # [B, S - 1]
    if not moving.numel() or not moving.any():
        return None
    frequencies = steps[moving == moving.max()].median(0).values
    breaks = ~both | (_wrap(steps - frequencies).abs() > STRAY).any(-1)
    before = torch.nn.functional.pad(breaks.cumsum(1), (1, 0))  # [B, S]
    span = 2
    while span < angles.shape[1]:
        whole = before[:, span:] == before[:, :-span]
        left = _wrap(angles[:, span:] - angles[:, :-span] - span * frequencies)[whole]
        if not len(left):
            break
        frequencies = frequencies + left.median(0).values / span
        span *= 2
    return frequencies


@dataclass(frozen=True)
class Rotation:
    """The rotation that one position adds.

    Attributes:
        frequencies: radians a position, ``[D]``, 0 where nothing is rotated.
        width: rotated components R.
        interleaved: pairs are neighbours, not halves.
        phases: radians at position 0, ``[D]``.
        strays: share of the tokens seen whose angle is not that of their position.
    """

    frequencies: Tensor
    width: int
    interleaved: bool
    phases: Tensor
    strays: float = 0.0

    @property
    def waves(self) -> Tensor:
        """Frequencies and phases for :func:`rotate`, ``[2, R]``."""
        return torch.stack((self.frequencies, self.phases))[:, : self.width]

    def _partner(self, x: Tensor) -> Tensor:
        turned, rest = x.split([self.width, x.shape[-1] - self.width], -1)
        return torch.cat((partner(turned, self.interleaved), torch.zeros_like(rest)), -1)

    def mean(self, total: Tensor, reach: int) -> Tensor:
        """``mean_p R_p x`` of heads side by side, ``[H * D]`` float64."""
        cos, sin = _mean_wave(self.frequencies.to(total.device), reach)
        x = total.unflatten(0, (-1, len(cos)))  # [H, D]
        return (x * cos + self._partner(x) * sin).flatten()

    def gram(self, matrix: Tensor, reach: int) -> Tensor:
        """``mean_p R_p M R_p^T`` of ``[..., H * D, H * D]`` float64, heads side by side."""
        heads = matrix.shape[-1] // len(self.frequencies)
        w = self.frequencies.to(matrix.device)
        cos_less, sin_less = _mean_wave(w[:, None] - w, reach)
        cos_more, sin_more = _mean_wave(w[:, None] + w, reach)

        def columns(m: Tensor) -> Tensor:  # M J^T
            return self._partner(m.unflatten(-1, (heads, -1))).flatten(-2)

        def times(m: Tensor, factors: Tensor) -> Tensor:
            return m * factors.repeat(heads, heads) / 2

        right = columns(matrix)
        left = columns(matrix.mT).mT
        both = columns(left)
        return (
            times(matrix, cos_less + cos_more) + times(right, sin_more - sin_less)
            + times(left, sin_more + sin_less) + times(both, cos_less - cos_more)
        )  # fmt: skip


def _mean_wave(frequencies: Tensor, reach: int) -> tuple[Tensor, Tensor]:
    """``mean_p cos(p w)`` and ``mean_p sin(p w)`` over positions 0 .. reach (Dirichlet kernel)."""
    half = frequencies / 2
    small = half.sin().abs() < 1e-9
    size = torch.where(
        small, 1.0, (reach * half).sin() / (reach * torch.where(small, 1.0, half.sin()))
    )
    middle = (reach - 1) * half
    return size * middle.cos(), size * middle.sin()
