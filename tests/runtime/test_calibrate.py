"""Predicted and measured cost of coding one side of one layer."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apack_compile.codec import Code, ExactLayout
from apack_compile.codec.fit import Evidence, fit_transform
from apack_compile.codec.moments import Moments
from apack_compile.codec.recipe import Recipe
from apack_compile.runtime import replay
from apack_compile.runtime.calibrate import Trial, _between, calibrate
from apack_compile.runtime.replay import Outcome, Split, Unmeasured
from apack_compile.runtime.sense import measure

from .. import zoo
from ..passes.capture import Captured, capture

WINDOW = 16


def captured_decoder(
    tokens: int = 300, batch: int = 1, dtype: torch.dtype = torch.float32
) -> Captured:
    model = zoo.plain_decoder().to(dtype)
    ids = torch.randint(10, 190, (batch, tokens), generator=torch.Generator().manual_seed(5))
    return capture(model, ids, torch.arange(tokens)[None])


def inputs_of(captured: Captured) -> tuple[Tensor, Tensor]:
    """Tokens and their positions."""
    ids, positions = (a for a in captured.args if not isinstance(a, nn.Parameter))
    return ids, positions


def everything(captured: Captured) -> dict[str, Any]:
    sites = captured.plan.having("encode")
    ids, _ = inputs_of(captured)
    coded = torch.ones(*ids.shape, dtype=torch.bool)
    coded[:, :4] = False
    return dict(
        gm=captured.gm, args=captured.args, sites=sites, turns=[None] * len(sites), coded=coded,
        window=WINDOW,
    )  # fmt: skip


def caches(captured: Captured) -> list[tuple[Tensor, Tensor]]:
    _, grown = captured.gm(*captured.args)[0], captured.gm(*captured.args)[1:]
    return [(grown[i], grown[i + 1]) for i in range(0, len(grown), 2)]


def codes_of(captured: Captured, ratio: float) -> list[tuple[Code, Code]]:
    layers = [Evidence(Moments.of(k, k, v, None)) for k, v in caches(captured)]
    return fit_transform(layers, (16, 16), Recipe(ratio), 4096)


def run(captured: Captured, codes: list[tuple[Code, Code]]) -> list[tuple[Trial, Trial]]:
    given = everything(captured)
    steps: list[tuple[int, int]] = []
    trials = calibrate(
        **given, sensitivities=measure(**given), codes=codes,
        step=lambda done, of: steps.append((done, of)),
    )  # fmt: skip
    assert steps == [(i + 1, 2 * len(codes)) for i in range(2 * len(codes))]
    return trials


def test_a_code_that_loses_nothing_costs_nothing() -> None:
    exact = Code(ExactLayout(2, 16))
    for pair in run(captured_decoder(), [(exact, exact)] * 2):
        for trial in pair:
            assert trial == Trial(0.0, 0.0)


def test_rounding_is_measured_in_sixteen_bits_alone() -> None:
    """Codes that lose nothing leave all as it is; the last bit changes all that follows."""
    exact = Code(ExactLayout(2, 16))
    trials = run(captured_decoder(dtype=torch.bfloat16), [(exact, exact)] * 2)
    for pair in trials:
        for trial in pair:
            assert trial.measured == 0 < trial.rounding < 1e-2
            assert trial.cost == -trial.rounding
    assert trials[0][0].rounding == trials[0][1].rounding != trials[1][0].rounding


def test_between_layers_that_were_measured_rounding_goes_by_their_distance() -> None:
    known = {0: 8.0, 4: 4.0, 6: 1.0}
    assert [_between(known, i) for i in range(7)] == [8, 7, 6, 5, 4, 2.5, 1]
    assert _between({}, 3) == 0
    assert _between({4: 2.0}, 0) == _between({4: 2.0}, 5) == 2  # layers before and behind them


def by_hand(captured: Captured, layer: int, side: int, code: Code) -> float:
    """KL of the last tokens' predictions, from the model's own parts, with a dense cache."""
    model = zoo.plain_decoder()
    ids, positions = inputs_of(captured)
    given = everything(captured)
    split = Split.of(given["coded"], WINDOW)
    past = ids.shape[1] - split.tail
    cache = [[k[:, :, :past], v[:, :, :past]] for k, v in caches(captured)]
    valid = torch.ones_like(ids)
    mask = zoo.plain_masks(valid, split.tail, "bool")

    def logits() -> Tensor:
        return model(ids[:, past:], positions[:, past:], cache, mask)[0].double()

    want = logits().log_softmax(-1)
    x = cache[layer][side]
    decoded = code.layout.decode(code.layout.encode(x, code.params), code.params, x.dtype)
    cache[layer][side] = torch.where(split.coded[:, None, :, None], decoded, x)
    got = logits().log_softmax(-1)
    return float((want.exp() * (want - got)).sum(-1).mean())


def test_the_measured_cost_is_that_of_the_model_on_a_coded_cache() -> None:
    captured = captured_decoder()
    codes = codes_of(captured, 8)
    trials = run(captured, codes)
    for layer, pair in enumerate(trials):
        for side, trial in enumerate(pair):
            expected = by_hand(captured, layer, side, codes[layer][side])
            # float32 logits of the order 1 leave about 1e-7 of the KL
            assert trial.measured == pytest.approx(expected, rel=1e-2, abs=2e-7)
            assert trial.measured > 0


def noisy(scale: float) -> Any:
    """A code that adds noise: errors without relation to one another, as the prediction has it."""

    @dataclasses.dataclass(frozen=True)
    class Noisy(ExactLayout):
        kind = f"noisy{scale}"

        def decode(self, payload: Any, params: Any, dtype: torch.dtype, positions: Any = None) -> Tensor:  # fmt: skip  # noqa: E501
            x = super().decode(payload, params, dtype, positions)
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(int(x.sum())))
            return x + scale * noise

    return Code(Noisy(2, 16))


def test_small_unrelated_errors_cost_what_is_predicted() -> None:
    captured = captured_decoder(600)
    code = noisy(0.3)
    for pair in run(captured, [(code, code)] * 2):
        for trial in pair:
            # four draws of 150 gradients, one draw of noise, second order only
            assert 0.6 < trial.measured / trial.predicted < 1.6


def test_a_prompt_that_is_too_short_is_refused() -> None:
    captured = captured_decoder(100)
    given = everything(captured)
    with pytest.raises(Unmeasured, match="a prompt of 100 tokens is too short"):
        calibrate(**given, sensitivities=[], codes=[], step=lambda done, of: None)


def test_padding_at_the_end_asks_nothing() -> None:
    """Bug: predictions of padding tokens counted as any other's."""
    coded = torch.ones(2, 400, dtype=torch.bool)
    coded[1, 350:] = False
    split = Split.of(coded, WINDOW)
    assert (split.tail, int(split.asked.sum())) == (100, 150)
    values = torch.randn(2, 400, 7)
    asked = split.of_asked(values)
    assert torch.equal(asked, torch.cat([values[0, 300:], values[1, 300:350]]))
    assert torch.equal(split.of_asked(values[:, -100:]), asked)
    with pytest.raises(Unmeasured, match="no logits of its last tokens"):
        split.of_asked(values[:, -1:])
    coded[:, 300:] = False
    with pytest.raises(Unmeasured, match="no logits of its last tokens"):
        Split.of(coded, WINDOW).of_asked(values)


class Written(nn.Module):
    """Writes to its residual stream between two layers, as deep-stacked images do."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.model = zoo.plain_decoder()
        self.in_place = in_place

    def forward(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        model = self.model
        x = model.embed(ids) + model.place(positions)
        caches: list[Tensor] = []
        for layer, norm in zip(model.layers, model.norms, strict=True):
            y, cache = layer(norm(x), None, None)
            caches += cache
            if self.in_place:
                x += y
                x[:, 5:9] += 0.1
            else:
                x = x + y
                x = torch.cat([x[:, :5], x[:, 5:9] + 0.1, x[:, 9:]], 1)
        return model.head(x), *caches


def test_a_graph_that_writes_in_place_is_measured_as_well() -> None:
    ids = torch.randint(10, 190, (1, 300), generator=torch.Generator().manual_seed(5))
    found = []
    for in_place in (True, False):
        captured = capture(Written(in_place), ids, torch.arange(300)[None])
        found.append(run(captured, codes_of(captured, 8)))
    for pair, plain in zip(*found, strict=True):
        for one, other in zip(pair, plain, strict=True):
            assert one.measured == pytest.approx(other.measured, rel=1e-2, abs=2e-7)


def test_without_logits_the_last_hidden_state_stands_for_them() -> None:
    model = zoo.plain_decoder()

    def body(ids: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        x = model.embed(ids) + model.place(positions)
        caches: list[Tensor] = []
        for layer, norm in zip(model.layers, model.norms, strict=True):
            y, cache = layer(norm(x), None, None)
            x, caches = x + y, [*caches, *cache]
        return x, *caches

    ids = torch.randint(10, 190, (1, 600), generator=torch.Generator().manual_seed(5))
    captured = capture(body, ids, torch.arange(600)[None])
    outcome = Outcome.of(captured.graph, captured.plan.having("encode"))
    assert not outcome.logits and outcome.node.meta["example_value"].shape == (1, 600, 64)
    code = noisy(0.3)
    for pair in run(captured, [(code, code)] * 2):
        for trial in pair:
            assert 0.6 < trial.measured / trial.predicted < 1.6


def test_logits_of_the_last_token_are_made_those_of_the_last_tokens() -> None:
    model = zoo.plain_decoder()

    def last(ids: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        x = model.embed(ids) + model.place(positions)
        y, (k, v) = model.layers[0](model.norms[0](x), None, None)
        return model.head((x + y)[:, -1:, :]), k, v

    ids = torch.randint(10, 190, (1, 300), generator=torch.Generator().manual_seed(5))
    captured = capture(last, ids, torch.arange(300)[None])
    outcome = Outcome.of(captured.graph, captured.plan.having("encode"))
    assert outcome.logits
    ((k, v),) = run(captured, codes_of(captured, 8))
    assert k.measured > 0 and v.measured > 0


def test_the_cost_is_the_kl_whatever_the_rows_it_is_taken_by(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    captured = captured_decoder()
    outcome = Outcome.of(captured.graph, captured.plan.having("encode"))
    assert outcome.logits
    a, b = torch.randn(70, 9), torch.randn(70, 9)
    expected = F.kl_div(
        b.double().log_softmax(-1), a.double().log_softmax(-1), log_target=True,
        reduction="batchmean",
    )  # fmt: skip
    for rows in (1, 32, 100):
        monkeypatch.setattr(replay, "ROWS", rows)
        assert outcome.cost(a, b) == pytest.approx(float(expected))
    assert outcome.cost(a, a) == 0.0
    hidden = Outcome(outcome.node, logits=False)
    assert hidden.cost(a, b) == pytest.approx(float((a - b).double().square().sum(1).mean() / 2))


def test_the_surprise_has_gradients_of_the_size_of_the_cost() -> None:
    """E[(g . d)^2] = 2 cost for small d, over many draws."""
    captured = captured_decoder()
    logits = Outcome.of(captured.graph, captured.plan.having("encode"))
    for outcome in (logits, Outcome(logits.node, logits=False)):
        values = torch.randn(40, 6).requires_grad_()
        d = 1e-2 * torch.randn(40, 6)
        own = torch.Generator().manual_seed(0)
        squares = []
        with torch.enable_grad():
            for _ in range(1500):
                (g,) = torch.autograd.grad(outcome.surprise(values, own), values)
                squares.append((g * d).sum(1).square().mean())
        expected = 2 * outcome.cost(values.detach(), values.detach() + d)
        assert math.isclose(float(torch.stack(squares).mean()), expected, rel_tol=0.05)
