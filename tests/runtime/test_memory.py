"""Memory is really freed: counted by storage, not by formula."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.profiler import ProfilerActivity, profile

from .. import plain, zoo

LAYERS = 6


def model_of_two_heads_of_64(layers: int) -> Any:
    """128 channels a layer, so that a fit wants 512 tokens."""
    config = zoo.text_config(
        num_hidden_layers=layers, hidden_size=256, head_dim=64, num_attention_heads=4,
        max_position_embeddings=8192,
    )  # fmt: skip
    return zoo.make("LlamaForCausalLM", transformers.LlamaConfig(**config))


def reachable_storage_bytes(root: Any) -> int:
    """Bytes of every tensor storage that attributes and items lead to from ``root``, each once."""
    seen: set[int] = set()
    storages: dict[int, int] = {}
    stack = [root]
    while stack:
        value = stack.pop()
        if id(value) in seen or isinstance(value, (type, type(gc))) or callable(value):
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            if type(value) is torch.Tensor:
                storage = value.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
            stack.extend(value.__dict__.values())
        elif isinstance(value, (list, tuple, set)):
            stack.extend(value)
        elif isinstance(value, dict):
            stack.extend(value.values())
        else:
            stack.extend(getattr(value, "__dict__", {}).values())
            slots = getattr(type(value), "__slots__", ())
            stack.extend(getattr(value, s, None) for s in slots if s != "__weakref__")
    return sum(storages.values())


def prefill(model: Any, length: int, dtype: torch.dtype = torch.float32) -> Any:
    cache = transformers.DynamicCache()
    ids = torch.randint(10, 190, (1, length), generator=torch.Generator().manual_seed(3))
    model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
    return cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_of_4096_tokens_at_ratio_8_is_at_most_a_sixth_of_the_dense_one(
    dtype: torch.dtype,
) -> None:
    model = model_of_two_heads_of_64(2).to(dtype)
    dense = reachable_storage_bytes(prefill(model, 4096))
    assert dense == 2 * 2 * 4096 * 128 * dtype.itemsize
    options = {"ratio": 8, "inner": "eager"}
    packed_model = torch.compile(model, backend="attentionpack", options=options)
    first = reachable_storage_bytes(prefill(packed_model, 4096))
    again = reachable_storage_bytes(prefill(packed_model, 4096))
    assert first <= dense / 6, f"{dense / first:.2f}x after the prefill that fits"
    assert again <= dense / 6, f"{dense / again:.2f}x after one that encodes"


def peak_bytes(model: Any, length: int, run: Callable[[Any, int], Any] = prefill) -> int:
    """Most bytes allocated at one time during a prefill, above what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        cache = run(model, length)
    del cache
    live = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def test_dense_caches_of_all_layers_never_exist_at_once_during_prefill() -> None:
    length = 2048
    model = model_of_two_heads_of_64(LAYERS)
    one_layer = 2 * length * 128 * 4
    stock = torch.compile(model, backend="eager", dynamic=False)
    prefill(stock, length)
    stock_peak = peak_bytes(stock, length)
    torch._dynamo.reset()
    ours = torch.compile(model, backend="attentionpack", options={"ratio": 8, "inner": "eager"})
    prefill(ours, length)  # learns the codes
    prefill(ours, length)  # compiles
    our_peak = peak_bytes(ours, length)
    # The dense cache of all layers is as many units; all but about one layer and the packed
    # sixth of the others must be gone from the peak.
    assert stock_peak - our_peak >= (LAYERS - 2.5) * one_layer, (
        f"{stock_peak / one_layer:.2f} and {our_peak / one_layer:.2f} layers at the peak"
    )


def decoder_of_wide_caches(layers: int) -> plain.PlainDecoder:
    """Hidden 32, but 4 heads of 64: caches are what takes memory, not what passes through."""
    model = plain.PlainDecoder(layers, hidden=32)
    for layer in model.layers:
        layer.heads, layer.kv_heads, layer.dim = 4, 4, 64
        layer.q, layer.k, layer.v = (nn.Linear(32, 256, bias=False) for _ in range(3))
        layer.o = nn.Linear(256, 32, bias=False)
    return model.eval()


def plain_prefill(model: Any, length: int) -> Any:
    positions = torch.arange(length)[None]
    return model(positions % plain.VOCAB, positions)[1]


# Inductor's order of operators is not AOTAutograd's, but it takes over a minute to compile this.
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_compiled_prefill_takes_less_than_the_dense_caches_of_all_layers(inner: str) -> None:
    layers, length = 10, 1024
    model = decoder_of_wide_caches(layers)
    dense = layers * 2 * length * 256 * 4
    assert peak_bytes(model, length, plain_prefill) > dense, "uncompiled, they all exist"
    ours = torch.compile(model, backend="attentionpack", options={"codec": "int4", "inner": inner})
    plain_prefill(ours, length)  # compiles
    peak = peak_bytes(ours, length, plain_prefill)
    assert peak < dense, f"{peak / dense:.2f} of the dense caches at the peak"
