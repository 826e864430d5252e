"""What older releases of transformers lack or spell otherwise, for all tests."""

from __future__ import annotations

from typing import Any

import transformers
from packaging.version import Version
from torch import Tensor

INSTALLED = Version(transformers.__version__)
BEFORE_5 = Version(transformers.__version__) < Version("5.0")
COMPLETE = Version("5.17")
"""The first release that is known to have every class that the tests build."""

ARIA_BREAKS = Version("5.24") > INSTALLED
"""Whether Aria's experts run outside of graphs, so that each layer is one of its own."""

BROKEN = (
    {"llama4": f"transformers {INSTALLED}: its forward asks for image_outputs that there are not"}
    if Version("5.24") <= INSTALLED < Version("5.25")
    else {}
)
"""Models that this release cannot run, compiled or not."""


def missing(error: BaseException | None) -> str | None:
    """The class that this release does not have yet, if that is what ``error`` is about."""
    if (
        INSTALLED < COMPLETE
        and isinstance(error, AttributeError)
        and error.obj is transformers
        and str(error.name)[:1].isupper()
    ):
        return f"transformers {INSTALLED} has no {error.name}"
    return None


def rope(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a decoder with rotary positions, ``rope_theta`` among them."""
    if not BEFORE_5:
        return {"rope_parameters": settings}
    rest = {name: value for name, value in settings.items() if name != "rope_theta"}
    return {"rope_theta": settings["rope_theta"], "rope_scaling": rest}


def token_types(images: Tensor) -> dict[str, Tensor]:
    """Which tokens are images ``[B, T]``: transformers 4 finds that out for itself."""
    return {} if BEFORE_5 else {"mm_token_type_ids": images.int()}
