"""The policy: a causal language model, asked for log-probabilities at response positions only."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from steelyard.data.collate import TreeBatch
from steelyard.data.encode import Encoder
from steelyard.errors import InputError
from steelyard.models.load import (
    check_logits,
    check_shared_prefix,
    open_model,
    quiet_loading,
    read_config,
)
from steelyard.models.trunk import Precision, run_trunk


class TokenLogprobs(NamedTuple):
    """At every response token: log p of the distribution that is sampled from (logits / temperature), its
    entropy, and log p at temperature 1. Zero where there is no token."""

    sampled_BKR: Float[Tensor, "B K R"]
    entropy_BKR: Float[Tensor, "B K R"]
    plain_BKR: Float[Tensor, "B K R"]


class PolicyModel(nn.Module):
    """A causal language model over rows of trees."""

    def __init__(self, hf: Any, *, precision: Precision = "float32") -> None:
        super().__init__()
        self.hf = hf
        self.precision: Precision = precision
        check_shared_prefix(hf.base_model, hf.config.get_text_config().vocab_size)
        check_logits(hf)

    @classmethod
    def load(cls, folder: str | Path, *, precision: Precision = "float32") -> PolicyModel:
        """Raises InputError if `folder` does not hold a language model."""
        from transformers import AutoModelForCausalLM

        names = read_config(folder).architectures or []
        if any(name.endswith("ForSequenceClassification") for name in names):
            # Loaded as a language model it would get an output layer of random weights.
            raise InputError(f"{folder}: holds {names}, a reward model; a policy must be a language model")
        return cls(open_model(AutoModelForCausalLM, folder), precision=precision)

    @classmethod
    def scratch(cls, encoder: Encoder, *, layers: int, width: int, heads: int, context: int, seed: int) -> PolicyModel:
        """A small Llama with fresh weights for the encoder's vocabulary."""
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=len(encoder.tokenizer),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=context,
            tie_word_embeddings=True,
            pad_token_id=encoder.pad_id,
            bos_token_id=encoder.tokenizer.bos_token_id,
            eos_token_id=encoder.end_id,
            attn_implementation="sdpa",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(LlamaForCausalLM(config))

    def forward(self, batch: TreeBatch, *, temperature: float = 1.0) -> TokenLogprobs:
        """Log-probabilities of the response tokens, float32; logits are computed nowhere else."""
        hidden = run_trunk(self.hf.base_model, batch, self.precision).states_TD
        mask = batch.mask_BKR
        # index_select: its gradient is a plain, ordered sum.
        states = hidden.index_select(0, batch.before_BKR[mask])
        logits = self.hf.get_output_embeddings()(states).float()
        tokens = batch.response_BKR[mask][:, None]
        sampled = torch.log_softmax(logits / temperature, -1)
        entropy = -(sampled.exp() * sampled).sum(-1)
        chosen = sampled.gather(-1, tokens)[:, 0]
        plain = chosen
        if temperature != 1.0:
            plain = torch.log_softmax(logits, -1).gather(-1, tokens)[:, 0]
        blank = torch.zeros(mask.shape, device=mask.device)
        where = mask.nonzero(as_tuple=True)
        return TokenLogprobs(*(blank.index_put(where, x) for x in (chosen, entropy, plain)))

    def save(self, folder: Path, encoder: Encoder) -> None:
        """Write the model with its tokenizer, as transformers reads them."""
        with quiet_loading():
            self.hf.save_pretrained(folder)
        encoder.save(folder)
