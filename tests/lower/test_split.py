"""What goes into which half, and what cannot be split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._guards import detect_fake_mode

from apack_compile.cache import PackedKV
from apack_compile.lower.share_bias import share_bias
from apack_compile.lower.split import Halves, Inseparable, split
from apack_compile.lower.values import symbols, values_of
from apack_compile.runtime.arguments import Dynamics, lengths_of
from apack_compile.runtime.specialise import Specialised

from ..helpers import fitted_ref
from ..passes.capture import POLICY, calls, capture, grown, packed, rewrite, table_of, tokens

sdpa = F.scaled_dot_product_attention
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def decode(
    fn: Callable[..., Any], *extra: Any, dynamic: Sequence[int] = (), tiers: bool = False
) -> tuple[fx.GraphModule, list[Any], dict[fx.Node, Any]]:
    """The rewritten graph of ``fn``, its arguments, and its values.

    dynamic: those of ``extra`` whose last size is a symbol; tiers: of the values.
    """
    for i in dynamic:
        torch._dynamo.mark_dynamic(extra[i], extra[i].dim() - 1)
    values = packed(30)
    if tiers:
        values = PackedKV.pack(tokens(30), fitted_ref(ratio=2, tiers=True), POLICY)
    captured = capture(fn, tokens(1), tokens(1), tokens(1), packed(30), values, *extra)
    new = rewrite(captured, in_step=True)
    handles = [captured.args[i] for i in new.interface.handles]
    tables = [captured.args, lengths_of(handles, new.interface.appends), ()]
    tables += [table_of(h.store) for h in handles]
    args = [tables[table][index] for table, index in new.interface.slots]
    known = Dynamics(captured.graph, captured.plan.handles, captured.plan.fixed)
    layouts = [h.store.ref.layout.spec for h in handles]
    sizes = [
        known.of(slot, value, layouts)
        for slot, value in zip(new.interface.slots, args, strict=True)
    ]
    found: list[Any] = []

    def record(gm: fx.GraphModule, fakes: Sequence[Any]) -> Any:
        mode = detect_fake_mode(fakes)
        assert mode is not None
        found.append(values_of(gm, fakes, mode))
        return gm

    Specialised(new.gm, args, sizes, record)
    return new.gm, args, found[0]


def run(halves: Halves, args: Sequence[Any]) -> list[Any]:
    made: dict[str, Any] = {"args": args}

    def get(place: tuple[str, Any]) -> Any:
        return place[1] if place[0] == "constant" else made[place[0]][place[1]]

    made["head"] = halves.head(*map(get, halves.head_inputs))
    made["body"] = halves.body(*map(get, halves.body_inputs))
    return [get(place) for place in halves.outputs]


def masked(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, mask: Tensor) -> Any:
    keys, values = grown(pk, pv, k, v)
    seen = (mask > 0.2)[:, None, None, :] & (torch.arange(mask.shape[1]) >= 0)
    return sdpa(q, keys, values, seen) * 2, keys, values


def test_masks_are_made_in_the_head_and_layers_in_the_body() -> None:
    gm, args, values = decode(masked, torch.rand(2, 31), dynamic=[0])
    assert share_bias(gm.graph, values) == 1
    gm.recompile()
    expected = gm(*[a.clone() if isinstance(a, Tensor) else a for a in args])
    halves = split(gm, values)
    head, body = calls(halves.head.graph), calls(halves.body.graph)
    assert head["gt"] and head["score_bias"] and not head["apack::attend_with_bias"]
    assert body["apack::attend_with_bias"] == 1 and body["apack::append_"] == 2
    assert not body["gt"] and not body["score_bias"]
    assert len(halves.storage) == 8
    fixed = [halves.body_fakes[i] for i in halves.storage]
    assert all(isinstance(f, Tensor) for f in fixed)
    slow = symbols(fixed)
    for fake in halves.body_fakes:
        assert symbols(fake) <= slow
    torch.testing.assert_close(run(halves, args), list(expected), **CLOSE)


def test_importance_is_updated_in_the_body_where_it_is() -> None:
    gm, args, values = decode(masked, torch.rand(2, 31), dynamic=[0], tiers=True)
    share_bias(gm.graph, values)
    gm.recompile()
    expected = gm(*[a.clone() if isinstance(a, Tensor) else a for a in args])
    halves = split(gm, values)
    head, body = calls(halves.head.graph), calls(halves.body.graph)
    assert body["apack::update_importance_"] == 1 and not head["apack::update_importance_"]
    assert head["apack::score_bias"] == 1 and not body["apack::score_bias"]
    (update,) = halves.body.graph.find_nodes(
        op="call_function", target=torch.ops.apack.update_importance_.default
    )
    inputs = [n for n in halves.body.graph.nodes if n.op == "placeholder"]
    assert inputs.index(update.args[0]) in halves.storage
    torch.testing.assert_close(run(halves, args), list(expected), **CLOSE)


def unmasked(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor) -> Any:
    keys, values = grown(pk, pv, k, v)
    return sdpa(q, keys, values), keys, values


def test_without_a_mask_there_is_no_bias() -> None:
    gm, args, values = decode(unmasked)
    assert share_bias(gm.graph, values) == 0
    halves = split(gm, values)
    assert calls(halves.body.graph)["apack::attend"] == 1
    expected = gm(*[a.clone() if isinstance(a, Tensor) else a for a in args])
    torch.testing.assert_close(run(halves, args), list(expected), **CLOSE)


def into_an_argument(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, x: Tensor) -> Any:
    x.add_(1)
    return unmasked(q, k, v, pk, pv)


def test_writes_to_arguments_are_refused() -> None:
    gm, _, values = decode(into_an_argument, torch.zeros(3))
    with pytest.raises(Inseparable, match="writes to an argument"):
        split(gm, values)


def by_the_length(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, x: Tensor) -> Any:
    keys, values = grown(pk, pv, k, v)
    return sdpa(q * x.shape[0], keys, values), keys, values


def test_what_is_made_of_a_moving_size_is_made_in_the_head() -> None:
    gm, args, values = decode(by_the_length, torch.zeros(31), dynamic=[0])
    halves = split(gm, values)
    assert calls(halves.head.graph)["mul"] == 1 and not calls(halves.body.graph)["mul"]
    expected = gm(*[a.clone() if isinstance(a, Tensor) else a for a in args])
    torch.testing.assert_close(run(halves, args), list(expected), **CLOSE)


def its_double(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, x: Tensor) -> Any:
    return (*unmasked(q, k, v, pk, pv), 2 * x.shape[0])


def test_results_that_are_moving_integers_are_refused() -> None:
    gm, _, values = decode(its_double, torch.zeros(5), dynamic=[0])
    with pytest.raises(Inseparable, match="integer"):
        split(gm, values)
