"""What the cost model knows of a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """Rates of a GPU, all in seconds and numbers each second.

    Attributes:
        name: that of ``torch.cuda.get_device_name``: cards alike in name differ in bandwidth.
        multiprocessors: how many programs can run at once follows from them.
        bandwidth: bytes read and written by a large copy.
        launch: from the end of one kernel to the end of a next one that does nothing.
        conversions: codes that are made numbers.
        products: numbers multiplied and added in the small products over codes.
        merges: numbers of splits put together.
        step: one step of a loop in which little is read and much waited for.
    """

    name: str
    multiprocessors: int
    bandwidth: float
    launch: float
    conversions: float
    products: float
    merges: float
    step: float


# Measured in benchmarks/results/attend-h100.json. The bandwidth is that of its copy. The other five
# solve five equations of three of its nine shapes:
#   step         expand_kernel, B8 32/32 S8192, mixed less 8 bit: 5.7 us for five steps more
#   merges       sum_kernel, mixed, B8 32/32 S8192 less B1 28/4 S4096: 13.7 us, 16.8e6 numbers more
#   launch       B1 28/4 S4096, 8 bit, whole: 21.03 us
#   conversions, products    B8 28/4 S32768 and B8 32/32 S8192, mixed, whole: 96.66 and 129.32 us,
#                with 32 and 8 rows of queries
H100 = Device(
    name="NVIDIA H100 80GB HBM3",
    multiprocessors=132,
    bandwidth=2.423e12,
    launch=4.35e-6,
    conversions=4.55e12,
    products=1.26e14,
    merges=1.22e12,
    step=1.14e-6,
)

KNOWN = (H100,)


def device_named(name: str) -> Device | None:
    """What is known of a GPU; None: it was not measured."""
    return next((device for device in KNOWN if device.name == name), None)


def device_of(device: torch.device) -> Device | None:
    """What is known of where a tensor is; None: it is no GPU, or was not measured."""
    if device.type != "cuda":
        return None
    return device_named(torch.cuda.get_device_name(device))
