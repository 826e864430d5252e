r"""Rotary position embedding seen from the codec: take it out of moments, spread it over positions.

Keys as attention sees them are rotated by their position, k_t = R_t x_t. Moments of a prompt of
1,000 tokens therefore say nothing of position 3,000: on SmolLM2 a basis fitted on 1,024 tokens
gives a KL of 0.26 at 3,072 tokens of context, one fitted on all positions 0.004 (keys at 1.75
bits). So moments are taken of x, and the moments of k are those of R_p x averaged over all
positions p up to the reach of the code:

    E[k k^T] = mean_p R_p E[x x^T] R_p^T,    R_p = diag(cos p w) + diag(sin p w) J

with J the signed permutation that pairs components (halves, or neighbours). Expanding the product
gives four elementwise products of E[x x^T] with averages of cosines and sines, whatever the number
of positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

POSITIONS = 1024
"""Positions over which moments are averaged."""


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
        if cos.shape != sin.shape or cos.numel() % (length * width):
            return None
        rows = cos.numel() // (length * width)
        if cos.shape[0] not in (1, rows) or length not in cos.shape[1:-1]:
            return None
        shape = (rows, length, width)
        return cls(cos.reshape(shape), sin.reshape(shape), interleaved)

    def undo(self, x: Tensor) -> Tensor:
        """``x [B, H, S, D]`` float32 as it was before the rotation; lengths stay as they are."""
        cos, sin = self.cos.float()[:, None], self.sin.float()[:, None]  # [B|1, 1, S, R]
        norm = (cos.square() + sin.square()).sqrt()
        turned, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], -1)
        back = (turned * cos - partner(turned, self.interleaved) * sin) / norm
        return torch.cat((back, rest), -1)

    def rotation(self, dim: int, visible: Tensor | None = None) -> Rotation:
        """The angle that one position adds, read off the last tokens (text, mostly).

        Args:
            dim: head_dim; components beyond R are not rotated.
            visible: ``[B, S]``: positions count from the first visible token of each sequence.
        """
        angles = torch.atan2(self.sin.double(), self.cos.double())  # [B|1, S, R]
        length = angles.shape[1]
        first = torch.zeros(1, 1, device=angles.device, dtype=torch.int64)
        if visible is not None:
            first = visible.to(torch.int8).argmax(1, keepdim=True)
        positions = torch.arange(length, device=angles.device) - first  # [B|1, S]
        frequencies = _frequencies(angles[0])
        phases = _wrap(angles[0, -1] - positions[0, -1] * frequencies)
        away = _wrap(angles - positions[..., None] * frequencies - phases).abs().amax(-1)
        seen = positions >= 0
        strays = ((away > STRAY) & seen).sum() / seen.expand_as(away).sum().clamp_min(1)

        def wide(x: Tensor) -> Tensor:
            return torch.cat((x, x.new_zeros(dim - len(x))))

        width = len(frequencies)
        return Rotation(wide(frequencies), width, self.interleaved, wide(phases), float(strays))


STRAY = 0.1
"""Radians by which the angle of a token may differ from that of its position; tables in bfloat16
are off by up to 0.01."""


def _wrap(angles: Tensor) -> Tensor:
    return torch.remainder(angles + torch.pi, 2 * torch.pi) - torch.pi


def _frequencies(angles: Tensor) -> Tensor:
    """Radians a position from ``[S, R]``: first from neighbours, then over doubling distances.

    Over a distance of n the error of the angles counts only 1/n. Distances that span an image,
    whose tokens have positions of their own, are not used.
    """
    frequencies = _wrap(angles.diff(dim=0)[-32:]).median(0).values
    span = 2
    while span < len(angles):
        late, early = angles[-32:][span - len(angles) :], angles[:-span][-32:]
        count = min(len(late), len(early))
        left = _wrap(late[-count:] - early[-count:] - span * frequencies)
        if bool((left.abs() > STRAY).any()):
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

    def _waves(self, reach: int, device: torch.device) -> tuple[Tensor, Tensor]:
        positions = torch.arange(POSITIONS, dtype=torch.float64, device=device) + 0.5
        angles = (positions / POSITIONS * reach)[:, None] * self.frequencies.to(device)
        return angles.cos(), angles.sin()  # [P, D]

    def _partner(self, x: Tensor) -> Tensor:
        turned, rest = x.split([self.width, x.shape[-1] - self.width], -1)
        return torch.cat((partner(turned, self.interleaved), torch.zeros_like(rest)), -1)

    def mean(self, total: Tensor, reach: int) -> Tensor:
        """``mean_p R_p x`` of heads side by side, ``[H * D]`` float64."""
        cos, sin = (wave.mean(0) for wave in self._waves(reach, total.device))
        x = total.unflatten(0, (-1, len(cos)))  # [H, D]
        return (x * cos + self._partner(x) * sin).flatten()

    def gram(self, matrix: Tensor, reach: int) -> Tensor:
        """``mean_p R_p M R_p^T`` of ``[..., H * D, H * D]`` float64, heads side by side."""
        heads = matrix.shape[-1] // len(self.frequencies)
        cos, sin = (wave.repeat(1, heads) for wave in self._waves(reach, matrix.device))

        def columns(m: Tensor) -> Tensor:  # M J^T
            return self._partner(m.unflatten(-1, (heads, -1))).flatten(-2)

        right = columns(matrix)
        left = columns(matrix.mT).mT
        both = columns(left)
        return (
            matrix * (cos.T @ cos) + right * (cos.T @ sin)
            + left * (sin.T @ cos) + both * (sin.T @ sin)
        ) / POSITIONS  # fmt: skip
