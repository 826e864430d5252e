from __future__ import annotations

from collections import Counter
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx

from .capture import capture, grown, packed, rewrite, tokens

sdpa = F.scaled_dot_product_attention


def decode(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor) -> Any:
    keys, values = grown(pk, pv, k, v)
    return sdpa(q, keys, values), keys, values


def test_the_dynamo_graph_is_not_changed() -> None:
    captured = capture(decode, *[tokens(1)] * 3, packed(30), packed(30))
    before = captured.gm.code
    nodes = Counter(n.op for n in captured.graph.nodes)
    rewrite(captured)
    captured.gm.recompile()
    assert captured.gm.code == before
    assert Counter(n.op for n in captured.graph.nodes) == nodes


def test_new_graphs_are_sound_and_have_no_packed_input() -> None:
    captured = capture(decode, *[tokens(1)] * 3, packed(30), packed(30))
    new = rewrite(captured)
    new.gm.graph.lint()
    inputs = [n for n in new.gm.graph.nodes if n.op == "placeholder"]
    assert len(inputs) == len(new.interface.slots)
    assert len(set(new.interface.slots)) == len(inputs)
    tables = {table for table, _ in new.interface.slots}
    assert tables == {0, 1, 3, 4}, "2: tokens by kind, for prompts"
    assert all(isinstance(n, fx.Node) for n in inputs)
