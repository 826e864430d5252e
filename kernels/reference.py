"""The oracle of the tests: what the ops mean, in float64, one token at a time.

Shares no code with what it checks: bits are unpacked byte by byte, tokens are read one by one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..codec import ExactLayout, Layout, ModalLayout, TransformLayout, parse_layout
from .side import Side


def attend_reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Dense attention, one query head at a time.

    Args:
        q: queries ``[B, Hq, Q, D]``.
        k: keys ``[B, H, S, D]``; v: values ``[B, H, S, Dv]``. Query head h reads KV head
            ``h // (Hq / H)``.
        mask: bool (True: seen) or float (added), broadcastable to ``[B, Hq, Q, S]``, or None.
        scale: factor of the scores.
        softcap: scores become ``softcap * tanh(scores / softcap)``; 0: they stay.
        sinks: ``[Hq]``: a score more in each row, without a value; or None.

    Returns:
        ``[B, Hq, Q, Dv]`` float64. Rows that see no token are 0.
    """
    batch, q_heads, queries, _ = q.shape
    heads, tokens = k.shape[1:3]
    out = torch.zeros(batch, q_heads, queries, v.shape[3], dtype=torch.float64)
    everywhere = None if mask is None else mask.expand(batch, q_heads, queries, tokens)
    for head in range(q_heads):
        kv_head = head // (q_heads // heads)
        keys, values = k[:, kv_head].double(), v[:, kv_head].double()
        scores = q[:, head].double() @ keys.transpose(1, 2) * scale  # [B, Q, S]
        if softcap:
            scores = softcap * (scores / softcap).tanh()
        if everywhere is not None:
            here = everywhere[:, head]
            if here.dtype == torch.bool:
                scores = scores.masked_fill(~here, float("-inf"))
            else:
                scores = scores + here.double()
        blind = (scores == float("-inf")).all(-1, keepdim=True)
        scores = scores.masked_fill(blind, 0.0)
        if sinks is not None:
            sink = sinks[head].double().expand(batch, queries, 1)
            scores = torch.cat([scores, sink], -1)
        weights = torch.softmax(scores, -1)[..., :tokens]
        out[:, head] = weights.masked_fill(blind, 0.0) @ values
    return out


def unpack_reference(side: Sequence[Tensor], lengths: Tensor, length: int, layout: str) -> Tensor:
    """Tokens ``0 .. length`` of one packed side, one at a time: ``[B, H, length, D]`` float64.

    Args:
        side: one packed side, flat (:class:`~apack_compile.kernels.side.Side`).
        lengths: int64 ``[2]``: tokens coded, tokens in the ring.
        length: logical tokens wanted, at most the sum of ``lengths``.
        layout: spec of the code.

    Among coded tokens the pool beats the codes; all others are read from the ring.
    """
    code = parse_layout(layout)
    tensors = Side.of(side, code)
    decoded = decode_reference(code, tensors.payload, tensors.params)  # [B, H, C, D]
    if isinstance(code, TransformLayout) and code.positional:
        decoded = turn_reference(code, decoded, tensors.params[-1], tensors.pool_positions[:, 0])
    batch, heads, _, dim = tensors.ring.shape
    coded = int(lengths[0])
    out = torch.empty(batch, heads, length, dim, dtype=torch.float64)
    for row in range(batch):
        slots = {int(p): slot for slot, p in enumerate(tensors.pool_positions[row]) if p >= 0}
        for token in range(length):
            if token >= coded:
                out[row, :, token] = tensors.ring[row, :, token - coded].double()
            elif token in slots:
                out[row, :, token] = tensors.pool[row, :, slots[token]].double()
            else:
                out[row, :, token] = decoded[row, :, token]
    return out


def decode_reference(layout: Layout, payload: Sequence[Tensor], params: Sequence[Tensor]) -> Tensor:
    """Payload tensors ``[B, T, width]`` to ``[B, H, T, D]`` float64, one token at a time."""
    batch, tokens = payload[0].shape[:2]
    out = torch.empty(batch, layout.heads, tokens, layout.dim, dtype=torch.float64)
    for row in range(batch):
        for token in range(tokens):
            if isinstance(layout, ModalLayout):
                x = _decode_modal(layout, [p[row, token] for p in payload], params)
            elif isinstance(layout, TransformLayout):
                x = _decode_transform(layout, [p[row, token] for p in payload], params)
            else:
                assert isinstance(layout, ExactLayout)
                x = payload[0][row, token].double()
            out[row, :, token] = x.view(layout.heads, layout.dim)
    return out


def turn_reference(layout: TransformLayout, x: Tensor, waves: Tensor, first: Tensor) -> Tensor:
    """Decoded keys ``x [B, H, T, D]`` float64, each pair turned by the angle of its token.

    Args:
        layout: says how channels are paired.
        x: of the tokens 0 .. T.
        waves: radians a position and at position 0, ``[2, R]``; angles are float32.
        first: the token that has position 0, ``[B]``.
    """
    out = x.clone()
    half = layout.rotary // 2
    for pair in range(half):
        i, j = (2 * pair, 2 * pair + 1) if layout.interleaved else (pair, pair + half)
        for row in range(len(x)):
            positions = (torch.arange(x.shape[2]) - int(first[row])).float()
            angles = (positions * float(waves[0, i]) + float(waves[1, i])).double()  # [T]
            one, other = x[row, :, :, i], x[row, :, :, j]
            out[row, :, :, i] = one * angles.cos() - other * angles.sin()
            out[row, :, :, j] = other * angles.cos() + one * angles.sin()
    return out


def _decode_modal(
    layout: ModalLayout, token: Sequence[Tensor], params: Sequence[Tensor]
) -> Tensor:  # fmt: skip
    """One token's payload to its heads side by side, ``[H * D]``: kind 1 comes first."""
    kind, *rest = token
    first, mine = 1 + layout.visual.gain, layout.visual.param_count  # codes, and gains if any
    if int(kind) == 1:
        return _decode_transform(layout.visual, rest[:first], params[:mine])
    return _decode_transform(layout.text, rest[first:], params[mine:])


def _decode_transform(
    layout: TransformLayout, token: Sequence[Tensor], params: Sequence[Tensor]
) -> Tensor:
    """One token's payload (``[width]`` each) to its heads side by side, ``[H * D]``."""
    mean, _, synthesis, units = (p.double() for p in params[:4])
    synthesis = synthesis * units[1].unsqueeze(-1)
    data = token[0].tolist()
    width = len(data) // layout.groups
    parts = []
    for group in range(layout.groups):
        levels: list[float] = []
        rest = data[group * width : (group + 1) * width]
        for bits, count in ((8, layout.r8), (4, layout.r4), (2, layout.r2)):
            size = count * bits // 8
            codes = unpack_bits_reference(rest[:size], bits, count)
            levels += [code + 0.5 - 2 ** (bits - 1) for code in codes]
            rest = rest[size:]
        gain = float(token[1][group]) if layout.gain else 1.0
        x = mean[group].clone()
        for component, level in enumerate(levels):
            x += gain * level * synthesis[group, component]
        parts.append(x)
    return torch.cat(parts)


def unpack_bits_reference(data: Sequence[int], bits: int, count: int) -> list[int]:
    """``count`` codes of ``bits`` bits from bytes: code i is in byte ``i % len(data)``."""
    codes = []
    for i in range(count):
        plane, byte = divmod(i, len(data))
        codes.append(data[byte] // 2 ** (bits * plane) % 2**bits)
    return codes
