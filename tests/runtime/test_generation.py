"""Every way of generating gives the tokens of the dense cache, and keeps the cache packed.

Beam search, several tokens on a packed cache and eager steps: ``test_cache_operations``.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch._dynamo.utils import counters

import apack_compile
from apack_compile import PackedKV

from .. import plain, zoo

EXACT = {"codec": "exact", "inner": "eager", "window": 8, "block": 16}
STEPS = 24


def generate(model: Any, inputs: dict[str, Any], **more: Any) -> Any:
    settings = {"do_sample": False, "max_new_tokens": STEPS, **more}
    return model.generate(**inputs, **settings, return_dict_in_generate=True)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    """Tests of this module share their graphs: tracing takes the time."""
    torch.manual_seed(0)


@dataclass
class Both:
    """A model, and the same one compiled."""

    case: zoo.Case
    ours: Any


@pytest.fixture(scope="module")
def both() -> Iterator[Both]:
    torch._dynamo.reset()
    case = zoo.llama(text=40, num_hidden_layers=1)
    yield Both(case, compiled(case.model))
    torch._dynamo.reset()


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="attentionpack", options=EXACT)


def check(got: Any, want: Any) -> None:
    assert torch.equal(got.sequences, want.sequences)
    assert is_packed(got.past_key_values)


def is_packed(cache: Any) -> bool:
    return all(isinstance(layer.keys, PackedKV) for layer in cache.layers)


def test_sampling_with_a_seed_gives_the_same_tokens_twice(both: Both) -> None:
    """A batch padded on the left, two samples of each row."""
    inputs = zoo.prompt(0, 40, 3, padded=True)

    def sampled(model: Any) -> Any:
        transformers.set_seed(5)
        settings = dict(do_sample=True, temperature=1.5, top_k=0, num_return_sequences=2)
        return generate(model, inputs, **settings)

    want, before = sampled(both.case.model), apack_compile.report(both.case.model).attends
    assert len(want.sequences.unique(dim=0)) == 6
    check(sampled(both.ours), want)
    graphs = apack_compile.report(both.case.model).graphs
    check(sampled(both.ours), want)
    report = apack_compile.report(both.case.model)
    assert report.graphs == graphs, "the second call compiles nothing"
    assert report.attends - before == 2 * (STEPS - 1)


@dataclass
class Streamer:
    """Takes tokens as they come, as transformers' TextStreamer does."""

    parts: list[Tensor] = field(default_factory=list)
    ended: bool = False

    def put(self, value: Tensor) -> None:
        self.parts.append(value.flatten().clone())

    def end(self) -> None:
        self.ended = True


def test_streaming_from_another_thread_gives_every_token_as_it_comes(both: Both) -> None:
    case, streamer = both.case, Streamer()
    want = generate(case.model, case.inputs)
    found: list[Any] = []

    def work() -> None:
        with torch.no_grad():
            found.append(generate(both.ours, case.inputs, streamer=streamer))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    check(found[0], want)
    assert streamer.ended
    assert [len(part) for part in streamer.parts[1:]] == [1] * STEPS
    assert torch.equal(torch.cat(streamer.parts), want.sequences[0])


def test_assisted_decoding_crops_the_cache_and_gives_the_dense_tokens(
    both: Both, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The assistant is compiled as well, and has a packed cache of its own."""
    case, cropped = both.case, []
    assistant = copy.deepcopy(case.model)
    for weight in assistant.parameters():
        weight.mul_(1.3)
    want = generate(case.model, case.inputs)
    crop = transformers.DynamicCache.crop

    def counted(self: Any, length: int) -> None:
        cropped.append((is_packed(self), self.get_seq_length() - length))
        crop(self, length)

    monkeypatch.setattr(transformers.DynamicCache, "crop", counted)
    check(generate(both.ours, case.inputs, assistant_model=compiled(assistant)), want)
    assert all(packed for packed, _ in cropped)
    assert any(tokens > 0 for _, tokens in cropped)


def test_turns_of_a_chat_share_one_cache_and_two_go_on_from_the_first(both: Both) -> None:
    """The first prompt is prefilled in chunks."""

    def turn(model: Any, cache: Any, said: Tensor, **more: Any) -> Any:
        inputs = {"input_ids": said, "attention_mask": torch.ones_like(said)}
        return generate(model, inputs, past_key_values=cache, max_new_tokens=12, **more)

    def chat(model: Any) -> list[Any]:
        generator = torch.Generator().manual_seed(1)
        first = both.case.inputs["input_ids"]
        found = [turn(model, transformers.DynamicCache(), first, prefill_chunk_size=16)]
        cache = found[0].past_key_values
        for shared in (copy.deepcopy(cache), cache):
            said = torch.randint(10, 190, (1, 20), generator=generator)
            found.append(turn(model, shared, torch.cat([found[0].sequences, said], 1)))
        said = torch.randint(10, 190, (1, 20), generator=generator)
        found.append(turn(model, cache, torch.cat([found[-1].sequences, said], 1)))
        return found

    for got, want in zip(chat(both.ours), chat(both.case.model), strict=True):
        check(got, want)


class Broken(plain.PlainAttention):
    """Graphs break at one place of every layer."""

    place = ""

    def forward(
        self, x: Tensor, past: tuple[Tensor, Tensor] | None, mask: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        self.pause("before the layer")
        batch, tokens, _ = x.shape
        q = self.q(x).view(batch, tokens, self.heads, self.dim).transpose(1, 2)
        k = self.k(x).view(batch, tokens, self.kv_heads, self.dim).transpose(1, 2)
        self.pause("between keys and values")
        v = self.v(x).view(batch, tokens, self.kv_heads, self.dim).transpose(1, 2)
        self.pause("before the cache")
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        self.pause("before attention")
        repeat = self.heads // self.kv_heads
        keys, values = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        self.pause("in attention")
        y = torch.nn.functional.scaled_dot_product_attention(q, keys, values, mask)
        self.pause("behind attention")
        return self.o(y.transpose(1, 2).reshape(batch, tokens, -1)), (k, v)

    def pause(self, place: str) -> None:
        if place == self.place:
            torch._dynamo.graph_break()


BREAKS = {
    "before the layer": STEPS - 1,
    "between keys and values": STEPS - 2,
    "before the cache": STEPS - 2,
    "before attention": 0,
    "in attention": 0,
    "behind attention": STEPS - 1,
}
"""Where graphs break, and how many steps attend to a packed cache.

A prefill that gets its keys from another graph shows no cache: the first decode step packs it.
"""


@pytest.mark.parametrize("place", BREAKS)
def test_graphs_may_break_anywhere(place: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = plain.PlainDecoder(layers=1)
    model.layers[0].__class__ = Broken
    model.layers[0].place = place
    ids = zoo.prompt(0, 40, 2, True)
    tokens, valid = ids["input_ids"], ids["attention_mask"]
    want, _ = plain.plain_generate(model, tokens, valid, STEPS, "bool")
    counters.clear()
    ours = torch.compile(model.eval(), backend="attentionpack", options=EXACT)
    got, past = plain.plain_generate(ours, tokens, valid, STEPS, "bool")
    assert torch.equal(got, want)
    report = apack_compile.report(model)
    assert counters["graph_break"]
    assert report.attends == BREAKS[place], str(report)
    assert isinstance(past[0][0], PackedKV) == (BREAKS[place] > 0)
    assert BREAKS[place] or any(graph.skipped for graph in report.graph_reports)
