"""What becomes of every family, as measured: the tests keep it, docs/families.md shows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

SLIDING = "the whole cache is not stored (sliding window): left dense"
BESIDE = "the last tokens of the cache are stored beside the whole (sliding window): left dense"
NOT_STORED = "no cache: keys and values are not stored"
LATENT = "keys or values are projected from the cache (latent attention): left dense"
JOINED = "the cache is joined with other keys or values: left dense"
SCALED_BEHIND = "masked or capped scores are multiplied by what is no constant: left dense"
PREALLOCATED = (
    "preallocated cache, written in place: left dense; the model holds it whole, so that its "
    "memory does not shrink"
)


@dataclass(frozen=True)
class Record:
    """What becomes of the attention of a family when it decodes.

    Attributes:
        packed: sites that attend to packed caches.
        error: of the logits with ratio 8, relative to what tells them apart.
        spoilt: the same, at least, when codes are lost or their components mixed up.
        left: sites left alone, by reason.
        note: what else is to be known.
        daily: whether it is always tested: with its prefill, or decode steps alone.
        first: the first step that attends to packed caches when prefill is compiled.
        differs_uncompiled: compiled by torch alone, it gives other tokens than uncompiled.
    """

    packed: int
    error: float = 0.0
    spoilt: float = 0.0
    left: Mapping[str, int] = field(default_factory=dict)
    note: str = ""
    daily: Literal["whole", "decode", ""] = ""
    first: int = 1
    differs_uncompiled: bool = False

    @property
    def bound(self) -> float:
        """Most error of the logits: in the middle between right and spoilt codes."""
        return (self.error * self.spoilt) ** 0.5


TABLE: dict[str, Record] = {
    "t5": Record(4, 0.44, 1.1, daily="whole"),
    "bart": Record(4, 0.022, 0.35),
    "florence2": Record(4, 0.028, 0.22),
    "t5gemma2": Record(0, left={JOINED: 2}, note="one attention over its cache and the encoder's"),
    "paligemma": Record(2, 0.032, 0.099),
    "gemma3": Record(1, 0.13, 0.22, {SLIDING: 1}),
    "gemma3n": Record(
        2, 0.048, 0.24, {SLIDING: 2}, note="its language model; two sites share one cache"
    ),
    "gemma4": Record(1, 0.056, 0.19, {SLIDING: 1}),
    "idefics": Record(2, 0.25, 0.66, {NOT_STORED: 2}, note="cross-attention without a cache"),
    "idefics2": Record(2, 0.31, 0.77),
    "idefics3": Record(2, 0.41, 1),
    "smolvlm": Record(2, 0.41, 1),
    "lfm2_vl": Record(1, 0.074, 0.17, note="the other layer is a convolution"),
    "llava": Record(2, 0.3, 0.43),
    "llava_pixtral": Record(2, 0.27, 0.92),
    "llava_next": Record(2, 0.33, 0.46),
    "llava_next_video": Record(2, 0.33, 0.46),
    "llava_onevision": Record(2, 0.073, 0.26),
    "video_llava": Record(2, 0.17, 1.1),
    "vipllava": Record(2, 0.13, 0.43),
    "mistral3": Record(2, 0.18, 0.32),
    "internvl": Record(2, 0.21, 0.41),
    "got_ocr2": Record(2, 0.14, 0.25),
    "deepseek_vl": Record(2, 0.14, 0.62),
    "janus": Record(2, 0.15, 0.92),
    "aya_vision": Record(1, 0.039, 0.096, {SLIDING: 1}),
    "cohere2_vision": Record(1, 0.024, 0.11, {SLIDING: 1}),
    "ovis2": Record(2, 0.11, 0.67),
    "mllama": Record(3, 0.24, 1.3, note="the third layer looks at the image", daily="whole"),
    "llama4": Record(1, 0.11, 0.25, {SLIDING: 1}, note="chunks; the full layer has no positions"),
    "aria": Record(2, 0.26, 0.99, note="a graph for every layer"),
    "fuyu": Record(2, 0.15, 0.33),
    "chameleon": Record(2, 0.14, 0.35, note="prefill in two graphs"),
    "emu3": Record(2, 0.25, 0.53),
    "phi4_multimodal": Record(
        2,
        0.062,
        0.37,
        note="its vision tower gives other numbers uncompiled, with torch alone too",
        differs_uncompiled=True,
    ),
    "git": Record(
        2,
        0.022,
        0.37,
        note="prefill breaks behind attention: the first decode step packs",
        daily="decode",
        first=2,
    ),
    "llama": Record(2, 0.15, 0.67),
    "mistral": Record(2, 0.15, 0.67),
    "mistral_sliding": Record(0, left={SLIDING: 2}),
    "mixtral": Record(2, 0.26, 0.83),
    "qwen2": Record(2, 0.15, 0.67),
    "qwen3": Record(2, 0.2, 1.1),
    "qwen3_moe": Record(2, 0.24, 0.7),
    "gemma": Record(2, 0.019, 0.057),
    "gemma2": Record(1, 0.035, 0.2, {SLIDING: 1}),
    "phi3": Record(2, 0.29, 0.4),
    "olmo2": Record(2, 0.19, 0.76),
    "granite": Record(2, 0.15, 0.67),
    "smollm3": Record(2, 0.21, 0.94, note="a layer without positions"),
    "cohere2": Record(1, 0.056, 0.22, {SLIDING: 1}, note="the full layer has no positions"),
    "glm4": Record(2, 0.16, 0.5),
    "stablelm": Record(2, 0.17, 1, note="partial rotary positions"),
    "starcoder2": Record(2, 0.14, 0.33),
    "gpt_neox": Record(2, 0.027, 0.31, note="partial rotary positions", daily="whole"),
    "gpt_oss": Record(2, 0.57, 0.95, note="a sink among the scores of each head", daily="whole"),
    "falcon": Record(2, 0.22, 0.72, note="one KV head", daily="whole"),
    "falcon_alibi": Record(2, 0.13, 0.31, note="a bias that is scaled, and a mask"),
    "bloom": Record(
        2, 0.02, 0.2, note="heads side by side (baddbmm, bmm), a bias of each", daily="whole"
    ),
    "mpt": Record(2, 0.024, 0.14, note="a bias, and a mask that hides"),
    "lfm2": Record(1, 0.067, 0.21, note="the other layer is a convolution", daily="whole"),
    "deepseek_v3": Record(0, left={LATENT: 2}, note="latent attention", daily="decode"),
    "gptj": Record(2, 0.046, 0.45, note="scores over a tensor of one number"),
    "codegen": Record(2, 0.039, 0.72, note="scores over a tensor of one number"),
    "gpt_neo": Record(2, 0.21, 1.3, note="scores that are not scaled"),
    "gpt_bigcode": Record(2, 0.088, 0.41, note="one KV head"),
    "gpt2": Record(2, 0.053, 0.7, daily="whole"),
    "opt": Record(2, 0.018, 0.49),
    "blip2": Record(2, 0.048, 0.43, note="generate of a model inside", daily="whole"),
    "blip2_t5": Record(4, 0.15, 0.7, note="generate of a model inside"),
    "instructblip": Record(2, 0.072, 0.51, note="generate of a model inside"),
    "kosmos2": Record(2, 0.025, 0.22, note="generate of a model inside"),
    "blip": Record(4, 0.039, 0.14, note="generate of a model inside"),
    "plain, tuples": Record(2, 0.26, 0.39, daily="whole"),
    "plain, tuples, written out": Record(2, 0.26, 0.39, daily="whole"),
    "plain, buffers by index": Record(0, left={PREALLOCATED: 2}, daily="whole"),
    "plain, buffers by slice": Record(0, left={PREALLOCATED: 2}, daily="whole"),
    "plain, buffers by slice, written out": Record(0, left={PREALLOCATED: 2}, daily="whole"),
    "qwen2_vl": Record(2, 0.23, 0.47),
    "qwen2_5_vl": Record(2, 0.26, 0.64),
    "qwen3_vl": Record(2, 0.17, 0.37, note="prefill in two graphs", daily="decode"),
    "qwen3_5": Record(1, 0.09, 0.2, note="the other layer is recurrent", daily="decode"),
    "glm4v": Record(2, 0.13, 0.76),
    "glm_ocr": Record(2, 0.49, 1.3),
    "ernie4_5_vl_moe": Record(2, 0.24, 0.62, note="prefill in two graphs"),
    "paddleocr_vl": Record(2, 0.28, 0.86),
    "video_llama_3": Record(2, 0.29, 0.84),
    "exaone4_5": Record(1, 0.13, 0.45, {SLIDING: 1}),
    "kimi_k25": Record(0, left={LATENT: 2}, note="latent attention"),
    "llama, eager attention": Record(2, 0.15, 0.67, daily="whole"),
    "gemma2, eager attention": Record(
        1, 0.035, 0.2, {SLIDING: 1}, note="capped scores", daily="decode"
    ),
    "opt, eager attention": Record(2, 0.018, 0.49),
    "t5, eager attention": Record(4, 0.44, 1.1),
    "llava, eager attention": Record(2, 0.3, 0.95),
    "qwen2_vl, eager attention": Record(2, 0.16, 0.47),
    "gemma3, eager attention": Record(1, 0.13, 0.22, {SLIDING: 1}),
    "blip2, eager attention": Record(2, 0.048, 0.43, note="generate of a model inside"),
}


BEFORE_5: dict[str, Record | str] = {
    "gemma3n": Record(2, 0.082, 0.3, {BESIDE: 2}, note="the whole of a step is in its cache too"),
    "git": Record(0, left={NOT_STORED: 2, JOINED: 2}, daily="decode"),
    "deepseek_v3": Record(2, 0.11, 0.84, daily="decode"),
    "codegen": Record(0, left={SCALED_BEHIND: 2}, note="scores are masked, then divided"),
    "lfm2": "transformers 4 marks its cache static inside of the graph, which Dynamo cannot trace",
    "lfm2_vl": "as lfm2",
}
"""What is different with transformers 4, or the reason why torch alone cannot compile it."""


def render() -> str:
    """The table, as docs/families.md shows it."""
    title = ("family", "sites packed", "left alone", "error", "spoilt", "tested", "remarks")
    lines = [row(title), "|" + "---|" * len(title)]
    for name, record in TABLE.items():
        left = "; ".join(f"{count}: {reason}" for reason, count in record.left.items())
        errors = (f"{record.error:.2f}", f"{record.spoilt:.2f}") if record.packed else ("", "")
        daily = record.daily or "on demand"
        lines.append(row((name, str(record.packed), left, *errors, daily, record.note)))
    return "\n".join(lines)


def summary() -> str:
    """The table in short, as README.md shows it: families by what becomes of their attention."""
    groups: dict[str, list[str]] = {}
    for name, record in TABLE.items():
        reasons = "; ".join(reason.partition(": left dense")[0] for reason in record.left)
        packed = "packed" if record.packed else ""
        kind = "; ".join(filter(None, (packed, reasons and f"left alone: {reasons}")))
        name, _, form = name.partition(", ")
        groups.setdefault(kind, []).append(f"{name} ({form})" if form else name)
    lines = [row(("attention sites", "families")), "|---|---|"]
    for kind in sorted(groups, key=lambda kind: not kind.startswith("packed")):
        lines.append(row((kind, ", ".join(groups[kind]))))
    return "\n".join(lines)


def row(cells: tuple[str, ...]) -> str:
    """A row of a table."""
    return "| " + " | ".join(cells) + " |"
