"""The policy: a causal language model, asked for log-probabilities at response positions only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from steelyard.data.collate import TreeBatch
from steelyard.data.encode import Encoder
from steelyard.errors import InputError
from steelyard.models.load import (
    check_logits,
    check_shared_prefix,
    open_model,
    quiet_loading,
    read_config,
    say_if_slow,
)
from steelyard.models.lora import LoraConfig, add_adapters, has_adapters, merged_state
from steelyard.models.next_token import Drawing, Nucleus, Seen, entropies, log_probability, nucleus, shaped
from steelyard.models.trunk import Precision, run_trunk


class TokenLogprobs(NamedTuple):
    """At every response token, zero where there is none: log p of the distribution that is sampled from and its
    entropy (no gradient); log p before the nucleus is cut out; log p of the model as it is, at temperature 1 and
    without penalty. `kept`: the nucleus at each token, in their order; None where nothing is cut."""

    sampled_BKR: Float[Tensor, "B K R"]
    entropy_BKR: Float[Tensor, "B K R"]
    full_BKR: Float[Tensor, "B K R"]
    plain_BKR: Float[Tensor, "B K R"]
    kept: Nucleus | None = None


class PolicyModel(nn.Module):
    """A causal language model over rows of trees."""

    def __init__(self, hf: Any, *, precision: Precision = "float32", logit_chunk: int | None = None) -> None:
        """`logit_chunk`: positions whose logits are in memory at once; where a gradient is taken, the others' are
        computed again. None: all of them, once."""
        super().__init__()
        self.hf = hf
        self.eval()  # as in `RewardModel`; and PPO and DPO compare probabilities of fixed functions
        self.precision: Precision = precision
        self.logit_chunk = logit_chunk
        say_if_slow(precision, self.device)
        check_shared_prefix(hf.base_model, hf.config.get_text_config().vocab_size)
        check_logits(hf)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        weight: Tensor = self.hf.get_output_embeddings().weight
        return weight.device

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        precision: Precision = "float32",
        logit_chunk: int | None = None,
        device: str = "cpu",
    ) -> Self:
        """Raises InputError if `folder` does not hold a language model."""
        from transformers import AutoModelForCausalLM

        names = read_config(folder).architectures or []
        if any(name.endswith("ForSequenceClassification") for name in names):
            # Loaded as a language model it would get an output layer of random weights.
            raise InputError(f"{folder}: holds {names}, a reward model; a policy must be a language model")
        hf = open_model(AutoModelForCausalLM, folder, device=device)
        return cls(hf, precision=precision, logit_chunk=logit_chunk)

    @classmethod
    def scratch(
        cls, encoder: Encoder, *, layers: int, width: int, heads: int, context: int, seed: int, device: str = "cpu"
    ) -> PolicyModel:
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
            return cls(LlamaForCausalLM(config).to(device))

    def forward(
        self,
        batch: TreeBatch,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        kept: Nucleus | None = None,
    ) -> TokenLogprobs:
        """Log-probabilities of the response tokens, float32; logits are computed nowhere else.

        With top_p < 1 the nucleus is `kept`, or if none is given this model's own, which takes no gradient.

        Raises:
            ValueError: a gradient is to be taken through the choice of the nucleus.
        """
        return self.measure(self.states(batch), batch, Drawing(temperature, top_p, repetition_penalty), kept)

    def states(self, batch: TreeBatch) -> Float[Tensor, "T D"]:
        """The last layer, after the final norm, at every token before a response token; no other row is to be read."""
        return run_trunk(self.hf.base_model, batch, self.precision, read="responses").states_TD

    def measure(
        self, states_TD: Float[Tensor, "T D"], batch: TreeBatch, how: Drawing, kept: Nucleus | None = None
    ) -> TokenLogprobs:
        """`forward` from the states."""
        own = how.top_p < 1.0 and kept is None
        if own and states_TD.requires_grad and torch.is_grad_enabled():
            raise ValueError("the nucleus must be given (`kept`) where a gradient is taken, got none: sample first")
        found: list[Nucleus] = []

        def read(logits: Tensor, z: Tensor, tokens: Tensor, allowed: Nucleus | None) -> tuple[Tensor, ...]:
            full = log_probability(z, tokens)
            plain = full if z is logits else log_probability(logits, tokens)
            if own:
                found.append(allowed := nucleus(z, how.top_p, tokens))
            sampled = full if allowed is None else log_probability(z, tokens, allowed)
            return sampled, entropies(z, allowed), full, plain

        sampled, entropy, full, plain = self._at_responses(states_TD, batch, how, kept, read)
        return TokenLogprobs(sampled, entropy, full, plain, Nucleus.join(found) if own else kept)

    def sampled(
        self, states_TD: Float[Tensor, "T D"], batch: TreeBatch, how: Drawing, kept: Nucleus | None = None
    ) -> Float[Tensor, "B K R"]:
        """Only log p of the distribution that was sampled from: what an update needs. `kept` as for `forward`.

        Raises:
            ValueError: top_p < 1 without a nucleus.
        """
        if how.top_p < 1.0 and kept is None:
            raise ValueError("the nucleus of the time of sampling must be given (`kept`) with top_p < 1, got none")

        def read(logits: Tensor, z: Tensor, tokens: Tensor, allowed: Nucleus | None) -> tuple[Tensor, ...]:
            return (log_probability(z, tokens, allowed),)

        return self._at_responses(states_TD, batch, how, kept, read)[0]

    def full_and_plain(
        self, states_TD: Float[Tensor, "T D"], batch: TreeBatch, how: Drawing
    ) -> tuple[Float[Tensor, "B K R"], Float[Tensor, "B K R"]]:
        """Those two of `measure` alone: what a reference is asked for."""

        def read(logits: Tensor, z: Tensor, tokens: Tensor, allowed: Nucleus | None) -> tuple[Tensor, ...]:
            full = log_probability(z, tokens)
            return full, full if z is logits else log_probability(logits, tokens)

        full, plain = self._at_responses(states_TD, batch, how, None, read)
        return full, plain

    def _at_responses(
        self,
        states_TD: Tensor,
        batch: TreeBatch,
        how: Drawing,
        kept: Nucleus | None,
        read: Callable[[Tensor, Tensor, Tensor, Nucleus | None], tuple[Tensor, ...]],
    ) -> tuple[Float[Tensor, "B K R"], ...]:
        """What `read` makes of (logits, shaped logits, tokens, nucleus) at every response token."""
        mask, head = batch.mask_BKR, self.hf.get_output_embeddings()
        # index_select: its gradient is a plain, ordered sum.
        states = states_TD.index_select(0, batch.before_BKR.flatten()[batch.real_r])
        tokens: Int[Tensor, "n"] = batch.response_BKR.flatten()[batch.real_r]
        seen = Seen(batch, head.weight.shape[0]) if how.repetition_penalty != 1.0 else None

        def part(states_nD: Tensor, where: slice, allowed: Nucleus | None) -> tuple[Tensor, ...]:
            logits = head(states_nD).float()
            return read(logits, shaped(logits, None if seen is None else seen[where], how), tokens[where], allowed)

        size = self.logit_chunk or max(1, len(tokens))
        starts = range(0, len(tokens), size)
        sizes = [min(size, len(tokens) - i) for i in starts]
        nuclei = [None] * len(sizes) if kept is None else kept.split(sizes)
        again = len(sizes) > 1 and torch.is_grad_enabled() and states.requires_grad
        results = []
        for start, n, allowed in zip(starts, sizes, nuclei, strict=True):
            arguments = (states[start : start + n], slice(start, start + n), allowed)
            results.append(checkpoint(part, *arguments, use_reentrant=False) if again else part(*arguments))
        blank = torch.zeros(mask.numel(), device=mask.device)
        columns = (torch.cat(column) for column in zip(*results, strict=True))
        return tuple(blank.index_put((batch.real_r,), column).view(mask.shape) for column in columns)

    def adapt(self, config: LoraConfig, *, seed: int) -> None:
        """Put LoRA adapters in, which alone are trained then; `models.lora.without_adapters` turns them off.

        Raises InputError if peft is missing or no layer has a wanted name.
        """
        add_adapters(self.hf, config, seed=seed)
        check_shared_prefix(self.hf.base_model, self.hf.config.get_text_config().vocab_size)

    def save(self, folder: Path, encoder: Encoder) -> None:
        """Write the model with its tokenizer, as transformers reads them; adapters are added to the weights."""
        with quiet_loading():
            self.hf.save_pretrained(folder, state_dict=merged_state(self.hf) if has_adapters(self.hf) else None)
        encoder.save(folder)
