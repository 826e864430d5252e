"""The tokens of a prompt by kind, for codes that have one for each; and why they are all text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.kinds import SortedTokens, sort_tokens
from ..options import Options
from ..passes.base import value_of
from ..passes.rewrite_encode import prompt_sites
from .stats import GraphRecord
from .study import Studies
from .visual import Mask

ABOUT = "visual tokens"
"""Under which the report has a note of the prompt."""


class PromptKinds:
    """Sorts the tokens of the prompts of one graph.

    Args:
        studies: of the graph.
        options: the user's.
    """

    def __init__(self, studies: Studies, options: Options) -> None:
        self._studies = studies
        self._options = options
        prompts = prompt_sites(studies.sites)
        others = [site for site in studies.sites if site not in prompts]
        self._others = [site.cached.site.node.name for site in others]

    @property
    def shape(self) -> tuple[Any, ...]:
        """Sequences and tokens of the prompt, as the graph has them; empty: there is none."""
        if not self._studies.own:
            return ()
        keys = value_of(self._studies.sites[self._studies.own[0]].cached.k.node)
        return keys.shape[0], keys.shape[2]

    def sort(self, args: Sequence[Any], record: GraphRecord) -> SortedTokens | None:
        """The tokens of the prompt; None if there is none. Waits for the device once.

        Args:
            args: of the Dynamo graph.
            record: is told if all tokens are text, and why.
        """
        if not self._studies.own:
            self.tell(None, record)
            return None
        batch, length = self._studies.prompt(args)
        mask = visual = self._studies.prompts.mask(args, batch, length)
        if not isinstance(visual, Tensor):
            device = value_of(self._studies.sites[self._studies.own[0]].cached.k.node).device
            visual = torch.zeros(batch, length, dtype=torch.bool, device=device)
        policy = self._options.policy
        tokens = sort_tokens(visual, max(length - policy.window, 0), policy.chunk)
        self.tell(mask if mask is None or tokens.has_visual else False, record)
        return tokens

    def tell(self, mask: Mask, record: GraphRecord) -> None:
        """Tell the report which tokens are all coded as text, and why.

        Args:
            mask: visual tokens of the prompt; False: none; None: not known.
            record: of the graph.
        """
        coded = f"all tokens are coded as text, at ratio {self._options.text_ratio:g}"
        for name in self._others:
            record.notes[f"{ABOUT} of {name}"] = (
                f"not known (other tokens than the prompt's): {coded}"
            )
        if not self._studies.own:
            return
        if isinstance(mask, Tensor):
            record.notes.pop(ABOUT, None)
        elif mask is None:
            record.notes[ABOUT] = f"not known ({self._studies.prompts.unknown}): {coded}"
        else:
            record.notes[ABOUT] = f"none in this prompt: {coded}"
