"""What each stage minimises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .batches import Batch
from .forward import embed, see, speak, understand
from .model import unchanged
from .plans import KINDS


class Seeing(nn.Module):
    """Single tiles without the language model: images shall lie where the words for them do.

    The mean of an image's tokens is to be closest, among all things, to the mean embedding of the
    thing's name, and equal to it. A token over a printed digit is to be that digit's embedding.

    Args:
        table: embeddings of all tokens, ``[V, hidden]``.
        names: token ids of every thing's name.
        digits: token ids of 0 to 9.
    """

    def __init__(
        self, table: Tensor, names: Sequence[Sequence[int]], digits: Sequence[int]
    ) -> None:
        super().__init__()
        means = torch.stack([table[torch.tensor(name)].mean(0) for name in names])
        self.register_buffer("means", means, persistent=False)  # [things, hidden]
        self.sharpness = nn.Parameter(torch.tensor(3.0))
        self.register_buffer("digits", table[torch.tensor(digits)], persistent=False)

    def forward(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch of tiles, and what is right of it."""
        seen = see(model, batch["tiles"]).float()  # [N, PLACES, hidden]
        drawings = len(batch["things"])
        printed = batch["digits"] >= 0
        drawn, named = self._pulled(seen[:drawings].mean(1), self.means, batch["things"])
        read, digits = self._pulled(seen[drawings:][printed], self.digits, batch["digits"][printed])
        return drawn + read, {"drawings": named, "digits": digits}

    def _pulled(self, seen: Tensor, places: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of what is seen ``[n, hidden]`` against its places; the share closest to them."""
        middle = places.mean(0)
        alike = F.normalize(seen - middle, dim=-1) @ F.normalize(places - middle, dim=-1).T
        logits = alike * self.sharpness.exp()
        far = (seen - places[numbers]).square().mean() / places.var()
        right = (logits.argmax(-1) == numbers).float().mean()
        return F.cross_entropy(logits, numbers) + far, right


def answering(model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch of albums, and the share of questions of each task that are all right.

    Cross-entropy of the answers, plus what the model's changes do to prose: KL divergence from
    the unchanged model, per token. Prose of so few documents would itself be learnt by heart.
    """
    # First of all: gradients need the changes' strength as it was when they were used.
    with torch.no_grad(), unchanged(model):
        before = prose_logits(model, batch["text"])
    seen = see(model, batch["tiles"])
    hidden = understand(model, embed(model, batch["ids"], batch["places"], seen))
    logits = speak(model, hidden, batch["positions"]).float()
    loss = F.cross_entropy(logits, batch["targets"])
    loss = loss + drift(before, prose_logits(model, batch["text"]))
    correct = (logits.argmax(-1) == batch["targets"]).float()
    exact = torch.ones(len(batch["kinds"]), device=loss.device)
    exact = exact.scatter_reduce(0, batch["owners"], correct, "amin")
    right = {}
    for number, kind in enumerate(KINDS):
        of_kind = (batch["kinds"] == number).float()
        right[kind] = (exact * of_kind).sum() / of_kind.sum()  # NaN where there is none
    return loss, right


def prose_logits(model: Any, text: Tensor) -> Tensor:
    """Logits ``[R, T, V]`` of prose ``[R, T]``."""
    hidden = model.model.text_model(text, use_cache=False).last_hidden_state
    return model.lm_head(hidden).float()


def drift(before: Tensor, now: Tensor) -> Tensor:
    """KL divergence per token, from logits of the unchanged model to those of this one."""
    return F.kl_div(
        now.log_softmax(-1).flatten(0, 1), before.log_softmax(-1).flatten(0, 1),
        log_target=True, reduction="batchmean",
    )  # fmt: skip
