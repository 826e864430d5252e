"""Codes for keys and values: fit, encode, decode, absorbed attention, bytes. No graphs here."""

from .code import Code, CodeRef
from .evicting import EvictingLayout
from .exact import ExactLayout
from .layout import Layout, parse_layout
from .lowrank import LowRankLayout
from .modal import ModalLayout
from .tiered import TieredLayout
from .transform import TransformLayout

__all__ = [
    "Code",
    "CodeRef",
    "EvictingLayout",
    "ExactLayout",
    "Layout",
    "LowRankLayout",
    "ModalLayout",
    "TieredLayout",
    "TransformLayout",
    "parse_layout",
]
