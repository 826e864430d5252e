"""What the cost model says of caches that are there: for the report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..cache import SideStore
from .device import Device, device_of
from .sizes import PackedSide, bytes_of
from .steps import is_predicted, seconds_of


def side_of(store: SideStore) -> PackedSide:
    """What the bytes of a store depend on, besides batch and length."""
    return PackedSide.of(store.ref, store.policy, store.dtype, store.kinds)


def predicted_bytes(stores: Iterable[SideStore]) -> int:
    """Bytes that the stores should take, as long as they are."""
    total = 0.0
    for store in stores:
        batch, prompt = store.side.ring.shape[0], max(store.prompt, 1)  # a crop may leave nothing
        total += sum(bytes_of(side_of(store), batch, prompt, max(store.length - prompt, 0)))
    return round(total)


def first_coded(store: SideStore) -> int:
    """Of the coded tokens of a store, those that prefill coded."""
    return min(max(store.prompt - store.policy.window, 0), store.coded)


def predicted_step(
    stores: Iterable[SideStore], q_heads: Mapping[str, int], device: Device | None = None
) -> float | None:
    """Seconds of packed attention in one step that reads all of these caches once.

    Args:
        stores: keys and values of the layers of a graph.
        q_heads: query heads of each attention site, by name.
        device: where it runs; None: where the stores are.

    Returns:
        None if the model does not know the device, or the kernels of one of the codes.
    """
    halves: dict[tuple[str, int, int], tuple[list[SideStore], list[SideStore]]] = {}
    for store in stores:
        site, _, side = store.name.rpartition(".")
        key = site, store.side.ring.shape[0], store.length
        halves.setdefault(key, ([], []))[side == "v"].append(store)
    total = 0.0
    for (site, batch, _), (keys, values) in halves.items():
        if site not in q_heads or len(keys) != len(values):
            return None
        for k, v in zip(keys, values, strict=True):
            sides = side_of(k), side_of(v)
            where = device or device_of(k.device)
            if where is None or not is_predicted(*sides):
                return None
            first = first_coded(k)
            total += seconds_of(*sides, q_heads[site], where, batch, k.coded, first=first)
    return total
