"""One ``score_bias`` for all layers.

    o1 = attend(q1, mask, ...)          bias = score_bias(mask, lengths, capacity, ring, dtype)
    o2 = attend(q2, mask, ...)    ->    o1 = attend_with_bias(q1, bias, ...)
                                        o2 = attend_with_bias(q2, bias, ...)

Layers share it if they have the same mask, lengths and numbers of slots. It is the plain function,
not the operator, so that Inductor fuses it with what makes the mask. Attention without a mask is
left as it is: kernels then know what is live from the lengths alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..codec import parse_layout
from ..kernels.score_bias import score_bias


def share_bias(graph: fx.Graph, values: dict[fx.Node, Any]) -> int:
    """Rewrite every masked ``apack::attend``.

    Args:
        graph: rewritten in place.
        values: of its nodes; those of new nodes are added.

    Returns:
        The number of ``score_bias`` nodes made.
    """
    made: dict[Any, fx.Node] = {}
    for node in graph.find_nodes(op="call_function", target=torch.ops.apack.attend.default):
        q, mask, k, v, lengths, *rest = node.args
        if mask is None:
            continue
        payload, ring = k[0], k[len(parse_layout(rest[1]).payload_fields(torch.float32)) + 2]
        slots = values[payload].shape[1], int(values[ring].shape[2])
        dtype = values[q].dtype
        key = (mask, lengths, str(slots[0]), slots[1], dtype)
        if key not in made:
            with graph.inserting_before(node):
                capacity = graph.call_function(torch.ops.aten.sym_size.int, (payload, 1))
                made[key] = graph.call_function(
                    score_bias, (mask, lengths, capacity, slots[1], dtype)
                )
            values[capacity] = slots[0]
            with values[q].fake_mode:
                values[made[key]] = score_bias(values[mask], values[lengths], *slots, dtype)
        node.target = torch.ops.apack.attend_with_bias.default
        node.args = (q, made[key], k, v, lengths, *rest)
    graph.lint()
    return len(made)
