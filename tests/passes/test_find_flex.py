from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.nn.attention.flex_attention import (
    BlockMask,
    create_block_mask,
    flex_attention,
)
from torch.nn.functional import scaled_dot_product_attention

from apack_compile.passes.find_attention import AttentionSite, find_attention
from apack_compile.passes.flex_mask import Blocks, FlexMask, write_mask

from ..helpers import few
from .capture import (
    CLOSE,
    AppendedOutput,
    EncodedOutput,
    PlainOutput,
    capture,
    check,
    grown,
    ours,
    packed,
    repeat_kv,
    rewrite,
    run,
    tokens,
)

QUERIES, KEYS = 3, 10
NONE = -float("inf")

Mod = Callable[..., Tensor]


def inputs(query_heads: int = 4) -> tuple[Tensor, ...]:
    return tokens(QUERIES, query_heads), tokens(KEYS), tokens(KEYS, dim=12)


def only_site(attend: Callable[..., Any], *args: Any) -> AttentionSite:
    sites, report = find_attention(capture(attend, *args).graph)
    assert (report.name, report.matched, report.skipped) == ("find_attention", 1, ())
    return sites[0]


def reasons(attend: Callable[..., Any], *args: Any) -> list[str]:
    sites, report = find_attention(capture(attend, *args).graph)
    assert (sites, report.matched) == ((), 0)
    return [skip.reason for skip in report.skipped]


def scored(score_mod: Mod, *captured: Tensor) -> AttentionSite:
    """The site of a call with this score_mod."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Any:
        def mod(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score_mod(s, b, h, i, j, *more)

        return flex_attention(q, k, v, score_mod=mod, enable_gqa=True)

    return only_site(attend, *inputs(), *captured)


def test_a_plain_call_is_a_site_without_a_mask() -> None:
    site = only_site(lambda q, k, v: flex_attention(q, k, v, enable_gqa=True), *inputs())
    shapes = [n.meta["example_value"].shape for n in (site.q, site.k, site.v, site.node)]
    assert shapes == [(2, 4, 3, 8), (2, 2, 10, 8), (2, 2, 10, 12), (2, 4, 3, 12)]
    assert (site.mask, site.causal, site.softcap, site.scale) == (
        None,
        False,
        0.0,
        1 / math.sqrt(8),
    )


def test_keys_are_found_behind_repeats() -> None:
    site = only_site(
        lambda q, k, v: flex_attention(q, repeat_kv(k), repeat_kv(v), scale=0.5), *inputs()
    )
    assert (site.k.op, site.v.op, site.scale) == ("placeholder", "placeholder", 0.5)


@pytest.mark.parametrize(
    ("mod", "scale", "cap"),
    [
        (lambda s, b, h, i, j: 2.0 * torch.tanh(s / 2.0), 1.0, 2.0),
        (lambda s, b, h, i, j: (s * 0.25).tanh() * 3, 0.75, 3.0),
        (lambda s, b, h, i, j: torch.tanh(s / 2) * -2, -1.0, 2.0),
        (lambda s, b, h, i, j: (s * 4).float() / 2, 2.0, 0.0),
    ],
)
def test_scores_are_scaled_and_capped(mod: Mod, scale: float, cap: float) -> None:
    site = scored(mod)
    assert (site.mask, site.softcap) == (None, cap)
    assert site.scale == pytest.approx(scale * 8**-0.5)


def test_calls_that_mean_the_same_have_equal_masks() -> None:
    def twice(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Any:
        def mod(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return s + slopes[h] * (j - i)

        def other(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return s + slopes[h] * (j - i) * 1.0

        outs = [flex_attention(q, k, v, score_mod=m, enable_gqa=True) for m in (mod, mod, other)]
        return outs[0] + outs[1] + outs[2]

    sites, _ = find_attention(capture(twice, *inputs(), torch.rand(4)).graph)
    masks = [site.mask for site in sites]
    assert all(isinstance(mask, FlexMask) for mask in masks)
    assert masks[0] == masks[1] != masks[2]


def test_constants_of_other_types_are_other_masks() -> None:
    """Bug: 1, 1.0 and True are equal in Python, and mean other dtypes in a mod."""
    one = scored(lambda s, b, h, i, j: s + i * 1).mask
    other = scored(lambda s, b, h, i, j: s + i * 1.0).mask
    assert isinstance(one, FlexMask) and isinstance(other, FlexMask)
    assert one.steps != other.steps


REFUSED: dict[str, tuple[Mod, str]] = {
    "squared": (lambda s, b, h, i, j, t: s * s, "scores are multiplied by what is no constant"),
    "by head": (lambda s, b, h, i, j, t: s * h, "scores are multiplied by what is no constant"),
    "relu": (lambda s, b, h, i, j, t: torch.relu(s), "relu of scores is not known"),
    "from it": (lambda s, b, h, i, j, t: 1 - s, "sub of scores is not known"),
    "not the score": (
        lambda s, b, h, i, j, t: (i - j) * 1.0, "its result does not come from the score"
    ),
    "hidden by score": (
        lambda s, b, h, i, j, t: torch.where(s > 0, s, NONE), "gt of scores is not known"
    ),
    "replaced": (
        lambda s, b, h, i, j, t: torch.where(i >= j, s, 0.0),
        "other numbers are put in the place of scores",
    ),
    "capped behind": (
        lambda s, b, h, i, j, t: torch.tanh(s + i), "what is capped are no plain scores"
    ),
    "scaled behind": (
        lambda s, b, h, i, j, t: (s + i) * 2,
        "what is added to scores is multiplied with them",
    ),
    "table as a whole": (
        lambda s, b, h, i, j, t: s + t.sum(), "sum of a captured tensor as a whole"
    ),
    "row of a table": (
        lambda s, b, h, i, j, t: s + t[h].amax(), "amax of a captured tensor as a whole"
    ),
    "divided": (
        lambda s, b, h, i, j, t: s + i // (j + 1),
        "a division is rounded by what is no integer",
    ),
    "unknown": (lambda s, b, h, i, j, t: s + torch.erf(i * 1.0), "erf is not known there"),
    "slice": (
        lambda s, b, h, i, j, t: s + t[0:2][0][h],
        "a captured tensor is looked up at more than one place",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("mod", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_score_mod_that_is_not_understood_is_left_dense(mod: Mod, reason: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Any:
        def score_mod(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return mod(s, b, h, i, j, table)

        return flex_attention(q, k, v, score_mod=score_mod, enable_gqa=True)

    found = reasons(attend, *inputs(), torch.randn(4, 4))
    assert found == [f"flex_attention: score_mod: {reason}: left dense"]


def hop(graph: fx.Graph) -> fx.Node:
    return next(n for n in graph.nodes if getattr(n.target, "__name__", "") == "flex_attention")


def test_more_results_than_the_output_are_left_dense() -> None:
    """On a CPU flex_attention gives no lse, so a graph is changed to use it."""
    gm = capture(lambda q, k, v: flex_attention(q, k, v, enable_gqa=True), *inputs()).gm
    node = hop(gm.graph)
    with gm.graph.inserting_after(node):
        lse = gm.graph.call_function(operator.getitem, (node, 1))
    with gm.graph.inserting_after(lse):
        gm.graph.call_function(torch.neg, (lse,))
    sites, report = find_attention(gm.graph)
    assert sites == ()
    assert [skip.reason for skip in report.skipped] == [
        "flex_attention: more than its output is used (lse): left dense"
    ]


# The rewritten graph -----------------------------------------------------------------------------

BLOCK = 16
"""Small, so that some blocks are full, some partial, and some are left out."""


def step(score_mod: Mod | None = None, mask_mod: Mod | None = None) -> Callable[..., Any]:
    """A step on a cache; mods also take the position of the first query, and a table."""

    def attend(
        q: Tensor, past_k: Tensor, past_v: Tensor, k: Tensor, v: Tensor, table: Tensor
    ) -> Any:
        keys, values = grown(past_k, past_v, k, v)
        first, length = keys.shape[2] - q.shape[2], keys.shape[2]
        mod = block_mask = None
        if score_mod is not None:

            def mod(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                return score_mod(s, b, h, i + first, j, table)

        if mask_mod is not None:

            def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                return mask_mod(b, h, i + first, j, table)

            block_mask = create_block_mask(
                seen, 2, 4, q.shape[2], length, device="cpu", BLOCK_SIZE=BLOCK
            )
        out = flex_attention(q, keys, values, mod, block_mask, enable_gqa=True)
        return out, keys, values

    return attend


def arguments(past: Callable[[int], Tensor], new: int) -> tuple[Tensor, ...]:
    return tokens(new, 4), past(40), past(40), tokens(new), tokens(new), torch.randn(2, 4, 60, 60)


def alibi(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor, table: Tensor) -> Tensor:
    return s + table[0, 0, 0, h] * (j - i)


def padded(b: Tensor, h: Tensor, i: Tensor, j: Tensor, table: Tensor) -> Tensor:
    return (i >= j) & (j >= b * 20) & (table[b][h][-1, j] > -1)


MODS: dict[str, tuple[Mod | None, Mod | None]] = {
    "none": (None, None),
    "causal and padded": (None, padded),
    "softcap and mask": (lambda s, b, h, i, j, t: 2 * torch.tanh(s / 2), padded),
    "bias and mask": (alibi, padded),
    "bias of integers": (lambda s, b, h, i, j, t: s - 1 + (j - i) // 4, None),
    "bias and cap": (lambda s, b, h, i, j, t: torch.tanh(s) * 3 + t[b, h, i, j] + t[b][1][2][j],
                     None),
    "hidden by where": (lambda s, b, h, i, j, t: torch.where(i < j, NONE, s) + h * 0.5, padded),
}  # fmt: skip


@pytest.mark.parametrize(("score_mod", "mask_mod"), MODS.values(), ids=MODS)
def test_a_step_on_codes_gives_what_flex_attention_gives(
    score_mod: Mod | None, mask_mod: Mod | None
) -> None:
    captured = capture(step(score_mod, mask_mod), *arguments(packed, 3))
    assert (captured.treatments, captured.reasons) == (["attend"], [])
    new = check(captured, [PlainOutput, AppendedOutput, AppendedOutput])
    assert ours(new) == {"apack::append_": 2, "apack::attend": 1}
    assert "flex_attention" not in new.calls


def test_a_prefill_runs_flex_attention_and_packs() -> None:
    captured = capture(step(alibi, padded), *arguments(tokens, 3))
    new = check(captured, [PlainOutput, EncodedOutput, EncodedOutput])
    assert ours(new) == {"apack::encode": 2, "apack::visible": 1}
    assert new.calls["flex_attention"] == 1


@pytest.mark.parametrize("changed", [False, True])
def test_a_captured_tensor_that_changes_makes_a_mask_each_time(changed: bool) -> None:
    """Bug: the second of two calls was given the mask of the first."""

    def fn(q: Tensor, pk: Tensor, pv: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Any:
        keys, values = grown(pk, pv, k, v)
        table = table + 0

        def mod(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return s + table[b, h, i, j]

        one = flex_attention(q, keys, values, mod, enable_gqa=True)
        if changed:
            table.mul_(-3)
        return one, flex_attention(q, keys, values, mod, enable_gqa=True), keys, values

    captured = capture(fn, *arguments(packed, 3))
    assert captured.treatments == ["attend", "attend"]
    new = check(captured, [PlainOutput, PlainOutput, AppendedOutput, AppendedOutput])
    assert new.calls["aten::index.Tensor"] == (2 if changed else 1)


def by_hand(
    q: Tensor, past_k: Tensor, past_v: Tensor, k: Tensor, v: Tensor, *blocks: Tensor
) -> Any:
    """A step with a BlockMask that says other than its mask_mod: of even keys."""
    keys, values = grown(past_k, past_v, k, v)
    lengths = q.shape[2], keys.shape[2]

    def even(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j % 2 == 0

    mask = BlockMask.from_kv_blocks(*blocks, BLOCK_SIZE=BLOCK, mask_mod=even, seq_lengths=lengths)
    return flex_attention(q, keys, values, block_mask=mask, enable_gqa=True), keys, values


def test_blocks_count_where_a_block_mask_is_made_by_hand() -> None:
    """Without Inductor flex_attention itself asks its mask_mod alone, so scores are masked here."""
    q, past_k, past_v, k, v, _ = arguments(packed, 3)
    count = torch.tensor([1], dtype=torch.int32).view(1, 1, 1)
    partial, full = (
        torch.tensor(c, dtype=torch.int32).view(1, 1, 1, 3) for c in ([1, 0, 2], [2, 1, 0])
    )
    captured = capture(by_hand, q, past_k, past_v, k, v, count, partial, count, full)
    assert captured.treatments == ["attend"]
    out = run(captured, rewrite(captured))[0][0]
    j = torch.arange(43)
    seen = ((j // BLOCK == 1) & (j % 2 == 0)) | (j // BLOCK == 2)
    keys, values = (torch.cat([p.unpack()[:, :, :40], x], 2) for p, x in ((past_k, k), (past_v, v)))
    wanted = scaled_dot_product_attention(q, keys, values, seen.expand(3, 43), enable_gqa=True)
    torch.testing.assert_close(out, wanted, **CLOSE)


@few
@given(
    rows=st.integers(1, 3), columns=st.integers(1, 4), size=st.sampled_from([1, 4, 7]),
    spare=st.integers(0, 3), seed=st.integers(0, 99),
)  # fmt: skip
def test_lists_of_blocks_become_a_mask(
    rows: int, columns: int, size: int, spare: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    queries, keys = max(rows * size - spare % size, 1), max(columns * size - spare % size, 1)
    present = torch.rand(2, 1, rows, columns, generator=generator) < 0.5
    counts = present.sum(-1, dtype=torch.int32)
    listed = present.int().argsort(stable=True, dim=-1, descending=True).int()

    graph = fx.Graph()
    q, one, two, numbers = (graph.placeholder(name) for name in ("q", "counts", "listed", "keys"))
    q.meta["example_value"] = torch.empty(2, 4, queries, 8)
    mask = FlexMask((), None, None, None, Blocks((one, two), None, (size, size)), ())
    graph.output(write_mask(graph, mask, q, numbers, lambda node: node))
    made = fx.GraphModule({}, graph)(q.meta["example_value"], counts, listed, torch.arange(keys))
    wanted = present.repeat_interleave(size, 2).repeat_interleave(size, 3)
    assert torch.equal(made, wanted[:, :, :queries, :keys])
