from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from .capture import CLOSE, capture, packed, repeat_kv, rewrite, run, tokens

B, H, Q, S, D = 2, 4, 3, 33, 8
LOWEST = torch.finfo(torch.float32).min
OTHER = "attention written out over other than [B, heads, queries, keys]: left dense"

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def flat(x: Tensor) -> Tensor:
    return x.reshape(B * H, -1, D)


def products(q: Tensor, k: Tensor) -> Tensor:
    return torch.bmm(flat(q), flat(k).transpose(1, 2))


def bloom(q: Tensor, k: Tensor, v: Tensor, m: Tensor, a: Tensor, beta: float = 1.0) -> Tensor:
    q, k, v = flat(q), flat(k).transpose(-1, -2), flat(v)
    scores = a.baddbmm(batch1=q, batch2=k, beta=beta, alpha=0.3).view(B, H, Q, -1)
    weights = F.softmax(scores + m, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.bmm(weights.view(B * H, Q, -1), v)


def bart(q: Tensor, k: Tensor, v: Tensor, m: Tensor, a: Tensor) -> Tensor:
    scores = (products(q, k).view(B, H, Q, S) + m).view(B * H, Q, S)
    weights = F.dropout(F.softmax(scores, dim=-1), p=0.0, training=False)
    return torch.bmm(weights, flat(v)).view(B, H, Q, D)


def wide(m: Tensor) -> Tensor:
    return m.expand(B, H, Q, S).reshape(B * H, Q, S)


# From q [B, H, Q, D], k and v [B, H, S, D], a mask [B, 1, Q, S] and biases [B * H, 1, S] to
# outputs of any shape; the scale; factor, and whether heads are joined, of each part of the mask.
FORMS: dict[str, tuple[Attend, float, list[tuple[float, bool]]]] = {
    "as bloom": (bloom, 0.3, [(1, True), (1, False)]),
    "a bias that is scaled": (
        lambda q, k, v, m, a: bloom(q, k, v, m, a, beta=-0.5), 0.3, [(-0.5, True), (1, False)]),
    "an input that does not count": (
        lambda q, k, v, m, a: torch.bmm((torch.baddbmm(
            torch.empty(B * H, Q, S), flat(q), flat(k).mT, beta=0, alpha=0.5) + wide(m)
        ).softmax(2), flat(v)), 0.5, [(1, True)]),
    "an input of zeros": (
        lambda q, k, v, m, a: torch.bmm(torch.baddbmm(
            torch.zeros(B * H, Q, S), flat(q), flat(k).mT, alpha=0.5).softmax(-1), flat(v)),
        0.5, []),
    "as bart was": (bart, 1.0, [(1, False)]),
    "queries scaled side by side": (
        lambda q, k, v, m, a: (
            (flat(q) * 0.5) @ flat(k).permute(0, 2, 1) + a + m[0]).softmax(-1) @ flat(v),
        1.0, [(1, True), (1, False)]),
    "keys turned before": (
        lambda q, k, v, m, a: torch.bmm(torch.bmm(
            q.flatten(0, 1), k.transpose(2, 3).flatten(0, 1)).softmax(-1), v.flatten(0, 1)
        ).unflatten(0, (B, H)), 1.0, []),
    "hidden side by side": (
        lambda q, k, v, m, a: torch.bmm(
            products(q, k).masked_fill(wide(m) < 0, LOWEST).softmax(-1), flat(v)),
        1.0, [(1, True)]),
    "einsum": (
        lambda q, k, v, m, a: torch.einsum("nqk,nkd->nqd", torch.einsum(
            "nqd,nkd->nqk", flat(q), flat(k)).mul(0.5).add(a).softmax(-1), flat(v)),
        0.5, [(1, True)]),
    "side by side from the softmax on": (
        lambda q, k, v, m, a: torch.bmm(flat_weights(
            (q @ k.transpose(2, 3) + m).softmax(-1)), flat(v)), 1.0, [(1, False)]),
    "sdpa": (
        lambda q, k, v, m, a: F.scaled_dot_product_attention(
            flat(q), flat(k), flat(v), attn_mask=wide(m), scale=0.5), 0.5, [(1, True)]),
}  # fmt: skip


def flat_weights(p: Tensor) -> Tensor:
    return p.reshape(B * H, Q, S)


def decode(attend: Attend, repeat: Callable[[Tensor], Tensor] = repeat_kv) -> Callable[..., Any]:
    def fn(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, m: Tensor, a: Tensor) -> Any:
        keys, values = torch.cat([pk, k], 2), torch.cat([pv, v], 2)
        return attend(q, repeat(keys), repeat(values), m, a), keys, values

    return fn


def given(heads: int = 2) -> tuple[Tensor, ...]:
    mask = torch.where(torch.rand(B, 1, Q, S) < 0.8, 0.0, LOWEST)
    mask[..., -1] = 0.0
    past = S - Q
    new = (tokens(Q, H), tokens(Q, heads), tokens(Q, heads))
    return *new, packed(past, heads), packed(past, heads), mask, torch.randn(B * H, 1, S)


@pytest.mark.parametrize("form", FORMS)
def test_heads_side_by_side_are_attended_on_codes(form: str) -> None:
    attend, scale, parts = FORMS[form]
    captured = capture(decode(attend), *given())
    assert (captured.treatments, captured.reasons) == (["attend"], [])
    site = captured.plan.sites[0].cached.site
    assert (site.scale, site.heads) == (scale, H)
    found = () if site.mask is None else site.mask.parts
    assert [(part.factor, part.joined) for part in found] == parts
    new = rewrite(captured)
    want = captured.expected()[0]
    (got, *_), _ = run(captured, new)
    torch.testing.assert_close(got, want, **CLOSE)
    assert got.shape == want.shape
    left = {"softmax", "bmm", "baddbmm", "matmul", "einsum", "unpack", "cat"} & set(new.calls)
    assert not left, "what was written out is gone"


@pytest.mark.parametrize("form", ["as bloom", "queries scaled side by side"])
def test_a_prefill_with_heads_side_by_side_leaves_its_cache_packed(form: str) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, m: Tensor, a: Tensor) -> Any:
        k, v = k * 1, v * 1
        return FORMS[form][0](q, repeat_kv(k), repeat_kv(v), m, a), k, v

    mask = torch.zeros(B, 1, Q, Q)
    mask[1, :, :, :1] = LOWEST
    captured = capture(fn, tokens(Q, H), tokens(Q), tokens(Q), mask, torch.randn(B * H, 1, Q))
    assert captured.treatments == ["encode"]
    results, _ = run(captured, rewrite(captured))
    torch.testing.assert_close(results[0], captured.expected()[0], **CLOSE)


# From [B, 2, S, D] to [B * H, S, D], each head twice in a row.
REPEATED: dict[str, Callable[[Tensor], Tensor]] = {
    "interleaved": lambda x: x.reshape(B * 2, S, D).repeat_interleave(2, 0),
    "interleaved, dim from behind": lambda x: x.flatten(0, 1).repeat_interleave(2, dim=-3),
    "expanded": lambda x: x.reshape(B * 2, S, D)[:, None].expand(-1, 2, -1, -1).reshape(-1, S, D),
    "expanded by unsqueeze": lambda x: (
        x.flatten(0, 1).unsqueeze(1).expand(B * 2, 2, S, D).reshape(B * H, S, D)),
    "before": lambda x: x.repeat_interleave(2, 1).reshape(B * 4, S, D).contiguous(),
    # Bug: a view that changes nothing hid the cache.
    "viewed as it is": lambda x: flat(
        x.view(B, 2, S, D).reshape(B * 2, S, D).repeat_interleave(2, 0)),
}  # fmt: skip


def narrow(
    repeat: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor] | None = None
) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, m: Tensor, a: Tensor) -> Tensor:
        scores = torch.bmm(flat(q), repeat(k).transpose(1, 2)) + a
        return torch.bmm((scores.view(B, H, Q, S) + m).softmax(-1).view(B * H, Q, S), (
            other or repeat)(v))  # fmt: skip

    return attend


def as_it_is(x: Tensor) -> Tensor:
    return x


@pytest.mark.parametrize("form", REPEATED)
def test_kv_heads_repeated_side_by_side_are_attended_on_codes(form: str) -> None:
    captured = capture(decode(narrow(REPEATED[form]), as_it_is), *given())
    assert (captured.treatments, captured.reasons) == (["attend"], [])
    site = captured.plan.sites[0].cached.site
    assert (site.heads, site.k.target) == (H, torch.cat)
    new = rewrite(captured)
    (got, *_), _ = run(captured, new)
    torch.testing.assert_close(got, captured.expected()[0], **CLOSE)
    assert not {"softmax", "bmm", "unpack", "cat", "repeat_interleave"} & set(new.calls)


@pytest.mark.parametrize("repeat", [
    lambda x: x.flatten(0, 1).repeat_interleave(2, 0)[[0, 2, 1, 3, 4, 6, 5, 7]],
    lambda x: x.flatten(0, 1).repeat(2, 1, 1),
    lambda x: x.flatten(0, 1)[None].expand(2, -1, -1, -1).reshape(-1, S, D),
    lambda x: x.flatten(0, 1).repeat_interleave(torch.full((4,), 2), 0),
], ids=["sorted", "repeated", "expanded", "by a tensor"])  # fmt: skip
@pytest.mark.parametrize("of", ["both", "values"])
def test_kv_heads_repeated_in_turn_side_by_side_are_left_alone(
    repeat: Callable[[Tensor], Tensor], of: str
) -> None:
    keys = repeat if of == "both" else REPEATED["interleaved"]
    assert left_dense(decode(narrow(keys, repeat), as_it_is))


@pytest.mark.parametrize("spread", [
    lambda x: x.expand(B, H, S, D), lambda x: x.expand(-1, H, -1, -1).contiguous(),
    lambda x: x.repeat(1, H, 1, 1), lambda x: torch.repeat_interleave(x, H, dim=1),
], ids=["expand", "expand and copy", "repeat", "repeat_interleave"])  # fmt: skip
def test_one_kv_head_is_spread_over_all_queries(spread: Callable[[Tensor], Tensor]) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, m: Tensor, a: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, m)

    captured = capture(decode(attend, spread), *given(1))
    assert (captured.treatments, captured.reasons) == (["attend"], [])
    new = rewrite(captured)
    (got, *_), _ = run(captured, new)
    torch.testing.assert_close(got, captured.expected()[0], **CLOSE)
    assert not {"expand", "repeat", "unpack", "cat"} & set(new.calls)


def test_queries_of_a_group_in_the_place_of_tokens_attend_to_dense_tensors() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, m: Tensor, a: Tensor) -> Tensor:
        q, k, v = q.reshape(B * 2, 2 * Q, D), k.reshape(B * 2, S, D), v.reshape(B * 2, S, D)
        return torch.bmm(torch.bmm(q, k.mT).softmax(-1), v).view(B, H, Q, D)

    captured = capture(decode(attend, as_it_is), *given())
    assert captured.treatments == ["unpack"]
    assert captured.reasons == ["queries and new keys are different in number: dense attention"]
    (got, *_), _ = run(captured, rewrite(captured))
    torch.testing.assert_close(got, captured.expected()[0], **CLOSE)


def test_two_kv_heads_repeated_in_turn_are_not_spread() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, m: Tensor, a: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, m)

    assert left_dense(decode(attend, lambda x: x.repeat(1, 2, 1, 1)))


def test_sizes_that_vary_are_proven() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, m: Tensor, a: Tensor) -> Any:
        keys, values = torch.cat([pk, k], 2), torch.cat([pv, v], 2)
        b, n = q.shape[0], q.shape[2]
        q, turned, rows = (x.reshape(b * H, -1, D) for x in (q, keys, values))
        scores = a.baddbmm(q, turned.transpose(1, 2), alpha=0.3).view(b, H, n, -1)
        weights = (scores + m[:, :, :, : keys.shape[2]]).softmax(-1).view(b * H, n, -1)
        return torch.bmm(weights, rows).view(b, H, n, D), keys, values

    captured = capture(fn, *given(H), dynamic=True)
    assert (captured.treatments, captured.reasons) == (["attend"], [])
    (got, *_), _ = run(captured, rewrite(captured))
    torch.testing.assert_close(got, captured.expected()[0], **CLOSE)


def swapped(x: Tensor) -> Tensor:
    """Heads before sequences."""
    return x.transpose(0, 1).reshape(B * H, -1, D)


def wrongly_repeated(x: Tensor) -> Tensor:
    """KV heads in turn, where each query head wants its own group."""
    b, h, s, d = x.shape
    return x[:, None].expand(b, 2, h, s, d).reshape(b, 2 * h, s, d)


REFUSED: dict[str, tuple[Attend, str]] = {
    "heads before sequences": (
        lambda q, k, v, m, a: torch.bmm(
            torch.bmm(swapped(q), swapped(k).mT).softmax(-1), swapped(v)), "not recognised"),
    "scores taken apart in another order": (
        lambda q, k, v, m, a: torch.bmm((products(q, k).view(H, B, Q, S) + m.transpose(0, 1)
        ).softmax(-1).view(B * H, Q, S), flat(v)), OTHER),
    "values in another order": (
        lambda q, k, v, m, a: torch.bmm(products(q, k).softmax(-1), swapped(v)), OTHER),
    "weights turned round": (
        lambda q, k, v, m, a: torch.bmm(products(q, k).softmax(-1).view(
            B, H, Q, S).transpose(0, 1).reshape(B * H, Q, S), flat(v)), "no attention here grows"),
    "scores read as others": (
        lambda q, k, v, m, a: products(q, k).view(B * H, S, Q).view(
            B * H, Q * 3, S // 3).softmax(-1) @ flat(v)[:, : S // 3], "unknown form"),
    "rows of other tokens": (
        lambda q, k, v, m, a: torch.bmm(products(q, k.reshape(B, H, D, S).transpose(
            2, 3)).softmax(-1), flat(v)), "changed once repeated"),
    "repeated side by side": (
        lambda q, k, v, m, a: torch.bmm(torch.bmm(
            flat(q), k[:, :2].reshape(B * 2, S, D).repeat(2, 1, 1).mT
        ).softmax(-1), flat(v)), OTHER),
    "a mask of other heads": (
        lambda q, k, v, m, a: torch.bmm(
            (products(q, k) + m[None]).softmax(-1)[0, 0], flat(v)), OTHER),
    "a mask that makes them four": (
        lambda q, k, v, m, a: torch.matmul(
            (products(q, k) + m[:1]).softmax(-1), flat(v)), "does not fit"),
    "a scale that differs from key to key": (
        lambda q, k, v, m, a: torch.bmm(
            (products(q, k) * a).softmax(-1), flat(v)), "differs from key to key"),
    "the softmax over queries": (
        lambda q, k, v, m, a: torch.bmm(products(q, k).softmax(1), flat(v)), "not over keys"),
    "sdpa of heads before sequences": (
        lambda q, k, v, m, a: F.scaled_dot_product_attention(
            swapped(q), swapped(k), swapped(v)), "not recognised"),
    "sdpa of values in another order": (
        lambda q, k, v, m, a: F.scaled_dot_product_attention(
            flat(q), flat(k), swapped(v)), "not [B, heads, tokens, head_dim]"),
}  # fmt: skip


def left_dense(fn: Callable[..., Any], heads: int = 2) -> list[str]:
    """The reasons; what is left dense gives what the graph gives."""
    captured = capture(fn, *given(heads))
    assert captured.treatments == []
    (got, *_), _ = run(captured, rewrite(captured))
    torch.testing.assert_close(got, captured.expected()[0], **CLOSE)
    return captured.reasons


@pytest.mark.parametrize("form", REFUSED)
def test_other_orders_are_left_alone_with_the_reason(form: str) -> None:
    attend, reason = REFUSED[form]
    assert reason in left_dense(decode(attend))[0]


def test_kv_heads_repeated_in_turn_are_left_alone() -> None:
    assert "not recognised" in left_dense(decode(bloom, wrongly_repeated))[0]


def test_bits_read_as_another_dtype_are_no_view() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, m: Tensor, a: Tensor) -> Tensor:
        scores = products(q, k).view(torch.int32).abs().view(torch.float32)
        return torch.bmm(scores.softmax(-1), flat(v))

    assert "unknown form" in left_dense(decode(attend))[0]


def test_a_mask_written_to_in_place_is_read_as_it_is_when_used() -> None:
    """Bug: a mask that had to be turned round was read before the graph had written to it."""

    def attend(q: Tensor, k: Tensor, v: Tensor, m: Tensor, a: Tensor) -> Tensor:
        hidden = torch.zeros(B, 1, Q, S, dtype=torch.bool)
        hidden[:, :, :, 5:20] = True
        return (q @ k.transpose(2, 3)).masked_fill(hidden, LOWEST).softmax(-1) @ v

    captured = capture(decode(attend), *given())
    assert (captured.treatments, captured.reasons) == (["attend"], [])
    (got, *_), _ = run(captured, rewrite(captured))
    torch.testing.assert_close(got, captured.expected()[0], **CLOSE)
