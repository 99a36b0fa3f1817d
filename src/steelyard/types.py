"""The words that every room shares: small frozen records and the legend of shape letters.

Shape letters, as suffixes of names and in type annotations: B examples, M members of an ensemble,
K responses to one prompt, L tokens of a row, T tokens of a response, D features, N rows of a data set,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant"]
Action = Literal["keep", "flip", "soften", "drop", "review"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


Prompt = str | tuple[Message, ...]
"""Plain text, or a conversation that ends with the turn to be answered."""


@dataclass(frozen=True, slots=True)
class Preference:
    """One comparison: `chosen` was preferred to `rejected` as an answer to `prompt`.

    Measuring and repairing data edit `flip_prob`, `margin` and `weight`; losses read them. No loss knows which
    strategy ran and no strategy knows the loss.

    `flip_prob` is the probability, in [0, 1], that the label is wrong; `margin` (in units of reward) is how far
    apart the two rewards should be at least; `weight` (>= 0) multiplies the pair's loss. `source` says where the
    row came from ("prefs.jsonl:17") and `row` is the untouched input row, so that nothing is lost on the way out.
    """

    id: str
    prompt: Prompt
    chosen: str
    rejected: str
    flip_prob: float = 0.0
    margin: float = 0.0
    weight: float = 1.0
    source: str = ""
    row: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0.0 <= self.flip_prob <= 1.0:
            raise ValueError(f"{self.source or self.id}: flip_prob must lie in [0, 1], got {self.flip_prob}")
        if not (self.weight >= 0.0 and self.weight < float("inf")):
            raise ValueError(f"{self.source or self.id}: weight must be finite and >= 0, got {self.weight}")
        if not abs(self.margin) < float("inf"):
            raise ValueError(f"{self.source or self.id}: margin must be finite, got {self.margin}")


@dataclass(frozen=True, slots=True)
class Strength:
    """How strong one preference is, by the vote of M reward models (Secrets of RLHF II, section 2.2, Eq. 4).

    `mean` and `std` (population form) are those of the members' margins r(chosen) - r(rejected), in units of
    reward; `votes` of `voters` members prefer the chosen response (a tie counts half). `p_flip` is the
    probability that a fresh annotator would decide the other way.
    """

    mean: float
    std: float
    votes: float
    voters: int
    p_flip: float
    action: Action = "keep"
    reason: str = ""
