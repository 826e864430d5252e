"""What autograd keeps of the work of the last tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, fx

from apack_compile.codec.sensitivity import Sensitivity
from apack_compile.runtime import sense, study
from apack_compile.runtime.saved import SavedTails, works_by_token

from .. import zoo

OPTIONS = {"inner": "eager", "window": 32, "block": 16, "ratio": 4, "profile_cache": False}


@pytest.mark.parametrize(
    ("name", "by_token"),
    [("mul", True), ("truediv", True), ("pow", True), ("silu", True), ("gelu", True),
     ("rsqrt", True), ("layer_norm", True), ("rms_norm", True), ("tanh", True),
     ("matmul", False), ("softmax", False), ("scaled_dot_product_attention", False),
     ("cumsum", False), ("conv1d", False), ("linear", False), ("no_such_function", False)],
)  # fmt: skip
def test_functions_by_token(name: str, by_token: bool) -> None:
    assert works_by_token(name) == by_token


@pytest.mark.parametrize(
    ("shape", "dim"),
    [((2, 9, 4), 1), ((2, 3, 9, 4), 2), ((2, 9, 3, 4), 1), ((2, 9, 9, 4), None), ((9, 4), None),
     ((2, 4, 9), None), ((2, 1, 4), None)],
)  # fmt: skip
def test_rows_of_the_last_tokens_are_kept(shape: tuple[int, ...], dim: int | None) -> None:
    node, spent = fx.Graph().placeholder("x"), []

    def spend(tensor: Tensor) -> Tensor:
        spent.append(tensor)
        return tensor

    saved = SavedTails({node}, 9, 3, spend)
    x = torch.randn(shape)
    assert saved.pack(x) is x, "of another node all is kept"
    saved.node = node
    packed = saved.pack(x)
    back = saved.unpack(packed)
    assert back.shape == x.shape
    if dim is None:
        assert back is x
        return
    assert torch.equal(back.narrow(dim, 6, 3), x.narrow(dim, 6, 3))
    assert spent[-1].untyped_storage().nbytes() == 3 * x.nbytes // 9


def written_out(text: int) -> zoo.Case:
    """Scores of all queries are kept; a norm of queries and keys."""
    config = transformers.Qwen3Config(**zoo.text_config(head_dim=16, attn_implementation="eager"))
    torch.manual_seed(0)
    return zoo.Case(transformers.Qwen3ForCausalLM(config).eval(), zoo.prompt(0, text, 2, True))


def sensitivities(make: Callable[..., zoo.Case]) -> tuple[list[Sensitivity], int]:
    """Those of a prompt's own tokens, and the bytes that autograd kept."""
    found: list[Any] = []
    spent = [0]
    measure, budget = study.measure, sense._Budget

    class Counting(budget):  # type: ignore[misc, valid-type]
        def spend(self, tensor: Tensor) -> Tensor:
            before = self.left
            super().spend(tensor)
            spent[0] += before - self.left
            return tensor

    def remembering(*args: Any) -> Any:
        found.append(measure(*args))
        return found[-1]

    case = make(text=300)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "measure", remembering)
        patch.setattr(sense, "_Budget", Counting)
        torch._dynamo.reset()
        compiled = torch.compile(case.model, backend="attentionpack", options=OPTIONS)
        compiled(**case.inputs, past_key_values=transformers.DynamicCache(), logits_to_keep=1)
    return found[0], spent[0]


@pytest.mark.parametrize(("make", "share"), [(zoo.llama, 0.75), (written_out, 0.9)])
def test_gradients_are_those_of_all_rows(
    make: Callable[..., zoo.Case], share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    got, little = sensitivities(make)
    monkeypatch.setattr(sense, "nodes_by_token", lambda gm, sites: set())
    want, much = sensitivities(make)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.k, b.k, rtol=1e-5, atol=0)
        torch.testing.assert_close(a.v, b.v, rtol=1e-5, atol=0)
    assert little < share * much


def test_logits_that_only_leave_the_graph_are_computed_for_the_last_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bug: ``fit`` computed logits of every token of a prompt again."""
    seen: list[torch.Size] = []
    probe = sense._Probe.run

    def run(self: Any, *args: Any) -> Any:
        result = probe(self, *args)
        seen.append(self.seen.shape)
        return result

    monkeypatch.setattr(sense._Probe, "run", run)
    case = zoo.llama(text=300)
    torch._dynamo.reset()
    compiled = torch.compile(case.model, backend="attentionpack", options=OPTIONS)
    cache = transformers.DynamicCache()
    out = compiled(**case.inputs, past_key_values=cache)
    assert out.logits.shape[1] > 300
    assert [shape[1] for shape in seen] == [75, 75]
