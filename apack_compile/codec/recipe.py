"""What a user may choose of a fitted code."""

from __future__ import annotations

from dataclasses import dataclass

from .layout import KEPT_OF, PARTS

KEY_CODES = ("post-rope", "pre-rope")

VALUE_BASES = ("pca", "hadamard")


@dataclass(frozen=True)
class Recipe:
    """Which member of the family of transform codes is fitted.

    Attributes:
        ratio: bytes of a dense 16-bit token over bytes of a coded one.
        k_code: ``post-rope``: keys are coded as attention sees them, and scores are taken against
            their codes. ``pre-rope``: coded before their rotary embedding, which takes fewer bits
            for the same error; scores are taken against rebuilt keys.
        v_basis: ``pca``: joint principal components of the heads of a group. ``hadamard``: a
            rotation of each head that no data decides, with a gain for each token and head
            (QuaRot, NeurIPS 2024).
        tiers: values have as many bits as the attention that their token receives is worth
            (:class:`~apack_compile.codec.tiered.TieredLayout`).
        exact_share: share of the tokens of each sequence, layer and side that stay exact: those
            that the code holds worst for their size. Codes are so much smaller.
        evict: share of the tokens of a prompt that are dropped for good: those that the last
            queries attended to least (:class:`~apack_compile.codec.evicting.EvictingLayout`). Codes
            of the others are so much larger. With ``visual_ratio``: of its visual tokens.
        visual_ratio: of visual tokens, which have a code of their own then
            (:class:`~apack_compile.codec.modal.ModalLayout`); ``ratio`` is that of text. 0: one
            code for all tokens. Goes together with all of the above.
    """

    ratio: float
    k_code: str = "post-rope"
    v_basis: str = "pca"
    tiers: bool = False
    exact_share: float = 0.0
    evict: float = 0.0
    visual_ratio: float = 0.0

    @property
    def evicted(self) -> int:
        """Of ``PARTS`` tokens of a prompt, how many are dropped."""
        return max(round(self.evict * PARTS), int(self.evict > 0))

    @property
    def weighs(self) -> bool:
        """Whether it matters how much attention a token received."""
        return self.tiers or self.evicted > 0

    @property
    def kept(self) -> int:
        """Of ``KEPT_OF`` tokens, how many stay exact."""
        return max(round(self.exact_share * KEPT_OF), int(self.exact_share > 0))
