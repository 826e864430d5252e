from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.quality import subject
from benchmarks.quality.documents import documents, read, spread, windows

from . import tiny


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.tokenizer()


def test_there_are_24_documents_to_test_and_6_others_to_calibrate() -> None:
    test, calibration = documents("test"), documents("calibration")
    assert (len(test), len(calibration)) == (24, 6)
    texts = [read(path) for path in test + calibration]
    assert len(set(texts)) == len({path.name for path in test + calibration}) == 30
    assert all(40_000 < len(text) <= 46_001 for text in texts)


def test_spread_is_even_and_keeps_the_ends() -> None:
    paths = documents("test")
    assert spread(paths, 24) == paths
    assert spread(paths, 2) == [paths[0], paths[-1]]
    assert spread(paths, 1) == [paths[0]]
    for count in (0, 25):
        with pytest.raises(ValueError, match=f"windows={count}: accepted is 1 to 24"):
            spread(paths, count)


def test_windows_are_the_first_tokens_of_documents(tokenizer: Any) -> None:
    ids = windows(tokenizer, "test", 2, 300)
    assert ids.shape == (2, 300) and ids.dtype == torch.int64
    for row, path in zip(ids, spread(documents("test"), 2), strict=True):
        assert read(path).startswith(tokenizer.decode(row)[:-8])


def test_every_document_is_long_enough_for_the_longest_context(tokenizer: Any) -> None:
    assert windows(tokenizer, "test", 24, subject.LIMIT).shape == (24, 8192)
    assert windows(tokenizer, "calibration", 6, subject.LIMIT).shape == (6, 8192)
    with pytest.raises(ValueError, match="tokens, and 20000 are wanted"):
        windows(tokenizer, "test", 1, 20_000)
