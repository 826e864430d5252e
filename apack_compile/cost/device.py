"""What the cost model knows of a GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Device:
    """Rates of a GPU, all in seconds and numbers each second.

    Attributes:
        name: that of ``torch.cuda.get_device_name``: cards alike in name differ in bandwidth.
        multiprocessors: how many programs can run at once follows from them.
        bandwidth: bytes read and written by a large copy.
        launch: from the end of one kernel to the end of a next one that does nothing.
        conversions: codes of a tile of keys or values that are made numbers and multiplied, with at
            most 16 rows of queries.
    """

    name: str
    multiprocessors: int
    bandwidth: float
    launch: float
    conversions: float


# Bandwidths are those of copies, in benchmarks/results/attend-h200.json and attend-h100.json. The
# other two are the same for both cards, whose multiprocessors are alike, and solve two equations of
# two of the eighteen cases on the H200:
#   launch         B1 28/4 S4096, 8 bit, whole: 15.25 us
#   conversions    B8 28/4 S32768, mixed, whole: 77.19 us
H200 = Device(
    name="NVIDIA H200",
    multiprocessors=132,
    bandwidth=2.766e12,
    launch=4.70e-6,
    conversions=4.75e12,
)
H100 = replace(H200, name="NVIDIA H100 80GB HBM3", bandwidth=2.423e12)

KNOWN = (H100, H200)


def device_named(name: str) -> Device | None:
    """What is known of a GPU; None: it was not measured."""
    return next((device for device in KNOWN if device.name == name), None)


def device_of(device: torch.device) -> Device | None:
    """What is known of where a tensor is; None: it is no GPU, or was not measured."""
    if device.type != "cuda":
        return None
    return device_named(torch.cuda.get_device_name(device))
