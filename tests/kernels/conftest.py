"""Triton's interpreter with any NumPy."""

from __future__ import annotations

from typing import Any

try:
    from triton.runtime import interpreter
except ImportError:
    pass
else:
    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        """Triton 3.6 takes int() of arrays of one number, which NumPy 2.5 refuses."""
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_lang_tensor
