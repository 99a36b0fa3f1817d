"""How responses are drawn, and what a response is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator

from steelyard.config import Config

Backend = Literal["auto", "shared", "transformers", "vllm"]


class SamplingConfig(Config):
    """How responses are drawn."""

    temperature: float = Field(1.0, gt=0, le=5, description="divides the logits; 1 is the model as it is")
    top_p: float = Field(1.0, gt=0, le=1, description="draw from the smallest set of tokens with this probability")
    repetition_penalty: float = Field(
        1.0, ge=1, le=5, description="divides (multiplies) positive (negative) logits of tokens already there"
    )
    max_new_tokens: int = Field(64, ge=1, description="a response is cut off after this many tokens")
    min_new_tokens: int = Field(0, ge=0, description="the end token is not drawn before this many tokens")
    rows: int = Field(
        128,
        ge=1,
        description="samples drawn side by side: whole prompts of k, at least one (memory, not results)",
    )
    sampler: Backend = Field(
        "auto",
        description="shared: Steelyard's own layers, each prompt kept once; transformers: any model; auto: shared "
        "where the model allows it; vllm: an extra, needs a GPU",
    )
    gpu_memory: float = Field(0.3, gt=0, le=1, description="share of the GPU's memory that vllm may take")

    def bent(self) -> dict[str, float]:
        """What makes the distribution that is drawn from another one than the model's own, by name."""
        own = {"temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0, "min_new_tokens": 0}
        return {name: x for name, value in own.items() if (x := getattr(self, name)) != value}

    @model_validator(mode="after")
    def _refuse_impossible_lengths(self) -> SamplingConfig:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens: must be at most max_new_tokens = {self.max_new_tokens}, got {self.min_new_tokens}"
            )
        return self

    @model_validator(mode="after")
    def _refuse_idle_memory(self) -> SamplingConfig:
        if self.sampler != "vllm" and "gpu_memory" in self.given():
            raise ValueError(f"gpu_memory: no effect with sampler = {self.sampler}; leave it out, or use vllm")
        return self


@dataclass(frozen=True, slots=True)
class Sample:
    """One response: its tokens (end token included if it came) and whether the end token came."""

    tokens: tuple[int, ...]
    ended: bool
