from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apack_compile.passes.find_weights import find_weights

from .capture import capture


class Layer(nn.Module):
    """Norm, attention with 2 heads of 8 and a cache, rotation by frequencies, residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.qkv = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(3))
        self.out = nn.Linear(16, 16)
        self.register_buffer("frequencies", torch.rand(4))

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.norm(x)
        q, k, v = (p(h).unflatten(-1, (2, 8)).transpose(1, 2) for p in self.qkv)
        angles = positions[:, :, None].float() * self.frequencies
        wide = torch.cat([angles, angles], -1)[:, None]
        crossed = torch.cat((-k[..., 4:], k[..., :4]), -1)
        k = k * wide.cos() + crossed * wide.sin()
        k, v = torch.cat([torch.tensor([]), k], -2), torch.cat([torch.tensor([]), v], -2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(y.transpose(1, 2).flatten(2)), k, v


class Decoder(nn.Module):
    """Embeds tokens, or puts image features in their places; two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 16)
        self.vision = nn.Linear(5, 16)
        self.first, self.second = Layer(), Layer()
        self.gain = nn.Parameter(torch.zeros(16))

    def decode(self, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        x, k0, v0 = self.first(x, positions)
        x, k1, v1 = self.second(x, positions)
        return x * (1 + self.gain), k0, v0, k1, v1

    def text(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        return self.decode(self.table(ids), positions)

    def image(self, ids: Tensor, positions: Tensor, pixels: Tensor) -> tuple[Tensor, ...]:
        x = self.table(ids)
        mask = (ids == 0)[..., None].expand_as(x)
        return self.decode(x.masked_scatter(mask, self.vision(pixels)), positions)

    def no_linear(self, x: Tensor) -> tuple[Tensor, ...]:
        h = x.unflatten(-1, (2, 8)).transpose(1, 2)
        k, v = torch.cat([torch.tensor([]), h], -2), torch.cat([torch.tensor([]), -h], -2)
        return F.scaled_dot_product_attention(h, k, v, is_causal=True), k, v


def found_by(model: nn.Module, run: Callable[..., Any], *args: Tensor) -> set[str]:
    """The names of the tensors of ``model`` that are found."""
    captured = capture(run, *args)
    found = find_weights(captured.graph, tuple(p.cached for p in captured.plan.sites))
    inputs = [n for n in captured.graph.nodes if n.op == "placeholder"]
    names = {t: name for name, t in [*model.named_parameters(), *model.named_buffers()]}
    return {names[captured.args[inputs.index(n)]] for n in found}


POSITIONS = torch.arange(12)[None]
IDS = torch.arange(12)[None].remainder(4)


def decoders_own(model: nn.Module) -> set[str]:
    every = [*model.named_parameters(), *model.named_buffers()]
    return {name for name, _ in every} - {"table.weight", "vision.weight", "vision.bias"}


def test_weights_behind_the_first_hidden_state_are_found_and_none_above() -> None:
    model = Decoder()
    found = found_by(model, model.text, IDS, POSITIONS)
    assert found == decoders_own(model)
    assert "gain" in found, "a weight of which something is computed first"
    assert {"first.frequencies", "second.frequencies"} <= found, "of the rotation, no parameters"


def test_a_graph_with_images_and_one_that_takes_embeddings_agree() -> None:
    model = Decoder()
    assert found_by(model, model.image, IDS, POSITIONS, torch.randn(3, 5)) == decoders_own(model)
    assert found_by(model, model.decode, torch.randn(1, 12, 16), POSITIONS) == decoders_own(model)


def test_a_graph_that_goes_on_to_logits_agrees_with_one_that_does_not() -> None:
    model = Decoder()

    def run(ids: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        x, *caches = model.text(ids, positions)
        return F.linear(x[:, -1:], model.table.weight), *caches

    assert found_by(model, run, IDS, POSITIONS) == decoders_own(model)


def test_keys_that_no_linear_layer_makes_have_no_weights() -> None:
    model = Decoder()
    assert found_by(model, model.no_linear, torch.randn(1, 12, 16)) == set()


def test_frequencies_times_positions_are_no_linear_layer() -> None:
    """Bug: positions named the layers of OLMo 2, whose keys are normed as a whole behind their
    projection: all layers had the codes of the first, and none was remembered."""

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.k = nn.Linear(16, 16, bias=False)
            self.register_buffer("frequencies", torch.rand(4))

        def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
            k = self.k(x)
            k = k * (k.float().pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
            k = (k * 0.5 + 0.25).unflatten(-1, (2, 8)).transpose(1, 2)
            angles = self.frequencies[None, :, None] @ positions[:, None, :].float()
            wide = torch.cat([angles.transpose(1, 2)] * 2, -1)[:, None]
            crossed = torch.cat((-k[..., 4:], k[..., :4]), -1)
            k = torch.cat([torch.tensor([]), k * wide.cos() + crossed * wide.sin()], -2)
            v = torch.cat([torch.tensor([]), self.k(x).unflatten(-1, (2, 8)).transpose(1, 2)], -2)
            return F.scaled_dot_product_attention(k, k, v, is_causal=True), k, v

    model = Normed()
    captured = capture(model, torch.rand(1, 12, 16), POSITIONS)
    (planned,) = captured.plan.sites
    inputs = [n for n in captured.graph.nodes if n.op == "placeholder"]
    weight = planned.cached.k.weight
    assert weight is not None
    assert captured.args[inputs.index(weight)] is model.k.weight
