"""Find attention: every form becomes one record.

    scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v), attn_mask=m, scale=s, ...)
    matmul(softmax(matmul(q, repeat_kv(k).transpose(2, 3)) * s + m), repeat_kv(v))
    flex_attention(q, k, v, score_mod, block_mask, s)
        ->  AttentionSite(q, k, v, mask=m, scale=s, causal=...)

Nothing is changed. Arguments may be positional or named, present or absent; what is written out is
read by ``find_chain.py``, flex_attention by ``find_flex.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from .base import PassReport, Skip, argument, calls, shape_of
from .constants import number
from .factors import Factor
from .find_chain import Chain, find_chain
from .find_flex import Flex, find_flex
from .find_writes import base_of, is_written
from .flex_mask import FlexMask
from .mask import OTHER_MASK, Mask, MaskPart, mask_part
from .regroup import lies_so, regrouped
from .views import in_one_order, lead_of, walk_up

OTHER_HEADS = "keys and values have not the same heads, or are changed once repeated: left dense"


@dataclass(frozen=True)
class AttentionSite:
    """One attention call, canonical.

    Attributes:
        node: the call; its value is ``[B, Hq, Q, Dv]``, or ``[B * Hq, Q, Dv]``.
        q: queries ``[B, Hq, Q, D]``, or ``[B * Hq, Q, D]``.
        k, v: the roots of keys and values, ``[B, H, S, D]``, before any repeat_kv or cast.
        heads: query heads, Hq.
        mask: what is laid over the scores, or what makes it (flex_attention), or None.
        scale: factor of the scores.
        causal: the call's own ``is_causal`` (PyTorch aligns it to the upper left).
        softcap: scores s become ``softcap * tanh(s / softcap)`` before the mask; 0: they stay.
        sinks: ``Hq`` numbers in any shape: scores of one token more, without a value; or None.
        factors: tensors that queries are multiplied with, besides ``scale``.
    """

    node: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    heads: int
    mask: Mask | FlexMask | None
    scale: float
    causal: bool
    softcap: float = 0.0
    sinks: fx.Node | None = None
    factors: tuple[Factor, ...] = ()


def find_attention(graph: fx.Graph) -> tuple[tuple[AttentionSite, ...], PassReport]:
    """All attention sites of a Dynamo graph, in order."""
    sites: list[AttentionSite] = []
    skipped: list[Skip] = []
    for node in graph.nodes:
        found = _attention(node)
        if isinstance(found, str):
            skipped.append(Skip(node.name, found))
        elif found is not None:
            sites.append(found)
    place = {node: number for number, node in enumerate(graph.nodes)}
    sites.sort(key=lambda site: place[site.node])  # a softmax stands before its product
    return tuple(sites), PassReport("find_attention", len(sites), tuple(skipped))


def _attention(node: fx.Node) -> AttentionSite | str | None:
    """The record of a call, or why there is none; None if it is no attention."""
    if calls(node, torch._C._nn.scaled_dot_product_attention):
        return _canonical(node)
    flex = find_flex(node)
    if isinstance(flex, Flex):
        site = _checked(flex.node, flex.q, flex.k, flex.v, flex.scale)
        if isinstance(site, str):
            return site
        return replace(site, mask=flex.mask, softcap=flex.softcap)
    if flex is not None:
        return flex
    chain = find_chain(node)
    if not isinstance(chain, Chain):
        return chain
    site = _checked(chain.node, chain.q, chain.k, chain.v, chain.scale)
    if isinstance(site, str):
        return site
    return replace(
        site, mask=chain.mask, softcap=chain.softcap, sinks=chain.sinks, factors=chain.factors
    )


def _canonical(node: fx.Node) -> AttentionSite | str:
    """The record of an SDPA call, or why there is none."""
    q, k, v = (argument(node, i, name) for i, name in enumerate(("query", "key", "value")))
    mask = argument(node, 3, "attn_mask")
    dropout = argument(node, 4, "dropout_p", 0.0)
    causal = argument(node, 5, "is_causal", False)
    scale = argument(node, 6, "scale")
    if not all(isinstance(operand, fx.Node) for operand in (q, k, v)):
        return "an operand is not a tensor of the graph"
    if not isinstance(causal, bool):
        return "is_causal is not known when compiling"
    if dropout != 0.0:
        return f"dropout_p is {dropout}: training"
    if scale is None:
        q_shape = shape_of(q)
        scale = 1.0 / math.sqrt(q_shape[-1]) if q_shape and isinstance(q_shape[-1], int) else None
    site = _checked(node, q, k, v, number(scale))
    if isinstance(site, str):
        return site
    if not in_one_order(q, k, v, (node,)):
        return "queries, keys or values are not [B, heads, tokens, head_dim]"
    if mask is None:
        return replace(site, causal=causal)
    part: MaskPart | None = MaskPart(mask)
    rows, keys = shape_of(q) or (), shape_of(k) or ()
    if len(rows) == 3:
        part = mask_part(mask, (*rows[:2], keys[1]))
    if part is None:
        return OTHER_MASK
    return replace(site, mask=Mask((part,)), causal=causal)


def _checked(node: fx.Node, q: fx.Node, k: fx.Node, v: fx.Node, scale: Any) -> AttentionSite | str:
    """The record of an attention without its mask, if its shapes are those of one."""
    q_shape, lead = shape_of(q), lead_of(k)
    if q_shape is None or len(q_shape) not in (3, 4):
        return "queries are not [B, heads, tokens, head_dim]"
    if not isinstance(q_shape[-1], int):
        return "head_dim is not known when compiling"
    keys, values = walk_up(k), walk_up(v)
    k_shape, v_shape = shape_of(keys), shape_of(values)
    if lead is None or k_shape is None or v_shape is None:
        return "keys or values are not [B, heads, tokens, head_dim]"
    if len(k_shape) != 4 or len(v_shape) != 4:
        return "keys or values are not [B, heads, tokens, head_dim]"
    sizes = (lead[1], *(shape[i] for shape in (k_shape, v_shape) for i in (1, 3)))
    if not all(isinstance(size, int) for size in sizes):
        return "heads or head_dim of keys or values are not known when compiling"
    heads = (q_shape if len(q_shape) == 4 else lead)[1]
    if k_shape[1] != v_shape[1]:
        return OTHER_HEADS
    if heads % k_shape[1] or k_shape[3] != q_shape[-1]:
        return f"{heads} query heads do not go with {k_shape[1]} and {v_shape[1]} KV heads"
    if not isinstance(scale, (int, float)):
        return "the scale is not a constant"
    if len(q_shape) == 3 and not is_written(q):
        before = regrouped(q)
        joined = before is not None and not is_written(base_of(before))
        if joined and len(shape_of(before) or ()) == 4 and lies_so(before, lead):
            q = before
    return AttentionSite(node, q, keys, values, heads, None, float(scale), False)
