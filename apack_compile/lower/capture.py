"""The body of a decode step as one CUDA graph.

A captured graph reads and writes at the addresses it was captured with. Weights and packed caches
stay where they are, and their addresses are checked before every replay; all other inputs are
small and are copied to where the graph expects them. When an address is another one (a cache has
grown, or it is another cache), the body runs uncaptured; when that set of addresses comes back, it
is captured too.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..locks import lock
from .recording import Recording

log = logging.getLogger(__name__)

MOST = 4
"""Captured graphs that are kept."""

LATEST = 2
"""The same of calls that are captured whenever they are new: most of what they saw is gone."""

RARELY = 16
"""One capture in so many calls at most, after the first few: it costs several steps."""

LARGE = 1 << 24
"""Bytes of an input that is expected where it was, as a weight is, and not copied."""


class Captured:
    """Calls ``call``, from a CUDA graph where one fits.

    Args:
        call: works on tensors of one device; what it writes to is among ``fixed``.
        fixed: arguments that are never copied: packed caches. Weights are not copied either.
        record: makes a recording.
        sparing: capture only what comes a second time, and seldom. Else whatever is new, once a
            first call has run: for calls that take the host as long as a capture does. Where that
            fails it becomes sparing.
        launched: see :meth:`Recording.replay`.

    Attributes:
        reason: why nothing is captured any more; empty if that is not so.
    """

    def __init__(
        self, call: Callable[..., Sequence[Any]], fixed: frozenset[int],
        record: Callable[..., Recording] = Recording, sparing: bool = True,
        launched: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        self.call = call
        self.fixed = fixed
        self.record = record
        self.sparing = sparing
        self.launched = launched
        self.reason = ""
        self.calls = self.captures = 0
        self._kinds: tuple[list[int], list[int], list[int]] | None = None
        self._recordings: OrderedDict[Any, Recording] = OrderedDict()
        self._seen: OrderedDict[Any, None] = OrderedDict()
        self._lock = lock()  # a recording has one set of inputs

    def __call__(self, args: Sequence[Any]) -> list[Any]:
        """The results of the call."""
        if self.reason or _others_capture():
            return list(self.call(*args))
        with self._lock:
            recording = self._recording(args)
            if recording is not None:
                return recording.replay(args, self.launched)
        return list(self.call(*args))

    def _recording(self, args: Sequence[Any]) -> Recording | None:
        """One that fits these arguments, captured now if that is worth it."""
        self.calls += 1
        if self._kinds is None:
            self._kinds = self._sort(args)
        copied, weights, rest = self._kinds
        key = (
            tuple([args[i].data_ptr() for i in weights]),
            tuple([_kind(args[i], i in self.fixed) for i in rest]),
        )
        recording = self._recordings.get(key)
        if recording is not None:
            self._recordings.move_to_end(key)
        elif not self.reason and self._worth_it(key):
            recording = self._capture(key, args, copied)
        return recording

    def _sort(self, args: Sequence[Any]) -> tuple[list[int], list[int], list[int]]:
        """Arguments to copy; weights; and all but those, whose shapes count as well."""
        devices = {arg.device for arg in args if isinstance(arg, Tensor)}
        if len(devices) > 1:  # of a number on the CPU the value would be captured
            self._give_up("inputs are on several devices")
        copied, weights, rest = [], [], []
        for i, arg in enumerate(args):
            if isinstance(arg, torch.nn.Parameter):
                weights.append(i)
                continue
            rest.append(i)
            if not isinstance(arg, Tensor) or i in self.fixed:
                continue
            if arg.numel() * arg.element_size() > LARGE:
                self.fixed |= {i}
            else:
                copied.append(i)
        return copied, weights, rest

    def _worth_it(self, key: Any) -> bool:
        """Whether to capture now: the second time that these addresses come, if sparing."""
        if not self.sparing:
            return self.calls > 1
        if key not in self._seen:
            self._seen[key] = None
            if len(self._seen) > 2 * MOST:
                self._seen.popitem(last=False)
            return False
        return self.captures * RARELY <= self.calls + MOST * RARELY

    def _capture(self, key: Any, args: Sequence[Any], copied: list[int]) -> Recording | None:
        if len(self._recordings) == (MOST if self.sparing else LATEST):
            self._recordings.popitem(last=False)  # and with it the memory of its intermediates
        self.captures += 1
        log.debug("capture %d of a decode step", self.captures)
        try:
            recording = self.record(self.call, args, copied)
        except Exception as error:  # nothing has run yet: the step can still be taken uncaptured
            if self.sparing:
                self._give_up(str(error).partition("\n")[0])
            self.sparing = True
            self._seen[key] = None
            return None
        self._recordings[key] = recording
        return recording

    def _give_up(self, reason: str) -> None:
        self.reason = reason
        log.warning("attentionpack: no CUDA graph of decode steps: %s", reason)


def _others_capture() -> bool:
    """Whether the whole call is part of a CUDA graph that the user is making."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _kind(arg: Any, fixed: bool) -> Any:
    """What a recording depends on."""
    if not isinstance(arg, Tensor):
        return arg
    if fixed:
        return arg.data_ptr(), arg.shape
    # Bug: a column of a mask that grows has another stride at each step, in a dimension of size 1.
    steps = tuple(n if size > 1 else 1 for size, n in zip(arg.shape, arg.stride(), strict=True))
    return arg.shape, steps, arg.dtype
