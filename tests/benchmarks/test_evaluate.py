from __future__ import annotations

import math

import pytest
import torch

from benchmarks.quality.evaluate import Reference, evaluate, in_log_probs
from benchmarks.quality.metrics import first_difference, kl_divergence
from benchmarks.quality.rivals.dense import Dense
from benchmarks.quality.rivals.turboquant import TurboQuant
from benchmarks.quality.runner import RivalRunner

from . import tiny

CONTEXT, NEXT, GREEDY = 288, 32, 16


@pytest.fixture(scope="module")
def reference() -> Reference:
    with torch.no_grad():
        return Reference(tiny.subject(), tiny.texts(3, CONTEXT + NEXT), CONTEXT, GREEDY)


def test_the_dense_cache_differs_from_itself_by_rounding(reference: Reference) -> None:
    scores, _ = evaluate(RivalRunner(reference.subject, Dense()), [reference])
    assert abs(scores.kl.mean) < 1e-6
    assert scores.top1.mean == 1
    assert scores.greedy.mean == GREEDY
    assert scores.passkeys.mean == 0 and scores.passkeys.high > 0.7  # of three prompts
    assert scores.perplexity.mean == pytest.approx(scores.perplexity_full.mean, rel=1e-6)


def test_figures_of_a_lossy_code(reference: Reference) -> None:
    subject, runner = reference.subject, RivalRunner(reference.subject, TurboQuant(1))
    scores, sizes = evaluate(runner, [reference])
    kv = [TurboQuant(1).code(layer) for layer in reference.prompts.layers]
    coded = subject.follow(kv, CONTEXT, reference.following).log_softmax(-1)
    dense = [(layer.k, layer.v) for layer in reference.prompts.layers]
    full = subject.follow(dense, CONTEXT, reference.following).log_softmax(-1)
    kl = kl_divergence(full, coded).mean(1)
    assert scores.by_window["kl"] == pytest.approx(kl.tolist(), rel=1e-3)
    assert 1e-5 < scores.kl.low < scores.kl.mean < scores.kl.high
    nll = torch.nn.functional.nll_loss(coded[:, :-1].mT, reference.following[:, 1:])
    assert scores.perplexity.mean == pytest.approx(math.exp(nll), rel=1e-4)
    assert len(scores.by_window["passkeys"]) == len(scores.by_window["depths"]) == 3
    assert sizes.ratio == pytest.approx(16 / (1 + 16 / 16))


def test_greedy_counts_what_free_running_decoding_shows(reference: Reference) -> None:
    """Teacher forcing on the stock continuation finds the same first difference."""
    subject, runner = reference.subject, RivalRunner(reference.subject, TurboQuant(1))
    scores, _ = evaluate(runner, [reference])
    kv = [TurboQuant(1).code(layer) for layer in reference.prompts.layers]
    tokens = reference.greedy[:, :1]
    for _ in range(GREEDY):
        logits = subject.follow(kv, CONTEXT, tokens)
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
    free = [
        float(first_difference(row[1:], wanted[1:]))
        for row, wanted in zip(tokens, reference.greedy, strict=True)
    ]
    assert scores.by_window["greedy"] == free
    assert min(free) < GREEDY


def test_log_probabilities_take_the_place_of_logits() -> None:
    logits = torch.randn(2, 3, 7)
    expected = logits.log_softmax(-1)
    assert in_log_probs(logits) is logits
    torch.testing.assert_close(logits, expected)
