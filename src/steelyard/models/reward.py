"""The reward model: a language model's trunk and one linear head, read at the last token.

Secrets of RLHF II, section 2.1. On disk it is an ordinary `AutoModelForSequenceClassification` folder with
`num_labels=1`, so it loads anywhere; the head and everything after it are float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from steelyard.data.collate import TreeBatch, collate
from steelyard.data.encode import Encoder, Tree
from steelyard.errors import InputError
from steelyard.models import scoring
from steelyard.models.load import check_shared_prefix, open_model, quiet_loading, read_config, say_if_slow
from steelyard.models.trunk import Precision, run_trunk


class RewardModel(nn.Module):
    """Scores the responses of trees. `mean` and `std` are the raw score's on its training data (see `normal`)."""

    def __init__(self, hf: Any, *, precision: Precision = "float32") -> None:
        super().__init__()
        self.hf = hf
        if not isinstance(getattr(hf, "score", None), nn.Linear):
            raise InputError(
                f"{type(hf).__name__}: has no linear head `score` on a language model's last state; Llama, Qwen and "
                "GPT-NeoX style classifiers have"
            )
        self.eval()  # dropout that a model brings would follow no seed; `models.dropout` does
        self.precision: Precision = precision
        say_if_slow(precision, self.device)
        check_shared_prefix(self.trunk, hf.config.get_text_config().vocab_size)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.head.weight.device

    @property
    def trunk(self) -> nn.Module:
        """The language model without its head."""
        return self.hf.base_model

    @property
    def layers(self) -> nn.ModuleList:
        """The trunk's layers, lowest first. Raises InputError for a trunk that does not list them as `layers`."""
        layers = getattr(self.trunk, "layers", None)
        if not isinstance(layers, nn.ModuleList):
            raise InputError(
                f"trainable_layers: {type(self.trunk).__name__} has no list of layers named `layers`, as Llama, Qwen "
                "and GPT-NeoX style models have; leave it out, or start from one of these"
            )
        return layers

    @property
    def head(self) -> nn.Linear:
        """The linear map from a feature to the reward."""
        return self.hf.score

    @classmethod
    def from_language_model(
        cls, folder: str | Path, *, pad_id: int, seed: int, precision: Precision = "float32", device: str = "cpu"
    ) -> RewardModel:
        """A new head (seeded) on the trunk of the language model in `folder`; on a reward model, its own head."""
        from transformers import AutoModelForSequenceClassification

        fresh = not is_reward_model(folder)
        config = read_config(folder)
        if fresh and any(n.endswith("ForSequenceClassification") for n in config.architectures or []):
            raise InputError(
                f"{folder}: holds a classifier of {config.num_labels} classes; start from a language model, or from a "
                "reward model with one output"
            )
        new = ("score.weight",) if fresh else ()
        hf = open_model(
            AutoModelForSequenceClassification, folder, device=device, new=new, num_labels=1, pad_token_id=pad_id
        )
        if fresh:
            width = hf.score.weight.shape[1]
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                # Small, so that training starts from margins near zero (std 1 / sqrt(D + 1), as in InstructGPT).
                hf.score.weight.copy_(torch.randn(hf.score.weight.shape, generator=generator) / (width + 1) ** 0.5)
        return cls(hf, precision=precision)

    @classmethod
    def load(cls, folder: str | Path, *, precision: Precision = "float32", device: str = "cpu") -> RewardModel:
        """Raises InputError if `folder` does not hold a reward model with one output."""
        from transformers import AutoModelForSequenceClassification

        require_reward_model(folder)
        return cls(open_model(AutoModelForSequenceClassification, folder, device=device), precision=precision)

    def features(self, batch: TreeBatch) -> Float[Tensor, "B K D"]:
        """The last layer at each response's last token, float32."""
        states = run_trunk(self.trunk, batch, self.precision, read="scored").states_TD
        return states.view(*batch.last_BK.shape, -1).float()

    def forward(self, batch: TreeBatch) -> Float[Tensor, "B K"]:
        """Raw rewards, float32."""
        return self.head(self.features(batch)).squeeze(-1)

    def values(self, batch: TreeBatch) -> Float[Tensor, "B K R"]:
        """The head read at the state before each response token: what PPO's critic predicts from."""
        states = run_trunk(self.trunk, batch, self.precision, read="responses").states_TD
        return self.head(states[batch.before_BKR].float()).squeeze(-1)

    def score(self, trees: Sequence[Tree], *, pad_id: int, max_tokens: int = 8192) -> Float[np.ndarray, "N K"]:
        """Raw rewards of many trees, in their order; all must have the same number of responses.

        A response that several trees hold is computed once.
        """
        return self.score_sets({"": trees}, pad_id=pad_id, max_tokens=max_tokens)[""]

    @torch.no_grad()
    def score_sets(
        self, sets: Mapping[str, Sequence[Tree]], *, pad_id: int, max_tokens: int = 8192
    ) -> dict[str, Float[np.ndarray, "N K"]]:
        """`score` for several sets; what they share is computed once."""
        training = self.training
        self.eval()
        rewards = scoring.score_sets(lambda trees: self(collate(trees, pad_id, self.device)).cpu(), sets, max_tokens)
        self.train(training)
        return rewards

    @property
    def normal(self) -> tuple[float, float]:
        """(mean, std) of the raw reward on the training pairs, kept in the checkpoint; (0, 1) if never measured."""
        mean, std = getattr(self.hf.config, "steelyard_reward", (0.0, 1.0))
        return float(mean), float(std)

    @property
    def measured(self) -> bool:
        """Whether `normal` was measured."""
        return hasattr(self.hf.config, "steelyard_reward")

    def set_normal(self, mean: float, std: float) -> None:
        """Record the raw reward's mean and std in the checkpoint's configuration."""
        self.hf.config.steelyard_reward = [float(mean), float(std)]

    def save(self, folder: Path, encoder: Encoder) -> None:
        """Write the model with its tokenizer, as transformers reads them."""
        self.hf.config.pad_token_id = encoder.pad_id
        with quiet_loading():
            self.hf.save_pretrained(folder)
        encoder.save(folder)


def is_reward_model(folder: str | Path) -> bool:
    """Whether the folder holds a one-output sequence classifier."""
    config = read_config(folder)
    names = config.architectures or []
    return any(n.endswith("ForSequenceClassification") for n in names) and config.num_labels == 1


def require_reward_model(folder: str | Path) -> None:
    """Raise InputError unless the folder holds a reward model."""
    if not is_reward_model(folder):
        raise InputError(
            f"{folder}: holds {read_config(folder).architectures}, not a reward model with one output "
            "(AutoModelForSequenceClassification, num_labels=1); train one with `steelyard train reward`"
        )
