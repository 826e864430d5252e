"""What each stage minimises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .batches import CELLS, Batch
from .forward import embed, see, speak, understand
from .model import unchanged
from .plans import KINDS
from .sources import CHARACTERS


class Seeing(nn.Module):
    """Single tiles without the language model: images shall lie where the words for them do.

    The mean of an image's tokens is to be closest, among all things, to the mean embedding of the
    thing's name, and equal to it. A token over print is to tell its three characters.

    Args:
        table: embeddings of all tokens, ``[V, hidden]``.
        names: token ids of every thing's name.
    """

    def __init__(self, table: Tensor, names: Sequence[Sequence[int]]) -> None:
        super().__init__()
        means = torch.stack([table[torch.tensor(name)].mean(0) for name in names])
        self.register_buffer("means", means, persistent=False)  # [things, hidden]
        self.register_buffer("middle", means.mean(0), persistent=False)
        self.sharpness = nn.Parameter(torch.tensor(3.0))
        self.characters = nn.Linear(table.shape[1], CELLS * len(CHARACTERS))
        # Embeddings are far smaller than 1: without this, letters would be learnt far slower.
        self.register_buffer("size", table.std(), persistent=False)

    def forward(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch of tiles, and what is right of it."""
        seen = see(model, batch["tiles"]).float()  # [N, PLACES, hidden]
        drawings = len(batch["things"])
        mean = seen[:drawings].mean(1)
        pull = F.normalize(mean - self.middle, dim=-1) @ F.normalize(
            self.means - self.middle, dim=-1
        ).T  # fmt: skip
        named = pull * self.sharpness.exp()
        letters = self.characters(seen[drawings:] / self.size).unflatten(-1, (CELLS, -1))
        wanted = self.means[batch["things"]]
        loss = (
            F.cross_entropy(named, batch["things"])
            + F.cross_entropy(letters.flatten(0, 2), batch["print"].flatten())
            + (mean - wanted).square().mean() / self.means.var()
        )
        right = {
            "drawings": (named.argmax(-1) == batch["things"]).float().mean(),
            "letters": (letters.argmax(-1) == batch["print"]).float().mean(),
        }
        return loss, right


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
