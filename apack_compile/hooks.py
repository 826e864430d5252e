"""What loading the backend does besides compiling: small, idempotent, only for our backend.

* Dynamo's ``recompile_limit`` is raised. Its 8 is counted per code object, and nearly all Hugging
  Face forwards share one: past the limit decode runs eagerly, without a word.
* ``torch.compile(model, backend="attentionpack").generate(...)`` uses the compiled forward.
  ``OptimizedModule`` hands out ``generate`` bound to the original model, which stock torch then
  runs eagerly; here every model inside that can generate has the compiled call as its own while
  ``generate`` of the compiled object runs.
* Hugging Face's output-capturing hooks are installed before tracing; installed during the first
  forward, under a lock, they break graphs.
* ``generate(compile_config=CompileConfig(backend="attentionpack"))`` also compiles with a
  DynamicCache and on any device; stock transformers skips both.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import logging
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import nn

from .calls import compiled_calls

log = logging.getLogger(__name__)

BACKEND = "attentionpack"
GENERATION = "transformers.generation.utils"
RECOMPILE_LIMIT = 64

_MARK = "_apack_hook"
_limit_before: list[int] = []


def install() -> None:
    """Install every hook that is not installed yet."""
    raise_recompile_limit()
    _hook_optimized_module()
    after_import(GENERATION, _hook_generation_criteria)


def raise_recompile_limit() -> None:
    """Raise Dynamo's limit to ours, unless the user has a higher one."""
    config = torch._dynamo.config
    if config.recompile_limit < RECOMPILE_LIMIT:
        _limit_before[:] = [config.recompile_limit]
        config.recompile_limit = RECOMPILE_LIMIT
        log.info("Dynamo's recompile_limit raised from %d to %d", _limit_before[0], RECOMPILE_LIMIT)


def restore_recompile_limit() -> None:
    """Undo :func:`raise_recompile_limit`, unless someone has changed the limit since."""
    if _limit_before and torch._dynamo.config.recompile_limit == RECOMPILE_LIMIT:
        torch._dynamo.config.recompile_limit = _limit_before[0]
    _limit_before.clear()


def _hook_optimized_module() -> None:
    from torch._dynamo.eval_frame import OptimizedModule

    original = OptimizedModule._initialize
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def initialize(self: Any) -> None:
        original(self)
        if _is_ours(self.dynamo_ctx):
            adopt(self, self._orig_mod, self.dynamo_ctx)

    setattr(initialize, _MARK, True)
    OptimizedModule._initialize = initialize


def _is_ours(context: Any) -> bool:
    from torch._dynamo.eval_frame import DisableContext, innermost_backend

    callback = getattr(context, "callback", None)
    if isinstance(context, DisableContext) or not callable(callback):
        return False
    compiler = getattr(innermost_backend(callback), "compiler_name", None)
    return compiler == BACKEND or _name_of(innermost_backend(callback)) == BACKEND


def _name_of(backend: Any) -> str:
    inner = getattr(backend, "compiler_fn", backend)
    return getattr(inner, "__name__", "")


def adopt(compiled: Any, model: nn.Module, context: Any) -> None:
    """Give the compiled object a ``generate`` that runs compiled; the model is left as it is."""
    transformers = sys.modules.get("transformers")
    if transformers is None:
        return
    install_capturing_hooks(model)
    generating = [m for m in model.modules() if isinstance(m, transformers.GenerationMixin)]
    original = getattr(model, "generate", None)
    if not generating or not callable(original):
        return
    calls = {m: context(m._call_impl) for m in generating}

    @functools.wraps(original)
    def generate(*args: Any, **kwargs: Any) -> Any:
        with compiled_calls(calls):
            return original(*args, **kwargs)

    # OptimizedModule hands attributes on to the model, except those of its own __dict__.
    object.__setattr__(compiled, "generate", generate)


def install_capturing_hooks(model: nn.Module) -> None:
    """Install them as transformers would: once, from the outermost model down.

    Installed twice, a layer's output is collected twice, and a model that asks for "the last
    layer but one" (LLaVA's vision tower) silently gets another one.
    """
    capturing = sys.modules.get("transformers.utils.output_capturing")
    install_once = getattr(capturing, "maybe_install_capturing_hooks", None)
    if install_once is None:
        return
    hooked = "_output_capturing_hooks_installed"
    for module in model.modules():  # outermost first; it marks the models inside
        if isinstance(module, sys.modules["transformers"].PreTrainedModel) and not any(
            getattr(inside, hooked, False) for inside in module.modules()
        ):
            install_once(module)


def _hook_generation_criteria(generation: ModuleType) -> None:
    original = getattr(generation.GenerationMixin, "_valid_auto_compile_criteria", None)
    if original is None:  # private: a release may do without it
        log.warning("attentionpack: this transformers does not take CompileConfig(backend=...)")
        return
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def criteria(self: Any, model_kwargs: dict[str, Any], generation_config: Any) -> bool:
        compile_config = generation_config.compile_config
        if getattr(compile_config, "backend", None) == BACKEND:
            return not generation_config.disable_compile
        return bool(original(self, model_kwargs, generation_config))

    setattr(criteria, _MARK, True)
    generation.GenerationMixin._valid_auto_compile_criteria = criteria


def after_import(name: str, act: Callable[[ModuleType], None]) -> None:
    """Call ``act`` with module ``name``: now if it is imported, else when it is."""
    if name in sys.modules:
        act(sys.modules[name])
    elif not any(isinstance(f, _AfterImport) and f.name == name for f in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport(name, act))


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds one module by the other finders, and acts once it has been executed."""

    def __init__(self, name: str, act: Callable[[ModuleType], None]) -> None:
        self.name = name
        self.act = act

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self.act(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
