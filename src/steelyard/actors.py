"""The models of PPO: policy, reference, reward model or several, critic."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from steelyard.data.collate import TreeBatch
from steelyard.data.encode import Encoder
from steelyard.errors import InputError
from steelyard.models.lora import without_adapters
from steelyard.models.next_token import Drawing, Nucleus
from steelyard.models.policy import PolicyModel, TokenLogprobs
from steelyard.models.reward import RewardModel
from steelyard.ppo_settings import PPOConfig
from steelyard.rewards import Aggregate, aggregate


class Ensemble(nn.Module):
    """Several reward models as one: each by its own mean and std (`normals`), then aggregated."""

    def __init__(
        self,
        members: Sequence[RewardModel],
        normals: Sequence[tuple[float, float]],
        how: Aggregate,
        uncertainty_weight: float,
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.normals = tuple(normals)
        self.how: Aggregate = how
        self.uncertainty_weight = uncertainty_weight

    def forward(self, batch: TreeBatch) -> Float[Tensor, "B K"]:
        """Aggregated rewards, float32."""
        return self.combine([member(batch) for member in self.members])

    def combine(self, scores: Sequence[Float[Tensor, "*B"]]) -> Float[Tensor, "*B"]:
        """One reward from the members' raw scores of the same responses."""
        normal = [(raw - mean) / std for raw, (mean, std) in zip(scores, self.normals, strict=True)]
        return aggregate(torch.stack(normal), self.how, uncertainty_weight=self.uncertainty_weight)


class ValueHead(nn.Module):
    """A critic on the policy's own layers: V = w h + b at the state from which a token is drawn, normalised scale.

    It starts at 0, the mean of the normalised reward, so that its first gradients reach the head alone.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, states_TD: Float[Tensor, "T D"], batch: TreeBatch) -> Float[Tensor, "B K R"]:
        """Values, float32; meaningless where there is no token."""
        values: Tensor = self.linear(states_TD[batch.before_BKR].float())
        return values.squeeze(-1)


class Models:
    """Policy, SFT reference, reward model and, where there is one, the critic.

    The critic is the twin of the (first) reward model, read on the normalised reward's scale, or a `ValueHead` on the
    policy. With LoRA the reference is the policy without its adapters, unless another is named. Several reward models
    act as one whose scores are normalised already.

    Raises InputError if the folders do not fit together, or a reward model's scores have no spread.
    """

    def __init__(self, config: PPOConfig) -> None:
        self.encoder = Encoder.load(config.policy, max_length=config.max_length)
        folders, precision, device = config.reward_models, config.precision, config.device
        reference = config.policy if config.reference is None else config.reference
        for folder in folders if reference == config.policy else (*folders, reference):
            what = "reference" if folder == reference else "reward model"
            self.encoder.require_same(folder, what=what, of=config.policy)
        sampling = config.sampling
        self.how = Drawing(sampling.temperature, sampling.top_p, sampling.repetition_penalty)
        how: dict[str, Any] = {"precision": precision, "logit_chunk": config.logit_chunk, "device": device}
        self.policy = PolicyModel.load(config.policy, **how)
        self.reference: PolicyModel | None = None
        if config.lora.rank is None or reference != config.policy:
            self.reference = PolicyModel.load(reference, **how)
            self.reference.requires_grad_(False)
        if config.lora.rank is not None:
            self.policy.adapt(config.lora, seed=config.seed)
        members = [RewardModel.load(f, precision=precision, device=device).requires_grad_(False) for f in folders]
        self.critic: RewardModel | ValueHead | None = None
        if config.advantage == "gae" and config.critic_model == "shared":
            self.critic = ValueHead(self.policy.hf.get_output_embeddings().weight.shape[1]).to(device)
        elif config.advantage == "gae":
            self.critic = RewardModel.load(folders[0], precision=precision, device=device)
        normals = [m.normal if config.normalise else (0.0, 1.0) for m in members]
        if unknown := [f for f, m in zip(folders, members, strict=True) if config.normalise and not m.measured]:
            if len(members) > 1:
                raise InputError(
                    f"{', '.join(unknown)}: no mean and std of its rewards are stored (steelyard_reward in "
                    "config.json), without which it cannot be set beside others; train it with `steelyard train "
                    "reward`, or use one reward model"
                )
            print(
                f"warning: {', '.join(unknown)}: no mean and std of its rewards are stored (steelyard_reward in "
                "config.json), so they are taken as they are",
                file=sys.stderr,
                flush=True,
            )
        for folder, (_, std) in zip(folders, normals, strict=True):
            if not std > 0:
                raise InputError(f"{folder}: its rewards have no spread (std {std}); nothing to learn from")
        self.reward: nn.Module = members[0]
        self.mean, self.std = self.value_mean, self.value_std = normals[0]
        if len(members) > 1:
            self.reward = Ensemble(members, normals, config.aggregate, config.uncertainty_weight)
            self.mean, self.std = 0.0, 1.0
        for model in (self.policy, self.reference, self.reward, self.critic):
            if model is not None:
                model.eval()

    @property
    def shared(self) -> bool:
        """Whether policy and critic are one trunk."""
        return isinstance(self.critic, ValueHead)

    def normal(self, raw: Tensor) -> Tensor:
        """A raw reward on the normalised scale."""
        return (raw - self.mean) / self.std

    @torch.no_grad()
    def act(self, batch: TreeBatch) -> tuple[TokenLogprobs, Float[Tensor, "B K R"] | None]:
        """(the policy's log-probabilities, the critic's values on the normalised scale), one forward if shared."""
        states = self.policy.states(batch)
        return self.policy.measure(states, batch, self.how), self.values(batch, states)

    @torch.no_grad()
    def refer(self, batch: TreeBatch) -> tuple[Float[Tensor, "B K R"], Float[Tensor, "B K R"]]:
        """The reference's log-probabilities: under sampling's temperature and penalty, without nucleus; plain."""
        if self.reference is not None:
            return self.reference.full_and_plain(self.reference.states(batch), batch, self.how)
        with without_adapters(self.policy):
            return self.policy.full_and_plain(self.policy.states(batch), batch, self.how)

    def logprobs(self, states_TD: Tensor, batch: TreeBatch, kept: Nucleus | None) -> Float[Tensor, "B K R"]:
        """The policy's log-probabilities of what was sampled, from its states, for the update."""
        return self.policy.sampled(states_TD, batch, self.how, kept)

    def values(self, batch: TreeBatch, states_TD: Tensor | None = None) -> Float[Tensor, "B K R"] | None:
        """The critic's values on the normalised scale; None without a critic. A shared one reads policy states."""
        if self.critic is None:
            return None
        if isinstance(self.critic, ValueHead):
            values: Tensor = self.critic(self.policy.states(batch) if states_TD is None else states_TD, batch)
            return values
        return (self.critic.values(batch) - self.value_mean) / self.value_std
