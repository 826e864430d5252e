from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from apack_compile.passes.find_attention import OTHER_HEADS, AttentionSite, find_attention

from .capture import capture, repeat_kv, tokens

sdpa = F.scaled_dot_product_attention
Attend = Callable[..., Tensor]


def inputs(query_heads: int = 4) -> tuple[Tensor, ...]:
    mask = torch.ones(2, 1, 3, 10, dtype=torch.bool)
    return tokens(3, query_heads), tokens(10), tokens(10), mask


def only_site(attend: Attend, query_heads: int = 4) -> AttentionSite:
    sites, report = find_attention(capture(attend, *inputs(query_heads)).graph)
    assert (report.name, report.matched, report.skipped) == ("find_attention", 1, ())
    assert len(sites) == 1
    return sites[0]


FORMS: dict[str, tuple[Attend, bool, float | None, bool]] = {
    "shortest": (lambda q, k, v, m: sdpa(q, k, v), False, None, False),
    "positional mask": (lambda q, k, v, m: sdpa(q, k, v, m), True, None, False),
    "all positional": (lambda q, k, v, m: sdpa(q, k, v, m, 0.0, False), True, None, False),
    "positional causal": (lambda q, k, v, m: sdpa(q, k, v, None, 0.0, True), False, None, True),
    "named mask": (lambda q, k, v, m: sdpa(q, k, v, attn_mask=m, dropout_p=0.0), True, None, False),
    "named causal": (lambda q, k, v, m: sdpa(q, k, v, is_causal=True), False, None, True),
    "named scale": (lambda q, k, v, m: sdpa(q, k, v, m, scale=0.25), True, 0.25, False),
    "all named": (
        lambda q, k, v, m: sdpa(value=v, key=k, query=q, attn_mask=m, scale=2, is_causal=False),
        True, 2.0, False,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("attend", "masked", "scale", "causal"), FORMS.values(), ids=FORMS)
def test_arguments_are_found_wherever_they_stand(
    attend: Attend, masked: bool, scale: float | None, causal: bool
) -> None:
    site = only_site(attend, query_heads=2)
    assert [n.meta["example_value"].shape[2] for n in (site.q, site.k, site.v)] == [3, 10, 10]
    assert site.k is not site.v
    assert (site.mask is not None) == masked
    if site.mask is not None:
        (part,) = site.mask.parts
        assert part.node.meta["example_value"].dtype == torch.bool
    assert site.scale == (1 / math.sqrt(8) if scale is None else scale)
    assert site.causal == causal


REPEATS: dict[str, Callable[[Tensor], Tensor]] = {
    "repeat_kv": repeat_kv,
    "short index": lambda x: x[:, :, None].expand(2, 2, 2, 10, 8).reshape(2, 4, 10, 8),
    "ellipsis": lambda x: x[:, :, None, ...].expand(-1, -1, 2, -1, -1).reshape(2, 4, 10, 8),
    "reshape, function": lambda x: torch.reshape(
        x[:, :, None].expand(2, 2, 2, 10, 8), (2, 4, 10, 8)
    ),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 1),
    "repeat_interleave, named": lambda x: x.repeat_interleave(repeats=2, dim=-3),
    "repeat_interleave, function": lambda x: torch.repeat_interleave(x, 2, dim=1),
    "reshape, all named": lambda x: torch.reshape(
        input=x[:, :, None].expand(2, 2, 2, 10, 8), shape=(2, 4, 10, 8)
    ),
    # Bug: named arguments stopped the compilation with an IndexError.
    "repeat_interleave, all named": lambda x: torch.repeat_interleave(input=x, repeats=2, dim=1),
    "cast and back": lambda x: repeat_kv(x.double()).to(torch.float32),
    "contiguous": lambda x: repeat_kv(x).contiguous(),
    "type_as": lambda x: repeat_kv(x.half().type_as(x)),
}


@pytest.mark.parametrize("repeat", REPEATS.values(), ids=REPEATS)
def test_keys_and_values_are_found_behind_repeats_and_casts(
    repeat: Callable[[Tensor], Tensor],
) -> None:
    site = only_site(lambda q, k, v, m: sdpa(q, repeat(k), repeat(v), m))
    assert (site.k.op, site.v.op) == ("placeholder", "placeholder")
    assert site.k.meta["example_value"].shape == (2, 2, 10, 8)


def test_grouped_query_attention_by_flag() -> None:
    site = only_site(lambda q, k, v, m: sdpa(q, k, v, m, enable_gqa=True))
    assert (site.k.op, site.v.op) == ("placeholder", "placeholder")


NO_REPEATS: dict[str, Callable[[Tensor], Tensor]] = {
    "tiled by repeat": lambda x: x.repeat(1, 2, 1, 1),
    "tiled by expand": lambda x: x[:, None].expand(2, 2, 2, 10, 8).reshape(2, 4, 10, 8),
    "tokens repeated": lambda x: x[:, :, :5].repeat_interleave(2, 2).repeat_interleave(2, 1),
    "something computed": lambda x: repeat_kv(x) * 2,
    "cut": lambda x: repeat_kv(x)[:, :, 1:],
}


@pytest.mark.parametrize("change", NO_REPEATS.values(), ids=NO_REPEATS)
def test_what_is_no_repeat_of_heads_ends_the_walk(change: Callable[[Tensor], Tensor]) -> None:
    site = only_site(lambda q, k, v, m: sdpa(q, change(k), change(v)))
    assert site.k.op != "placeholder"
    assert site.v.op != "placeholder"


SKIPPED: dict[str, tuple[Attend, str]] = {
    "dropout": (lambda q, k, v, m: sdpa(q, k, v, dropout_p=0.1), "dropout_p is 0.1: training"),
    "dropout, positional": (
        lambda q, k, v, m: sdpa(q, k, v, None, 0.5), "dropout_p is 0.5: training"
    ),
    "three dimensions": (
        lambda q, k, v, m: sdpa(q[:, 0], k[:, 0], v[:, 0]),
        "keys or values are not [B, heads, tokens, head_dim]",
    ),
    "keys of three dimensions": (
        lambda q, k, v, m: sdpa(q, k[0], v[0]),
        "keys or values are not [B, heads, tokens, head_dim]",
    ),
    "other heads for values": (lambda q, k, v, m: sdpa(q, k, v[:, :1]), OTHER_HEADS),
    # Bug: the reason was that query heads do not go with KV heads, though they do.
    "keys that are changed once repeated": (
        lambda q, k, v, m: sdpa(
            q, k[:, :1].repeat_interleave(2, 1) * 2, v[:, :1].repeat(1, 2, 1, 1)
        ),
        OTHER_HEADS,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("attend", "reason"), SKIPPED.values(), ids=SKIPPED)
def test_what_is_not_understood_is_left_alone_with_a_reason(attend: Attend, reason: str) -> None:
    graph = capture(attend, *inputs(query_heads=2)).graph
    sites, report = find_attention(graph)
    assert sites == ()
    assert report.matched == 0
    assert [skip.reason for skip in report.skipped] == [reason]
    node = next(n for n in graph.nodes if n.name == report.skipped[0].where)
    assert node.target is torch._C._nn.scaled_dot_product_attention


def test_sites_are_in_order_and_a_graph_without_attention_has_none() -> None:
    def twice(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Any:
        return sdpa(sdpa(q, k, v, scale=1.0), k, v, scale=2.0)

    sites, _ = find_attention(capture(twice, *inputs(2)).graph)
    assert [site.scale for site in sites] == [1.0, 2.0]
    none, report = find_attention(capture(lambda x: x + 1, torch.ones(3)).graph)
    assert (none, report.matched, report.skipped) == ((), 0, ())
