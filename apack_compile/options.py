"""The options of the backend: names, types, defaults, errors that say what is accepted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any, get_origin

from .cache import Policy
from .codec.fixed import FIXED
from .codec.recipe import KEY_CODES, VALUE_BASES, Recipe

CODECS = ("transform", "svd", *FIXED)

ONLY_WITH = {
    "ratio": ("transform", "svd"),
    "k_code": ("transform",),
    "v_basis": ("transform",),
    "tiers": ("transform",),
    "exact_share": ("transform",),
    "evict": ("transform",),
    "visual_ratio": ("transform",),
    "text_ratio": ("transform",),
    "k_rank": ("svd",),
    "v_rank": ("svd",),
}
"""Options that only some codecs have."""

MOST_EVICTED = 0.9
"""Share of the tokens of a prompt that may be dropped."""

INNER = ("inductor", "aot_eager", "eager")

PAPER = "paper"
"""The mode that stands for codec='svd'; Inductor knows nothing of it."""

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs", PAPER)


class OptionError(ValueError):
    """An option of ``torch.compile(..., backend="attentionpack")`` is not accepted."""


@dataclass(frozen=True)
class Options:
    """What a user may choose.

    Attributes:
        codec: ``transform`` (joint-head PCA, quantised coefficients), ``exact`` (tokens kept as
            they are: for tests, and to have the machinery without any loss), ``int8`` or ``int4``
            (rounded head by head), or ``svd`` (the paper's: a truncated SVD of each sequence;
            ``mode="paper"`` chooses it).
        ratio: bytes of a dense 16-bit token over bytes of a coded one, from 2 to 32.
        k_code, v_basis, tiers, exact_share, evict: see :class:`~apack_compile.codec.recipe.Recipe`.
        visual_ratio: the ratio of the visual tokens of a prompt, which have a code of their own
            then, from 2 to 32; 0: all tokens have one code, with ``ratio``.
        text_ratio: the ratio of all other tokens, with ``visual_ratio``.
        k_rank, v_rank: components that ``svd`` keeps; 0: as many as ``ratio`` allows.
        sinks: first visible tokens of each sequence, kept exact for good.
        window: recent tokens that are never coded.
        block: tokens that gather behind the window before they are coded together.
        fit_tokens: tokens of prefill to see before a basis is fitted; until then caches are
            packed exactly. 0: four times the channels of a layer, at most 1024.
        profile_cache: fitted codes are kept in the user's cache folder and found there again.
        inner: ``inductor``; or, for debugging, ``aot_eager`` or ``eager`` to run rewritten graphs
            operator by operator, behind AOTAutograd or as they are.
        inductor: Inductor settings, as ``options`` of ``torch.compile`` with that backend.
    """

    codec: str = "transform"
    ratio: float = 4.0
    k_code: str = "post-rope"
    v_basis: str = "pca"
    tiers: bool = False
    exact_share: float = 0.0
    evict: float = 0.0
    visual_ratio: float = 0.0
    text_ratio: float = 2.0
    k_rank: int = 0
    v_rank: int = 0
    sinks: int = 4
    window: int = 64
    block: int = 32
    fit_tokens: int = 0
    profile_cache: bool = True
    inner: str = "inductor"
    inductor: Mapping[str, Any] = field(default_factory=dict)

    @property
    def policy(self) -> Policy:
        """Which tokens stay exact."""
        return Policy(sinks=self.sinks, window=self.window, block=self.block)

    @property
    def key(self) -> tuple[Any, ...]:
        """What fitted codes depend on."""
        return (self.codec, self.recipe)

    @property
    def recipe(self) -> Recipe:
        """Which member of the family is fitted."""
        ratio = self.text_ratio if self.visual_ratio else self.ratio
        shares = float(self.exact_share), float(self.evict), float(self.visual_ratio)
        return Recipe(float(ratio), self.k_code, self.v_basis, self.tiers, *shares)

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None, mode: str | None = None) -> Options:
        """Check what the user gave.

        Args:
            options: by name.
            mode: ``"paper"`` stands for ``codec="svd"``; other modes say nothing here.

        Raises:
            OptionError: names the option, the value and what is accepted.
        """
        if not isinstance(options, Mapping | None):
            raise OptionError(f"options={options!r}: accepted is a dict of options by name")
        given = dict(options or {})
        if mode == PAPER and given.setdefault("codec", "svd") != "svd":
            raise OptionError(
                f"mode='paper' and option codec={given['codec']!r} do not go together: the "
                "paper's code is codec='svd'; leave one of them out"
            )
        names = [f.name for f in fields(cls)]
        for name in given:
            if name not in names:
                close = get_close_matches(str(name), names, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else "."
                raise OptionError(
                    f"attentionpack has no option {name!r}{hint} Accepted: {', '.join(names)}. "
                    "Inductor's own settings go into options={'inductor': {...}}."
                )
        _one_of(given, "codec", CODECS)
        _one_of(given, "inner", INNER)
        _one_of(given, "k_code", KEY_CODES)
        _one_of(given, "v_basis", VALUE_BASES)
        _number(given, "ratio", float, 2, 32)
        _number(given, "visual_ratio", float, 2, 32, or_zero=True)
        _number(given, "text_ratio", float, 2, 32)
        _number(given, "k_rank", int, 0, 1 << 16)
        _number(given, "v_rank", int, 0, 1 << 16)
        _number(given, "sinks", int, 0, 64)
        _number(given, "window", int, 1, 4096)
        _number(given, "block", int, 16, 4096)
        _number(given, "fit_tokens", int, 0, 1 << 20)
        _flag(given, "profile_cache")
        _flag(given, "tiers")
        _number(given, "exact_share", float, 0, 0.05)
        _number(given, "evict", float, 0, MOST_EVICTED)
        codec = given.get("codec", cls.codec)
        for name, codecs in ONLY_WITH.items():
            if name in given and codec not in codecs:
                raise OptionError(
                    f"options codec={codec!r} and {name}={given[name]!r} do not go together: "
                    f"accepted with {name} is codec={' or '.join(map(repr, codecs))}"
                )
        _check_kinds(given)
        if given.get("sinks") == 0 and (given.get("k_code") == "pre-rope" or codec == "svd"):
            raise OptionError(
                f"option sinks=0 does not go together with codec={codec!r} "
                f"and k_code={given.get('k_code', cls.k_code)!r}: positions of keys are counted "
                "from the first sink; accepted is sinks from 1 to 64"
            )
        _check_exact_share(given)
        inductor = given.get("inductor", {})
        if not isinstance(inductor, Mapping):
            raise OptionError(
                f"option inductor={inductor!r}: accepted is a dict of Inductor settings"
            )
        _check_inductor(inductor)
        return cls(**given)


def _one_of(given: dict[str, Any], name: str, accepted: tuple[str, ...]) -> None:
    if name in given and given[name] not in accepted:
        words = ", ".join(map(repr, accepted))
        raise OptionError(f"option {name}={given[name]!r}: accepted are {words}")


def _check_kinds(given: dict[str, Any]) -> None:
    """Options of codes for each kind of tokens."""
    visual = given.get("visual_ratio", 0)
    if "text_ratio" in given and not visual:
        raise OptionError(
            f"option text_ratio={given['text_ratio']!r} without visual_ratio: text has a ratio of "
            "its own only if visual tokens have; accepted with it is visual_ratio from 2 to 32"
        )
    if visual and given.get("ratio"):
        raise OptionError(
            f"options visual_ratio={visual!r} and ratio={given['ratio']!r} do not go together "
            "(text has text_ratio): leave one of them out"
        )


def _check_exact_share(given: dict[str, Any]) -> None:
    """Codes need bytes as well."""
    names = ("visual_ratio", "text_ratio") if given.get("visual_ratio") else ("ratio",)
    ratio, name = max((given.get(name, getattr(Options, name)), name) for name in names)
    share = given.get("exact_share", 0)
    if 2 * ratio * share > 1:
        raise OptionError(
            f"option exact_share={share!r} leaves less than half of the bytes to codes at "
            f"{name}={ratio!r}: accepted is a number from 0 to {1 / (2 * ratio):.4f} with it"
        )


def _number(
    given: dict[str, Any], name: str, kind: type, low: float, high: float, or_zero: bool = False
) -> None:
    if name not in given:
        return
    value = given[name]
    numeric = (int,) if kind is int else (int, float)
    proper = isinstance(value, numeric) and not isinstance(value, bool)
    if not proper or not (low <= value <= high or (or_zero and value == 0)):
        words = "a whole number" if kind is int else "a number"
        more = ", or 0" if or_zero else ""
        raise OptionError(
            f"option {name}={value!r}: accepted is {words} from {low} to {high}{more}"
        )


def _flag(given: dict[str, Any], name: str) -> None:
    if name in given and not isinstance(given[name], bool):
        raise OptionError(f"option {name}={given[name]!r}: accepted are True, False")


def _check_inductor(settings: Mapping[str, Any]) -> None:
    import torch._inductor

    known = torch._inductor.list_options()
    for given, value in settings.items():
        name = str(given).replace("-", "_")
        if name not in known:
            raise OptionError(
                f"option inductor={{{given!r}: {value!r}}}: Inductor has no such setting; "
                "torch._inductor.list_options() lists them"
            )
        kind = torch._inductor.config.get_type(name)
        # As torch.compile checks its own: generic types cannot be asked for their instances.
        if get_origin(kind) is None and not isinstance(value, kind):
            raise OptionError(f"option inductor={{{given!r}: {value!r}}}: accepted is {kind}")


def inductor_config(mode: str | None, options: Options) -> dict[str, Any]:
    """Inductor settings for ``mode`` and ``options['inductor']``.

    Raises:
        OptionError: no such mode.
    """
    import torch._inductor

    if mode is not None and mode not in MODES:
        raise OptionError(f"mode={mode!r}: accepted are {', '.join(map(repr, MODES))}")
    settings = dict(torch._inductor.list_mode_options(mode)) if mode in MODES[1:-1] else {}
    if mode == "max-autotune-no-cudagraphs":
        settings["triton.cudagraphs"] = False  # decode graphs would have one
    settings.update({name.replace("-", "_"): v for name, v in options.inductor.items()})
    return settings
