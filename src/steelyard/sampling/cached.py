"""Any Hugging Face model as a reader: its own forward pass and its own cache, copied for the k samples of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steelyard.models.policy import PolicyModel
from steelyard.models.trunk import autocast


class CacheReader:
    """Implements `loop.Reader`. The prompt is computed once, but its keys and values are kept k times."""

    def __init__(self, policy: PolicyModel, *, pad_id: int) -> None:
        self.policy = policy
        self.pad_id = pad_id
        self.device = policy.device

    def start(self, prompts: Sequence[tuple[int, ...]], *, k: int, room: int) -> Float[Tensor, "R V"]:
        """See `loop.Reader`."""
        width = max(map(len, prompts))
        # Padding stands on the left, so a row's last token is real.
        ids = torch.tensor([[self.pad_id] * (width - len(p)) + list(p) for p in prompts], device=self.device)
        there = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        output = self._forward(ids, there, (there.cumsum(-1) - 1).clamp(min=0), None)
        self.cache = output.past_key_values
        self.cache.batch_repeat_interleave(k)
        self.there = there.repeat_interleave(k, 0)
        self.position = self.there.sum(-1)
        return output.logits[:, -1].float().repeat_interleave(k, 0)

    def leave(self, keep_R: Bool[Tensor, "R"]) -> Int[Tensor, "r"]:
        """See `loop.Reader`."""
        order = keep_R.nonzero()[:, 0]
        self.cache.batch_select_indices(order)
        self.there, self.position = self.there[order], self.position[order]
        return order

    def read(self, token_R: Int[Tensor, "R"]) -> Float[Tensor, "R V"]:
        """See `loop.Reader`."""
        self.there = torch.cat([self.there, self.there.new_ones(len(self.there), 1)], 1)
        output = self._forward(token_R[:, None], self.there, self.position[:, None], self.cache)
        self.position = self.position + 1
        return output.logits[:, -1].float()

    def _forward(self, ids: Tensor, there: Tensor, positions: Tensor, cache: Any) -> Any:
        with autocast(self.policy.precision, ids.device):
            return self.policy.hf(
                input_ids=ids,
                attention_mask=there,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
