"""LoRA (Hu et al. 2021, arXiv 2106.09685): each linear layer's weight W plus (alpha / r) B A of rank r; W stays.

B starts at 0, so the adapted model starts as the model itself. peft makes the layers; `models.trunk` runs them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from steelyard.config import Config
from steelyard.errors import InputError


class LoraConfig(Config):
    """Train low-rank adapters in place of the weights."""

    rank: int | None = Field(None, ge=1, description="rank of the adapters; none given: train the weights themselves")
    alpha: float = Field(16.0, gt=0, description="the adapters' sum is multiplied by alpha / rank")
    targets: tuple[str, ...] = Field(
        (), description="names of the linear layers that get one (q_proj ...); none given: all but the output layer"
    )

    @model_validator(mode="after")
    def _refuse_idle_options(self) -> LoraConfig:
        if self.rank is None and (idle := self.given() & {"alpha", "targets"}):
            raise ValueError(f"{', '.join(sorted(idle))}: no effect without rank; leave out, or give a rank")
        return self


def add_adapters(hf: Any, config: LoraConfig, *, seed: int) -> None:
    """Put adapters into a transformers model, in place; they alone are trainable then.

    Raises InputError if peft is missing, the model has them already, or no layer has one of the names.
    """
    try:
        from peft import LoraConfig as PeftConfig
        from peft import inject_adapter_in_model
    except ImportError:
        raise InputError("lora: needs the package peft; install it with: pip install 'steelyard[lora]'") from None
    if config.rank is None or has_adapters(hf):
        raise ValueError("adapters need a rank, and a model without adapters")
    settings = PeftConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=list(config.targets) or "all-linear",
        init_lora_weights=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(settings, hf)
        except ValueError as error:
            raise InputError(f"lora.targets: {error}") from None
    for name, parameter in hf.named_parameters():
        parameter.requires_grad_(_is_adapter(name))


def has_adapters(model: nn.Module) -> bool:
    """Whether adapters were added."""
    return any(_is_adapter(name) for name, _ in model.named_parameters())


@contextlib.contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Inside, the model is the one that the adapters were added to."""
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "lora_A")]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@torch.no_grad()
def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The state under the names that the model had before, every adapter added to its weight; the model stays."""
    state = {}
    for name, tensor in model.state_dict().items():
        if not _is_adapter(name):
            state[name.replace(".base_layer.", ".")] = tensor
    layers: list[tuple[str, Any]] = [(n, m) for n, m in model.named_modules() if hasattr(m, "lora_A")]
    for name, layer in layers:
        for adapter in layer.active_adapters:
            state[f"{name}.weight"] = state[f"{name}.weight"] + layer.get_delta_weight(adapter)
    return state


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: the adapters where there are some, else everything."""
    state = model.state_dict()
    return {n: t for n, t in state.items() if _is_adapter(n)} if has_adapters(model) else state


def load_trained_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put back `trained_state`. Raises ValueError if the names are others."""
    if (here := trained_state(model)).keys() != state.keys():
        missing = sorted(here.keys() ^ state.keys())[:3]
        raise ValueError(f"the state must hold the tensors that are trained; these differ: {missing}")
    model.load_state_dict(state, strict=False)


def _is_adapter(name: str) -> bool:
    return ".lora_" in f".{name}"
