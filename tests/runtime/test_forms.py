"""Random decoders made of forms of attention: packed where the report says so, and right."""

from __future__ import annotations

import os
from typing import Any, get_args, get_type_hints
from unittest import mock

import pytest
import torch
import torch.nn.attention.flex_attention as flex
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

import apack_compile

from ..forms import Decoder, Form
from ..plain import VOCAB

STEPS = (1,) * 8 + (5, 1)
"""Tokens of each decode step."""

EXAMPLES = int(os.environ.get("APACK_TEST_FORMS", "4"))
"""More than in every run of the suite by hand."""

OPTIONS = {"codec": "exact", "inner": "eager", "window": 8, "block": 16}


def run(model: Any, length: int) -> list[Tensor]:
    """Logits of a prefill, and of decode steps, with padding on the left."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(VOCAB, (2, length + sum(STEPS)), generator=generator)
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[1, :3] = False
    logits, past = model(ids[:, :length], valid[:, :length])
    found = [logits]
    for tokens in STEPS:
        start, length = length, length + tokens
        logits, past = model(ids[:, start:length], valid[:, :length], past)
        found.append(logits)
    return found


def check(forms: list[Form], length: int) -> None:
    model = Decoder(forms).eval()
    with torch.no_grad(), mock.patch.object(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True):
        want = run(model, length)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="attentionpack", options=OPTIONS)
        got = run(compiled, length)
    for mine, right in zip(got, want, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-4)
    report = apack_compile.report(model)
    sites = sum(1 + form.twice for form in forms)
    assert report.attends == sites * len(STEPS), str(report)
    assert all(graph.packed for graph in report.graph_reports), str(report)
    assert not [skip for graph in report.graph_reports for skip in graph.skipped], str(report)


hints = get_type_hints(Form)
FORMS = st.builds(
    Form,
    k_dim=st.sampled_from([8, 16]),
    v_dim=st.sampled_from([8, 16]),
    **{
        name: st.sampled_from(get_args(hint) or (False, True))
        for name, hint in hints.items()
        if name not in ("k_dim", "v_dim")
    },
)


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(st.lists(FORMS, min_size=1, max_size=2), st.integers(20, 60))
def test_any_forms(forms: list[Form], length: int) -> None:
    check(forms, length)


@pytest.mark.parametrize("form", [
    Form(causal=True, rotary="sections"),
    Form(attend="matmul", softcap=2, sinks=True, factor="heads", mask="taken off"),
    Form(attend="einsum", factor="divisor", mask="where"),
    Form(attend="bmm", sinks=True, repeat="joined", rotary="complex", factor="length"),
    Form(attend="baddbmm", alibi=True, mask="whole", twice=True),
], ids=lambda form: form.attend)  # fmt: skip
def test_a_plain_form(form: Form) -> None:
    check([form], 40)
