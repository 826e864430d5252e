"""A cost model in sympy: bytes of a packed cache, and time of packed attention in a step."""

from .device import H100, H200, Device, device_named, device_of
from .live import predicted_bytes, predicted_step
from .predict import predict
from .sizes import PackedSide, SideBytes, bytes_of, side_bytes
from .steps import is_predicted, launches, seconds_of

__all__ = [
    "H100",
    "H200",
    "Device",
    "PackedSide",
    "SideBytes",
    "bytes_of",
    "device_named",
    "device_of",
    "is_predicted",
    "launches",
    "predict",
    "predicted_bytes",
    "predicted_step",
    "seconds_of",
    "side_bytes",
]
