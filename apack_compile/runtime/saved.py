"""What autograd keeps of the work of the last tokens: their rows, not those of the whole prompt.

    x.pow(2) of [B, S, C]     keeps x[:, -tail:]

Gradients of the rows before are 0 and stay so (``tail.py``): operators that work on every number
by itself, or on every token, then need those rows for nothing. Of a prompt of 4,096 tokens that is
15 parts of 16. Where keys and values of all tokens are read, everything is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import networkx as nx
import torch
from torch import Tensor, fx

from ..passes.ancestry import as_networkx
from ..passes.plan import PlannedSite

BY_TOKEN = frozenset({"layer_norm", "rms_norm"})
"""Functions of a token's channels, all that are not pointwise themselves."""

OTHER_NAMES = {"truediv": "div", "itruediv": "div", "iadd": "add", "imul": "mul", "isub": "sub"}
"""What ``operator`` calls some of PyTorch's functions."""


@cache
def works_by_token(name: str) -> bool:
    """Whether a function of this name, of PyTorch or its tensors, does not mix tokens."""
    packet = getattr(torch.ops.aten, OTHER_NAMES.get(name, name), None)
    if name in BY_TOKEN or not isinstance(packet, torch._ops.OpOverloadPacket):
        return name in BY_TOKEN  # what Python gives every object, such as __le__, is no operator
    overloads = [getattr(packet, overload) for overload in packet.overloads()]
    return any(torch.Tag.pointwise in overload.tags for overload in overloads)


def nodes_by_token(gm: fx.GraphModule, sites: list[PlannedSite]) -> set[fx.Node]:
    """The nodes whose saved rows of tokens before the last ones are not needed.

    Those between a cache and its attention are none of them: there all tokens count.
    """
    flow = as_networkx(gm.graph)
    between: set[fx.Node] = set()
    for site in sites:
        call = site.cached.site.node
        above = nx.ancestors(flow, call) | {call}
        for update in (site.cached.k, site.cached.v):
            between |= nx.descendants(flow, update.node) & above
    return {
        n for n in gm.graph.nodes
        if n.op in ("call_function", "call_method") and n not in between
        and works_by_token(getattr(n.target, "__name__", str(n.target)))
    }  # fmt: skip


class SavedTails:
    """Packs and unpacks what autograd saves.

    Args:
        nodes: see :func:`nodes_by_token`.
        length, tail: tokens of the prompt, and those of them that work.
        spend: told of every tensor that is kept.

    Attributes:
        node: the node that runs.
    """

    def __init__(
        self, nodes: set[fx.Node], length: int, tail: int, spend: Callable[[Tensor], Tensor]
    ) -> None:
        self.nodes = nodes
        self.length = length
        self.tail = tail
        self.spend = spend
        self.node: fx.Node | None = None

    def pack(self, tensor: Tensor) -> Any:
        """The tensor, or its last rows and the dimension they are rows of."""
        dim = self._tokens(tensor) if self.node in self.nodes else None
        if dim is None:
            return self.spend(tensor)
        return self.spend(tensor.narrow(dim, self.length - self.tail, self.tail).clone()), dim

    def unpack(self, packed: Any) -> Tensor:
        """As many rows as there were. The first ones are a copy of one that works: real numbers,
        as 0 times their derivative has to be 0."""
        if isinstance(packed, Tensor):
            return packed
        rows, dim = packed
        shape = list(rows.shape)
        shape[dim] = self.length - self.tail
        return torch.cat([rows.narrow(dim, 0, 1).expand(shape), rows], dim)

    def _tokens(self, tensor: Tensor) -> int | None:
        """The dimension of the tokens in ``[B, S, C]``, ``[B, H, S, D]`` or ``[B, S, H, D]``."""
        dims = {3: (1,), 4: (1, 2)}.get(tensor.dim(), ())
        found = [dim for dim in dims if tensor.shape[dim] == self.length]
        return found[0] if len(found) == 1 else None
