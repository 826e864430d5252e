"""Packed cache tensors: what a model keeps in the place of dense keys and values."""

from .store import Policy, SideStore
from .tensor import PackedKV

__all__ = ["PackedKV", "Policy", "SideStore"]
