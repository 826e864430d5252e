from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from benchmarks.quality.results import FOLDER
from benchmarks.quality.table import embed
from benchmarks.tiny_vlm import adapter, card, evaluate


def test_scores_say_of_which_adapter_they_are(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(b"trained")
    args = evaluate.parse(["--adapter", str(path), "--contexts", "3"])
    about = evaluate.settings(args, torch.bfloat16)
    assert about["adapter"] == hashlib.sha256(b"trained").hexdigest()[:12]
    assert (about["contexts"], about["dtype"]) == (3, "torch.bfloat16")


def test_the_scores_in_the_repository_are_those_of_its_adapter() -> None:
    content = json.loads((FOLDER / "tiny-vlm.json").read_text(encoding="utf-8"))
    assert content["settings"]["adapter"] == adapter.digest(adapter.ADAPTER)
    images = json.loads((FOLDER / "quality-images.json").read_text(encoding="utf-8"))
    assert images["settings"]["adapter"] == adapter.digest(adapter.ADAPTER)


def test_the_card_has_scores_controls_and_missed_gates() -> None:
    figure = {"mean": 0.965, "low": 0.94, "high": 0.99}
    content = {
        "command": "python -m x",
        "environment": {"device": "a GPU", "torch": "2", "transformers": "5"},
        "settings": {"adapter": "0123456789ab", "contexts": 200},
        "perplexity over SmolLM2's": 1.0214,
        "gates": {"perplexity": True, "which at 4096": False},
        "cells": [
            {"task": "which", "context": 4096, "exact": figure, "half": figure, "blank": figure},
            {"task": "clip", "context": 512, "exact": figure},
        ],
    }
    text = card.scores(content)
    share = "96.5% (94.0% to 99.0%)"
    assert f"| which | 4,096 | {share} | {share} | {share} |" in text
    assert f"| clip | 512 | {share} |  |  |" in text
    assert "SmolLM2's: 1.021. Of 2 gates missed: which at 4096." in text
    assert "200 contexts a cell" in text and "starts with `0123456789ab`" in text
    assert text in embed(card.CARD.read_text(encoding="utf-8"), "tiny-vlm", text)
