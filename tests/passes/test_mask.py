from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx

from apack_compile.passes.mask import Mask, MaskPart, mask_part, write_mask

from ..helpers import few

B, H, Q, S = 2, 3, 4, 5


def place(graph: fx.Graph, value: Tensor) -> fx.Node:
    node = graph.placeholder(f"x{len(graph.nodes)}")
    node.meta["example_value"] = value
    return node


def part(shape: tuple[int, ...], scores: tuple[int, ...]) -> MaskPart | None:
    return mask_part(place(fx.Graph(), torch.zeros(shape)), scores)


@pytest.mark.parametrize("shape", [
    (B, H, Q, S), (B, 1, Q, S), (1, H, 1, S), (H, 1, S), (Q, S), (S,), (1, 1, 1, 1),
])  # fmt: skip
def test_a_mask_of_whole_heads_stays_as_it_is(shape: tuple[int, ...]) -> None:
    found = part(shape, (B, H, Q, S))
    assert found is not None and not found.joined


@pytest.mark.parametrize(("shape", "joined"), [
    ((B * H, Q, S), True), ((B * H, 1, S), True), ((1, Q, S), False), ((Q, S), False), ((S,), False)
])  # fmt: skip
def test_a_mask_over_heads_side_by_side(shape: tuple[int, ...], joined: bool) -> None:
    found = part(shape, (B * H, Q, S))
    assert found is not None and found.joined == joined


@pytest.mark.parametrize(("shape", "scores"), [
    ((B, 1, Q, S), (B * H, Q, S)), ((H, Q, S), (B * H, Q, S)), ((B, H, Q, S), (1, H, Q, S)),
    ((Q, S), (B, H, 1, S)), ((2, B, H, Q, S), (B, H, Q, S)), ((S - 1,), (B, H, Q, S)),
])  # fmt: skip
def test_a_mask_that_makes_the_scores_larger_does_not_fit(
    shape: tuple[int, ...], scores: tuple[int, ...]
) -> None:
    assert part(shape, scores) is None


KINDS = st.tuples(
    st.sampled_from(["adds", "shows", "hides"]),
    st.sampled_from([(B * H, Q, S), (B * H, 1, S), (B, 1, Q, S), (1, H, 1, S), (Q, S)]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.sampled_from([1.0, 0.5, -2.0]),
)


@few
@given(st.lists(KINDS, min_size=1, max_size=4))
def test_parts_are_laid_over_the_scores_one_after_another(
    kinds: list[tuple[str, tuple[int, ...], torch.dtype, float]],
) -> None:
    graph, parts, values = fx.Graph(), [], []
    want = torch.zeros(B, H, Q, S, dtype=torch.float64)
    hidden = torch.zeros(B, H, Q, S, dtype=torch.bool)
    for kind, shape, dtype, factor in kinds:
        joined = shape[0] == B * H
        value = torch.randn(shape).to(dtype) if kind == "adds" else torch.rand(shape) < 0.5
        node = place(graph, value)
        values.append(value)
        factor = factor if kind == "adds" else 1.0
        parts.append(MaskPart(node, kind == "hides", factor=factor, joined=joined))
        whole = value.view(B, H, *shape[1:]) if joined else value
        if kind == "adds":
            want = want + whole.double() * factor
        else:
            hidden = hidden | (whole if kind == "hides" else ~whole)
    nodes = {node: node for node in graph.nodes}
    graph.output(write_mask(graph, Mask(tuple(parts)), nodes, H))
    got = fx.GraphModule(torch.nn.Module(), graph)(*values)
    if got.dtype == torch.bool:
        assert torch.equal(got.expand(B, H, Q, S), ~hidden)
    else:
        assert got.dtype in (torch.float32, torch.float64)
        want = want.masked_fill(hidden, float("-inf"))
        torch.testing.assert_close(got.expand(B, H, Q, S).double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("more", ["", "adds", "seen"])
def test_a_query_that_sees_none_of_faint_tokens_looks_at_all_alike(more: str) -> None:
    """Bug: it looked at nothing; masked_fill with a finite number leaves it the mean of all."""
    graph = fx.Graph()
    values = [torch.rand(Q, S) < 0.5]
    values[0][0] = False
    parts = [MaskPart(place(graph, values[0]), faint=True)]
    if more == "adds":
        values.append(torch.randn(S))
        parts.append(MaskPart(place(graph, values[1])))
    if more == "seen":
        values.append(torch.arange(S) > 0)
        parts.append(MaskPart(place(graph, values[1])))
    nodes = {node: node for node in graph.nodes}
    graph.output(write_mask(graph, Mask(tuple(parts)), nodes, H))
    got = fx.GraphModule(torch.nn.Module(), graph)(*values)
    weights = (torch.randn(B, H, Q, S) * 3 + got).softmax(-1)
    live = S - (more == "seen")
    torch.testing.assert_close(weights[:, :, 0, -live:], torch.full((B, H, live), 1 / live))
    assert not weights[:, :, 1:][~values[0][1:].expand(B, H, -1, -1)].any()


def test_scaling_turns_no_hidden_token_into_a_seen_one() -> None:
    graph = fx.Graph()
    bias = MaskPart(place(graph, torch.zeros(S)), factor=3.0)
    shown = MaskPart(place(graph, torch.ones(S, dtype=torch.bool)))
    assert Mask((bias, shown)).scaled(-1.0) is None
    halved = Mask((bias, shown)).scaled(0.5)
    assert halved is not None and [p.factor for p in halved.parts] == [1.5, 1.0]
    turned = Mask((bias,)).scaled(-1.0)
    assert turned is not None and [p.factor for p in turned.parts] == [-3.0]
