from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from apack_compile.cache import PackedKV, SideStore
from apack_compile.kernels.kinds import SortedTokens, sort_tokens
from apack_compile.passes.draft import SORTED_TOKENS, EncodedOutput, PlainOutput
from apack_compile.passes.rewrite_encode import collect

from ..helpers import fitted_ref, modal_ref
from .capture import (
    POLICY,
    Rewritten,
    capture,
    check,
    grown,
    ours,
    repeat_kv,
    rewrite,
    run,
    tokens,
)

sdpa = F.scaled_dot_product_attention

IMPORTANCE = torch.ops.apack.importance.default


def prefill(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Any:
    keys, values = (torch.cat([torch.tensor([]), x], -2) for x in (k, v))
    return sdpa(q, repeat_kv(keys), repeat_kv(values), mask), keys, values


def dense_past(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor) -> Any:
    keys, values = grown(pk, pv, k, v)
    return sdpa(q, keys, values), keys, values


def test_a_prefill_is_encoded_in_the_graph() -> None:
    captured = capture(prefill, tokens(50, 4), tokens(50), tokens(50), None)
    new = check(captured, [PlainOutput, EncodedOutput, EncodedOutput])
    assert ours(new) == {"apack::encode": 2}
    assert new.calls["scaled_dot_product_attention"] == 1
    assert [r.matched for r in new.reports] == [0, 0, 2]


def test_a_dense_past_is_encoded_as_a_whole() -> None:
    captured = capture(dense_past, *[tokens(3)] * 3, tokens(40), tokens(40))
    new = check(captured, [PlainOutput, EncodedOutput, EncodedOutput])
    assert ours(new) == {"apack::encode": 2}
    assert new.calls["cat"] == 2


def test_layers_that_share_a_prefilled_cache_encode_it_once() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Any:
        keys, values = k * 2, v * 2
        return sdpa(sdpa(q, keys, values), keys, values), keys, values

    new = check(capture(fn, *[tokens(50)] * 3), [PlainOutput, EncodedOutput, EncodedOutput])
    assert ours(new) == {"apack::encode": 2}


def left_padded(length: int = 50, padding: int = 6) -> Tensor:
    real = torch.ones(2, length, dtype=torch.bool)
    real[0, :padding] = False
    return torch.ones(length, length, dtype=torch.bool).tril() & real[:, None, None]


def test_a_fitted_code_keeps_the_first_visible_tokens_of_each_row() -> None:
    captured = capture(prefill, tokens(50, 4), tokens(50), tokens(50), left_padded())
    _, keys, values = captured.expected()
    new = rewrite(captured, [fitted_ref(gain=False), fitted_ref()])
    assert ours(new) == {"apack::encode": 2, "apack::visible": 1}
    (_, k, v), _ = run(captured, new)
    for mine, theirs in ((k, keys), (v, values)):
        exact = (mine == theirs).all(-1).all(1)
        assert exact[0, :42].nonzero()[:, 0].tolist() == [6, 7]
        assert exact[1, :42].nonzero()[:, 0].tolist() == [0, 1]
        assert exact[:, 42:].all()


def test_moments_of_a_prefill_are_extra_results() -> None:
    captured = capture(prefill, tokens(50, 4), tokens(50), tokens(50), left_padded())
    expected = captured.expected()
    draft = captured.draft()
    assert collect(draft, sinks=2).matched == 1
    gm, interface = draft.finish()
    results, (moments, visible, cos, sin, interleaved, weight) = run(
        captured, Rewritten(gm, interface, [], [])
    )
    for mine, theirs in zip(results, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    assert visible.sum(1).tolist() == [44, 50]
    assert moments[0].item() == 94 - 2 * 2, "padding and sinks do not count"
    assert (cos, sin, interleaved, weight) == (None, None, False, None)
    q = next(a for a in captured.args if a.shape == (2, 4, 50, 8))
    again = torch.ops.apack.moments(q, *expected[1:], visible, None, None, None, False, 2)
    assert all(torch.equal(a, b) for a, b in zip(moments, again, strict=True))


def test_codes_in_tiers_are_encoded_by_importance() -> None:
    captured = capture(prefill, tokens(50, 4), tokens(50), tokens(50), left_padded())
    refs = [fitted_ref(gain=False), fitted_ref(ratio=2, tiers=True)]
    new = rewrite(captured, refs)
    assert ours(new) == {"apack::encode": 2, "apack::importance": 1, "apack::visible": 1}
    (encoded,) = (n for n in new.gm.graph.nodes if n.target == IMPORTANCE)
    ((reader),) = encoded.users
    assert reader.args[-2:] == (encoded, None) and reader.args[3] == refs[1].layout.spec


def test_a_fit_of_codes_in_tiers_is_told_the_importance_of_tokens() -> None:
    captured = capture(prefill, tokens(50, 4), tokens(50), tokens(50), left_padded())
    draft = captured.draft()
    collect(draft, sinks=2, weigh=True)
    gm, interface = draft.finish()
    _, (*_, weight) = run(captured, Rewritten(gm, interface, [], []))
    assert weight.shape == (2, 50)
    assert not weight[0, :6].any() and bool((weight[1] > 0).all())


def test_queries_joined_with_sequences_tell_the_same_moments() -> None:
    """Bug: queries were taken apart behind the node that reads them."""

    def joined(q: Tensor, k: Tensor, v: Tensor, factor: float) -> Any:
        keys, values = (torch.cat([torch.tensor([]), x], -2) for x in (k, v))
        flat = (x.reshape(-1, *x.shape[2:]) for x in (q, keys, values))
        q, *kv = flat
        return sdpa(q * factor, *kv), keys, values

    args = tokens(50, 2), tokens(50), tokens(50), 0.5
    draft = capture(joined, *args).draft()
    assert collect(draft, sinks=2, weigh=True).matched == 1
    draft.finish()[0].graph.lint()


def test_a_fit_that_knows_visual_tokens_has_their_moments_behind_all() -> None:
    captured = capture(prefill, tokens(50, 4), tokens(50), tokens(50), left_padded())
    visual = torch.zeros(2, 50, dtype=torch.bool)
    visual[0, 4:20], visual[1, 1:9] = True, True  # 6 in padding, 2 and 1 of them sinks
    draft = captured.draft()
    collect(draft, sinks=2, visual=True)
    gm, interface = draft.finish()
    captured.args = (*captured.args, visual)
    _, (moments, *_) = run(captured, Rewritten(gm, interface, [], []))
    assert len(moments) == 12
    assert moments[0].item() == 90
    assert moments[6].item() == (16 - 2 - 2) + (8 - 1)


def test_kinds_of_tokens_with_a_dense_past_are_those_given() -> None:
    """A graph does not show them: the mask that it takes comes from the user."""
    captured = capture(dense_past, *[tokens(3)] * 3, tokens(40), tokens(40))
    draft = captured.draft()
    collect(draft, sinks=2, visual=True)
    gm, interface = draft.finish()
    captured.args = (*captured.args, torch.arange(43).expand(2, -1) < 20)
    _, (moments, *_) = run(captured, Rewritten(gm, interface, [], []))
    assert moments[0].item() == 2 * (43 - 2) and moments[6].item() == 2 * (20 - 2)


def by_kind(captured: Any, masked: Tensor) -> tuple[Rewritten, SortedTokens]:
    ref = modal_ref()
    prompt = sort_tokens(masked, masked.shape[1] - POLICY.window, POLICY.chunk)
    return rewrite(captured, [ref, ref]), prompt


def alone(x: Tensor, ref: Any, masked: Tensor | None) -> Tensor:
    return PackedKV.pack(x, ref, POLICY, visual=masked).unpack()


def test_a_prompt_is_encoded_by_kind_in_the_graph() -> None:
    k, v = tokens(50), tokens(50)
    captured = capture(prefill, tokens(50, 4), k, v, None)
    masked = torch.rand(2, 50, generator=torch.Generator().manual_seed(0)) < 0.4
    new, prompt = by_kind(captured, masked)
    assert ours(new) == {"apack::encode": 2}, "no importance is asked for"
    told = [slot for slot in new.interface.slots if slot[0] == SORTED_TOKENS]
    assert sorted(told) == [(SORTED_TOKENS, 0), (SORTED_TOKENS, 1), (SORTED_TOKENS, 2)]
    (_, *got), _ = run(captured, new, prompt)
    for back, x, ref in zip(got, (k, v), new.refs, strict=True):
        assert torch.equal(back, alone(x, ref, masked))
        assert not torch.equal(back, alone(x, ref, None))


def test_codes_by_kind_with_levels_are_told_both() -> None:
    q, k, v = tokens(90, 4), tokens(90), tokens(90)
    captured = capture(prefill, q, k, v, None)
    masked = torch.rand(2, 90, generator=torch.Generator().manual_seed(0)) < 0.5
    refs = [modal_ref(gain=False, evict=0.4), modal_ref(ratio=3, tiers=True, evict=0.4)]
    new = rewrite(captured, refs)
    assert ours(new) == {"apack::encode": 2, "apack::importance": 1}
    (weights,) = (n for n in new.gm.graph.nodes if n.target == IMPORTANCE)
    assert all(reader.args[-2] is weights and reader.args[-1] for reader in weights.users)
    prompt = sort_tokens(masked, 90 - POLICY.window, POLICY.chunk)
    (_, *got), _ = run(captured, new, prompt)
    weight = torch.ops.apack.importance(q, k, None, False, *weights.args[4:])
    for back, x, ref in zip(got, (k, v), refs, strict=True):
        store = SideStore.encode(x, ref, POLICY, None, weight, masked)
        assert torch.equal(back, store.dense(90))


def test_tokens_of_an_image_that_is_attended_to_are_not_those_of_the_prompt() -> None:
    """Cross-attention: nothing is known of them, and they are coded as text."""

    def fn(q: Tensor, k: Tensor, image: Tensor, w: Tensor) -> Any:
        keys, pixels = k * 2, image @ w
        return sdpa(sdpa(q, keys, keys), pixels, pixels), keys, pixels

    k, image, w = tokens(50), tokens(40), torch.randn(8, 8)
    captured = capture(fn, tokens(50), k, image, w)
    masked = torch.ones(2, 50, dtype=torch.bool)
    new, prompt = by_kind(captured, masked)
    (_, keys, pixels), _ = run(captured, new, prompt)
    assert torch.equal(keys, alone(k * 2, new.refs[0], masked))
    assert torch.equal(pixels, alone(image @ w, new.refs[0], None))


def test_a_mask_over_caches_of_several_lengths_is_read_for_each() -> None:
    """Bug: tokens that a bias of each head shows in one cache were those of the next, shorter one,
    and the model stopped."""

    def fn(q: Tensor, k: Tensor, image: Tensor, mask: Tensor, w: Tensor) -> Any:
        keys, pixels = k * 2, image @ w
        return sdpa(sdpa(q, keys, keys, mask), pixels, pixels, mask), keys, pixels

    given = tokens(30), tokens(30), tokens(11), torch.randn(1, 2, 1, 1), torch.randn(8, 8)
    new = check(capture(fn, *given), [PlainOutput, EncodedOutput, EncodedOutput])
    assert ours(new) == {"apack::encode": 2, "apack::visible": 2}
