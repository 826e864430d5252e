from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from apack_compile import ops  # noqa: F401  (registers the operators)
from apack_compile.kernels.running_importance import (
    KEEP,
    UNKNOWN,
    of_run,
    recent_importance,
    worth,
)

from ..helpers import few

RING = 9


def by_definition(
    before: Tensor, q: Tensor, bias: Tensor, ring: Tensor, lengths: Tensor, scale: float,
    softcap: float, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """I <- a I + (1 - a) m, one query after the other, in float64; live tokens only."""
    batch, heads, queries, _ = q.shape
    live, groups = int(lengths[1]), heads // ring.shape[1]
    out = torch.zeros(batch, live, dtype=torch.float64)
    added = bias.expand(batch, heads, queries, ring.shape[2]).double()
    for b in range(batch):
        now: list[float | None] = [float(x) if x >= 0 else None for x in before[b, :live]]
        now[live - queries :] = [None] * queries
        for t in range(queries):
            mass = torch.zeros(live, dtype=torch.float64)
            for h in range(heads):
                s = ring[b, h // groups, :live].double() @ q[b, h, t].double() * scale
                if softcap:
                    s = softcap * torch.tanh(s / softcap)
                s = s + added[b, h, t, :live]
                if bool((s == -math.inf).all()) and sinks is None:
                    continue
                if sinks is not None:
                    s = torch.cat([s, sinks[h].double().view(1)])
                mass += s.softmax(0)[:live] / heads
            for token in range(live - queries + t + 1):
                old, m = now[token], float(mass[token])
                now[token] = m if old is None else KEEP * old + (1 - KEEP) * m
        out[b] = torch.tensor(now, dtype=torch.float64)
    return out


def step(
    batch: int = 2, kv: int = 2, groups: int = 2, queries: int = 1, live: int = 7,
    mask: Tensor | None = None, softcap: float = 0.0, sinks: Tensor | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """Arguments of the operator; what is behind the live slots is no number."""
    q, ring = torch.randn(batch, kv * groups, queries, 8) * 2, torch.randn(batch, kv, RING, 8)
    ring[:, :, live:] = math.nan
    before = torch.rand(batch, RING)
    lengths = torch.tensor([40, live])
    bias = torch.ops.apack.score_bias(mask, lengths, 0, RING, q.dtype)
    return before, q, bias, ring, lengths, 0.3, softcap, sinks


@given(
    batch=st.integers(1, 2), kv=st.sampled_from([1, 2]), groups=st.sampled_from([1, 3]),
    queries=st.sampled_from([1, 2, 5]), more=st.integers(0, 4),
    kind=st.sampled_from(["none", "bool", "float", "causal", "blind"]), capped=st.booleans(),
    unknown=st.floats(0, 1),
)  # fmt: skip
@few
def test_it_is_the_moving_average_of_the_weights_in_the_ring(
    batch: int, kv: int, groups: int, queries: int, more: int, kind: str, capped: bool,
    unknown: float,
) -> None:  # fmt: skip
    live = queries + more
    seen = torch.rand(batch, 1, queries, 40 + live) < 0.7
    masks: dict[str, Tensor | None] = {
        "none": None, "bool": seen, "blind": torch.zeros_like(seen),
        "float": torch.where(seen, 0.3, -math.inf),
        "causal": torch.ones(queries, 40 + live, dtype=torch.bool).tril(40 + more)[None, None],
    }  # fmt: skip
    sinks = torch.randn(kv * groups) if capped else None
    args = step(batch, kv, groups, queries, live, masks[kind], 5.0 if capped else 0.0, sinks)
    args[0][torch.rand(batch, RING) < unknown] = UNKNOWN
    got = torch.ops.apack.running_importance(*args)
    assert got.shape == (batch, RING) and got.dtype == torch.float32
    torch.testing.assert_close(got[:, :live].double(), by_definition(*args), rtol=1e-5, atol=1e-7)
    assert not got[:, live:].any()


def test_in_place_it_stays_where_it_is() -> None:
    importance, *rest = step()
    want = torch.ops.apack.running_importance(importance.clone(), *rest)
    where = importance.data_ptr()
    assert torch.ops.apack.update_importance_(importance, *rest) is None
    assert torch.equal(importance, want) and importance.data_ptr() == where


def test_several_queries_give_what_they_give_one_by_one() -> None:
    mask = torch.ones(3, 47, dtype=torch.bool).tril(44)[None, None]
    before, q, _, ring, _, scale, *_ = step(queries=3, live=7, mask=mask)
    together = torch.ops.apack.running_importance(
        before, q, torch.ops.apack.score_bias(mask, torch.tensor([40, 7]), 0, RING, q.dtype), ring,
        torch.tensor([40, 7]), scale,
    )  # fmt: skip
    for i in range(3):
        lengths = torch.tensor([40, 5 + i])
        bias = torch.ops.apack.score_bias(None, lengths, 0, RING, q.dtype)
        one = q[:, :, i : i + 1]
        before = torch.ops.apack.running_importance(before, one, bias, ring, lengths, scale)
    torch.testing.assert_close(together, before)


def test_sequences_of_a_batch_know_nothing_of_each_other() -> None:
    before, q, bias, ring, *rest = step(batch=3)
    before[1, 2] = UNKNOWN
    together = torch.ops.apack.running_importance(before, q, bias, ring, *rest)
    for row in range(3):
        mine = (t[row : row + 1] for t in (before, q))
        alone = torch.ops.apack.running_importance(*mine, bias, ring[row : row + 1], *rest)
        torch.testing.assert_close(alone[0], together[row])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_padding_has_none_and_takes_none(dtype: torch.dtype) -> None:
    """The sequence has what it has without it."""
    q, ring = torch.randn(1, 4, 1, 8, dtype=dtype), torch.randn(1, 2, RING, 8, dtype=dtype)
    before = torch.tensor([[UNKNOWN] * 3 + [0.25] * 3 + [0.0] * 3])
    lengths = torch.tensor([0, 7])
    mask = (torch.arange(7) >= 3)[None, None, None]
    bias = torch.ops.apack.score_bias(mask, lengths, 0, RING, dtype)
    got = torch.ops.apack.running_importance(before, q, bias, ring, lengths, 0.3)
    bare = torch.ops.apack.score_bias(None, torch.tensor([0, 4]), 0, RING - 3, dtype)
    alone = torch.ops.apack.running_importance(
        before[:, 3:], q, bare, ring[:, :, 3:], torch.tensor([0, 4]), 0.3
    )
    assert not got[:, :3].any()
    torch.testing.assert_close(got[:, 3:], alone)


def test_a_query_that_is_no_number_gives_nothing_to_any_token() -> None:
    before, q, *rest = step()
    q[0, 1] = math.nan
    got = torch.ops.apack.running_importance(before, q, *rest)
    torch.testing.assert_close(got[0, :6], KEEP * before[0, :6])
    assert got[0, 6] == 0 and got[1].isfinite().all() and got[1, 6] > 0


def test_a_ring_begins_with_what_the_prompt_knows() -> None:
    known = torch.tensor([[4.0, 1.0, 2.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
    like = torch.zeros(2, 1, 4, 8)
    got = recent_importance(known, like, 1, 5)
    assert got.tolist() == [[0.25, 0.5, 0.25, 0, 0], [0.0] * 5]
    assert got.dtype == torch.float32
    assert recent_importance(None, like, 1, 5).tolist() == [[UNKNOWN] * 5] * 2


def test_of_tokens_behind_a_ring() -> None:
    held = torch.tensor([[0.5, 0.1, UNKNOWN, 9.0]])
    assert of_run(None, 3, 2) is None
    got = of_run(held, 3, 2)
    assert got is not None
    torch.testing.assert_close(got, torch.tensor([[0.5, 0.1, -1, -1, -1]]))
    told = torch.tensor([[7.0, 7, 1, 1, 1, 2, 3]])
    got = of_run(held, 3, 2, told, start=2)
    kept = KEEP**2
    new = [kept * x + (1 - kept) * 0.125 for x in (0.5, 0.1)]
    assert got is not None
    torch.testing.assert_close(got, torch.tensor([[*new, 0.125, 0.25, 0.375]]))


def test_where_one_token_is_unknown_all_of_its_sequence_are_alike() -> None:
    """And in no other; padding does not count, whatever is known of it."""
    known = torch.tensor([[0.1, 0.3, UNKNOWN], [0.1, 0.3, 0.2], [UNKNOWN, 0.3, 0.2]])
    like, first = torch.zeros(3, 1, 3, 4), torch.tensor([[0], [0], [6]])
    got = worth(known, like, 5, first)
    torch.testing.assert_close(got, torch.tensor([[0, 0, 0], [0.1, 0.3, 0.2], [-1, 0.3, 0.2]]))
    assert worth(None, like, 5, first).tolist() == [[0] * 3, [0] * 3, [-1, 0, 0]]
    assert worth(known, like, 0, 0)[1].tolist() == known[1].tolist()
