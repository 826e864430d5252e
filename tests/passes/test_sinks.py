from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from .capture import CLOSE, capture, repeat_kv, rewrite, run
from .written_out import SINKS, column, decode, given, plain


def less_max(s: Tensor) -> Tensor:
    return s - s.max(dim=-1, keepdim=True).values


WITH_SINKS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "as gpt_oss": lambda q, k, m, x: F.softmax(
        less_max(torch.cat([plain(q, k) + m, column(q, x)], dim=-1)), dim=-1)[..., :-1],
    "amax": lambda q, k, m, x: (
        lambda s: (s - s.amax(-1, keepdim=True)).softmax(-1)[:, :, :, :-1])(
            torch.cat([plain(q, k) + m, column(q, x)], 3)),
    "cast": lambda q, k, m, x: torch.cat(
        [plain(q, k).double() + m, x.double()[None, :, None, None].expand(2, 4, 3, 1)], -1
    ).softmax(-1).float()[..., :-1],
    "capped": lambda q, k, m, x: torch.cat(
        [(plain(q, k) / 2).tanh() * 2 + m, x.view(4, 1, 1).expand(2, 4, 3, 1)], -1
    ).softmax(-1)[..., :-1],
}  # fmt: skip


@pytest.mark.parametrize("form", WITH_SINKS)
def test_sinks_among_the_scores_take_part_on_codes(form: str) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, m: Tensor, x: Tensor) -> Any:
        keys, values = torch.cat([pk, k], 2), torch.cat([pv, v], 2)
        return WITH_SINKS[form](q, repeat_kv(keys), m, x) @ repeat_kv(values), keys, values

    captured = capture(fn, *given(3), SINKS)
    assert (captured.treatments, captured.reasons) == (["attend"], [])
    assert captured.plan.sites[0].cached.site.sinks is not None
    new = rewrite(captured)
    (got, *_), _ = run(captured, new)
    torch.testing.assert_close(got, captured.expected()[0], **CLOSE)
    assert not {"softmax", "matmul", "unpack", "max", "amax", "expand"} & set(new.calls)


def test_scores_less_their_maximum_are_those_scores() -> None:
    captured = capture(decode(lambda q, k, m: less_max(plain(q, k) + m).softmax(-1)), *given(3))
    assert (captured.treatments, captured.reasons) == (["attend"], [])
    (got, *_), _ = run(captured, rewrite(captured))
    torch.testing.assert_close(got, captured.expected()[0], **CLOSE)
