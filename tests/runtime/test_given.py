"""Visual tokens that the user names."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import apack_compile
from apack_compile.runtime.given import fitted_mask, given_mask, visual_tokens

from .. import zoo
from .test_modal import compiled, images, kinds, notes, prefilled, stores

BOOL = {"dtype": torch.bool}


def test_a_mask_holds_in_its_block_and_the_innermost_counts() -> None:
    one, two = torch.ones(2, 3, **BOOL), torch.zeros(4, **BOOL)
    assert given_mask() is None
    with visual_tokens(one):
        assert given_mask() is one
        with pytest.raises(KeyError), visual_tokens(two):
            found = given_mask()
            assert found is not None and found.shape == (1, 4)
            raise KeyError
        assert given_mask() is one
    assert given_mask() is None


def test_a_mask_is_that_of_one_thread() -> None:
    seen: list[Tensor | None] = []
    with visual_tokens(torch.ones(1, 3, **BOOL)):
        thread = threading.Thread(target=lambda: seen.append(given_mask()))
        thread.start()
        thread.join()
    assert seen == [None]


@pytest.mark.parametrize(
    "mask",
    [None, [True], torch.ones(2, 3), torch.ones(1, 2, 3, **BOOL), torch.tensor(True)],
    ids=str,
)
def test_what_is_no_mask_is_refused(mask: Any) -> None:
    with pytest.raises(ValueError, match="accepted is a bool tensor"), visual_tokens(mask):
        pass


def test_a_mask_is_brought_to_the_shape_of_the_prompt() -> None:
    mask = torch.tensor([[True, False], [False, True]])
    assert torch.equal(fitted_mask(mask, 2, 2), mask)
    assert torch.equal(fitted_mask(mask, 4, 2), mask.repeat_interleave(2, 0))
    assert fitted_mask(mask, 2, 3).tolist() == [[True, False, False], [False, True, False]]
    for batch, length in ((3, 2), (1, 2), (2, 1)):
        with pytest.raises(ValueError, match=r"mask of shape \(2, 2\); the prompt has"):
            fitted_mask(mask, batch, length)


@torch.no_grad()
def test_it_wins_over_what_the_graph_shows() -> None:
    case = zoo.llava(side=112, text=150)
    ours = compiled(case.model)
    given = ~images(case)
    with visual_tokens(given):
        for _ in range(2):
            cache = prefilled(ours, case.inputs)
            for store in stores(cache):
                assert torch.equal(kinds(store), given[:, : store.coded])
    for store in stores(prefilled(ours, case.inputs)):
        assert torch.equal(kinds(store), images(case)[:, : store.coded])


@torch.no_grad()
def test_it_serves_where_the_graph_shows_nothing() -> None:
    case = zoo.llama(text=149)
    embeddings = case.model.get_input_embeddings()(case.inputs["input_ids"])
    mask = torch.arange(150)[None] < 70
    ours = compiled(case.model)
    with visual_tokens(mask):
        for _ in range(2):
            cache = prefilled(ours, {"inputs_embeds": embeddings})
            assert torch.equal(kinds(stores(cache)[0]), mask[:, : 150 - 16])
    code = stores(cache)[0].ref.code
    assert code.kinds is not None, "codes were fitted by it, too"
    assert "visual tokens" not in notes(case.model)


@torch.no_grad()
def test_a_mask_that_does_not_fit_is_an_error_not_a_dense_cache() -> None:
    case = zoo.llama(text=149)
    ours = compiled(case.model)
    prefilled(ours, case.inputs)
    with (
        visual_tokens(torch.ones(1, 151, **BOOL)),
        pytest.raises(ValueError, match="the prompt has"),
    ):
        prefilled(ours, case.inputs)
    for graph in apack_compile.report(case.model).graph_reports:
        assert "could not be rewritten" not in graph.reason
    assert kinds(stores(prefilled(ours, case.inputs))[0]).shape == (1, 150 - 16)


@torch.no_grad()
def test_beams_have_the_mask_of_their_sequence() -> None:
    case = zoo.llama(batch=2, text=99)
    mask = torch.arange(100) < torch.tensor([[60], [0]])
    ours = compiled(case.model)
    with visual_tokens(mask):
        told = ours.generate(
            **case.inputs, max_new_tokens=4, num_beams=3, do_sample=False,
            return_dict_in_generate=True,
        )  # fmt: skip
    assert kinds(stores(told.past_key_values)[0]).sum(1).tolist() == [60] * 3 + [0] * 3


@torch.no_grad()
def test_a_prompt_that_ran_eagerly_is_packed_by_its_mask() -> None:
    """As with ``CompileConfig``: the first step reads a dense past."""
    case = zoo.llama(text=149)
    mask = torch.arange(150)[None] < 70
    ours = compiled(case.model)
    with visual_tokens(mask):
        for _ in range(2):
            cache = transformers.DynamicCache()
            case.model(**case.inputs, past_key_values=cache)
            ours(input_ids=torch.tensor([[5]]), past_key_values=cache)
            for store in stores(cache):
                assert store.length == 151
                assert torch.equal(kinds(store), mask[:, : 151 - 16])
