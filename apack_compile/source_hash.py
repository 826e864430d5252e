"""Our sources in Inductor's cache key: an edited kernel or pass must not be served stale code.

So is ``APACK_ATTEND``, which says what a packed attention becomes.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass

from .ops.attend_cuda import choice


@lru_cache(maxsize=1)
def source_hash() -> str:
    """Digest of every source file of the package."""
    from . import kernels, passes

    digest = hashlib.sha256()
    for package in (Path(__file__).parent, *map(_folder, (kernels, passes))):
        for path in sorted(package.rglob("*.py")):
            digest.update(path.relative_to(package).as_posix().encode() + b"\0")
            digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


def _folder(package: Any) -> Path:
    return Path(package.__file__).parent


class SourceKey(CustomGraphPass):
    """Changes nothing; carries :func:`source_hash` and the user's own pass, if there is one."""

    def __init__(self, users: Any = None) -> None:
        self.users = users

    def __call__(self, graph: torch.fx.Graph) -> None:
        """Run the user's own pass."""
        for each in self.users if isinstance(self.users, (list, tuple)) else (self.users,):
            if each is not None:
                each(graph)

    def uuid(self) -> Any:
        """Our digest and the user's pass's own; None (no caching) if that one has none."""
        ours = (source_hash(), choice())
        if self.users is None:
            return ours
        theirs = getattr(self.users, "uuid", None)
        key = theirs() if theirs is not None else None
        return None if key is None else (*ours, key)


def keyed(config: dict[str, Any]) -> dict[str, Any]:
    """Inductor settings with our sources in the cache key."""
    name = "post_grad_custom_pre_pass"
    users = config.get(name, getattr(torch._inductor.config, name))
    return {**config, name: SourceKey(users)}
