"""Decode graphs on their way to Inductor on a GPU: what layers share, and CUDA graphs."""

from . import ops
from .decode import compile_decode, is_decode

__all__ = ["compile_decode", "is_decode", "ops"]
