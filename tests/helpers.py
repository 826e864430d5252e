"""What several test modules share: codes made by hand, packed sides, Dynamo graphs."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from apack_compile import ops  # noqa: F401  (registers the operators)
from apack_compile.cache import Policy, SideStore
from apack_compile.codec import Code, CodeRef, ExactLayout, Layout, ModalLayout, TransformLayout
from apack_compile.codec.fit import Evidence, fit_transform
from apack_compile.codec.fit_modal import fit_modal
from apack_compile.codec.layout import TOP_LEVEL
from apack_compile.codec.modal import joined
from apack_compile.codec.moments import Moments
from apack_compile.codec.recipe import Recipe

few = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
"""Hypothesis settings of tests whose examples take milliseconds."""


def hand_code(layout: Layout, seed: int = 0) -> Code:
    """A code with made-up parameters: right in shape, of sensible size, optimal for nothing."""
    if isinstance(layout, ExactLayout):
        return Code(layout)
    if isinstance(layout, ModalLayout):
        return joined(hand_code(layout.visual, seed), hand_code(layout.text, seed + 1), (1, 1))
    assert isinstance(layout, TransformLayout)
    generator = torch.Generator().manual_seed(seed)
    n, rank = layout.heads // layout.groups * layout.dim, layout.rank
    shapes = [(layout.groups, n), (layout.groups, n, rank), (layout.groups, rank, n)]
    mean, analysis, synthesis = (torch.randn(shape, generator=generator) for shape in shapes)
    whiten = torch.rand(layout.groups, rank, generator=generator) + 0.5 if layout.gain else None
    metric = torch.zeros(layout.heads, layout.dim, layout.dim)
    scales = torch.zeros(layout.groups, rank)
    params = layout.params_of(mean, analysis, synthesis, metric, scales, whiten)
    if layout.tier_shares:
        params.append(torch.ones(len(layout.tier_shares) + 1))
    if layout.positional:
        params.append(torch.rand(2, 1, generator=generator).expand(2, layout.rotary))
    return Code(layout, tuple(params))


def pair_waves(layout: TransformLayout) -> Tensor:
    """Radians a position and at position 0, ``[2, R]``: each pair has its own."""
    pairs = layout.rotary // 2
    waves = torch.stack([100.0 ** -(torch.arange(pairs) / pairs), torch.arange(pairs) % 7 / 3])
    if layout.interleaved:
        return waves.repeat_interleave(2, 1)
    return waves.repeat(1, 2)


def random_payload(layout: Layout, batch: int, tokens: int, dtype: torch.dtype) -> list[Tensor]:
    """Payload tensors with every code as likely as any other."""
    payload = []
    for width, kind in layout.payload_fields(dtype):
        if kind == torch.uint8:
            payload.append(torch.randint(0, 256, (batch, tokens, width), dtype=torch.uint8))
        else:
            payload.append(torch.rand(batch, tokens, width).to(kind) + 0.5)
    return payload


def encoded(
    x: Tensor, code: Code, policy: Policy, visible: Tensor | None = None
) -> tuple[list[Tensor], Tensor]:
    """One side, flat, as ops take it, and its lengths."""
    tensors = torch.ops.apack.encode(
        x, visible, list(code.params), code.layout.spec, policy.sinks, policy.extra,
        policy.window, policy.ring, policy.chunk,
    )  # fmt: skip
    coded = max(x.shape[2] - policy.window, 0)
    count = len(code.layout.payload_fields(x.dtype)) + 3
    return [*tensors[:count], *code.params], torch.tensor([coded, x.shape[2] - coded])


def poison(side: list[Tensor], lengths: Tensor, layout: Layout) -> list[Tensor]:
    """A copy of one flat side with NaN (and arbitrary codes) wherever no live token is."""
    side = [t.clone() for t in side]
    count = len(layout.payload_fields(torch.float32))
    coded, recent = lengths.tolist()
    for payload in side[: count - len(layout.shares)]:
        stale = payload[:, coded:]
        stale.fill_(float("nan") if stale.is_floating_point() else 171)
    pool, positions, ring = side[count : count + 3]
    ring[:, :, recent:] = float("nan")
    unused = (positions < 0) | (positions >= coded)
    pool.masked_fill_(unused[:, None, :, None], float("nan"))
    return side


def dropped_tokens(store: SideStore) -> Tensor:
    """``[B, S]`` bool: the tokens of a side that are gone for good, counted one by one."""
    gone = torch.zeros(store.side.ring.shape[0], store.length, dtype=torch.bool)
    if store.ref.layout.evicts:
        absent = store.ref.layout.absent(store.side.payload)
        assert absent is not None
        gone[:, : store.coded] = absent[:, : store.coded]
        for row, positions in enumerate(store.side.pool_positions.tolist()):
            gone[row, [p for p in positions if 0 <= p < store.length]] = False
    return gone


def fitted_ref(
    heads: int = 2, dim: int = 8, ratio: float = 4, gain: bool = True, tiers: bool = False,
    evict: float = 0,
) -> CodeRef:  # fmt: skip
    """A code that was fitted: for keys, or for values (``gain``: one gain a token)."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, heads, 200, dim, generator=generator)
    evidence = Evidence(Moments.of(x, x, x, None))
    codes = fit_transform([evidence], (dim, dim), Recipe(ratio, tiers=tiers, evict=evict), 0)
    return CodeRef(codes[0][int(gain)])


def modal_ref(gain: bool = True, visual_ratio: float = 4, ratio: float = 2, **more: Any) -> CodeRef:
    """A code for each kind of tokens of 2 heads of 8: of keys, or of values (``gain``)."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(1, 2, 400, 8, generator=generator)
    x[:, :, :200] += 3 * torch.randn(1, 2, 1, 8, generator=generator)
    seen = torch.arange(400)[None] < 200
    visual = Moments.of(x, x, x, None, among=seen)
    evidence = Evidence(Moments.of(x, x, x, None), visual=visual)
    codes = fit_modal([evidence], (8, 8), Recipe(ratio, visual_ratio=visual_ratio, **more), 0)
    return CodeRef(codes[0][int(gain)])


def at_every_level(ref: CodeRef, x: Tensor, positions: Tensor | None = None) -> list[Tensor]:
    """What the code makes of tokens ``[B, H, T, D]`` at each level that they may be of."""
    layout, params, found = ref.layout, ref.code.params, []
    highest = [last for _, last in layout.plane_levels if last < TOP_LEVEL]
    for level in range(max(highest, default=len(layout.shares)) + 1):
        levels = torch.full((x.shape[0], x.shape[2]), level, dtype=torch.uint8)
        payload = layout.encode(x, params, positions, levels)
        found.append(layout.decode(payload, params, x.dtype, positions))
    return found
