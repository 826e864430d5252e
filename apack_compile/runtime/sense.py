"""Measure the sensitivity of every layer: run a prefill again, with gradients.

The Dynamo graph is interpreted node by node. Of each cache tensor all but the last tokens become a
leaf, so that gradients stop there: what is differentiated is the work of the last tokens on a
given cache, which is what decode does. Where the graph computes logits of the last token only
(``logits_to_keep=1``), it is made to compute them for all of the last tokens.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx

from ..codec.rotation import Turn
from ..codec.sensitivity import Sensitivity
from ..passes.find_writes import is_written
from ..passes.plan import PlannedSite

QUERIES = 256
"""Tokens at the end of a prefill whose predictions are differentiated."""

DRAWS = 4
"""Tokens drawn for each prediction."""

FEWEST = 32
"""Fewer queries than this say too little."""


class Unmeasured(Exception):
    """The sensitivity could not be measured; says why."""


def measure(
    gm: fx.GraphModule, args: Sequence[Any], sites: Sequence[PlannedSite],
    turns: Sequence[Turn | None], coded: Tensor, window: int,
) -> list[Sensitivity]:  # fmt: skip
    """The sensitivity of each site.

    Args:
        gm: the Dynamo graph of a prefill.
        args: its arguments.
        sites: the sites whose cache is packed.
        turns: the rotation of each site's keys.
        coded: ``[B, S]`` bool: tokens that the codes will hold, were they far behind.
        window: tokens right before the last ones that stay exact.

    Raises:
        Unmeasured: and why.
    """
    if any(n.op == "placeholder" and is_written(n) for n in gm.graph.nodes):
        raise Unmeasured("the graph writes to its inputs")
    batch, length = coded.shape
    tail = min(max(QUERIES // batch, FEWEST), length // 4)
    if tail < FEWEST:
        raise Unmeasured(f"a prompt of {length} tokens is too short")
    past = length - tail
    coded = coded[:, :past].clone()
    coded[:, max(past - window, 0) :] = False
    turns = [t and Turn(t.cos[:, :past], t.sin[:, :past], t.interleaved) for t in turns]
    updates = [u.node for s in sites for u in (s.cached.k, s.cached.v)]
    probe = _Probe(gm, updates, tail)
    budget = _Budget(coded.device)
    draws = []
    with torch.inference_mode(False), torch.enable_grad():
        plain = [_detached(a) for a in args]
        try:
            with torch.autograd.graph.saved_tensors_hooks(budget.spend, _same):
                predictions = _predictions(probe.run(*plain), tail)
            leaves = [probe.leaves[u] for u in updates]
            own = torch.Generator(coded.device).manual_seed(0)  # the user's stays as it is
            for last in [False] * (DRAWS - 1) + [True]:
                grads = torch.autograd.grad(
                    _surprise(predictions, own), leaves, retain_graph=not last
                )
                draws.append(
                    [
                        Sensitivity.of(k, v, coded, DRAWS * batch * tail, turn)
                        for k, v, turn in zip(grads[::2], grads[1::2], turns, strict=True)
                    ]
                )
        except torch.OutOfMemoryError as error:
            raise Unmeasured("out of memory") from error
        except RuntimeError as error:
            raise Unmeasured(f"no gradients: {str(error).splitlines()[0]}") from error
    found = [reduce(operator.add, layer) for layer in zip(*draws, strict=True)]
    if not all(s.is_finite for s in found):
        raise Unmeasured("gradients are not finite")
    return found


class _Probe(fx.Interpreter):
    """Runs a graph with leaves in the place of all but the last ``tail`` cached tokens."""

    def __init__(self, gm: fx.GraphModule, updates: Sequence[fx.Node], tail: int) -> None:
        super().__init__(gm)
        self.updates = set(updates)
        self.tail = tail
        self.leaves: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        """As the graph says, but for cache tensors and for the choice of the last token."""
        if _takes_last_token(n):
            args, _ = self.fetch_args_kwargs_from_env(n)
            return args[0][:, -self.tail :]
        value = super().run_node(n)
        if n in self.updates:
            past = value[:, :, : -self.tail].detach().requires_grad_()
            self.leaves[n] = past
            value = torch.cat([past, value[:, :, -self.tail :]], 2)
        return value


def _takes_last_token(n: fx.Node) -> bool:
    """``hidden[:, -1:, :]`` of ``[B, S, C]``."""
    if n.op != "call_function" or getattr(n.target, "__name__", "") != "getitem":
        return False
    index = n.args[1]
    if not isinstance(index, tuple) or len(index) < 2 or not isinstance(n.args[0], fx.Node):
        return False
    value = n.args[0].meta.get("example_value")
    everything = slice(None, None, None)
    return (
        isinstance(value, Tensor)
        and value.dim() == 3
        and index[1] == slice(-1, None, None)
        and all(i == everything for i in (index[0], *index[2:]))
    )


def _predictions(results: Any, tail: int) -> Tensor:
    """Log-probabilities that the graph gives for its last tokens: ``[B * tail, vocabulary]``."""
    candidates = [
        r for r in torch.utils._pytree.tree_leaves(results)
        if isinstance(r, Tensor) and r.is_floating_point() and r.dim() == 3 and r.requires_grad
    ]  # fmt: skip
    candidates = [r for r in candidates if r.shape[1] >= tail]
    if not candidates:
        raise Unmeasured("the graph gives no logits of its last tokens")
    logits = max(candidates, key=lambda r: r.shape[2])
    return logits[:, -tail:].float().log_softmax(-1).flatten(0, 1)


def _surprise(predictions: Tensor, generator: torch.Generator) -> Tensor:
    """Sum of log-probabilities of tokens drawn from the model's own predictions."""
    drawn = torch.multinomial(predictions.detach().exp(), 1, generator=generator)
    return predictions.gather(1, drawn).sum()


class _Budget:
    """Lets autograd keep at most half of the memory that is free."""

    def __init__(self, device: torch.device) -> None:
        self.left = _free_bytes(device) // 2
        self.seen: set[int] = set()

    def spend(self, tensor: Tensor) -> Tensor:
        """Count a tensor that autograd keeps."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.seen:
            self.seen.add(storage.data_ptr())
            self.left -= storage.nbytes()
            if self.left < 0:
                raise Unmeasured("too little memory for gradients of so long a prompt")
        return tensor


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _detached(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.clone() if value.is_inference() else value.detach()
