"""The physical storage of one packed side, and the history that handles share.

A store is append-only: tokens ``0 .. length``, of which ``0 .. coded`` are coded and the rest
live in the ring. Handles (:class:`~apack_compile.cache.PackedKV`) of different lengths may share
a store as long as their histories agree; whoever wants to write behind an older length first gets
a store of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakSet

import torch
from torch import Tensor

from ..codec import CodeRef
from ..codec.lowrank import REFACTOR
from ..kernels.encode import tallies
from ..kernels.encode_later import encode_later
from ..kernels.factor import refactored
from ..kernels.kinds import sort_tokens
from ..kernels.planes import capacity_for, quotas
from ..kernels.pool import resized
from ..kernels.running_importance import of_run, recent_importance
from ..kernels.side import Side
from ..ops.encode_cuda import encode_kernels
from .lease import Lease, writing
from .policy import Policy, encode_arguments

SLACK = 32
"""A payload grows by one part in so many, or by ``Policy.chunk`` if that is more."""


class SideStore:
    """Codes, pool and ring of one side (K or V) of one layer.

    Attributes:
        ref: the code.
        policy: what stays exact.
        side: the physical tensors; ``side.params`` is empty, parameters belong to the code.
        coded: tokens in the payload that count.
        length, prompt: tokens held in all, and how many of them were packed together at first.
        tally: error, size and number of the tokens coded, in what the fit expected
            (``kernels.encode.tally``).
        kinds: of each kind, the coded tokens of the prompt in the sequence that has the most, where
            kinds have codes of their own (``kernels/kinds.py``).
        rows: of each plane, the most that are in use.
        importance: of the tokens in the ring, ``[B, ring]`` float32, where later tokens have bits
            by it (``kernels/running_importance.py``); else None.
        name: of the site and side that the store was made for.
    """

    def __init__(self, ref: CodeRef, policy: Policy, side: Side, coded: int, length: int) -> None:
        self.ref = ref
        self.policy = policy
        self.side = side
        self.coded = coded
        self.length = self.prompt = length
        self.name = ""
        self.tally = torch.zeros(tallies(ref.layout))
        self.kinds: tuple[int, ...] = (coded, 0)
        self.rows = quotas(ref.layout, coded)
        self.importance: Tensor | None = None
        self.factored = coded  # with a basis of its own: tokens that the basis was made from
        self._leases: WeakSet[Lease] = WeakSet()
        self._lists: list[WeakSet[SideStore]] = []

    @classmethod
    def encode(
        cls, x: Tensor, ref: CodeRef, policy: Policy, visible: Tensor | None = None,
        importance: Tensor | None = None, visual: Tensor | None = None,
    ) -> SideStore:  # fmt: skip
        """Pack a dense ``[B, H, S, D]``; see ``apack::encode``.

        Args:
            x, ref, policy, visible, importance: see there.
            visual: ``[B, S]`` bool, True for visual tokens; None: all are text.
        """
        policy = policy.for_code(ref)
        arguments = encode_arguments(ref, policy, x.device)
        counts = kinds = None
        if visual is not None and ref.layout.plane_kinds:
            tokens = sort_tokens(visual, max(x.shape[2] - policy.window, 0), policy.chunk)
            counts, kinds = tokens.counts, tokens.tensors(x.device)
        tensors = torch.ops.apack.encode(x, visible, *arguments, importance, kinds)
        return cls.from_encoded(tensors, ref, policy, x.shape[2], counts)

    @classmethod
    def from_encoded(
        cls, tensors: list[Tensor], ref: CodeRef, policy: Policy, length: int,
        kinds: tuple[int, ...] | None = None,
    ) -> SideStore:  # fmt: skip
        """Adopt what ``apack::encode`` returned for ``length`` tokens, so many of each kind."""
        count = len(ref.layout.payload_fields(tensors[0].dtype)) + 3
        side, (tally, *importance) = Side.of(tensors[:count], ref.layout), tensors[count:]
        store = cls(ref, policy, side, max(length - policy.window, 0), length)
        store.tally = tally
        store.importance = importance[0] if importance else None
        if kinds is not None:
            store.kinds = kinds
            store.rows = quotas(ref.layout, store.coded, kinds=kinds)
        return store

    @property
    def recent(self) -> int:
        """Live slots of the ring."""
        return self.length - self.coded

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the dense cache that this store stands for."""
        return self.side.ring.dtype

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.side.ring.device

    def tensors(self) -> list[Tensor]:
        """The physical tensors, in the order that ops take, parameters left out."""
        side = self.side
        return [*side.payload, side.pool, side.pool_positions, side.ring]

    def owned(self) -> list[Tensor]:
        """Every physical tensor: those, and what no op reads by the side."""
        return self.tensors() + ([] if self.importance is None else [self.importance])

    @property
    def nbytes(self) -> int:
        """Bytes of every physical tensor, slack included, bases of the model not."""
        return sum(t.untyped_storage().nbytes() for t in self.owned()) + self.ref.cache_bytes

    def known_to(self, stores: WeakSet[SideStore]) -> None:
        """Be in this set, with all stores that are made of this one."""
        stores.add(self)
        self._lists.append(stores)

    def introduce(self, heir: SideStore) -> None:
        """Let ``heir``, made of this store, be known by its name to whoever knows this one."""
        heir.name = self.name
        for stores in self._lists:
            heir.known_to(stores)

    def lease(self, length: int) -> Lease:
        """Claim ``length`` tokens of this store for a handle."""
        lease = Lease(length)
        self._leases.add(lease)
        return lease

    def dense(self, length: int) -> Tensor:
        """The first ``length`` tokens as ``[B, H, length, D]``."""
        lengths = torch.tensor([self.coded, self.recent], device=self.device)
        side = [*self.tensors(), *self.ref.code.on(self.device)]
        return torch.ops.apack.unpack(side, lengths, length, self.ref.layout.spec)

    # Growing ---------------------------------------------------------------------------------

    def branch(self, length: int) -> SideStore:
        """A store whose length is ``length``, free to be written behind it.

        This store itself if nobody needs what lies behind ``length``, else a copy.
        """
        if length == self.length:
            return self
        if any(lease.length > length for lease in self._leases):
            return self._copy(length)
        self._truncate(length)
        return self

    def _truncate(self, length: int) -> None:
        if length < self.coded:
            # The window is gone with the tokens behind `length`; the coded ones stay coded.
            self.coded = length
            self.factored = min(self.factored, length)
            self.rows = [min(rows, length) for rows in self.rows]
            taken = self.side.pool_positions[:, self.policy.sinks :]  # sinks are reserved for good
            with writing(self.tensors(), self.device):
                taken.masked_fill_(taken >= length, -1)
        self.length, self.prompt = length, min(self.prompt, length)

    def _copy(self, length: int) -> SideStore:
        capacity = self._round_up(min(self.coded, length))
        copied = self._map(lambda t: t.clone(), lambda p: p[:, :capacity].clone())
        copied._truncate(length)
        copied._give_slots_back()
        return copied

    def surplus(self, tokens: int) -> int:
        """Tokens of the ring to be coded before ``tokens`` more (at most a block) fit into it."""
        full = self.recent + tokens > self.policy.ring
        return self.recent - self.policy.window if full else 0

    def reserve(self, tokens: int) -> None:
        """Make room for ``tokens`` in the ring."""
        if self.surplus(tokens):
            self.code_oldest(self.surplus(tokens))

    def code_oldest(self, tokens: int) -> None:
        """Move the oldest ``tokens`` of the ring into the codes."""
        live = self.recent
        with writing(self.owned(), self.device):
            run = self.side.ring[:, :, :live].clone()  # before anything changes: this may fail
            self._code_first(tokens, run, of_run(self.importance, live))

    def free_ring(self) -> None:
        """Let graphs that run in the current mode write to the ring: one made in inference mode
        may not be written outside of it."""
        if self.side.ring.is_inference() and not torch.is_inference_mode_enabled():
            self.side = self.side._replace(ring=self.side.ring.clone())
            self.importance = None if self.importance is None else self.importance.clone()

    def advance(self, tokens: int) -> None:
        """``tokens`` have been written behind the live slots of the ring."""
        self.length += tokens

    def extend(self, new: Tensor, importance: Tensor | None = None) -> None:
        """Append ``new [B, H, T, D]``, however long.

        Args:
            new: the tokens.
            importance: of all tokens then, ``[B, length]``; None: of the new ones it is not known.
        """
        with writing(self.owned(), self.device):
            ring, live, tokens = self.side.ring, self.recent, new.shape[2]
            run = torch.cat([ring[:, :, :live], new.to(ring.dtype)], 2)
            fits = live + tokens <= ring.shape[2]
            weights = of_run(self.importance, live, tokens, importance, self.coded)
            self._code_first(0 if fits else live + tokens - self.policy.window, run, weights)

    def _code_first(self, tokens: int, run: Tensor, weights: Tensor | None) -> None:
        """Code the first ``tokens`` of ``run [B, H, T, D]``; the others are the ring then."""
        if tokens:
            self._code(run[:, :, :tokens], None if weights is None else weights[:, :tokens])
        left = run.shape[2] - tokens
        self.length = self.coded + left  # with what is coded, should the rest fail
        self.side.ring[:, :, :left] = run[:, :, tokens:]
        if self.importance is not None and weights is not None:
            self.importance[:, :left] = weights[:, tokens:]

    def _code(self, x: Tensor, weights: Tensor | None) -> None:
        start, end = self.coded, self.coded + x.shape[2]
        code = self.ref.code
        self.room_for_codes(end)
        payload, pool, positions = self.side[:3]
        ref = self.ref
        if code.layout.per_sequence and end - self.factored >= REFACTOR:
            x, start = torch.cat([self.dense(start), x], 2), 0
            ref = refactored(ref, x, positions)
            code = ref.code
        begin = torch.full((1,), start, dtype=torch.int32, device=self.device)
        # In place: a step that was captured as a CUDA graph reads these addresses.
        sums = encode_later(
            x, code.on(self.device), code.layout, payload, pool, positions, begin,
            self.policy.sinks, self.policy.extra, weights, encode_kernels(x, code.layout),
        )  # fmt: skip
        self.coded_to(end, sums)
        if ref is not self.ref:
            self.ref, self.factored = ref, end

    def room_for_codes(self, end: int) -> None:
        """Let payload and pool hold what the first ``end`` tokens want."""
        self.make_room(end)
        capacity = self.side.payload[0].shape[1]
        if self._slots(capacity) > self.side.pool.shape[2]:
            self._resize_pool(capacity)  # with the payload, and as seldom

    def coded_to(self, end: int, sums: Tensor | None = None) -> None:
        """The first ``end`` tokens are coded now. sums: what is new in the tally."""
        more = quotas(self.ref.layout, end - self.coded, later=True)
        self.rows = [rows + new for rows, new in zip(self.rows, more, strict=True)]
        self.coded = end
        if sums is not None:
            self.tally = self.tally.to(sums.device) + sums

    def _slots(self, tokens: int) -> int:
        """Slots of the pool that so many coded tokens want."""
        return self.policy.sinks + self.ref.layout.slots(self.policy.extra, tokens)

    def _resize_pool(self, tokens: int) -> None:
        """Let the pool have the slots that so many coded tokens want."""
        pool, positions = resized(self.side.pool, self.side.pool_positions, self._slots(tokens))
        self.side = self.side._replace(pool=pool, pool_positions=positions)

    def _give_slots_back(self) -> None:
        """Leave free slots that a payload without slack does not want."""
        tokens = self._round_up(self.coded)
        if self._slots(tokens) < self.side.pool.shape[2]:
            self._resize_pool(tokens)

    def _round_up(self, tokens: int) -> int:
        return capacity_for(tokens, self.policy.chunk)

    def make_room(self, tokens: int, spare: bool = True) -> None:
        """Let the payload hold so many tokens; with ``spare`` a little more."""
        self.side = self.side._replace(payload=self._with_room(tokens, spare))

    def _with_room(self, tokens: int, spare: bool = True) -> tuple[Tensor, ...]:
        """The payload with room for ``tokens``.

        All tensors grow together, for captured steps are captured anew whenever one does: planes
        get room for the tokens that the others have room for.
        """
        payload = self.side.payload
        if all(n <= p.shape[1] for n, p in zip(self._wanted(tokens), payload, strict=True)):
            return payload
        capacity = payload[0].shape[1]
        if tokens > capacity:  # by a little more when there is much
            capacity = self._round_up(tokens + (capacity // SLACK if spare else 0))
        return tuple(
            self._grown(p, rows) for p, rows in zip(payload, self._wanted(capacity), strict=True)
        )

    def _wanted(self, tokens: int) -> list[int]:
        """Rows of each payload tensor for ``tokens``, of which some are coded already."""
        layout = self.ref.layout
        more = quotas(layout, max(tokens - self.coded, 0), later=True)
        planes = [rows + new for rows, new in zip(self.rows, more, strict=True)]
        return [tokens] * layout.tokenwise + planes

    def _grown(self, part: Tensor, rows: int) -> Tensor:
        if rows <= part.shape[1]:
            return part
        more = self._round_up(rows) - part.shape[1]
        return torch.nn.functional.pad(part, (0, 0, 0, more))

    # Whole-store operations --------------------------------------------------------------------

    def _map(
        self, each: Callable[[Tensor], Tensor], payload: Callable[[Tensor], Tensor] | None = None
    ) -> SideStore:
        payload = payload or each
        end = self.ref.layout.tokenwise
        side = Side(
            (*map(payload, self.side.payload[:end]), *map(each, self.side.payload[end:])),
            each(self.side.pool), each(self.side.pool_positions), each(self.side.ring), (),
        )  # fmt: skip
        return self._heir(side, each)

    def _heir(self, side: Side, each: Callable[[Tensor], Tensor]) -> SideStore:
        """A store with the same tokens in other tensors, each made by ``each``."""
        heir = SideStore(self.ref, self.policy, side, self.coded, self.length)
        heir.factored, heir.prompt, heir.tally = self.factored, self.prompt, self.tally.clone()
        heir.rows, heir.kinds = list(self.rows), self.kinds
        heir.importance = None if self.importance is None else each(self.importance)
        self.introduce(heir)
        return heir

    def select(self, rows: Tensor, length: int) -> SideStore:
        """Batch rows ``rows`` (int64, repeats allowed) of the first ``length`` tokens."""
        rows = rows.to(self.device)
        chosen = self._map(lambda t: t.index_select(0, rows))
        chosen.ref = self.ref.select(rows)
        chosen._truncate(length)
        if chosen.coded < self.coded:  # others, as beams, need not wait for the device
            chosen._give_slots_back()
        return chosen

    def clone(self, length: int) -> SideStore:
        """A deep copy of the first ``length`` tokens."""
        return self._copy(length)

    def to(self, length: int, dtype: torch.dtype, device: torch.device) -> SideStore:
        """A copy in another dtype or on another device; codes and gains keep their dtype."""
        side = self.side.to(self.ref.layout, dtype, device)
        moved = self._heir(side, lambda t: t.to(device=device, copy=True))
        moved._truncate(length)
        return moved

    def align(self, coded: int, capacity: int) -> None:
        """Code further, up to ``coded`` tokens, and grow to ``capacity``, if that is more."""
        if coded > self.coded:
            self.code_oldest(coded - self.coded)
        self.make_room(capacity, spare=False)

    def __getstate__(self) -> dict[str, object]:
        own = ("_leases", "_lists")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state, _leases=WeakSet(), _lists=[])
        if "importance" not in state:  # of a version before there was one
            ring, tracks = self.side.ring, self.ref.layout.tracks_importance
            self.importance = recent_importance(None, ring, 0, ring.shape[2]) if tracks else None
