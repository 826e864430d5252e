from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from apack_compile.passes.ancestry import as_networkx
from apack_compile.passes.find_rotation import find_rotation

from .capture import capture

Rotate = Callable[[Tensor, Tensor, Tensor], Tensor]


def halves(k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = k[..., : k.shape[-1] // 2], k[..., k.shape[-1] // 2 :]
    return (k * cos) + (torch.cat((-second, first), dim=-1) * sin)


def neighbours(k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    crossed = torch.stack((-k[..., 1::2], k[..., ::2]), dim=-1).flatten(-2)
    return crossed * sin + k.float() * cos


def partial(k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = halves(k[..., :4], cos[..., :4], sin[..., :4])
    return torch.cat([turned.to(k.dtype), k[..., 4:]], dim=-1)


def nothing(k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return k


def a_bias_and_a_scale(k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return k * cos + k * sin


def before_heads(k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    tables = cos.transpose(1, 2), sin.transpose(1, 2)  # [B, S, 1, R]
    return halves(k.transpose(1, 2).contiguous(), *tables).transpose(1, 2)


def before_heads_permuted(k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    tables = cos.transpose(1, 2), sin.transpose(1, 2)
    return halves(k.permute(0, 2, 1, 3).contiguous(), *tables).permute(0, 2, 1, 3)


def transposed_otherwise(k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return halves(k.transpose(2, 3), cos.transpose(2, 3), sin.transpose(2, 3)).transpose(2, 3)


def prefill(rotate: Rotate) -> Callable[..., tuple[Tensor, ...]]:
    def run(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        past = torch.tensor([])
        keys = torch.cat([past, rotate(k, cos, sin)], dim=-2)
        values = torch.cat([past, v], dim=-2)
        out = F.scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=True)
        return out, keys, values

    return run


def found_in(rotate: Rotate) -> tuple[str, str, bool] | None:
    tokens = [torch.randn(1, h, 20, 8) for h in (4, 2, 2)]
    angles = torch.randn(1, 1, 20, 8)
    captured = capture(prefill(rotate), *tokens, angles.cos(), angles.sin())
    (planned,) = captured.plan.sites
    found = find_rotation(as_networkx(captured.graph), planned.cached.k.new)
    if found is None:
        return None
    return str(found.cos), str(found.sin), found.interleaved


@pytest.mark.parametrize(("rotate", "interleaved"), [(halves, False), (neighbours, True)])
def test_rotations_are_found_with_their_tables(rotate: Rotate, interleaved: bool) -> None:
    found = found_in(rotate)
    assert found is not None
    assert "cos" in found[0] and "sin" in found[1] and found[2] is interleaved


def test_a_rotation_of_the_first_components_is_found() -> None:
    found = found_in(partial)
    assert found is not None and found[2] is False


@pytest.mark.parametrize("rotate", [before_heads, before_heads_permuted])
def test_a_rotation_before_heads_and_tokens_change_places_is_found(rotate: Rotate) -> None:
    """Bug: such keys were fitted as if they had no rotation, for a short reach."""
    found = found_in(rotate)
    assert found is not None and found[2] is False


@pytest.mark.parametrize("rotate", [nothing, a_bias_and_a_scale, transposed_otherwise])
def test_other_keys_have_no_rotation(rotate: Rotate) -> None:
    assert found_in(rotate) is None
