from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from apack_compile.passes.find_visual import (
    IMAGE,
    NO_IMAGE,
    TEXT,
    Chosen,
    Given,
    Joined,
    Kinds,
    Put,
    find_visual,
)
from apack_compile.runtime.visual import TokenKinds

from .capture import Captured, capture

WIDTH, TOKENS, IMAGES = 8, 20, 5

Merge = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of text ``[B, S, C]``, features ``[N, C]`` and a mask ``[B, S]``."""


class Decoder(torch.nn.Module):
    """One attention layer on merged embeddings, with a cache."""

    def __init__(self, merge: Merge) -> None:
        super().__init__()
        self.merge = merge
        self.table = torch.nn.Embedding(50, WIDTH)
        self.place = torch.nn.Embedding(TOKENS + IMAGES, WIDTH)
        self.vision = torch.nn.Linear(3, WIDTH)
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.qkv = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, ids: Tensor, pixels: Tensor, mask: Tensor) -> Any:
        x = self.merge(self.table(ids), self.vision(pixels), mask)
        x = x * 2.0 + self.place(torch.arange(x.shape[1]))
        return self.layer(x)

    def layer(self, x: Tensor) -> Any:
        y = self.norm(x)
        q, k, v = (f(y).unflatten(-1, (2, -1)).transpose(1, 2) for f in self.qkv)
        keys, values = (torch.cat([torch.tensor([]), part], -2) for part in (k, v))
        mixed = F.scaled_dot_product_attention(q, keys, values, is_causal=True)
        return x + mixed.transpose(1, 2).flatten(2), keys, values


def masked(batch: int = 2) -> Tensor:
    mask = torch.zeros(batch, TOKENS, dtype=torch.bool)
    mask[0, 2 : 2 + IMAGES] = True
    mask[1:, 7 : 7 + IMAGES] = True
    return mask


def inputs(batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.randint(0, 50, (batch, TOKENS))
    return ids, torch.randn(batch * IMAGES, 3), masked(batch)


def kinds_of(captured: Captured) -> Kinds | str:
    (planned,) = captured.plan.sites
    return find_visual(captured.graph, planned.cached.k.new)


def scatter(text: Tensor, features: Tensor, mask: Tensor) -> Tensor:
    return text.masked_scatter(mask[..., None], features)


def scatter_function(text: Tensor, features: Tensor, mask: Tensor) -> Tensor:
    return torch.masked_scatter(text, mask[..., None].expand_as(text), features)


def scatter_in_place(text: Tensor, features: Tensor, mask: Tensor) -> Tensor:
    text = text.clone()
    text.masked_scatter_(mask[..., None], features)
    return text


def where(text: Tensor, features: Tensor, mask: Tensor) -> Tensor:
    wide = torch.zeros_like(text).masked_scatter(mask[..., None], features)
    return torch.where(mask[..., None], wide, text)


def where_not(text: Tensor, features: Tensor, mask: Tensor) -> Tensor:
    wide = features.view(len(text), IMAGES, -1).repeat(1, TOKENS // IMAGES, 1)
    return text.where(~mask[..., None], wide)


def setitem(text: Tensor, features: Tensor, mask: Tensor) -> Tensor:
    text = text.clone()
    text[mask] = features
    return text


def index_put(text: Tensor, features: Tensor, mask: Tensor) -> Tensor:
    rows, columns = torch.arange(2)[:, None], torch.tensor([[2], [7]]) + torch.arange(IMAGES)
    return text.index_put((rows, columns), features.view(2, IMAGES, -1))


def slices(text: Tensor, features: Tensor, mask: Tensor) -> Tensor:
    text, features = text.clone(), features.view(2, IMAGES, -1)
    text[0, 2:7] = features[0]
    text[1:, 7:12] = features[1:]
    return text


def sum_of_masked(text: Tensor, features: Tensor, mask: Tensor) -> Tensor:
    spread = torch.zeros_like(text).masked_scatter(mask[..., None], features)
    return text * ~mask[..., None] + spread


FORMS: dict[Merge, type] = {
    scatter: Chosen, scatter_function: Chosen, scatter_in_place: Chosen, where: Chosen,
    where_not: Chosen, setitem: Put, index_put: Put, sum_of_masked: Chosen,
}  # fmt: skip


@pytest.mark.parametrize("merge", FORMS, ids=lambda merge: merge.__name__)
def test_every_form_of_a_merge_gives_its_mask(merge: Merge) -> None:
    captured = capture(Decoder(merge), *inputs())
    kinds = kinds_of(captured)
    assert isinstance(kinds, frozenset)
    assert {type(origin) for origin in kinds - TEXT} == {FORMS[merge]}
    visual = TokenKinds(captured.gm).visual(kinds, captured.args)
    assert isinstance(visual, Tensor)
    assert torch.equal(visual.expand(2, TOKENS), masked())


def test_writes_of_parts_of_a_row_add_up() -> None:
    kinds = kinds_of(captured := capture(Decoder(slices), *inputs()))
    assert isinstance(kinds, frozenset)
    visual = TokenKinds(captured.gm).visual(kinds, captured.args)
    assert torch.equal(visual, masked())


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (0, 1, 0)])
def test_images_before_and_behind_text_are_told_apart(order: tuple[int, ...]) -> None:
    def join(text: Tensor, features: Tensor, mask: Tensor) -> Tensor:
        parts = text[:, :10], features.view(2, IMAGES, -1)
        return torch.cat([parts[i] for i in order], dim=1)

    captured = capture(Decoder(join), *inputs())
    kinds = kinds_of(captured)
    assert isinstance(kinds, frozenset)
    assert {type(origin) for origin in kinds - TEXT} == {Joined}
    visual = TokenKinds(captured.gm).visual(kinds, captured.args)
    row = [bool(part) for part in order for _ in range(IMAGES if part else 10)]
    assert visual.tolist() == [row, row]


def test_two_merges_in_a_row_add_up() -> None:
    def twice(text: Tensor, features: Tensor, mask: Tensor) -> Tensor:
        first = scatter(text, features, mask)
        return scatter(first, features * 2, mask.roll(6, 1))

    captured = capture(Decoder(twice), *inputs())
    kinds = kinds_of(captured)
    assert isinstance(kinds, frozenset)
    visual = TokenKinds(captured.gm).visual(kinds, captured.args)
    assert torch.equal(visual, masked() | masked().roll(6, 1))
    assert visual.sum() == 4 * IMAGES


def nothing(text: Tensor, features: Tensor, mask: Tensor) -> Tensor:
    return text


def zeros_for_padding(text: Tensor, features: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask[..., None], 0.0, text).masked_fill(mask[..., None], 0.0)


def pooled_text(text: Tensor, features: Tensor, mask: Tensor) -> Tensor:
    return torch.cat([text.mean(1, keepdim=True), text[:, 1:]], 1)


def other_text(text: Tensor, features: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask[..., None], text.flip(1), text)


def modulated(text: Tensor, features: Tensor, mask: Tensor) -> Tensor:
    """Cross-attention, adapters: tokens stay text."""
    weights = torch.softmax(text @ features.T, -1)
    return text + weights @ features


@pytest.mark.parametrize("merge", [nothing, zeros_for_padding, pooled_text, other_text, modulated])
def test_text_is_text_whatever_is_done_to_it(merge: Merge) -> None:
    assert kinds_of(capture(Decoder(merge), *inputs())) == NO_IMAGE


def test_an_attention_mask_made_by_where_is_no_image() -> None:
    class Masked(Decoder):
        def forward(self, ids: Tensor, valid: Tensor) -> Any:
            x = self.table(ids)
            q, k, v = (f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in self.qkv)
            keys, values = (torch.cat([torch.tensor([]), part], -2) for part in (k, v))
            hidden = torch.where(valid[:, None] > 0.5, 0.0, -1e9)  # [B, 1, S]
            bias = torch.where(valid[:, None, :] > 2, valid[:, None, :] * hidden, hidden)
            return F.scaled_dot_product_attention(q, keys, values, bias[:, None]), keys, values

    captured = capture(Masked(nothing), torch.randint(0, 50, (2, TOKENS)), torch.ones(2, TOKENS))
    assert kinds_of(captured) == NO_IMAGE


def test_keys_of_an_encoder_behind_cross_attention_do_not_count() -> None:
    """An encoder-decoder: images are in the encoder, whose result is only attended to."""

    class Seq2Seq(Decoder):
        def forward(self, ids: Tensor, encoded: Tensor) -> Any:
            x = self.table(ids)
            seen = F.scaled_dot_product_attention(x[:, None], encoded[:, None], encoded[:, None])
            return self.layer(x + seen[:, 0])

    captured = capture(
        Seq2Seq(nothing), torch.randint(0, 50, (2, TOKENS)), torch.randn(2, 9, WIDTH)
    )
    assert kinds_of(captured) == NO_IMAGE


def test_embeddings_of_another_graph_are_given() -> None:
    model = Decoder(nothing)
    captured = capture(model.layer, torch.randn(2, TOKENS, WIDTH))
    kinds = kinds_of(captured)
    (index,) = (i for i, a in enumerate(captured.args) if a.dim() == 3)
    assert kinds == frozenset({Given(index)})
    assert TokenKinds(captured.gm).visual(kinds, captured.args) is None


def test_keys_without_embeddings_give_a_reason() -> None:
    def prefill(q: Tensor, k: Tensor, v: Tensor) -> Any:
        keys, values = (torch.cat([torch.tensor([]), part], -2) for part in (k, v))
        return F.scaled_dot_product_attention(q, keys, values), keys, values

    captured = capture(prefill, *[torch.randn(1, 2, TOKENS, 4)] * 3)
    assert kinds_of(captured) == "the tokens' embeddings are not found in this graph"


def test_the_residual_stream_keeps_tokens_apart() -> None:
    """The first packed layer may stand above others that are not packed."""

    class Deep(Decoder):
        def forward(self, ids: Tensor, pixels: Tensor, mask: Tensor) -> Any:
            x = scatter(self.table(ids), self.vision(pixels), mask)
            y = self.norm(x).unflatten(-1, (2, -1)).transpose(1, 2)
            y = F.scaled_dot_product_attention(y, y, y, is_causal=True)  # no cache: not packed
            x = x + y.transpose(1, 2).flatten(2)
            return self.layer(x + F.gelu(self.qkv[0](x)))

    captured = capture(Deep(nothing), *inputs())
    kinds = kinds_of(captured)
    assert isinstance(kinds, frozenset)
    visual = TokenKinds(captured.gm).visual(kinds, captured.args)
    assert torch.equal(visual, masked())


def test_a_condition_that_the_graph_writes_to_is_not_evaluated() -> None:
    def written(text: Tensor, features: Tensor, mask: Tensor) -> Tensor:
        mask = mask.clone()
        mask[:, 0] = False
        return scatter(text, features, mask)

    captured = capture(Decoder(written), *inputs())
    kinds = kinds_of(captured)
    assert isinstance(kinds, frozenset)
    assert TokenKinds(captured.gm).visual(kinds, captured.args) is None


def test_batch_and_number_of_features_may_be_symbols() -> None:
    old, new = inputs(2), inputs(3)
    captured = capture(Decoder(setitem), *old, dynamic=True)
    kinds = kinds_of(captured)
    assert isinstance(kinds, frozenset)
    sizes = {2: 3, 2 * IMAGES: 3 * IMAGES, TOKENS: TOKENS}
    args = []
    for a in captured.args:
        given = [after for before, after in zip(old, new, strict=True) if before is a]
        args.append(sizes[a] if isinstance(a, int) else given[0] if given else a)
    assert sum(isinstance(a, int) for a in args) >= 2
    visual = TokenKinds(captured.gm).visual(kinds, args)
    assert torch.equal(visual, masked(3))


def test_features_with_learned_positions_are_images() -> None:
    """Vision towers look up positions: what is computed from pixels is no text for that."""

    def merge(text: Tensor, features: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask[..., None], features.view(2, TOKENS, -1), text)

    class Positions(Decoder):
        def forward(self, ids: Tensor, pixels: Tensor, mask: Tensor) -> Any:
            patches = self.vision(pixels).view(2, TOKENS, -1)
            features = patches + self.place(torch.arange(TOKENS).expand(2, -1))
            return self.layer(merge(self.table(ids), features, mask))

    ids, _, mask = inputs()
    captured = capture(Positions(nothing), ids, torch.randn(2 * TOKENS, 3), mask)
    kinds = kinds_of(captured)
    assert isinstance(kinds, frozenset)
    (merged,) = kinds
    assert isinstance(merged, Chosen)
    assert (merged.chosen, merged.other) == (IMAGE, TEXT)


def test_parameters_are_not_images() -> None:
    class Soft(Decoder):
        def __init__(self) -> None:
            super().__init__(nothing)
            self.prompt = torch.nn.Parameter(torch.randn(1, IMAGES, WIDTH))

        def forward(self, ids: Tensor) -> Any:
            x = torch.cat([self.prompt.expand(2, -1, -1), self.table(ids)], 1)
            return self.layer(x)

    assert kinds_of(capture(Soft(), inputs()[0])) == NO_IMAGE
