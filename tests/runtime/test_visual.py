"""Which tokens are visual, through every cut that Dynamo makes in a model."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from apack_compile import compat
from apack_compile.hooks import install_capturing_hooks
from apack_compile.passes.find_visual import NO_IMAGE, find_visual
from apack_compile.passes.plan import make_plan
from apack_compile.runtime.visual import MEMORY, Memory, TokenKinds

from .. import versions, zoo


def told(case: zoo.Case, **how: Any) -> list[Any]:
    """What every graph with a first prefill says: a mask, a bool, None, or a reason."""
    found: list[Any] = []

    def backend(gm: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        sites = make_plan(gm.graph).having("encode")
        kinds = find_visual(gm.graph, sites[0].cached.k.new) if sites else NO_IMAGE
        reader = TokenKinds(gm)

        def run(*args: Any) -> Any:
            if sites:
                found.append(kinds if isinstance(kinds, str) else reader.visual(kinds, args))
            return reader.run(gm, args)

        return run

    install_capturing_hooks(case.model)
    torch.compile(case.model, backend=backend, **how)(**case.inputs, use_cache=True)
    return found


FAMILIES = [
    zoo.llava, zoo.qwen2_vl, zoo.smolvlm, zoo.idefics3, zoo.paligemma, zoo.internvl, zoo.gemma3,
    zoo.aria,
]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_the_visual_tokens_of_a_family_are_found_exactly(family: Callable[..., zoo.Case]) -> None:
    case = family(batch=2, padded=True, text=12)
    ids = case.inputs["input_ids"]
    masks = told(case)
    assert len(masks) == (2 if family is zoo.aria and versions.ARIA_BREAKS else 1)
    for mask in masks:
        assert isinstance(mask, Tensor)
        assert torch.equal(mask.expand(ids.shape), ids == zoo.IMAGE)


@pytest.mark.parametrize("family", [zoo.llava, zoo.qwen2_vl, zoo.llama])
def test_prompts_without_an_image_have_none(family: Callable[..., zoo.Case]) -> None:
    case = family(text=12)
    ids = case.inputs["input_ids"].clamp(max=190)
    case.inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert told(case) == [NO_IMAGE]


def test_a_model_in_one_graph_is_read_in_one_graph() -> None:
    if compat.torch_version() < (2, 13) or versions.BEFORE_5:
        pytest.skip("older torch and transformers break this model's graph, whatever the backend")
    case = zoo.llava(text=12)
    (mask,) = told(case, fullgraph=True)
    ids = case.inputs["input_ids"]
    assert torch.equal(mask.expand(ids.shape), ids == zoo.IMAGE)


def test_text_to_which_something_unknown_is_added_is_of_unknown_kind() -> None:
    """Aria's experts run outside of graphs: the second layer cannot know what they add."""
    if not versions.ARIA_BREAKS:
        pytest.skip("with this transformers the whole model is one graph")
    case = zoo.aria(text=12)
    ids = case.inputs["input_ids"].clamp(max=190)
    case.inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert told(case) == [False, None]


def test_embeddings_that_the_user_made_are_of_unknown_kind() -> None:
    case = zoo.llama(text=12)
    embeddings = case.model.get_input_embeddings()(case.inputs["input_ids"])
    case.inputs = {"inputs_embeds": embeddings, "attention_mask": case.inputs["attention_mask"]}
    assert told(case) == [None]


def test_what_is_noted_is_known_while_the_embeddings_live() -> None:
    memory = Memory()
    embeddings, mask = torch.zeros(1, 3, 2), torch.tensor([[True, False, True]])
    memory.note(embeddings, mask)
    assert memory.of(embeddings) is mask
    assert memory.of(embeddings.clone()) is None
    memory.note(embeddings, False)
    assert memory.of(embeddings) is False
    del embeddings
    gc.collect()
    assert len(memory._known) == 0


def test_embeddings_that_were_written_to_are_of_unknown_kind() -> None:
    """Images written into text by eager code between two graphs."""
    memory, embeddings = Memory(), torch.zeros(1, 3, 2)
    memory.note(embeddings, False)
    embeddings[:, 1] = 5.0
    assert memory.of(embeddings) is None


def test_inference_tensors_count_no_writes_and_are_never_sure_to_be_text() -> None:
    memory, mask = Memory(), torch.ones(1, 3) > 0
    with torch.inference_mode():
        embeddings = torch.zeros(1, 3, 2)
        memory.note(embeddings, False)
        assert memory.of(embeddings) is None
        memory.note(embeddings, mask)
        assert memory.of(embeddings) is mask


def test_a_graph_that_writes_images_into_its_input_leaves_a_word_about_it() -> None:
    def backend(gm: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        return lambda *args: TokenKinds(gm).run(gm, args)

    def write(text: Tensor, mask: Tensor, features: Tensor) -> None:
        text[mask] = features

    mask = torch.tensor([[False, True, True]])
    text, features = torch.zeros(1, 3, 4), torch.randn(2, 4)
    first = torch.tensor([[True, False, False]])
    MEMORY.note(text, first)
    torch.compile(write, backend=backend)(text, mask, features)
    known = MEMORY.of(text)
    assert isinstance(known, Tensor)
    assert torch.equal(known, mask | first)


def layer(width: int = 4) -> Callable[..., Any]:
    def forward(x: Tensor, w: Tensor) -> Any:
        k = torch.nn.functional.linear(x, w).unflatten(-1, (1, -1)).transpose(1, 2)
        keys = torch.cat([torch.tensor([]), k], -2)
        y = torch.nn.functional.scaled_dot_product_attention(k, keys, keys)
        return (x + y[:, 0]) @ w, keys

    return forward


@pytest.mark.parametrize(
    ("known", "may_be"), [(None, False), (False, False), (torch.ones(1, 3) > 0, True)]
)
def test_only_known_images_make_a_prompt_worth_a_look(known: Any, may_be: bool) -> None:
    captured: list[tuple[TokenKinds, Any, tuple[Any, ...]]] = []

    def backend(gm: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        (planned,) = make_plan(gm.graph).sites
        kinds, reader = find_visual(gm.graph, planned.cached.k.new), TokenKinds(gm)

        def run(*args: Any) -> Any:
            captured.append((reader, kinds, args))
            return gm(*args)

        return run

    x = torch.randn(1, 3, 4)
    if known is not None:
        MEMORY.note(x, known)
    torch.compile(layer(), backend=backend)(x, torch.nn.Parameter(torch.eye(4)))
    ((reader, kinds, args),) = captured
    assert reader.may_be_visual(kinds, args) is may_be
    visual = reader.visual(kinds, args)
    assert torch.equal(visual, known) if isinstance(known, Tensor) else visual is known
