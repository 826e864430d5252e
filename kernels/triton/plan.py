"""What the kernels are told at compile time: sizes of one packed layer, and how to cut the work.

Constants of one side (K or V), by their names in the kernels:

    X       1 if the code is exact        D, DP     head_dim, and the next power of two
    G       groups of the code            GAIN      1 if tokens carry gains
    8 4 2   bytes of each run             P8 P4 P2  their widths in tiles, powers of two
    PITCH   payload width of a token      W         columns: the rank, or D if exact
    S8 S4 S2    (values) codes of a word that one product takes at once
    ROT     (keys) channels that were rotated behind the code: such keys are rebuilt; 0: none
    INTER   (keys) 1 if pairs are neighbours          HALF    (keys) pairs, a power of two

``H`` KV heads with ``ROWS`` query rows each (query heads x queries); ``G`` groups of programs,
``BLOCKS`` blocks of ``M`` rows in each; ``N`` tokens in a tile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

from ...codec import ExactLayout, Layout, ModalLayout, TransformLayout, parse_layout

EXACT_ROWS = 16
"""Query rows of a program over ring and pool: the least that tensor cores take."""

LEAST_BYTES = 32
"""Of a run in a tile: 16 words, the least that tensor cores take."""

CHUNK = 64
"""Components that a program of the small kernels takes at a time."""

MOST_STACKED = 64
"""Rows of a product's left operand that are stacked codes, at most."""

MOST_SPLITS = 126
"""The merge holds the references of this many splits at a time, and some more: of programs over
slots, of pool and ring."""

BESIDE_BASIS = 104 << 10
"""Bytes of shared memory that a program has besides the basis of keys that are turned: what the
greediest layout that was compiled wants (values of 448, 32 and 32 components, 64 query rows)."""


@dataclass(frozen=True)
class MergeConfig:
    """How the merge is cut.

    Attributes:
        columns: channels of the result that a program makes.
        components: of the most that it holds at a time: with twice as many the basis of two warps
            lies in memory (2 KB of stack; 45 us where 5 are enough).
        numbers: of the most that it adds up at a time, of all components and some splits.
        warps: of a program.
        fill: programs for each multiprocessor, if there are as many rows.
    """

    columns: int = 64
    components: int = 256
    numbers: int = 2048
    warps: int = 2
    fill: int = 16


MERGE = MergeConfig()
"""The best in the mean of eight cases, of 37 that were measured on an H100, when ``components`` was
512; none of the cases has more than 256."""


@dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
        tokens: of a tile, N.
        rows: the most query rows in a tile, M.
        least: the fewest.
        warps: of a program.
        stages: tiles in flight.
        fill: programs for each multiprocessor.
        share: of the programs that run at once, those over codes at least.
        beside: where there are as many tiles for each program that can run at once, programs over
            codes do ring and pool as well; 0: they never do.
        registers: of a thread at most; 0: as many as the compiler likes.
        stacked: rows that products over values shall have: codes of narrow runs are stacked. With
            four warps and 64 rows a product is one of a warp group.
    """

    tokens: int = 64
    rows: int = 32
    least: int = 8
    warps: int = 4
    stages: int = 3
    fill: int = 2
    share: float = 0.75
    beside: int = 0
    registers: int = 0
    stacked: int = 64


@cache
def default_config(k_layout: str, v_layout: str, rows: int) -> Config:
    """The configuration used without autotuning: the best of those measured on an H100.

    Two warps wait less for each other than four and have fewer instructions in all, but a program's
    sums must fit into their registers: 16 rows of queries do, 32 do not, nor do keys that are
    rebuilt. Programs over codes of 8 bits alone were no faster with ring and pool beside them.

    Args:
        k_layout, v_layout: specs of the codes.
        rows: query rows, of all heads of a sequence.
    """
    key, value = parse_layout(k_layout), parse_layout(v_layout)
    if key.positional:
        return Config(stages=2)
    narrow = Config(rows=16, warps=2, stages=2, fill=4, stacked=32)
    if any(getattr(layout, "r4", 0) + getattr(layout, "r2", 0) for layout in (key, value)):
        return replace(narrow, beside=5)
    exact = isinstance(key, ExactLayout) or isinstance(value, ExactLayout)
    few = rows <= narrow.rows * program_groups(key, value)
    return narrow if few and not exact else Config()


def program_groups(key: Layout, value: Layout) -> int:
    """Groups of KV heads that have programs of their own. Keys that are turned are rebuilt by head;
    else it is a multiple of the groups of both codes, which divide the heads, so this does."""
    if key.positional:
        return key.heads
    return math.lcm(*(getattr(layout, "groups", layout.heads) for layout in (key, value)))


def power(n: int, least: int) -> int:
    """The least power of two that is no less than ``n``, nor than ``least``."""
    return max(1 << max(n - 1, 0).bit_length(), least)


def supported(layout: Layout) -> bool:
    """Whether the kernels know this kind of code."""
    if isinstance(layout, ModalLayout):
        return supported(layout.visual) and supported(layout.text)
    if isinstance(layout, TransformLayout):
        return all(count % 16 == 0 for _, count in layout.runs)
    return isinstance(layout, ExactLayout)


def _widths(layout: TransformLayout) -> tuple[int, int, int]:
    """Bytes of each run."""
    return layout.r8, layout.r4 // 2, layout.r2 // 4


def shared_bytes(layout: Layout) -> int:
    """Shared memory that a program wants where keys are rebuilt: for the basis of one head, mostly.

    0 if they are not: no more than any device has.
    """
    if not (isinstance(layout, TransformLayout) and layout.positional):
        return 0
    rows = sum(
        power(width, LEAST_BYTES) // 2 * (16 // bits)
        for bits, width in zip((8, 4, 2), _widths(layout), strict=True)
        if width
    )
    return BESIDE_BASIS + rows * 2 * _pairs(layout)["KHALF"] * 2


def _side(letter: str, layout: Layout, stacked: int) -> dict[str, int]:
    """Constants of one side."""
    exact = isinstance(layout, ExactLayout)
    constants = {"X": int(exact), "G": layout.heads}
    widths, gain, pitch = (0, 0, 0), 0, layout.heads * layout.dim
    if isinstance(layout, TransformLayout):
        constants["G"], gain = layout.groups, int(layout.gain > 0)
        widths = _widths(layout)
        pitch = layout.groups * sum(widths)
    pads = tuple(power(width, LEAST_BYTES) if width else 0 for width in widths)
    named = {letter + name: value for name, value in constants.items()}
    for bits, width, pad in zip((8, 4, 2), widths, pads, strict=True):
        named |= {f"{letter}{bits}": width, f"{letter}P{bits}": pad}
    dim = power(layout.dim, 16)
    columns = dim if exact else widths[0] + 2 * widths[1] + 4 * widths[2]
    named |= {letter + "W": columns, letter + "PITCH": pitch, letter + "GAIN": gain}
    if letter == "K":
        named |= _pairs(layout)
    else:
        for bits, pad in zip((8, 4, 2), pads, strict=True):
            named[f"VS{bits}"] = min(max(stacked // (pad // 2), 1), 16 // bits) if pad else 0
    return named | {"D" + letter: layout.dim, f"D{letter}P": dim}


def _pairs(layout: Layout) -> dict[str, int]:
    """Constants of keys that were coded before their rotation; 0 if they were not."""
    if not (isinstance(layout, TransformLayout) and layout.positional):
        return {"KROT": 0, "KINTER": 0, "KHALF": 0}
    pairs = (layout.dim + 1) // 2
    return {"KROT": layout.rotary, "KINTER": layout.interleaved, "KHALF": power(pairs, 16)}


@dataclass(frozen=True)
class Plan:
    """The constants of the kernels.

    Attributes:
        fold, basis, attend, merge: keyword arguments of each.
        groups, blocks: of programs over codes of one sequence.
        rows: kept for each group.
        exacts: slots behind those of the splits: the pool's, if there is one or rows are listed,
            and the ring's.
        exact_programs: over ring and pool of one sequence, if each does both.
        pieces: of them, in one group.
        head_rows: query rows of one KV head of one sequence.
        pool: 1 if programs read the pool.
    """

    fold: dict[str, int]
    basis: dict[str, int]
    attend: dict[str, int]
    merge: dict[str, int]
    groups: int
    blocks: int
    rows: int
    exacts: int
    exact_programs: int
    pieces: int
    head_rows: int
    pool: int


def piece_tiles(ring: int) -> int:
    """Tiles of mixed codes that ring and pool of a head take as long as: 14.7 us with 80 recent
    tokens, 11,000 of 26,600 cycles for these, where a tile takes 5,200 (a profile of an H100)."""
    return 3 + ring // 48


@cache
def make_plan(
    k_layout: str, v_layout: str, q_heads: int, queries: int, pools: tuple[int, int], ring: int,
    config: Config, listed: bool = False, lacking: bool = False,
) -> Plan:  # fmt: skip
    """The plan of a layer.

    Args:
        k_layout, v_layout: specs of the codes, which are plain.
        q_heads, queries: of the query tensor.
        pools: slots of the pool of keys and of values.
        ring: slots of the ring.
        config: how to cut the work.
        listed: rows are listed (``listing.py``): pools are no part of programs over heads.
        lacking: values may lack bits.
    """
    key, value = parse_layout(k_layout), parse_layout(v_layout)
    k, v = _side("K", key, config.stacked), _side("V", value, config.stacked)
    heads, rows = key.heads, q_heads // key.heads * queries
    groups = program_groups(key, value)
    per_group = heads // groups * rows
    m = min(power(per_group, config.least), config.rows)
    blocks = -(-per_group // m)
    common = {
        "H": heads, "ROWS": rows, "G": groups, "X": EXACT_ROWS, "XBLOCKS": -(-rows // EXACT_ROWS),
    }  # fmt: skip
    ek, ev = (0, 0) if listed else pools
    pool = int(ek + ev > 0)
    exacts = 1 + max(pool, int(listed))
    stats = 7 if lacking else 4
    chunks = -(-k["KW"] // CHUNK)
    attend = common | k | v | {
        "Q": queries, "M": m, "BLOCKS": blocks, "EK": ek, "EKP": power(ek, 16), "EV": ev,
        "EVP": power(ev, 16), "EXACTS": exacts, "RING": ring, "XN": 32,
        "LIST": int(listed), "STATS": stats,
        "LISTED": power(ek + ev, 16), "N": config.tokens, "STAGES": config.stages,
        "PIECE": piece_tiles(ring), "BESIDE": int(config.beside > 0),
        "CHUNKS": chunks, "CHUNKSP": power(chunks, 1),
    }  # fmt: skip
    head = {"H": heads, "ROWS": rows, "G": groups, "STRIDE": blocks * m, "X": EXACT_ROWS}
    fold = head | {name: k[name] for name in ("KG", "DK", "DKP", "KW", "K8", "K4", "K2")}
    fold |= {"CHUNK": CHUNK, "CHUNKS": chunks}
    of_basis = ("KG", "DK", "KW", "K8", "K4", "K2", "KGAIN", "KROT", "KINTER")
    basis = {name: k[name] for name in of_basis} | {
        "H": heads, "HALF": k["KHALF"], "CHUNK": CHUNK, "COLUMNS": 16, "PARTS": k["KHALF"] // 8,
    }  # fmt: skip
    merge = {name: head[name] for name in ("H", "ROWS", "G", "STRIDE")}
    merge |= {name: v[name] for name in ("VG", "VX", "DV", "VW", "V8", "V4", "V2")}
    columns = min(MERGE.columns, v["DVP"])
    chunk = columns if v["VX"] else min(power(v["VW"], 16), MERGE.components)
    merge |= {
        "Q": queries, "STATS": stats, "EXACTS": exacts, "POOL": pool,
        "CHUNK": chunk, "COLUMNS": columns, "PARTS": -(-value.dim // columns),
        "TILE": max(MERGE.numbers // chunk, 1),
    }  # fmt: skip
    exact_programs = heads * common["XBLOCKS"]
    return Plan(
        fold,
        basis,
        attend,
        merge,
        groups,
        blocks,
        blocks * m,
        exacts,
        exact_programs,
        exact_programs // groups,
        rows,
        pool,
    )


def merge_slots(plan: Plan, config: Config, processors: int, tails: int = 0) -> int:
    """A power of two that holds the most slots that there can be, for any batch.

    Args:
        plan: of the layer.
        config: how the work is cut.
        processors: multiprocessors of the device.
        tails: slots of programs over pools where rows are listed, at most.
    """
    most = min(processors * config.fill // (plan.groups * plan.blocks), MOST_SPLITS)
    return power(max(most, 1) + tails + plan.exacts, 2)
