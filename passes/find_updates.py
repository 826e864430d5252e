"""Find the cache update behind each attention operand, by data flow.

    keys = cat([past, new], -2);  ... attention(q, keys, ...) ...;  return keys
        ->  CacheUpdate(node=keys, past=past, new=new, kind="packed" | "dense" | "empty")

``past`` is a graph input (``packed``: one of our handles; ``dense``: a plain tensor), or nothing
(``empty``: the first prefill, ``cat([tensor([]), new])`` or ``new`` itself). An update must be an
output of the graph: what a model does not store, or stores sliced (sliding windows), stays as it
is; so does what it stores both ways, unless ``past`` is packed. Vision attention has no update.

Cross-attention reads keys of another hidden state, or of other tokens, than its queries (those of
an image or of an encoder). They are stored once, ``empty``, and never grow: later graphs read one
of our handles as it is (``fixed``: ``node`` and ``past`` are the input itself).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Literal

import networkx as nx
import torch
from torch import fx

from ..cache import PackedKV
from .ancestry import as_networkx, is_projection, projected_from, weight_above
from .base import PassReport, Skip, argument, calls, output_of, same_size, shape_of, value_of
from .find_attention import AttentionSite
from .find_strays import grows
from .find_writes import base_of, is_written, written

Kind = Literal["packed", "dense", "empty", "fixed"]

NOT_STORED = "no cache: keys and values are not stored"
PREALLOCATED = (
    "preallocated cache, written in place: left dense; the model holds it whole, so that its "
    "memory does not shrink"
)
CUT = "the whole cache is not stored (sliding window): left dense"
CUT_TOO = "the last tokens of the cache are stored beside the whole (sliding window): left dense"
COPIED = "what is stored is a copy of the cache, not what attention reads: left dense"
MADE = "keys or values are made of a cache in a way that is not recognised: left dense"

_GIVEN = ("placeholder", "get_attr")
_ALLOCATES = (torch.zeros, torch.empty, torch.full, torch.ones, torch.zeros_like, torch.empty_like,
              "new_zeros", "new_empty", "new_full")  # fmt: skip
_REPEATS = ("repeat", "tile", torch.tile, "index_select", torch.index_select, "clone",
            "repeat_interleave", torch.repeat_interleave)  # fmt: skip
_COPIES = ("clone", "contiguous", "transpose", "permute", "swapaxes", "swapdims", "to", "detach")


@dataclass(frozen=True)
class CacheUpdate:
    """How one cache tensor grows in this graph.

    Attributes:
        node: the whole cache tensor after the update, an output of the graph.
        past: the input it grew from, None if it starts here.
        new: the new tokens ``[B, H, T, D]``; if it does not grow, the whole.
        kind: what ``past`` is.
        weight: the projection weight that ``new`` was made with, if it is an input: it names the
            layer across graphs.
    """

    node: fx.Node
    past: fx.Node | None
    new: fx.Node
    kind: Kind
    weight: fx.Node | None


@dataclass(frozen=True)
class CachedSite:
    """An attention site with the updates of its keys and values.

    Attributes:
        site: the attention.
        k, v: the updates.
        crosses: whether the cache starts here with other tokens than the queries, or tokens of
            another hidden state.
    """

    site: AttentionSite
    k: CacheUpdate
    v: CacheUpdate
    crosses: bool = False


def find_updates(
    graph: fx.Graph, sites: tuple[AttentionSite, ...]
) -> tuple[tuple[CachedSite, ...], PassReport]:
    """The sites whose keys and values are both a growing cache."""
    flow = as_networkx(graph)
    outputs = set(output_of(graph).all_input_nodes)
    found: list[CachedSite] = []
    skipped: list[Skip] = []
    for site in sites:
        k, v = (_update(root, site, outputs, flow) for root in (site.k, site.v))
        reason = k if isinstance(k, str) else v if isinstance(v, str) else None
        if reason in (NOT_STORED, MADE) and any(
            _is_latent(s, outputs, flow) for s in (site.k, site.v)
        ):
            reason = "keys or values are projected from the cache (latent attention): left dense"
        if reason is None:
            assert isinstance(k, CacheUpdate) and isinstance(v, CacheUpdate)
            reason = _mismatch(site, k, v, flow)
        if reason is not None:
            skipped.append(Skip(site.node.name, reason))
        else:
            assert isinstance(k, CacheUpdate) and isinstance(v, CacheUpdate)
            found.append(CachedSite(site, k, v, _crosses(site, k, flow)))
    return tuple(found), PassReport("find_updates", len(found), tuple(skipped))


def _update(
    root: fx.Node, site: AttentionSite, outputs: set[fx.Node], flow: nx.DiGraph
) -> CacheUpdate | str:
    base = base_of(root)
    sizes, q_sizes = shape_of(base) or (), shape_of(site.q) or ()
    put_together = root is base and len(sizes) == 4 and same_size(sizes[2], q_sizes[-2])
    if _is_preallocated(base, outputs) and not (put_together and base.op not in _GIVEN):
        return PREALLOCATED
    found = _growth(root, outputs, flow)
    if isinstance(found, CacheUpdate) and is_written(root):
        return "the graph writes to the grown cache in place: left dense"
    if isinstance(found, CacheUpdate) and _is_cut_too(found, outputs):
        return CUT_TOO
    return found


def _growth(root: fx.Node, outputs: set[fx.Node], flow: nx.DiGraph) -> CacheUpdate | str:
    if not calls(root, torch.cat, torch.concat):
        return _without_cat(root, outputs, flow)
    operands = argument(root, 0, "tensors")
    dim = argument(root, 1, "dim", 0)
    if dim in (-1, 3):  # new tokens, put together of a part that is turned and one that is not
        return _without_cat(root, outputs, flow)
    if dim not in (-2, 2):
        return "no cache: made by a cat of halves, not of tokens"
    if isinstance(operands, (list, tuple)) and (
        calls(operands[0], torch.cat, torch.concat) or any(grows(o, outputs) for o in operands)
    ):
        return "the cache is joined with other keys or values: left dense"
    if root not in outputs:
        return COPIED if _is_copied(root, outputs) else CUT
    if not isinstance(operands, (list, tuple)) or len(operands) != 2:
        return f"cat of {len(operands)} tensors"
    past, new = operands
    weight = weight_above(flow, new)
    value, size = value_of(past), shape_of(past)
    if size is not None and len(size) == 1 and size[0] == 0:
        return CacheUpdate(root, None, new, "empty", weight)
    if past.op != "placeholder":
        return "the past is computed in the graph"
    if isinstance(value, PackedKV):
        if value.dtype != value_of(new).dtype:
            return "the packed cache and its new tokens differ in dtype: made dense"
        return CacheUpdate(root, past, new, "packed", weight)
    past_shape, new_shape = shape_of(past), shape_of(new)
    if past_shape is None or new_shape is None or len(past_shape) != 4 or len(new_shape) != 4:
        return "the past is not [B, heads, tokens, head_dim]"
    return CacheUpdate(root, past, new, "dense", weight)


def _without_cat(root: fx.Node, outputs: set[fx.Node], flow: nx.DiGraph) -> CacheUpdate | str:
    if isinstance(value_of(root), PackedKV) and root.op == "placeholder":
        return CacheUpdate(root, root, root, "fixed", None)
    if root.op == "placeholder":
        return "keys or values are an input that this graph does not grow (cross-attention?)"
    if root in outputs:
        return CacheUpdate(root, None, root, "empty", weight_above(flow, root))
    if _is_written_elsewhere(root, outputs):
        return PREALLOCATED
    if _repeats_what_is_stored(root, outputs):
        return MADE
    return MADE if _is_made_of_a_cache(root, outputs, flow) else NOT_STORED


def _is_preallocated(base: fx.Node, outputs: set[fx.Node]) -> bool:
    """Whether a tensor that is kept is there before its tokens are, and takes them up."""
    given = base.op in _GIVEN and not isinstance(value_of(base), PackedKV)
    made = calls(base, *_ALLOCATES) and base in outputs
    return (given or made) and is_written(base)


def _is_written_elsewhere(root: fx.Node, outputs: set[fx.Node]) -> bool:
    """Whether ``root``, or a part of it, is written to a tensor that was there before."""
    stack = [root]
    while stack:
        for user in stack.pop().users:
            targets = map(base_of, written(user))
            if any(
                base is not base_of(root) and _is_preallocated(base, outputs) for base in targets
            ):
                return True
            if calls(user, operator.getitem, *_COPIES):
                stack.append(user)
    return False


def _is_copied(root: fx.Node, outputs: set[fx.Node]) -> bool:
    """Whether a copy of ``root``, turned round or not, is stored."""
    stack = [root]
    while stack:
        copies = [user for user in stack.pop().users if calls(user, *_COPIES)]
        if not outputs.isdisjoint(copies):
            return True
        stack += copies
    return False


def _is_cut_too(update: CacheUpdate, outputs: set[fx.Node]) -> bool:
    """Whether the last tokens are stored beside the whole, and may be what the next step grows.

    The whole is then kept for other layers of this step. A past that is packed was a whole.
    """
    if update.kind not in ("dense", "empty"):
        return False
    tails = [user for user in update.node.users if _is_tail(user)]
    return any(tail in outputs or _is_copied(tail, outputs) for tail in tails)


def _is_tail(node: fx.Node) -> bool:
    """Whether ``node`` is ``x[:, :, start:]`` of ``x [B, H, S, D]``."""
    index = argument(node, 1, "index") if calls(node, operator.getitem) else None
    if not isinstance(index, tuple) or not index:
        return False
    if index[0] is Ellipsis:
        index = (*[slice(None)] * (5 - len(index)), *index[1:])
    *lead, tokens = index[:3]
    others = (*lead, *index[3:])
    cut = isinstance(tokens, slice) and tokens.start is not None and tokens.stop is None
    return len(lead) == 2 and cut and all(other in (slice(None), Ellipsis) for other in others)


def _repeats_what_is_stored(root: fx.Node, outputs: set[fx.Node]) -> bool:
    """Whether ``root`` is a view of a tensor that is stored, or its heads in another order."""
    node = root
    while node not in outputs:
        above = argument(node, 0, "input")
        passed = calls(node, *_REPEATS) or base_of(node) is not node
        if not passed or not isinstance(above, fx.Node):
            return False
        node = above
    return True


def _is_made_of_a_cache(root: fx.Node, outputs: set[fx.Node], flow: nx.DiGraph) -> bool:
    """Whether a cache that grows is among what ``root`` is made of, short of any projection."""
    stack, seen = [root], {root}
    while stack:
        node = stack.pop()
        packed = node.op == "placeholder" and isinstance(value_of(node), PackedKV)
        if packed or grows(node, outputs):
            return True
        above = () if is_projection(node) else flow.predecessors(node)
        new = [n for n in above if n not in seen and isinstance(value_of(n), torch.Tensor)]
        seen.update(new)
        stack += new
    return False


def _is_latent(root: fx.Node, outputs: set[fx.Node], flow: nx.DiGraph) -> bool:
    """Whether keys or values are projected from a cache that grows."""
    return any(
        grows(above, outputs)
        for state in projected_from(flow, root, levels=1)
        for above in (state, *flow.predecessors(state))
    )


def _mismatch(site: AttentionSite, k: CacheUpdate, v: CacheUpdate, flow: nx.DiGraph) -> str | None:
    """Why keys and values of one site cannot be packed together, or None."""
    if k.kind != v.kind:
        return f"keys grow from a {k.kind} past and values from a {v.kind} one"
    k_shape, v_shape = shape_of(k.new), shape_of(v.new)
    assert k_shape is not None and v_shape is not None
    if k.kind != "fixed" and not same_size(k_shape[2], v_shape[2]):  # else attention asks for it
        return "keys and values do not grow by the same number of tokens"
    if _crosses(site, k, flow) and not all(projected_from(flow, u.new) for u in (k, v)):
        return "keys and values are other tokens than the queries, and no projection makes them"
    return None


def _crosses(site: AttentionSite, k: CacheUpdate, flow: nx.DiGraph) -> bool:
    """Whether the cache starts here with other tokens than the queries."""
    k_shape, q_shape = shape_of(k.new), shape_of(site.q)
    assert k_shape is not None and q_shape is not None
    if k.kind != "empty":
        return False
    if not same_size(k_shape[2], q_shape[-2]):
        return True
    of_k, of_q = projected_from(flow, k.new), projected_from(flow, site.q)
    return bool(of_k and of_q and not of_k & of_q)
