"""Packed cache tensors: what a model keeps in the place of dense keys and values."""

from .policy import Policy
from .store import SideStore
from .tensor import PackedKV

__all__ = ["PackedKV", "Policy", "SideStore"]
