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
            most 16 rows of queries, by all programs that run at once.
        products: multiplications of codes with the basis that rebuild keys, by all of these.
        wait: seconds of a turn of a loop that reads before it goes on.
    """

    name: str
    multiprocessors: int
    bandwidth: float
    launch: float
    conversions: float
    products: float
    wait: float


# Bandwidths are those of copies, in benchmarks/results/attend-later-h200.json and attend-h100.json.
# The others are the same for both cards, whose multiprocessors are alike, and solve four equations,
# two of attend-h100.json and two of options-h200.json:
#   launch         B1 28/4 S4096, 8 bit, whole: 14.1 us
#   conversions    B8 32/32 S8192, mixed, whole: 80.6 us
#   products       B8 28/4 S32768, k_code="pre-rope": 362.6 us
#   wait           codes by kind are as far off at B1 28/4 S4096 (too long) as at B8 28/4 S32768
H200 = Device(
    name="NVIDIA H200",
    multiprocessors=132,
    bandwidth=2.764e12,
    launch=4.26e-6,
    conversions=5.70e12,
    products=2.07e14,
    wait=0.72e-6,
)
H100 = replace(H200, name="NVIDIA H100 80GB HBM3", bandwidth=2.419e12)

KNOWN = (H100, H200)


def device_named(name: str) -> Device | None:
    """What is known of a GPU; None: it was not measured."""
    return next((device for device in KNOWN if device.name == name), None)


def device_of(device: torch.device) -> Device | None:
    """What is known of where a tensor is; None: it is no GPU, or was not measured."""
    if device.type != "cuda":
        return None
    return device_named(torch.cuda.get_device_name(device))
