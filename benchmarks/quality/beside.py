"""The tables of the paper beside what was measured here.

AttentionPack, CVPR 2026 (arXiv 2603.23914): Table 1 and the ablations that its text reports, on
LLaVA-1.5-7B where nothing else is said. Figures of the paper are copied; ours are read from result
files. Models, tasks and ranks differ: what can be compared is what a step costs, not the figures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Cell = Mapping[str, Any]

Row = tuple[str, str, str]
"""What it is; the paper's figures; the method here, or "" if there is none."""

NONE = "not reported"

ABLATIONS: tuple[tuple[str, Sequence[Row]], ...] = (
    (
        "Equal bytes",
        (
            ("full cache", "76.64, 51.05 (1x)", "full precision"),
            ("H2O", "76.36, 52.09 (2x)", "H2O 2x"),
            ("H2O, 4x", NONE, "H2O 4x"),
            ("H2O, 8x", NONE, "H2O 8x"),
            ("SnapKV, 2x", NONE, "SnapKV 2x"),
            ("SnapKV, 4x", NONE, "SnapKV 4x"),
            ("SnapKV, 8x", NONE, "SnapKV 8x"),
            ("the paper's own setting, 4x", NONE, "paper: own setting, 4x"),
            ("the paper's own setting, 8x", NONE, "paper: own setting, 8x"),
            ("ours, 4x", NONE, "attentionpack 4x, fitted beforehand"),
            ("ours, 8x", NONE, "attentionpack 8x, fitted beforehand"),
            ("ours, 8x, tiers", NONE, "attentionpack 8x, tiers, fitted beforehand"),
            ("ours, 8x, 30 % evicted", NONE, "attentionpack 8x, 30 % evicted, fitted beforehand"),
            ("ours, 8x, keys before rotation", NONE,
             "attentionpack 8x, pre-RoPE K, fitted beforehand"),
        ),
    ),
    (
        "Ranks of keys and values, halved step by step (paper's of 4,096 channels; here of 192)",
        (
            ("128/256", "76.77, 52.50 (2.32x)", ""),
            ("128/128; here 96/96", "76.80, 52.51 (3.19x)", "paper: K 96, V 96"),
            ("64/128; here 48/96", "76.75, 52.47 (3.92x)", "paper: K 48, V 96"),
            ("here 96/48", NONE, "paper: K 96, V 48"),
            ("64/64; here 48/48", "76.88, 52.44 (5.09x)", "paper: K 48, V 48"),
            ("32/64; here 24/48", "76.46, 52.00 (5.98x)", "paper: K 24, V 48"),
            ("32/32; here 24/24", "75.91, 51.69 (7.24x)", "paper: K 24, V 24"),
            ("16/32; here 12/24", "74.12, 50.06 (8.09x)", "paper: K 12, V 24"),
            ("16/16; here 12/12", "72.13, 48.44 (9.18x)", "paper: K 12, V 12"),
            ("growing with the layer, 16 to 128 and 32 to 256", "74.33, 50.85 (3.65x)", ""),
            ("90 % of the variance, at most 64", "76.50, 52.18 (5.23x)", ""),
        ),
    ),
    (
        "All heads together or each by itself",
        (
            ("together, 48/48", "64.5 MB at R = 64", "paper: K 48, V 48"),
            ("by head, 48/48", "1.48 times the cache for the same OCR-VQA (R = 24), or 1.8 % less",
             "paper: K 48, V 48, by head"),
            ("together, 24/24", NONE, "paper: K 24, V 24"),
            ("by head, 24/24", NONE, "paper: K 24, V 24, by head"),
        ),
    ),
    (
        "Keys or values alone",
        (
            ("keys alone, rank 64; here 24",
             "LLaMA-3.1-8B, LongBench: 34.14 with 1,500 tokens, 32.85 with 1,000 (full 35.43)",
             "paper: K 24, V exact"),
            ("values alone, here 24", "\"value matrices require higher rank\"",
             "paper: K exact, V 24"),
        ),
    ),
    (
        "Share of tokens with all components of values (R = 64; here 48), the others a quarter",
        (
            ("all", "76.88, 52.44", "paper: K 48, V 48"),
            ("50 %", NONE, "paper: K 48, V 48, 50% whole"),
            ("25 %", "\"almost the same\", decompression almost 30 % cheaper",
             "paper: K 48, V 48, 25% whole"),
            ("10 %", NONE, "paper: K 48, V 48, 10% whole"),
            ("none", NONE, "paper: K 48, V 48, 0% whole"),
            ("25 %, of keys as well", "not done: keys are too sensitive",
             "paper: K 48, V 48, 25% whole, K too"),
        ),
    ),
    (
        "With quantisation, with eviction",
        (
            ("4 bits alone (paper: KVQuant; here KIVI)", "75.90, 50.67 (82.1 MB)", "KIVI 4 bit"),
            ("factors", "76.88, 52.44 (64.5 MB)", "paper: K 48, V 48"),
            ("factors, 8 bits", NONE, "paper: K 48, V 48, 8 bit"),
            ("factors, 4 bits", "75.27, 50.18 (16.1 MB)", "paper: K 48, V 48, 4 bit"),
            ("twice the rank, 4 bits", NONE, "paper: K 96, V 96, 4 bit"),
            ("25 % with all components, 4 bits", NONE, "paper: K 48, V 48, 25% whole, 4 bit"),
            ("the others dropped", "76.88, 51.63 (62.1 MB)", "paper: K 48, V 48, 25% kept"),
            ("the others dropped, 4 bits", "75.27, 49.11 (15.5 MB)",
             "paper: K 48, V 48, 25% kept, 4 bit"),
            ("30 % dropped", NONE, "paper: K 48, V 48, 70% kept"),
        ),
    ),
)  # fmt: skip
"""Scores of the paper are of A-OKVQA (%) and OCR-VQA (ROUGE-L)."""

TABLE_1: tuple[Row, ...] = (
    ("full cache, LLaVA-1.5-7B", "1x: 76.64, 51.05, 34.68", "full precision"),
    ("FastV, k = 5, 50 %", "1x: 76.72, 52.62, 34.27", ""),
    ("Scissorhands, 50 %", "2x: 75.50, 50.08, 31.66", ""),
    ("H2O, 50 %", "2x: 76.36, 52.09, 32.15", "H2O 2x"),
    ("SnapKV, 2x", NONE, "SnapKV 2x"),
    ("MiniCache", "4.51x: 76.54, 51.93, 33.75", ""),
    ("AttentionPack, R = 64; here for 4x", "5.09x: 76.88, 52.44, 34.59",
     "attentionpack 4x, paper mode"),
    ("AttentionPack, R = 32; here for 8x", "7.24x: 75.91, 51.69, 32.79",
     "attentionpack 8x, paper mode"),
    ("full cache, LLaVA-1.5-13B", "1x: 81.40, 55.01, 36.40", ""),
    ("MiniCache", "4.35x: 81.20, 53.18, 35.52", ""),
    ("AttentionPack, R = 64 and 32", "5.17x: 81.25, 53.22, 36.38; 7.30x: 80.00, 51.92, 34.40", ""),
    ("full cache, QwenVL-Chat-7B", "1x: 75.67, 70.5, 35.82", ""),
    ("AttentionPack, R = 64 and 32", "2.77x: 75.33, 68.45, 35.72; 4.02x: 75.17, 68.02, 35.67", ""),
    ("ours, 4x", NONE, "attentionpack 4x, fitted beforehand"),
    ("ours, 8x", NONE, "attentionpack 8x, fitted beforehand"),
    ("ours, 16x", NONE, "attentionpack 16x, fitted beforehand"),
)  # fmt: skip
"""Ratio, A-OKVQA (%), OCR-VQA (ROUGE-L), MMMU (%)."""

CONTEXT = 4096
"""Tokens of the albums beside Table 1."""


def ablations(results: Mapping[str, Any]) -> str:
    """A table for each question, of the run "paper".

    Args:
        results: content of its result file.
    """
    cells = {cell["method"]: cell for cell in results["cells"]}
    parts = []
    for title, rows in ABLATIONS:
        head = "| | paper: A-OKVQA, OCR-VQA | here: ratio | KL | top-1 | pass keys |"
        lines = [head, "|---|---|---|---|---|---|"]
        lines += [_line(row, cells, _prose, 4) for row in rows]
        parts.append(f"{title}:\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def table_1(results: Mapping[str, Any]) -> str:
    """The paper's Table 1 beside albums.

    Args:
        results: content of the result file of the run "images".
    """
    cells = {cell["method"]: cell for cell in results["cells"] if cell["context"] == CONTEXT}
    head = "| | paper: ratio, A-OKVQA, OCR-VQA, MMMU | here: ratio | which | what | needle | read |"
    rows = [_line(row, cells, _albums, 5) for row in TABLE_1]
    return "\n".join([head, "|---|---|---|---|---|---|---|", *rows])


def _line(
    row: Row, cells: Mapping[str, Cell], columns: Callable[[Cell], list[str]], count: int
) -> str:
    title, paper, method = row
    if method in cells:
        here = columns(cells[method])
    else:
        here = ["not measured" if method else "not here"] + [""] * (count - 1)
    return f"| {' | '.join([title, paper, *here])} |"


def _prose(cell: Cell) -> list[str]:
    keys = cell["by_window"]["passkeys"]
    return [
        f"{cell['ratio']:.2f}",
        f"{cell['kl']['mean']:.2g}",
        f"{cell['top1']['mean']:.1%}",
        f"{sum(map(int, keys))} of {len(keys)}",
    ]


def _albums(cell: Cell) -> list[str]:
    tasks = (f"{cell[kind]['mean']:.1%}" for kind in ("which", "what", "needle", "read"))
    return [f"{cell['ratio']:.2f}", *tasks]
