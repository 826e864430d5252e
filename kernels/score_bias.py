"""What is added to scores over a packed layer: mask by physical slot, and -inf where nothing is.

The same for all layers whose masks and lengths agree, so it is an operator of its own,
``apack::score_bias``: computed once a step, whatever the number of layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..codec.layout import working_dtype


def score_bias(
    mask: Tensor | None, lengths: Tensor, capacity: int, ring: int, dtype: torch.dtype
) -> Tensor:
    """Bias ``[B|1, Hq|1, Q|1, capacity + ring]``: 0 or the mask's number where a token is seen.

    Args:
        mask: bool (True: seen) or float (added), at most 4-D, by logical position along its last
            dimension; or None.
        lengths: int64 ``[2]``: tokens coded, tokens in the ring.
        capacity: slots of the payload.
        ring: slots of the ring.
        dtype: of the queries; the bias has their working dtype.
    """
    work = working_dtype(dtype)
    coded, recent = lengths[0], lengths[1]
    in_codes = torch.arange(capacity, device=lengths.device)
    in_ring = torch.arange(ring, device=lengths.device)
    live = torch.cat([in_codes < coded, in_ring < recent])
    bias = torch.where(live, 0.0, float("-inf")).to(work)
    if mask is None:
        return bias[None, None, None]
    if mask.shape[-1] != 1:
        where = torch.cat([in_codes, coded + in_ring]).clamp(max=mask.shape[-1] - 1)
        mask = mask.index_select(-1, where)
    if mask.dtype == torch.bool:
        bias = torch.where(mask, bias, float("-inf"))
    else:
        bias = mask.to(work) + bias
    return bias[(None,) * (4 - bias.dim())]
