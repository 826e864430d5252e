from __future__ import annotations

import logging
from pathlib import Path

import pytest

from apack_compile.fitting.file import read_profile, write_profile
from apack_compile.fitting.folder import cache_folder, find_profile, keep_profile, path_of

from .profiles import OPTIONS, saved


def test_the_folder_is_the_variables_else_the_users(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    monkeypatch.setenv("ATTENTIONPACK_CACHE", "~/mine")
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.setenv("ATTENTIONPACK_CACHE", "")
    assert cache_folder() == Path("/elsewhere/attentionpack")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / ".cache" / "attentionpack"


def test_what_is_kept_is_found_by_weights_and_options(_cache_folder: Path) -> None:
    mine, theirs = saved(), saved(options="others")
    path, other = keep_profile(mine), keep_profile(theirs)
    assert path is not None and path != other
    assert path.is_relative_to(_cache_folder) and path == path_of(mine.fingerprint, OPTIONS)
    found = find_profile(mine.fingerprint, OPTIONS)
    assert found is not None
    assert (found[0], found[1].options, len(found[1].layers)) == (path, OPTIONS, 2)
    assert find_profile(saved(3).fingerprint, OPTIONS) is None
    assert find_profile(mine.fingerprint, "unknown") is None


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_nothing_kept_is_no_reason_to_warn(caplog: pytest.LogCaptureFixture) -> None:
    assert find_profile(saved().fingerprint, OPTIONS) is None
    assert warnings(caplog) == []


def test_a_damaged_file_is_ignored_with_one_warning_left_there_and_replaced(
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = keep_profile(saved())
    assert path is not None
    bad = path.read_bytes()[:-5]
    path.write_bytes(bad)
    assert find_profile(saved().fingerprint, OPTIONS) is None
    (warning,) = warnings(caplog)
    assert warning.startswith(f"attentionpack: the profile {path} is not used: it is damaged (")
    assert path.read_bytes() == bad
    assert keep_profile(saved()) == path
    assert find_profile(saved().fingerprint, OPTIONS) is not None


def test_a_file_of_other_weights_or_options_is_ignored_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = keep_profile(saved())
    assert path is not None
    write_profile(saved(3), path)
    assert find_profile(saved().fingerprint, OPTIONS) is None
    write_profile(saved(options="others"), path)
    assert find_profile(saved().fingerprint, OPTIONS) is None
    first, second = warnings(caplog)
    assert first.endswith("is not used: it belongs to other weights")
    assert second.endswith("is not used: it belongs to other options: others")
    assert read_profile(path).options == "others"


def test_a_folder_that_cannot_be_written_is_a_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ATTENTIONPACK_CACHE", str(tmp_path / "file"))
    assert keep_profile(saved()) is None
    assert find_profile(saved().fingerprint, OPTIONS) is None
    assert all(text.startswith("attentionpack: ") for text in warnings(caplog))
    assert len(warnings(caplog)) == 2 and "could not be saved" in warnings(caplog)[0]


def test_no_home_directory_is_a_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("ATTENTIONPACK_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    assert keep_profile(saved()) is None
    assert find_profile(saved().fingerprint, OPTIONS) is None
    assert len(warnings(caplog)) == 2
