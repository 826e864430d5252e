r"""Transform code: a basis over the heads of a group, quantised coefficients, absorbed attention.

For each group of KV heads, with the group's heads side by side in one vector x of n numbers,

    y = (x - mean) analysis                    analysis: n x R, in units of the quantiser's step
    u = clamp(floor(y / t) + 2^(b-1), 0, 2^b - 1)              b = 8, 4 or 2 bits by component
    x ~ mean + t (u + 1/2 - 2^(b-1)) synthesis                 t: per-token gain, or 1

Weighting, scales and rank are all inside ``analysis`` and ``synthesis`` (see ``fit.py``), which are
stored as float16 matrices with float32 units (``half.py``).

Attention never rebuilds x. With q' = synthesis q and the constant c_r = 1/2 - 2^(b_r - 1),

    q . x  =  q . mean + t (q' . u + q' . c)
    sum_s p_s x_s  =  (sum_s p_s) mean + ((sum_s p_s t_s u_s) + (sum_s p_s t_s) c) synthesis

so that keys cost one small product a step and values one map a step, whatever the length.

Keys may be coded before their rotary embedding (``rotary``): x is then the key turned back from
the position of its token, and scores turn the rebuilt keys again. Which position a token is given
does not matter for the result, as long as it is the same both times; codes fit best if it is the
model's own.
Transform coding of KV: KVTC (ICLR 2026); absorption as in multi-head latent attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from .bits import CLASSES, pack, unpack
from .half import HALF, MOST, halved, power_of_two
from .layout import Judged, Layout, scores_of_keys, tiers_of, working_dtype
from .rotation import rotate

GAIN_DTYPE = torch.float16

LEAST_GAIN = 1e-5
"""A token of zeros has this gain."""

MOST_GAIN = 6e4
"""No token has more."""

SPAN = 16.0
"""What a typical number becomes before products: float16 has 12 powers of two above it and, for
the lower half of a number, as many below."""


@dataclass(frozen=True)
class TransformLayout(Layout):
    """Components in runs of 8, 4 and 2 bits, the same for every group of heads.

    Attributes:
        groups: the KV heads are split into this many groups of neighbours.
        r8, r4, r2: components with 8, 4 and 2 bits in each group.
        gain: whether each token and group carries a 16-bit gain: 0 no, 1 the root mean square of
            ``y * whiten``, 2 its largest magnitude.
        rotary: leading components of a head that are rotated by position; 0: coded as they are.
        interleaved: 1 if rotated pairs are neighbours, 0 if they are halves.
        exact: of ``KEPT_OF`` tokens, how many stay exact: those whose error, in the metric of the
            code, is greatest over their own size. What is unusual in a context is looked up by it.

    Params (:meth:`params_of`): ``mean [G, n]``, ``analysis [G, n, R]`` and ``synthesis [G, R, n]``
    in float16, their ``units [2, G, R]``, with a gain also ``whiten [G, R]``, then ``metric
    [H, D, D]`` in float16, ``scales [G, R]`` and ``spans [2]``; with ``rotary`` also ``waves
    [2, rotary]`` (``rotation.py``). Tokens are multiplied by the first span (a power of two) before
    products, which brings them into the range of float16:

        y = (spans_0 (x - mean)) analysis units_0

    and what is multiplied by ``synthesis`` is multiplied by units_1 as well. Sizes are those of
    ``spans_0 (x - mean) metric spans_1``, whose components in the basis are ``scales y``.
    """

    groups: int
    r8: int
    r4: int
    r2: int
    gain: int
    rotary: int = 0
    interleaved: int = 0
    exact: int = 0

    kind: ClassVar[str] = "transform"

    @property
    def plain(self) -> TransformLayout:
        """The same components for every token."""
        return _plain(self)

    @property
    def kept(self) -> int:
        """Of ``KEPT_OF`` tokens, how many stay exact."""
        return self.exact

    @property
    def param_count(self) -> int:
        """Mean, bases, their units, metric, scales, spans, and what gain and rotation need."""
        return 7 + (self.gain > 0) + self.positional

    def params_of(
        self, mean: Tensor, analysis: Tensor, synthesis: Tensor, metric: Tensor, scales: Tensor,
        whiten: Tensor | None = None, typical: Tensor | float = 1.0,
    ) -> list[Tensor]:  # fmt: skip
        """The parameters that codes with and without tiers have, before ``waves``.

        Args:
            mean: ``[G, n]``; analysis: ``[G, n, R]``; synthesis: ``[G, R, n]``.
            metric: ``[H, D, D]``: sizes are those of ``(x - mean) metric``.
            scales: ``[G, R]``: of the components in that metric.
            whiten: ``[G, R]``, with a gain.
            typical: the deviation of the largest channel of ``x - mean``. Numbers are cut off at
                some 4,000 times that (2,000 to 4,000).
        """
        span = SPAN / power_of_two(torch.as_tensor(typical, dtype=torch.float32).to(mean.device))
        into, into_units = halved(analysis / span, 1)
        out, out_units = halved(synthesis, 2)
        weights, weight_unit = halved(metric / span, (0, 1, 2))
        units = torch.stack([into_units, out_units])  # [2, G, R]
        spans = torch.stack([span.reshape(()), weight_unit.reshape(())])
        middle = [] if whiten is None else [whiten]
        params = [mean, into, out, units, *middle, weights, scales, spans]
        kept = (p if p.dtype == HALF else p.float() for p in params)
        return [p.contiguous() for p in kept]

    def judged_by(self, params: Sequence[Tensor]) -> Sequence[Tensor]:
        """Metric, scales and spans."""
        return params[4 + (self.gain > 0) :][:3]

    @property
    def positional(self) -> bool:
        """Whether keys are coded before their rotation."""
        return self.rotary > 0

    @property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """Pairs of bits and components, in storage order, empty runs left out."""
        counts = (self.r8, self.r4, self.r2)
        return tuple((bits, count) for bits, count in zip(CLASSES, counts, strict=True) if count)

    @property
    def rank(self) -> int:
        """Components R that are stored, per group."""
        return self.r8 + self.r4 + self.r2

    @property
    def tiers(self) -> tuple[tuple[float, int], ...]:
        """Shares of the tokens, and the bits that they lack."""
        return tiers_of(self.tier_shares)

    def payload_fields(self, dtype: torch.dtype) -> tuple[tuple[int, torch.dtype], ...]:
        """Code bytes of all groups, then the gains."""
        code_bytes = self.groups * sum(bits * count // 8 for bits, count in self.runs)
        codes = ((code_bytes, torch.uint8),)
        return (*codes, (self.groups, GAIN_DTYPE)) if self.gain else codes

    def _grouped(self, x: Tensor) -> Tensor:
        """``[B, H, T, D]`` to ``[B, G, T, n]``."""
        per_group = self.heads // self.groups
        x = x.unflatten(1, (self.groups, per_group))
        return x.transpose(2, 3).flatten(3)

    def _centres(self, like: Tensor) -> Tensor:
        """c_r = 1/2 - 2^(b_r - 1) for each component: ``[R]``."""
        return torch.cat([like.new_full((n,), 0.5 - 2.0 ** (bits - 1)) for bits, n in self.runs])

    def _codes(self, payload: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The integer codes as floating-point numbers ``[B, G, T, R]``."""
        packed = payload[0].unflatten(-1, (self.groups, -1)).transpose(1, 2)  # [B, G, T, bytes]
        planes: list[Tensor] = []
        start = 0
        for bits, count in self.runs:
            width = bits * count // 8
            planes += unpack(packed[..., start : start + width], bits)
            start += width
        return torch.cat([plane.to(dtype) for plane in planes], -1)

    def _gains(self, payload: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        return payload[1].to(dtype).transpose(1, 2)  # [B, G, T]

    def _turned(
        self, x: Tensor, params: Sequence[Tensor], positions: Tensor | None, sign: int
    ) -> Tensor:
        """``x [B, H, T, D]`` rotated to its positions, or back (``sign`` -1)."""
        if not self.positional:
            return x
        assert positions is not None
        return rotate(x, positions, sign * params[-1], bool(self.interleaved))

    def encode(
        self, x: Tensor, params: Sequence[Tensor], positions: Tensor | None = None,
        levels: Tensor | None = None,
    ) -> list[Tensor]:  # fmt: skip
        """Turn back, project, divide by the gain, round, clamp, pack."""
        _, y = self._components(x, params, positions)
        return self._packed(y, params, levels)[0]

    def encode_and_judge(
        self, x: Tensor, params: Sequence[Tensor], positions: Tensor | None = None,
        levels: Tensor | None = None,
    ) -> tuple[list[Tensor], Judged | None]:  # fmt: skip
        """What is not in the stored components is size minus theirs: nothing is decoded."""
        centred, y = self._components(x, params, positions)
        payload, back = self._packed(y, params, levels)
        metric, scales, spans = (p.to(y.dtype) for p in self.judged_by(params))
        scales = scales[:, None]
        per_head = centred.unflatten(-1, (-1, self.dim)).transpose(2, 3).flatten(1, 2)
        size = (per_head @ metric * spans[1]).square().sum((1, 3))  # [B, T]
        stored = (y * scales).square().sum((1, 3))
        wrong = ((y - back) * scales).square().sum((1, 3))
        error = (size - stored).clamp_min(0) + wrong
        return payload, Judged(error, size, self._strain(error, centred))

    def _strain(self, error: Tensor, centred: Tensor) -> Tensor:
        """The error ``[B, T]``, over the size of the token where a share of them stays exact."""
        if not self.kept:
            return error
        return error / centred.square().sum((1, 3)).clamp_min(1e-30)

    def _components(
        self, x: Tensor, params: Sequence[Tensor], positions: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Tokens about the mean, times the span ``[B, G, T, n]``; components ``[B, G, T, R]``."""
        x = self._turned(x.to(working_dtype(x.dtype)), params, positions, -1)
        mean, analysis, units = (params[i].to(x.dtype) for i in (0, 1, 3))
        span = self.judged_by(params)[2][0].to(x.dtype)
        centred = ((self._grouped(x) - mean[:, None]) * span).clamp(-MOST, MOST)
        return centred, centred @ analysis * units[0][:, None]

    def _rounded_gains(self, y: Tensor, params: Sequence[Tensor]) -> Tensor:
        """The gain of each token and group as it is stored: ``[B, G, T]``."""
        white = y * params[4].to(y.dtype)[:, None]
        size = white.square().mean(-1).sqrt() if self.gain == 1 else white.abs().amax(-1)
        return size.clamp(LEAST_GAIN, MOST_GAIN).to(GAIN_DTYPE)

    def _packed(
        self, y: Tensor, params: Sequence[Tensor], levels: Tensor | None
    ) -> tuple[list[Tensor], Tensor]:
        """The payload of components ``y [B, G, T, R]``, and what it stands for."""
        payload = []
        gains = None
        if self.gain:
            rounded = self._rounded_gains(y, params)
            payload.append(rounded.transpose(1, 2))
            gains = rounded.to(y.dtype)[..., None]
        parts, middles = [], []
        counts = [count for _, count in self.runs]
        for (bits, _), part in zip(
            self.runs, (y if gains is None else y / gains).split(counts, -1), strict=True
        ):
            half = 2 ** (bits - 1)
            codes = (part.floor() + half).clamp(0, 2 * half - 1)
            parts.append(pack(codes, bits))
            middles.append(codes + (0.5 - half))
        back = torch.cat(middles, -1)
        packed = torch.cat(parts, -1).transpose(1, 2).flatten(2)  # [B, T, G * bytes]
        return [packed, *payload], back if gains is None else back * gains

    def decode(
        self, payload: Sequence[Tensor], params: Sequence[Tensor], dtype: torch.dtype,
        positions: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Codes times synthesis, the gain, the mean, the rotation."""
        work = working_dtype(dtype)
        mean, synthesis = params[0].to(work), self._synthesis(params, work)
        codes = self._codes(payload, work)
        x = (codes + self._centres(codes)) @ synthesis
        if self.gain:
            x = x * self._gains(payload, work)[..., None]
        x = x + mean[:, None]  # [B, G, T, n]
        per_group = self.heads // self.groups
        x = x.unflatten(-1, (per_group, self.dim)).transpose(2, 3).flatten(1, 2)
        return self._turned(x, params, positions, 1).to(dtype)

    def _synthesis(self, params: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """With its units: ``[G, R, n]``."""
        return params[2].to(dtype) * params[3][1].to(dtype)[..., None]

    def _per_head(self, params: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Mean ``[H, 1, D]`` and synthesis ``[H, R, D]`` by KV head."""
        per_group = self.heads // self.groups
        mean = params[0].to(dtype).reshape(self.heads, 1, self.dim)
        synthesis = self._synthesis(params, dtype).unflatten(-1, (per_group, self.dim))
        synthesis = synthesis.transpose(1, 2)
        return mean, synthesis.reshape(self.heads, self.rank, self.dim)

    def scores(
        self, q: Tensor, payload: Sequence[Tensor], params: Sequence[Tensor],
        positions: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """``q . mean + t (q' . u + q' . c)``, in the dtype of q; rotated keys are rebuilt."""
        if self.positional:
            return scores_of_keys(q, self.decode(payload, params, q.dtype, positions))
        mean, synthesis = self._per_head(params, q.dtype)
        by_head = q.unflatten(1, (self.heads, -1)).flatten(2, 3)  # [B, H, M, D]
        folded = by_head @ synthesis.transpose(-1, -2)  # [B, H, M, R]
        bias = by_head @ mean.transpose(-1, -2)  # [B, H, M, 1]
        centre = folded @ self._centres(q)[:, None]  # [B, H, M, 1]

        def by_group(z: Tensor) -> Tensor:
            return z.unflatten(1, (self.groups, -1)).flatten(2, 3)

        coded = by_group(folded) @ self._codes(payload, q.dtype).transpose(-1, -2) + by_group(
            centre
        )
        if self.gain:
            coded = coded * self._gains(payload, q.dtype)[:, :, None]
        scores = coded + by_group(bias)  # [B, G, M', T]
        return scores.unflatten(2, (-1, q.shape[2])).flatten(1, 2)

    def mix(self, p: Tensor, payload: Sequence[Tensor], params: Sequence[Tensor]) -> Tensor:
        """Accumulate codes, then one map to head space, in the dtype of p."""
        mean, synthesis = self._per_head(params, p.dtype)
        weights = p.unflatten(1, (self.groups, -1)).flatten(2, 3)  # [B, G, M', T]
        total = weights.sum(-1, keepdim=True)
        if self.gain:
            weights = weights * self._gains(payload, p.dtype)[:, :, None]
        latent = weights @ self._codes(payload, p.dtype)
        latent = latent + weights.sum(-1, keepdim=True) * self._centres(p)

        def by_head(z: Tensor) -> Tensor:
            return z.unflatten(2, (self.heads // self.groups, -1)).flatten(1, 2)

        out = by_head(latent) @ synthesis + by_head(total) * mean  # [B, H, M, D]
        return out.unflatten(2, (-1, p.shape[2])).flatten(1, 2)


@cache
def _plain(layout: TransformLayout) -> TransformLayout:
    sizes = {f.name: getattr(layout, f.name) for f in fields(TransformLayout)}
    return TransformLayout(**{**sizes, "exact": 0})
