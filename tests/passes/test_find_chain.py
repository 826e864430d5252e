from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from apack_compile.passes.find_attention import AttentionSite, find_attention

from .capture import CLOSE, capture, repeat_kv, rewrite, run, tokens
from .written_out import LOWEST, SINKS, Weigh, column, decode, given, plain

# Weights from q, k and a float mask that is 0 or LOWEST, hidden where it is LOWEST.
FORMS: dict[str, tuple[Weigh, float, bool, bool]] = {
    "as transformers": (
        lambda q, k, m: F.dropout(
            F.softmax(torch.matmul(q, k.transpose(2, 3)) * 0.25 + m, dim=-1, dtype=torch.float32)
            .to(q.dtype), p=0.0, training=False),
        0.25, True, False),
    "divided": (lambda q, k, m: (plain(q, k) / 4 + m).softmax(-1), 0.25, True, False),
    "scaled before": (lambda q, k, m: torch.softmax(plain(q * 0.5, k) + m, 3), 1.0, True, False),
    "number first": (lambda q, k, m: (0.5 * plain(q, k) + m).softmax(dim=-1), 0.5, True, False),
    "mask first": (lambda q, k, m: torch.add(m, plain(q, k)).softmax(-1), 1.0, True, False),
    "no mask": (lambda q, k, m: (q.matmul(k.mT) * 0.5).softmax(-1), 0.5, False, False),
    "masked_fill": (
        lambda q, k, m: (plain(q, k) * 0.5).masked_fill(m < 0, float("-inf")).softmax(-1),
        0.5, True, True),
    "scaled behind the mask": (
        lambda q, k, m: (plain(q, k).masked_fill(m < 0, -1e9) * 0.5).softmax(-1), 0.5, True, True),
    "scaled with its mask": (
        lambda q, k, m: ((plain(q, k) * 0.5 + m) / 2).softmax(-1), 0.25, True, False),
    "where": (
        lambda q, k, m: torch.where(m == 0, plain(q, k), LOWEST).softmax(-1), 1.0, True, False),
    "in place": (
        lambda q, k, m: plain(q, k).mul_(0.5).add_(m).softmax(-1), 0.5, True, False),
    # Bug: operands given by name stopped the compilation of the whole graph.
    "all named": (
        lambda q, k, m: torch.add(
            torch.mul(torch.matmul(input=q, other=k.permute(dims=(0, 1, 3, 2))), other=0.5), other=m
        ).softmax(dim=-1), 0.5, True, False),
    "softcap": (
        lambda q, k, m: (torch.tanh(plain(q, k) * 0.25 / 2) * 2 + m).softmax(-1),
        0.25, True, False),
    "softcap of other sign": (
        lambda q, k, m: ((plain(q, k) / -0.5).tanh().masked_fill(m < 0, -1e9) * 2).softmax(-1),
        -4.0, True, True),
    "permuted": (
        lambda q, k, m: (q @ k.permute(0, 1, 3, 2) + m).float().softmax(-1).type_as(q),
        1.0, True, False),
    "by other names": (
        lambda q, k, m: torch.subtract(
            torch.divide(torch.multiply(plain(q, k), 2.0), 4.0).true_divide(2.0), m, alpha=1
        ).softmax(-1), 0.25, True, False),
    "where, a tensor of one number": (
        lambda q, k, m: torch.where(
            m == 0, plain(q, k), torch.tensor(LOWEST, dtype=q.dtype)).softmax(-1),
        1.0, True, False),
    "where, hidden first": (
        lambda q, k, m: torch.where(
            m < 0, torch.tensor(float("-inf")), plain(q, k) * 0.5).softmax(-1), 0.5, True, True),
    "where, filled like the scores": (
        lambda q, k, m: (lambda s: torch.where(m == 0, s, torch.full_like(s, -1e9)))(
            plain(q, k)).softmax(-1), 1.0, True, False),
    "where, a method": (
        lambda q, k, m: plain(q, k).where(m == 0, torch.full((), -1e9).to(q.dtype)).softmax(-1),
        1.0, True, False),
    # Bug: the condition was taken for the scores.
    "where, a method, all named": (
        lambda q, k, m: plain(q, k).where(condition=m == 0, other=torch.tensor(-1e9)).softmax(-1),
        1.0, True, False),
    "masked_fill by a tensor": (
        lambda q, k, m: plain(q, k).masked_fill(m < 0, q.new_tensor(-1e9)).softmax(-1),
        1.0, True, True),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_written_out_attention_is_attended_on_codes(form: str) -> None:
    weigh, scale, masked, hides = FORMS[form]
    captured = capture(decode(weigh), *given(3))
    (planned,) = captured.plan.sites
    assert (planned.treatment, captured.reasons) == ("attend", [])
    site = planned.cached.site
    assert (site.scale, site.heads) == (scale, 4)
    parts = () if site.mask is None else site.mask.parts
    assert [part.hides for part in parts] == [hides] * masked
    assert site.softcap == (2.0 if "softcap" in form else 0.0)
    new = rewrite(captured)
    want = captured.expected()
    (got, *_), _ = run(captured, new)
    torch.testing.assert_close(got, want[0], **CLOSE)
    left = {"softmax", "matmul", "unpack", "cat", "expand"} & set(new.calls)
    assert not left, "what was written out is gone"


@pytest.mark.parametrize("form", FORMS)
def test_a_prefill_that_is_written_out_leaves_its_cache_packed(form: str) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Any:
        return FORMS[form][0](q, repeat_kv(k), mask) @ repeat_kv(v), k + 0, v + 0

    def stored(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Any:
        k, v = k * 1, v * 1
        return FORMS[form][0](q, repeat_kv(k), mask) @ repeat_kv(v), k, v

    mask = torch.zeros(2, 1, 9, 9)
    mask[1, :, :, :4] = LOWEST
    captured = capture(stored, tokens(9, 4), tokens(9), tokens(9), mask)
    assert captured.treatments == ["encode"]
    new = rewrite(captured)
    results, _ = run(captured, new)
    torch.testing.assert_close(results[0], captured.expected()[0], **CLOSE)
    seen = captured.plan.sites[0].cached.site.mask
    assert (seen is not None) == FORMS[form][2]
    assert capture(fn, tokens(9, 4), tokens(9), tokens(9), mask).treatments == []


REFUSED: dict[str, tuple[Weigh, str]] = {
    "softcap twice": (
        lambda q, k, m: (plain(q, k).tanh().tanh() + m).softmax(-1), "capped twice"),
    "softcap over the mask": (
        lambda q, k, m: (torch.tanh(plain(q, k) + m) * 50).softmax(-1), "mask is capped"),
    "a mask turned round": (
        lambda q, k, m: (plain(q, k).masked_fill(m < 0, -1e9) * -0.5).softmax(-1), "turned round"),
    "over queries": (lambda q, k, m: (plain(q, k) + m).softmax(-2), "not over keys"),
    "hidden by a small number": (
        lambda q, k, m: plain(q, k).masked_fill(m < 0, -10.0).softmax(-1), "unknown way"),
    "a mask for more sequences": (
        lambda q, k, m: (plain(q[:1], k[:1]) + m).softmax(-1), "does not fit"),
    "weights in a given tensor": (
        lambda q, k, m: (lambda s: torch.softmax(s, -1, out=torch.empty_like(s)))(plain(q, k) + m),
        ""),
    "a power": (lambda q, k, m: (plain(q, k) ** 2 + m).softmax(-1), "unknown form"),
    "a number for all": (
        lambda q, k, m: (plain(q, k) + m.sum() * 0).softmax(-1), "a number is added"),
    "keys that are written to": (
        lambda q, k, m: (plain(q, k.float().clone().mul_(2)) + m).softmax(-1), ""),
    "sinks that differ from row to row": (
        lambda q, k, m: torch.cat([plain(q, k) + m, q[..., :1]], -1).softmax(-1)[..., :-1],
        "sinks among the scores"),
    "sinks of each sequence": (
        lambda q, k, m: torch.cat(
            [plain(q, k) + m, m[:, :, :1, :1].expand(-1, 4, -1, -1)], -1).softmax(-1)[..., :-1],
        "sinks among the scores"),
    "another column cut": (
        lambda q, k, m: torch.cat([plain(q, k) + m, column(q, SINKS)], -1).softmax(-1)[..., 1:],
        "sinks among the scores"),
    "weights that are cut": (
        lambda q, k, m: F.pad(plain(q, k) + m, (0, 1)).softmax(-1)[..., :-1], "cut behind"),
    "less than another maximum": (
        lambda q, k, m: (lambda s: (s - s.amax(-2, keepdim=True)).softmax(-1))(plain(q, k) + m),
        "is made of them"),
    "sinks made of the scores": (
        lambda q, k, m: (lambda s: torch.cat(
            [s + m, s.sum((0, 2, 3))[None, :, None, None].expand(2, 4, s.shape[2], 1)], -1
        ).softmax(-1)[..., :-1])(plain(q, k)), "is made of them"),
    # Bug: the reason was that it is no mask of numbers.
    "a constant for all": (
        lambda q, k, m: (plain(q, k) + 3.0 + m).softmax(-1), "a number is added"),
    "a mask of bools": (
        lambda q, k, m: (plain(q, k) + (m == 0)).softmax(-1), "no mask of numbers"),
    "a mask less the scores": (lambda q, k, m: (m - plain(q, k)).softmax(-1), "unknown form"),
    "a mask taken off several times": (
        lambda q, k, m: torch.sub(plain(q, k), m, alpha=2).softmax(-1), "unknown form"),
    "a number taken off": (
        lambda q, k, m: (plain(q, k) - m.sum() * 0).softmax(-1), "a number is added"),
    "hidden by a number that is not known": (
        lambda q, k, m: torch.where(m == 0, plain(q, k), m.min()).softmax(-1), "unknown way"),
    "hidden by a small tensor": (
        lambda q, k, m: torch.where(m == 0, plain(q, k), torch.tensor(-10.0)).softmax(-1),
        "unknown way"),
    "hidden by more sequences": (
        lambda q, k, m: torch.where(
            m[:1] == 0, plain(q[:1], k[:1]), torch.full((2, 1, 1, 1), -1e9)).softmax(-1),
        "does not fit"),
    "hidden by a tensor that is written to": (
        lambda q, k, m: torch.where(
            m == 0, plain(q, k), torch.full((), -1e9).mul_(1e-9)).softmax(-1), "unknown way"),
    # Bug: what is rounded was taken for a quotient.
    "rounded": (
        lambda q, k, m: torch.div(plain(q, k), 2.0, rounding_mode="floor").softmax(-1),
        "unknown form"),
    # Bug: -1e4 hides no more once it is -1, but was taken for -inf.
    "hidden scores scaled away": (
        lambda q, k, m: (plain(q, k).masked_fill(m < 0, -1e4) * 1e-4).softmax(-1),
        "until they are seen"),
    "a sum of weights": (
        lambda q, k, m: (lambda p: p / p.sum())((plain(q, k) + m).softmax(-1)), ""),
}  # fmt: skip


@pytest.mark.parametrize("form", REFUSED)
def test_other_forms_are_left_alone_with_the_reason(form: str) -> None:
    weigh, reason = REFUSED[form]
    captured = capture(decode(weigh), *given())
    assert captured.treatments == []
    if reason:
        assert reason in captured.reasons[0]


def test_scores_that_are_masked_by_a_statement_are_left_alone() -> None:
    """The graph then has a softmax of the product itself: the mask is nowhere on the way."""

    def weigh(q: Tensor, k: Tensor, m: Tensor) -> Tensor:
        scores = plain(q, k)
        scores.masked_fill_(m < 0, float("-inf"))
        return scores.softmax(-1)

    def through_a_view(q: Tensor, k: Tensor, m: Tensor) -> Tensor:
        scores = plain(q, k)
        scores[:, :, :, :3] = -1e9
        return scores.softmax(-1)

    for each in (weigh, through_a_view):
        captured = capture(decode(each), *given())
        assert captured.treatments == []
        assert "in place" in captured.reasons[0]


@pytest.mark.parametrize("changed", ["queries", "a view of them", "mask", "mask of two", "sinks"])
def test_what_changes_behind_the_scores_is_left_alone(changed: str) -> None:
    """Bug: packed attention read it where the values are read, after it had changed."""

    def fn(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, m: Tensor, x: Tensor) -> Any:
        keys, values = torch.cat([pk, k], 2), torch.cat([pv, v], 2)
        q, m, x = q + 0, m + 0, x + 0
        s = plain(q, repeat_kv(keys)) + m
        if changed == "mask of two":
            s = s + x[:, None, None]
        p = torch.cat([s, column(q, x)], -1).softmax(-1)[..., :-1]
        if changed == "queries":
            q.mul_(0.5)
        elif changed == "a view of them":
            q[..., :2] = 0
        elif changed == "sinks":
            x.fill_(2.0)
        else:
            m[..., :5] = LOWEST
        return p @ repeat_kv(values), keys, values

    captured = capture(fn, *given(), SINKS)
    assert captured.treatments == []
    assert "change before the values are read" in captured.reasons[0]


def test_what_changes_behind_the_values_does_no_harm() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, m: Tensor) -> Any:
        keys, values, m = torch.cat([pk, k], 2), torch.cat([pv, v], 2), m + 0
        o = (plain(q, repeat_kv(keys)) + m).softmax(-1) @ repeat_kv(values)
        m[..., :5] = LOWEST
        return o, keys, values

    captured = capture(fn, *given())
    assert captured.treatments == ["attend"]
    torch.testing.assert_close(
        run(captured, rewrite(captured))[0][0], captured.expected()[0], **CLOSE
    )


def test_casts_of_the_cache_that_are_written_to_are_not_the_cache() -> None:
    """Bug: what a decode step wrote to a cast or a repetition of its keys was dropped."""

    def weigh(q: Tensor, k: Tensor, m: Tensor) -> Tensor:
        k = k.float()
        k[:, :, 0] = 0
        return (plain(q, k) + m).softmax(-1)

    captured = capture(decode(weigh), *given())
    assert captured.treatments == [] or captured.treatments == ["unpack"]
    new = rewrite(captured)
    torch.testing.assert_close(run(captured, new)[0][0], captured.expected()[0], **CLOSE)


def test_an_output_has_the_dtype_of_the_weights() -> None:
    """Bug: float32 queries made a float32 output of what was cast for the next layer."""

    def weigh(q: Tensor, k: Tensor, m: Tensor) -> Tensor:
        return (plain(q.double(), k.double()) + m).softmax(-1).to(q.dtype)

    captured = capture(decode(weigh), *given())
    assert captured.treatments == ["attend"]
    (got, *_), _ = run(captured, rewrite(captured))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, captured.expected()[0], **CLOSE)


def test_sites_are_in_the_order_of_their_outputs() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Any:
        first, second = plain(q, k).softmax(-1), plain(k, q).softmax(-1)
        late = second @ v
        return late, first @ v

    found = sites(fn, tokens(3), tokens(3), tokens(3))
    assert [site.q.name for site in found] == ["l_k_", "l_q_"]


def test_weights_that_are_returned_are_left_alone() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, mask: Tensor) -> Any:
        keys, values = torch.cat([pk, k], 2), torch.cat([pv, v], 2)
        p = (plain(q, repeat_kv(keys)) + mask).softmax(-1)
        return p @ repeat_kv(values), p, keys, values

    captured = capture(fn, *given())
    assert captured.treatments == []
    assert "used by more than the values" in captured.reasons[0]


def sites(fn: Callable[..., Any], *args: Any) -> tuple[AttentionSite, ...]:
    found, report = find_attention(capture(fn, *args).graph)
    assert report.matched == len(found)
    return found


def test_a_softmax_without_values_is_no_attention() -> None:
    def router(x: Tensor, w: Tensor) -> Tensor:
        return (x @ w).softmax(-1).topk(2).values

    captured = capture(router, torch.randn(2, 3, 8), torch.randn(8, 4))
    assert captured.reasons == [] and sites(router, torch.randn(2, 3, 8), torch.randn(8, 4)) == ()


def test_the_scale_of_a_symbol_is_guarded() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return (plain(q, k) * scale).softmax(-1) @ v

    (site,) = sites(fn, tokens(3), tokens(3), tokens(3), 1 / math.sqrt(8))
    assert site.scale == 1 / math.sqrt(8)
