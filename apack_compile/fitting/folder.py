"""The user's folder of profiles: found again by weights and options; never a reason to fail."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

from .file import ProfileError, SavedProfile, read_profile, write_profile

log = logging.getLogger(__name__)

VARIABLE = "ATTENTIONPACK_CACHE"

FIT = 4
"""Raised whenever the same prompt would be fitted to other codes: those kept are then not found.

1: sensitivity to the prompt's own text. 2: to repeated pieces of it as well; no bytes left over.
3: groups of at most 512 channels. 4: bases in float16.
"""


def cache_folder() -> Path:
    """``$ATTENTIONPACK_CACHE``, else ``$XDG_CACHE_HOME/attentionpack``, else in ``~/.cache``.

    Raises:
        RuntimeError: there is no home directory.
    """
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "attentionpack"


def path_of(fingerprint: str, options: str) -> Path:
    """Where the profile of these weights and options is kept."""
    return cache_folder() / "profiles" / f"{fingerprint}-{_short(f'{FIT} {options}')}.safetensors"


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def find_profile(fingerprint: str, options: str) -> tuple[Path, SavedProfile] | None:
    """The profile kept for these weights and options; warns of a file that is not used."""
    try:
        path = path_of(fingerprint, options)
        profile = read_profile(path)
        if profile.fingerprint != fingerprint:
            raise ProfileError("it belongs to other weights")
        if profile.options != options:
            raise ProfileError(f"it belongs to other options: {profile.options}")
    except FileNotFoundError:
        return None
    except (OSError, RuntimeError) as error:
        log.warning("attentionpack: no profile can be looked for: %s", error)
        return None
    except ProfileError as error:
        log.warning("attentionpack: the profile %s is not used: %s", path, error)
        return None
    return path, profile


def keep_profile(profile: SavedProfile) -> Path | None:
    """Write the profile to where :func:`find_profile` finds it; None after a warning."""
    try:
        path = path_of(profile.fingerprint, profile.options)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_profile(profile, path)
    except (OSError, RuntimeError) as error:
        log.warning("attentionpack: the fitted codes could not be saved: %s", error)
        return None
    log.info("fitted codes saved to %s", path)
    return path
