from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch

from apack_compile.cache import Policy
from apack_compile.options import CODECS, MODES, PAPER, OptionError, Options, inductor_config

NAMES = [f.name for f in dataclasses.fields(Options)]


@pytest.mark.parametrize("given", [None, {}])
def test_no_options_are_the_defaults(given: dict[str, Any] | None) -> None:
    assert Options.parse(given) == Options()


def test_defaults_are_what_the_documentation_says() -> None:
    options = Options()
    assert (options.codec, options.ratio, options.fit_tokens) == ("transform", 4.0, 0)
    assert options.policy == Policy(sinks=4, window=64, block=32)
    assert options.inductor == {}


GOOD: list[dict[str, Any]] = [
    {"codec": "exact"}, {"codec": "transform", "ratio": 2}, {"ratio": 32}, {"ratio": 6.5},
    {"sinks": 0}, {"sinks": 64}, {"window": 1}, {"window": 4096}, {"block": 16}, {"block": 4096},
    {"fit_tokens": 0}, {"fit_tokens": 1 << 20}, {"inductor": {"max_autotune": True}},
    {"inductor": {"max-autotune": True}}, {"k_code": "pre-rope"}, {"v_basis": "hadamard"},
    {"codec": "int8"}, {"codec": "int4"}, {"codec": "svd", "ratio": 8},
    {"codec": "svd", "k_rank": 16, "v_rank": 32}, {"profile_cache": False},
    {"visual_ratio": 0}, {"visual_ratio": 16}, {"visual_ratio": 2, "text_ratio": 32.0},
    {"visual_ratio": 8, "k_code": "pre-rope", "v_basis": "hadamard", "tiers": False, "evict": 0},
    {"visual_ratio": 0, "ratio": 8, "tiers": True},
    {"visual_ratio": 16, "tiers": True, "evict": 0.3, "exact_share": 0.01},
    {"evict": 0}, {"evict": 0.9, "tiers": True, "exact_share": 0.01},
    {"exact_share": 0}, {"ratio": 8, "exact_share": 0.05}, {"ratio": 32, "exact_share": 1 / 64},
]  # fmt: skip


@pytest.mark.parametrize("given", GOOD, ids=str)
def test_what_is_given_is_taken_and_the_rest_is_default(given: dict[str, Any]) -> None:
    options = Options.parse(given)
    assert {name: getattr(options, name) for name in given} == given
    for name in set(NAMES) - set(given):
        assert getattr(options, name) == getattr(Options(), name)


def test_sizes_go_into_the_policy() -> None:
    policy = Options.parse({"sinks": 7, "window": 100, "block": 50}).policy
    assert (policy.sinks, policy.window, policy.block, policy.ring) == (7, 100, 50, 150)


def test_papers_mode_is_a_codec() -> None:
    assert Options.parse(None, "paper").codec == "svd"
    assert Options.parse(None, "max-autotune") == Options()
    assert inductor_config("paper", Options.parse(None, "paper")) == {}
    with pytest.raises(OptionError, match="mode='paper' and option codec='int8' do not go"):
        Options.parse({"codec": "int8"}, "paper")


TOGETHER: list[tuple[dict[str, Any], str]] = [
    ({"codec": "exact", "ratio": 4}, "codec='exact' and ratio=4 .*'transform' or 'svd'"),
    ({"codec": "int8", "k_code": "pre-rope"}, "codec='int8' and k_code='pre-rope' .*'transform'"),
    ({"codec": "svd", "v_basis": "pca"}, "codec='svd' and v_basis='pca' .*'transform'"),
    ({"codec": "int8", "exact_share": 0.01}, "exact_share=0.01 .*'transform'"),
    ({"codec": "svd", "evict": 0.3}, "evict=0.3 .*'transform'"),
    ({"ratio": 16, "exact_share": 0.05}, "exact_share=0.05 .* ratio=16: accepted .* to 0.0312 "),
    ({"k_rank": 4}, "codec='transform' and k_rank=4 .*'svd'"),
    ({"codec": "int4", "v_rank": 4}, "codec='int4' and v_rank=4 .*'svd'"),
    ({"k_code": "pre-rope", "sinks": 0}, "sinks=0 .* k_code='pre-rope'.* sinks from 1 to 64"),
    ({"codec": "svd", "sinks": 0}, "sinks=0 .* codec='svd'.* sinks from 1 to 64"),
    ({"text_ratio": 2}, "text_ratio=2 without visual_ratio: .* is visual_ratio from 2 to 32"),
    ({"text_ratio": 2, "visual_ratio": 0}, "text_ratio=2 without visual_ratio"),
    ({"visual_ratio": 16, "ratio": 8}, "visual_ratio=16 and ratio=8 .*text has text_ratio"),
    ({"visual_ratio": 16, "exact_share": 0.05}, "=0.05 .* visual_ratio=16: accepted .* to 0.0312"),
    ({"visual_ratio": 2, "text_ratio": 16, "exact_share": 0.05}, "=0.05 .* text_ratio=16: "),
    ({"visual_ratio": 16, "codec": "svd"}, "codec='svd' and visual_ratio=16 .*'transform'"),
    ({"visual_ratio": 16, "codec": "int8"}, "codec='int8' and visual_ratio=16 .*'transform'"),
    ({"visual_ratio": 16, "k_code": "pre-rope", "sinks": 0}, "sinks=0 .* sinks from 1 to 64"),
]


@pytest.mark.parametrize(("given", "words"), TOGETHER, ids=str)
def test_options_that_do_not_go_together(given: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        Options.parse(given)


def test_codes_depend_on_codec_and_recipe_only() -> None:
    key = Options.parse({"ratio": 4}).key
    assert key == Options.parse({"ratio": 4.0, "window": 10, "profile_cache": False}).key
    assert key != Options.parse({"ratio": 5}).key
    assert key != Options.parse({"codec": "exact"}).key
    assert key != Options.parse({"ratio": 4, "k_code": "pre-rope"}).key
    assert key != Options.parse({"ratio": 4, "v_basis": "hadamard"}).key
    assert key != Options.parse({"ratio": 4, "exact_share": 0.01}).key
    assert key != Options.parse({"ratio": 4, "evict": 0.3}).key
    by_kind = Options.parse({"visual_ratio": 16}).key
    assert by_kind == Options.parse({"visual_ratio": 16.0, "text_ratio": 2}).key
    assert by_kind != Options.parse({"visual_ratio": 16, "text_ratio": 4}).key
    assert by_kind not in (Options.parse({"ratio": 2}).key, Options.parse({"ratio": 16}).key)
    assert key == Options.parse({"visual_ratio": 0}).key


NUMBERS = {
    "ratio": ("a number from 2 to 32", [1.99, 32.1, 0, -4, float("nan"), float("inf")]),
    "visual_ratio": ("a number from 2 to 32, or 0", [1.99, 32.1, -4, float("nan"), False]),
    "text_ratio": ("a number from 2 to 32", [1.99, 32.1, 0, float("nan")]),
    "exact_share": ("a number from 0 to 0.05", [-0.01, 0.06, float("nan")]),
    "evict": ("a number from 0 to 0.9", [-0.1, 0.95, float("nan"), "0.3"]),
    "sinks": ("a whole number from 0 to 64", [-1, 65, 1.0]),
    "window": ("a whole number from 1 to 4096", [0, 4097, 64.5]),
    "block": ("a whole number from 16 to 4096", [15, 4097, 32.0]),
    "fit_tokens": ("a whole number from 0 to 1048576", [-1, (1 << 20) + 1, 2.5]),
}


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, v) for name, (_, bad) in NUMBERS.items() for v in [*bad, "4", None, True, [4]]],
)
def test_a_number_out_of_range_is_refused_with_the_range(name: str, value: Any) -> None:
    expected = f"option {name}={value!r}: accepted is {NUMBERS[name][0]}"
    with pytest.raises(OptionError, match=re.escape(expected)):
        Options.parse({name: value})


@pytest.mark.parametrize("value", [None, 0, 1, "True", []])
def test_a_flag_is_true_or_false(value: Any) -> None:
    expected = f"option profile_cache={value!r}: accepted are True, False"
    with pytest.raises(OptionError, match=re.escape(expected)):
        Options.parse({"profile_cache": value})


@pytest.mark.parametrize("value", ["int2", "Exact", "", None, 3, ["exact"]])
def test_an_unknown_codec_is_refused_with_the_known_ones(value: Any) -> None:
    expected = f"option codec={value!r}: accepted are 'transform', 'svd', 'exact', 'int8', 'int4'"
    with pytest.raises(OptionError, match=re.escape(expected)):
        Options.parse({"codec": value})
    assert CODECS == ("transform", "svd", "exact", "int8", "int4")


@pytest.mark.parametrize(
    ("name", "hint"), [("ration", "'ratio'"), ("windows", "'window'"), ("codecs", "'codec'")]
)
def test_a_misspelt_option_is_refused_with_a_suggestion(name: str, hint: str) -> None:
    expected = f"attentionpack has no option {name!r}; did you mean {hint}? Accepted: codec, ratio"
    with pytest.raises(OptionError, match=re.escape(expected)):
        Options.parse({name: 1})


@pytest.mark.parametrize("name", ["max_autotune", "", 3, None])
def test_an_unknown_option_is_refused_with_all_known_ones(name: Any) -> None:
    with pytest.raises(OptionError) as caught:
        Options.parse({name: 1})
    text = str(caught.value)
    assert text.startswith(f"attentionpack has no option {name!r}.")
    assert f"Accepted: {', '.join(NAMES)}." in text
    assert "options={'inductor': {...}}" in text


@pytest.mark.parametrize("value", [None, "max_autotune", ["max_autotune"], 1])
def test_inductor_settings_that_are_no_dict_are_refused(value: Any) -> None:
    with pytest.raises(
        OptionError, match=re.escape(f"option inductor={value!r}: accepted is a dict")
    ):
        Options.parse({"inductor": value})


@pytest.mark.parametrize("name", ["max_autotun", "ratio", "", 3])
def test_an_unknown_inductor_setting_is_refused_by_name(name: Any) -> None:
    """Bug: a name that is no text was an AttributeError."""
    with pytest.raises(OptionError, match=re.escape(f"{{{name!r}: 1}}: Inductor has no such")):
        Options.parse({"inductor": {name: 1}})


def test_option_errors_are_value_errors() -> None:
    assert issubclass(OptionError, ValueError)


def test_options_do_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Options().ratio = 8.0  # type: ignore[misc]


@pytest.mark.parametrize("mode", [None, "default"])
def test_the_default_mode_leaves_inductor_as_it_is(mode: str | None) -> None:
    assert inductor_config(mode, Options()) == {}


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != PAPER])
def test_modes_are_those_of_inductor(mode: str) -> None:
    expected = torch._inductor.list_mode_options(mode) if mode != "default" else {}
    if mode == "max-autotune-no-cudagraphs":  # ours are the default
        expected = {**expected, "triton.cudagraphs": False}
    assert inductor_config(mode, Options()) == expected


def test_settings_beat_the_mode_and_may_be_spelt_with_dashes() -> None:
    given = Options.parse({"inductor": {"max-autotune": False, "epilogue_fusion": True}})
    config = inductor_config("max-autotune", given)
    assert config["max_autotune"] is False
    assert config["epilogue_fusion"] is True
    assert "max-autotune" not in config


@pytest.mark.parametrize("mode", ["fastest", "", 3])
def test_an_unknown_mode_is_refused_with_the_known_ones(mode: Any) -> None:
    expected = f"mode={mode!r}: accepted are 'default', 'reduce-overhead', 'max-autotune'"
    with pytest.raises(OptionError, match=re.escape(expected)):
        inductor_config(mode, Options())
