"""Kernels where rows of codes are not tokens, or many tokens are exact: against plain operators.

Those run in float64 here; what they mean is tested against the oracle elsewhere. Interpreted on a
CPU, compiled on a GPU.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from apack_compile.cache import Policy
from apack_compile.codec import Code, Layout, ModalLayout, TransformLayout
from apack_compile.codec.evicting import evicting
from apack_compile.codec.modal import modal
from apack_compile.codec.tiered import TIERS, layout_of
from apack_compile.kernels.kinds import sort_tokens
from apack_compile.kernels.planes import counted
from apack_compile.kernels.triton import launch
from apack_compile.kernels.triton.calls import INTERPRETED
from apack_compile.kernels.triton.launch import attend_packed, takes
from apack_compile.kernels.triton.plan import Config

from ..helpers import hand_code, pair_waves, poison

DEVICE = "cpu" if INTERPRETED else "cuda"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

POLICY = Policy(sinks=3, extra=5, window=7, block=16, chunk=16)
SMALL = Config(tokens=16, rows=16)

KEYS = TransformLayout(2, 64, 1, 16, 32, 16, 0)
VALUES = replace(KEYS, gain=1)
TURNED = replace(KEYS, rotary=64)


def tiered(shares: tuple[int, ...] = TIERS, groups: int = 1) -> TransformLayout:
    return layout_of((2, 64, groups), (16, 32, 16), True, shares)


def code_of(layout: Layout, seed: int) -> Code:
    """A code whose decoded tokens are of the size of real ones, and whose errors are told."""
    code = hand_code(layout, seed)
    params, at = list(code.params), 0
    inner = [layout.visual, layout.text] if isinstance(layout, ModalLayout) else [layout]
    for part in inner:
        size = (part.heads // part.groups * part.dim * part.rank) ** 0.5
        params[at + 3] = params[at + 3] * torch.tensor([20.0, 1.0])[:, None, None] / size
        metric = at + 4 + (part.gain > 0)
        params[metric] = torch.eye(part.dim).expand(part.heads, -1, -1).to(torch.float16)
        if part.positional:
            params[at + part.param_count - 1] = pair_waves(part)
        at += part.param_count
    return Code(layout, tuple(params))


def case(
    k: Layout, v: Layout, *, batch: int = 2, length: int = 70, queries: int = 1, repeat: int = 2,
    dtype: torch.dtype = torch.float16, visible: Tensor | None = None, alike: bool = True,
    broken: tuple[str, int] | None = None, whole: bool = True, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """One layer of a prompt. alike: keys and values go by the same importance.

    broken: a side, and a token of it in sequence 0 that is no number; without whole in one channel.
    """
    generator = torch.Generator().manual_seed(seed)
    codes = code_of(k, 5), code_of(v, 6)
    importance = torch.rand(batch, length, generator=generator)
    coded = max(length - POLICY.window, 0)
    kinds = None
    if k.plane_kinds:
        visual = torch.rand(batch, length, generator=generator) < 0.4
        kinds = sort_tokens(visual, coded, POLICY.chunk).tensors(torch.device("cpu"))
    sides = []
    for name, code in zip("kv", codes, strict=True):
        layout = code.layout
        x = torch.randn(batch, layout.heads, length, layout.dim, generator=generator).to(dtype)
        if broken is not None and broken[0] == name:
            if whole:
                x[0, :, broken[1]] = float("nan")
            else:
                x[0, 0, broken[1], 3] = float("inf")
        weights = importance if alike or name == "k" else importance.flip(1)
        made = torch.ops.apack.encode(
            x, visible, list(code.params), layout.spec, POLICY.sinks, POLICY.extra, POLICY.window,
            POLICY.ring, POLICY.chunk, weights, kinds,
        )  # fmt: skip
        count = len(layout.payload_fields(dtype)) + 3
        lengths = torch.tensor([coded, length - coded])
        side = poison([*made[:count], *code.params], lengths, layout)
        sides.append(poison_rows(side, layout, coded))
    q = torch.randn(batch, k.heads * repeat, queries, k.dim, generator=generator).to(dtype)
    return {"q": q, "mask": None, "k": sides[0], "v": sides[1], "lengths": lengths, "codes": codes}


def poison_rows(side: list[Tensor], layout: Layout, coded: int) -> list[Tensor]:
    """Rows of planes behind those in use are made no numbers, or arbitrary codes."""
    end = layout.tokenwise
    for plane in range(1, len(layout.shares) + 1):
        used = counted(layout, side[end - 1], plane, coded)
        rows = side[end + plane - 1]
        stale = torch.arange(rows.shape[1]) >= used
        rows.masked_fill_(stale[..., None], float("nan") if rows.is_floating_point() else 171)
    return side


def kernels(given: dict[str, Any], config: Config | None = SMALL) -> Tensor:
    codes, mask = given["codes"], given["mask"]
    specs = [code.layout.spec for code in codes]
    bias = None
    if mask is not None:
        ring = given["k"][len(codes[0].layout.payload_fields(torch.float16)) + 2].shape[2]
        size = given["k"][0].shape[1]
        bias = torch.ops.apack.score_bias(mask, given["lengths"], size, ring, given["q"].dtype)
        bias = bias.to(DEVICE)
    k, v = ([t.to(DEVICE) for t in given[side]] for side in "kv")
    q, lengths = given["q"].to(DEVICE), given["lengths"].to(DEVICE)
    sinks = given.get("sinks")
    sinks = None if sinks is None else sinks.to(DEVICE)
    more = (given.get("softcap", 0.0), sinks, config)
    assert takes(q, *specs)
    return attend_packed(q, bias, k, v, lengths, 0.125, *specs, *more).cpu()


def check(given: dict[str, Any], config: Config | None = SMALL) -> None:
    """Relative error within the rounding of the dtype; and twice the same, to the bit."""
    specs = [code.layout.spec for code in given["codes"]]
    q, mask, k, v = (given[name] for name in ("q", "mask", "k", "v"))
    more = given.get("softcap", 0.0), given.get("sinks")
    want = torch.ops.apack.attend(q.double(), mask, k, v, given["lengths"], 0.125, *specs, *more)
    out = kernels(given, config)
    assert out.dtype == q.dtype and out.shape == want.shape
    finite = want.isfinite()
    assert torch.equal(out.isfinite(), finite)
    error = (out.double() - want)[finite].norm() / want[finite].norm()
    assert error < torch.finfo(out.dtype).eps, f"relative error {error:.2e}"
    if not INTERPRETED:
        assert torch.equal(kernels(given, config).nan_to_num(7), out.nan_to_num(7))


def kept(layout: TransformLayout, share: int = 80) -> TransformLayout:
    return replace(layout, exact=share)


def both_kinds(
    gain: int, rotary: int = 0, tiers: tuple[tuple[int, ...], tuple[int, ...]] = ((), ()),
    evicted: int = 0, exact: int = 0,
) -> Layout:  # fmt: skip
    """Codes by kind; tiers: of visual tokens and of text."""
    visual = layout_of((2, 64, 2), (0, 16, 32), gain > 0, tiers[0])
    text = layout_of((2, 64, 1), (32, 32, 16), gain > 0, tiers[1])
    more = {"rotary": rotary, "exact": exact}
    return modal(evicting(replace(visual, **more), evicted), replace(text, **more))


BOTH = TIERS, TIERS


PAIRS = {
    "tiers": (KEYS, tiered()),
    "tiers in groups": (replace(KEYS, groups=2), tiered(groups=2)),
    "tiers, four bytes at a time": (KEYS, layout_of((2, 64, 1), (32, 32, 64), True, TIERS)),
    "two tiers": (KEYS, tiered((16, 4))),
    "one tier": (KEYS, tiered((9,))),
    "tiers, keys turned": (TURNED, tiered()),
    "evict": (evicting(KEYS, 10), evicting(VALUES, 10)),
    "evict, keys turned": (evicting(TURNED, 10), evicting(VALUES, 10)),
    "evict and tiers": (evicting(KEYS, 10), evicting(tiered(), 10)),
    "evict keys": (evicting(KEYS, 10), VALUES),
    "evict values": (KEYS, evicting(replace(VALUES, gain=0), 10)),
    "kept": (kept(KEYS), kept(VALUES)),
    "kept keys": (kept(KEYS), VALUES),
    "kept, keys turned": (kept(TURNED), kept(VALUES)),
    "kept and tiers": (kept(KEYS), replace(tiered(), exact=80)),
    "kept and evict": (evicting(kept(KEYS), 10), evicting(kept(VALUES), 10)),
    "all three": (evicting(kept(KEYS), 10), evicting(replace(tiered(), exact=80), 10)),
    "kinds": (both_kinds(0), both_kinds(1)),
    "kinds, keys turned": (both_kinds(0, 64), both_kinds(1)),
    "kinds, tiers": (both_kinds(0), both_kinds(1, tiers=BOTH)),
    "kinds, tiers of text": (both_kinds(0), both_kinds(1, tiers=((), (16, 4)))),
    "kinds, tiers of images": (both_kinds(0), both_kinds(1, tiers=((9,), ()))),
    "kinds, evict": (both_kinds(0, evicted=10), both_kinds(1, evicted=10)),
    "kinds, evict values": (both_kinds(0), both_kinds(1, evicted=10)),
    "kinds, evict keys": (both_kinds(0, evicted=10), both_kinds(1)),
    "kinds, kept": (both_kinds(0, exact=80), both_kinds(1, exact=80)),
    "kinds, tiers and evict": (both_kinds(0, evicted=10), both_kinds(1, tiers=BOTH, evicted=10)),
    "kinds, all": (
        both_kinds(0, 64, evicted=10, exact=80),
        both_kinds(1, tiers=BOTH, evicted=10, exact=80),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_every_layout(name: str) -> None:
    check(case(*PAIRS[name]))


@pytest.mark.parametrize("name", PAIRS if DEVICE == "cuda" else ["evict and tiers", "kinds, all"])
def test_programs_over_rows_do_ring_and_pool(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those over slots, behind the splits, do none of it."""
    monkeypatch.setattr(launch, "exact_beside", lambda *_: 1)
    check(case(*PAIRS[name]), replace(SMALL, beside=1))


FEW = ["tiers", "evict and tiers", "kept", "kinds", "kinds, all"]


@pytest.mark.parametrize("name", PAIRS if DEVICE == "cuda" else FEW)
def test_masks_padding_and_several_queries(name: str) -> None:
    visible = torch.arange(70)[None] >= torch.tensor([0, 11])[:, None]
    given = case(*PAIRS[name], visible=visible, queries=3)
    given["mask"] = (torch.rand(2, 4, 3, 70) < 0.7) & visible[:, None, None]
    check(given)
    given["mask"] = visible[:, None, None]
    given["sinks"] = torch.randn(4)
    check(given)


@pytest.mark.parametrize(
    "name", PAIRS if DEVICE == "cuda" else ["all three", "kinds", "kinds, all"]
)
def test_capped_scores(name: str) -> None:
    check({**case(*PAIRS[name], dtype=torch.bfloat16), "softcap": 5.0})


DROPPING = ["evict", "evict and tiers", "kept and evict", "kinds, evict", "kinds, all"]


@pytest.mark.parametrize("name", DROPPING)
def test_keys_and_values_that_dropped_different_tokens(name: str) -> None:
    check(case(*PAIRS[name], alike=False))


@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize(
    "name",
    ["evict", "evict keys", "evict values", "kept", "kinds", "kinds, evict", "kinds, evict values"],
)
def test_a_token_that_is_no_number_is_seen(name: str, side: str, alike: bool) -> None:
    """Whether it was dropped or not, and whatever became of its other half."""
    if name in ("kept", "kinds") and not alike:
        pytest.skip("drops nothing")
    tokens = range(8, 60, 4) if DEVICE == "cuda" else (20, 33)
    for token in tokens:
        given = case(*PAIRS[name], alike=alike, broken=(side, token))
        out = kernels(given)
        assert out[0].isnan().all() and out[1].isfinite().all()
        check(given)


@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize(
    "name",
    [
        "evict",
        "evict keys",
        "evict values",
        "kinds, evict",
        "kinds, evict keys",
        "kinds, evict values",
    ],
)
def test_a_dropped_token_with_one_number_that_is_none(name: str, softcap: float, side: str) -> None:
    """Bug: heads that stayed finite had the value of another token, whose row is the first."""
    tokens = range(8, 60, 3) if DEVICE == "cuda" else (12, 33)
    for token in tokens:
        given = case(*PAIRS[name], alike=False, broken=(side, token), whole=False)
        check({**given, "softcap": softcap})


@pytest.mark.parametrize("name", PAIRS if DEVICE == "cuda" else ["all three", "kinds, all"])
@pytest.mark.parametrize("length", [3, 7, 8, 23])
def test_few_tokens(name: str, length: int) -> None:
    """None, one, and few of them coded."""
    check(case(*PAIRS[name], length=length))


@pytest.mark.parametrize("name", PAIRS if DEVICE == "cuda" else ["evict and tiers", "kinds, all"])
def test_more_tokens_than_one_program_ranks(name: str) -> None:
    check(case(*PAIRS[name], batch=1, length=2500 if DEVICE == "cuda" else 1100), None)


def test_no_sequences() -> None:
    given = case(*PAIRS["evict and tiers"])
    for side in "kv":
        stored = given[side]
        count = len(stored) - len(given["codes"]["kv".index(side)].params)
        given[side] = [t[:0] for t in stored[:count]] + stored[count:]
    given["q"] = given["q"][:0]
    assert kernels(given).shape == (0, 4, 1, 64)


def test_what_the_kernels_do_not_take() -> None:
    q = torch.empty(1, 4, 1, 64, dtype=torch.float16)
    assert not takes(q, tiered().spec, VALUES.spec)
    assert not takes(q, both_kinds(0).spec, VALUES.spec)
    assert not takes(q, both_kinds(1, tiers=BOTH).spec, both_kinds(1).spec)
    assert not takes(q, replace(KEYS, r4=24).spec, tiered().spec)
