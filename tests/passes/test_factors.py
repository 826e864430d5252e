"""Scores times a tensor: what is the same for all keys scales the queries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from .capture import CLOSE, capture, packed, repeat_kv, rewrite, run, tokens

B, H, Q, S, D = 2, 4, 3, 33, 8
LOWEST = torch.finfo(torch.float32).min

Weigh = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def plain(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2)


def flat(x: Tensor) -> Tensor:
    return x.reshape(B * H, -1, x.shape[-1])


# From q, k, a mask m [B, 1, Q, S] and one number for each head t [H] to weights; whether each
# factor divides, and whether heads are joined in it.
FORMS: dict[str, tuple[Weigh, list[tuple[bool, bool]]]] = {
    "a temperature": (lambda q, k, m, t: (plain(q, k) * t[0] + m).softmax(-1), [(False, False)]),
    "of each head": (
        lambda q, k, m, t: (t[:, None, None] * plain(q, k) + m).softmax(-1), [(False, False)]),
    "of each query": (
        lambda q, k, m, t: (plain(q, k).mul(q[..., :1].exp()) + m).softmax(-1), [(False, False)]),
    "of each sequence": (
        lambda q, k, m, t: (plain(q, k) * t[:2, None, None, None] + m).softmax(-1),
        [(False, False)]),
    # GPT-J divides by a tensor of one number, and GPT-2 did.
    "as GPT-J": (
        lambda q, k, m, t: (plain(q, k) / torch.sqrt(torch.tensor(D)) + m).softmax(-1),
        [(True, False)]),
    "as GPT-2 was": (
        lambda q, k, m, t: (
            plain(q, k) / torch.full([], D**0.5, dtype=q.dtype, device=q.device) + m).softmax(-1),
        [(True, False)]),
    "as cosine attention": (
        lambda q, k, m, t: (
            plain(q / q.norm(dim=-1, keepdim=True), k) * t.view(1, H, 1, 1).clamp(max=4.0).exp() + m
        ).softmax(-1), [(False, False)]),
    "in place": (
        lambda q, k, m, t: plain(q, k).mul_(t[:, None, None]).div_(t[1]).add_(m).softmax(-1),
        [(False, False), (True, False)]),
    "with a number and a cap": (
        lambda q, k, m, t: (
            torch.tanh(plain(q, k) * 0.5 * t[:, None, None] / 3) * 3 + m).softmax(-1),
        [(False, False)]),
    "of another dtype": (
        lambda q, k, m, t: (plain(q, k) * t.double()[:, None, None] + m).softmax(-1).float(),
        [(False, False)]),
    "a whole number": (
        lambda q, k, m, t: (plain(q, k) / torch.tensor(4) + m).softmax(-1), [(True, False)]),
    # Bug: the reason was that it differs from key to key.
    "bool": (
        lambda q, k, m, t: (plain(q, k) * (t > 0)[:, None, None] + m).softmax(-1),
        [(False, False)]),
    "of zero": (lambda q, k, m, t: (plain(q, k) * t[3] + m).softmax(-1), [(False, False)]),
    "heads side by side": (
        lambda q, k, m, t: ((torch.bmm(flat(q), flat(k).mT) * t.repeat(B)[:, None, None]
        ).view(B, H, Q, S) + m).softmax(-1), [(False, True)]),
}  # fmt: skip


def decode(weigh: Weigh) -> Callable[..., Any]:
    def fn(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, m: Tensor, t: Tensor) -> Any:
        keys, values = torch.cat([pk, k], 2), torch.cat([pv, v], 2)
        return weigh(q, repeat_kv(keys), m, t) @ repeat_kv(values), keys, values

    return fn


def given() -> tuple[Tensor, ...]:
    mask = torch.where(torch.rand(B, 1, Q, S) < 0.8, 0.0, LOWEST)
    mask[..., -1] = 0.0
    past = S - Q
    factors = torch.tensor([0.5, -1.5, 2.0, 0.0])
    return tokens(Q, H), tokens(Q), tokens(Q), packed(past), packed(past), mask, factors


@pytest.mark.parametrize("form", FORMS)
def test_factors_of_rows_are_attended_on_codes(form: str) -> None:
    weigh, factors = FORMS[form]
    captured = capture(decode(weigh), *given())
    assert (captured.treatments, captured.reasons) == (["attend"], [])
    found = captured.plan.sites[0].cached.site.factors
    assert [(factor.inverse, factor.joined) for factor in found] == factors
    new = rewrite(captured)
    want = captured.expected()[0]
    (got, *_), _ = run(captured, new)
    torch.testing.assert_close(got, want, **CLOSE)
    assert got.dtype == want.dtype
    assert not {"softmax", "matmul", "bmm", "unpack", "cat"} & set(new.calls)


@pytest.mark.parametrize("form", ["of each head", "as GPT-J", "with a number and a cap"])
def test_a_prefill_with_factors_leaves_its_cache_packed(form: str) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, m: Tensor, t: Tensor) -> Any:
        k, v = k * 1, v * 1
        return FORMS[form][0](q, repeat_kv(k), m, t) @ repeat_kv(v), k, v

    mask = torch.zeros(B, 1, Q, Q)
    mask[1, :, :, :1] = LOWEST
    captured = capture(fn, tokens(Q, H), tokens(Q), tokens(Q), mask, given()[-1])
    assert captured.treatments == ["encode"]
    results, _ = run(captured, rewrite(captured))
    torch.testing.assert_close(results[0], captured.expected()[0], **CLOSE)


REFUSED: dict[str, tuple[Weigh, str]] = {
    "from key to key": (
        lambda q, k, m, t: (plain(q, k) * m.exp() + m).softmax(-1), "differs from key to key"),
    "from key to key, bool": (
        lambda q, k, m, t: (plain(q, k) * (m == 0)).softmax(-1), "differs from key to key"),
    "more sequences": (
        lambda q, k, m, t: (plain(q[:1], k[:1]) * t[:2, None, None, None]).softmax(-1),
        "does not fit them"),
    "behind the mask": (
        lambda q, k, m, t: ((plain(q, k) + m) * t[0]).softmax(-1), "masked or capped scores"),
    "behind the cap": (
        lambda q, k, m, t: (plain(q, k).tanh() * t[:, None, None] + m).softmax(-1),
        "masked or capped scores"),
    "over the scores": (lambda q, k, m, t: (t[0] / plain(q, k)).softmax(-1), "unknown form"),
    "a quotient that is rounded": (
        lambda q, k, m, t: torch.div(plain(q, k), t[0], rounding_mode="floor").softmax(-1),
        "unknown form"),
    "made of the scores": (
        lambda q, k, m, t: (lambda s: (s / s.norm(dim=-1, keepdim=True) + m).softmax(-1))(
            plain(q, k)), "is made of them"),
}  # fmt: skip


@pytest.mark.parametrize("form", REFUSED)
def test_other_factors_are_left_alone_with_the_reason(form: str) -> None:
    weigh, reason = REFUSED[form]
    captured = capture(decode(weigh), *given())
    assert captured.treatments == []
    assert reason in captured.reasons[0]


def test_a_factor_that_changes_before_the_values_are_read_is_left_alone() -> None:
    def weigh(q: Tensor, k: Tensor, m: Tensor, t: Tensor) -> Tensor:
        t = t + 0
        weights = (plain(q, k) * t[:, None, None] + m).softmax(-1)
        t.fill_(2.0)
        return weights

    captured = capture(decode(weigh), *given())
    assert captured.treatments == []
    assert "change before the values are read" in captured.reasons[0]


READ: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "of a parameter": lambda s, t: t[0], "whole": lambda s, t: t.sum().long() + 2,
    "of the scores": lambda s, t: s.abs().max(), "whole, of the scores": lambda s, t: s.argmax(),
}  # fmt: skip


@pytest.mark.parametrize("kind", READ)
def test_a_number_that_is_read_out_of_a_tensor_is_a_factor(kind: str) -> None:
    """Bug: a guard was asked for, and the compilation of the whole graph failed."""

    def weigh(q: Tensor, k: Tensor, m: Tensor, t: Tensor) -> Tensor:
        scores = plain(q, k)
        return (scores * READ[kind](scores, t).item() + m).softmax(-1)

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        captured = capture(decode(weigh), *given())
    if "of the scores" in kind:
        assert captured.treatments == [] and "is made of them" in captured.reasons[0]
        return
    assert (captured.treatments, captured.reasons) == (["attend"], [])
    (got, *_), _ = run(captured, rewrite(captured))
    torch.testing.assert_close(got, captured.expected()[0], **CLOSE)
