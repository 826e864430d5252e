"""The masks of the sites of a graph being rewritten, each computed once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from . import flex_mask
from .base import value_of
from .find_attention import AttentionSite
from .find_writes import base_of, is_written
from .flex_mask import FlexMask
from .mask import Mask, MaskPart, write_mask
from .plan import PlannedSite

if TYPE_CHECKING:
    from .draft import Draft

aten = torch.ops.aten


class SiteMasks:
    """Writes the masks of sites into a draft.

    What is computed for a mask serves all sites that have it, unless the graph writes to a part of
    it in place.
    """

    def __init__(self, draft: Draft) -> None:
        self.draft = draft
        self._known: dict[tuple[Any, ...], fx.Node] = {}

    def of(self, site: AttentionSite) -> fx.Node | None:
        """The mask of a site in the new graph; if it is bool, True where a token is seen."""
        if isinstance(site.mask, FlexMask):
            return self._of_flex(site, site.mask)
        draft = self.draft
        if (mask := site.mask) is None or _is_as_sdpa_has_it(mask):
            return None if mask is None else draft.map[mask.parts[0].node]
        if any(is_written(base_of(part.node)) for part in mask.parts):
            return write_mask(draft.graph, mask, draft.map, site.heads)
        key = mask, site.heads
        if key not in self._known:
            nodes = {draft.map[part.node] for part in mask.parts}
            last = next(n for n in reversed(draft.graph.nodes) if n in nodes)
            with draft.graph.inserting_before(draft.first_user(last)):  # for the sites before, too
                self._known[key] = write_mask(draft.graph, mask, draft.map, site.heads)
        return self._known[key]

    def _of_flex(self, site: AttentionSite, mask: FlexMask) -> fx.Node:
        """Made in front of the first site that has it; sites come in order."""
        draft = self.draft
        planned = next(p for p in draft.plan.sites if p.cached.site is site)
        packed = planned.treatment == "attend"
        key = mask, packed, value_of(site.q).device
        changes = any(is_written(base_of(node)) for node in mask.tensors)
        if changes or key not in self._known:
            with draft.graph.inserting_before(draft.map[site.node]):
                keys = self._packed_keys(planned) if packed else self._dense_keys(site)
                self._known[key] = flex_mask.write_mask(
                    draft.graph, mask, site.q, keys, draft.map.__getitem__
                )
        return self._known[key]

    def _packed_keys(self, planned: PlannedSite) -> fx.Node:
        """``[0, 1, ...]``, as many as the packed keys and those that this graph appends."""
        draft, past = self.draft, planned.cached.k.past
        number = draft.number(past)
        new = draft.plan.appended[number]
        length, device = draft.length(number), draft.device(number)
        keys = draft.graph.call_function(aten.arange.start, (-new, length), {"device": device})
        return draft.graph.call_function(aten.add.Tensor, (keys, new)) if new else keys

    def _dense_keys(self, site: AttentionSite) -> fx.Node:
        call = self.draft.graph.call_function
        size = call(aten.sym_size.int, (self.draft.map[site.k], 2))
        return call(aten.arange.default, (size,), {"device": value_of(site.k).device})


def _is_as_sdpa_has_it(mask: Mask) -> bool:
    """Whether a mask is one tensor as it is, bool or of floating-point numbers."""
    first = mask.parts[0]
    value = value_of(first.node)
    known = value.dtype == torch.bool or value.is_floating_point()
    return known and mask.parts == (MaskPart(first.node),)
