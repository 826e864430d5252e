"""The ``apack::`` operators: schemas, fakes, implementations, lowerings."""

from . import library

__all__ = ["library"]
