"""Open model folders, with errors that say what to do, and check that shared prefixes hold for the model."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from steelyard.data.collate import collate
from steelyard.data.encode import Tree, refuse_run
from steelyard.errors import DivergedError, InputError
from steelyard.models.trunk import Precision, run_trunk


def read_config(folder: str | Path) -> Any:
    """The model's configuration. Raises InputError if `folder` is not a checkpoint folder."""
    from transformers import AutoConfig

    refuse_run(folder)
    if not (Path(folder) / "config.json").exists():
        raise InputError(
            f"{folder}: not a model folder (config.json is missing). Models are read from local folders in "
            "Hugging Face's layout; download one first"
        )
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: its config.json cannot be read: {error}") from None


def open_model(auto: Any, folder: str | Path, *, device: str = "cpu", new: Collection[str] = (), **kwargs: Any) -> Any:
    """`auto.from_pretrained(folder)` on `device`, in float32 with the attention that shared prefixes need.

    `new`: weights that the folder need not hold. Raises InputError where others are missing, do not fit or are not
    finite, and where the model has no such attention.
    """
    kind = read_config(folder).model_type
    with quiet_loading():
        try:
            hf, found = auto.from_pretrained(
                folder,
                local_files_only=True,
                attn_implementation="sdpa",
                dtype=torch.float32,
                output_loading_info=True,
                **kwargs,
            )
        except (OSError, SafetensorError) as error:
            raise InputError(f"{folder}: its weights are missing or damaged: {error}; copy the model again") from None
        except RuntimeError as error:
            if "size" not in str(error):
                raise
            raise InputError(f"{folder}: its weights do not fit its config.json: {error}") from None
        except ValueError as error:
            if "attention implementation" not in str(error):
                raise
            raise InputError(
                f"{folder}: chosen and rejected cannot share their prompt in a model of type {kind}, which takes no "
                "attention mask of its own (sdpa); Llama, Qwen and GPT-NeoX style models can"
            ) from None
    # transformers would fill them with random numbers.
    if missing := sorted(set(found["missing_keys"]) - set(new)):
        stray = sorted(found["unexpected_keys"])
        raise InputError(
            f"{folder}: {len(missing)} of the model's weights are not in its files ({_some(missing)})"
            + (f", which hold others that it has no place for ({_some(stray)})" if stray else "")
            + ": save the model again whole, under the names that transformers gives its weights"
        )
    if wrong := [name for name, p in hf.named_parameters() if not bool(torch.isfinite(p).all())]:
        raise DivergedError(
            f"{folder}: {len(wrong)} of the model's weights are not finite ({_some(wrong)}): its training has "
            "diverged, or its files are damaged; take another checkpoint"
        )
    return hf.to(device)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def say_if_slow(precision: Precision, device: torch.device) -> None:
    """Warn, once a process, of bfloat16 on a CPU that has no instructions for it. Raises ValueError for "auto"."""
    if precision == "auto":
        raise ValueError("precision: a model computes in float32 or bfloat16; `config.fastest_precision` chooses one")
    if precision == "bfloat16" and device.type == "cpu" and not _has_bfloat16():
        _say_slow()


def _has_bfloat16() -> bool:
    capabilities: Mapping[str, Any] = getattr(
        torch.cpu, "get_capabilities", dict
    )()  # older versions of torch do not tell
    names = ("avx512_bf16", "avx10_2", "amx_bf16", "bf16", "sve_bf16")
    return not capabilities or any(capabilities.get(name, False) for name in names)


@functools.cache
def _say_slow() -> None:
    print(
        "warning: precision = bfloat16: this CPU has no bfloat16 instructions, on which products in it are many times "
        "slower than in float32; use precision = float32 here",
        file=sys.stderr,
        flush=True,
    )


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence transformers' progress bars and its report of new head weights: here they are new on purpose."""
    from transformers.utils import logging as hf_logging

    level = hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.ERROR)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


@torch.no_grad()
def check_logits(hf: Any, *, tolerance: float = 1e-3) -> None:
    """Raise InputError unless the logits are the output embedding of the last hidden state and nothing more.

    Some models scale or cap them. Log-probabilities computed without that would differ from what is sampled.
    """
    vocabulary = hf.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (1, 7), generator=torch.Generator().manual_seed(0))
    ids = ids.to(next(hf.parameters()).device)
    training = hf.training
    hf.eval()
    try:
        logits = hf(input_ids=ids, use_cache=False).logits
        ours = hf.get_output_embeddings()(hf.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    finally:
        hf.train(training)
    error = float((ours - logits).abs().max() / logits.abs().max())
    if not error < tolerance:
        raise InputError(
            f"{type(hf).__name__}: the model scales or caps its logits, which is not supported (relative difference "
            f"{error:.2g}); use a Llama, Qwen or GPT-NeoX style model"
        )


@torch.no_grad()
def check_shared_prefix(trunk: nn.Module, vocabulary: int, *, tolerance: float = 1e-3) -> None:
    """Raise InputError unless a row of prompt and two responses equals the two sequences computed apart.

    Models with recurrent state, ALiBi, sliding windows shorter than the text or their own masks cannot share a
    prefix this way; computing on would give wrong numbers without a sign.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, vocabulary, (n,), generator=generator).tolist())

    device = next(trunk.parameters()).device
    prompt, first, second = draw(7), draw(5), draw(6)
    both = collate([Tree(prompt, (first, second))], 0, device)
    training = trunk.training
    trunk.eval()
    try:
        try:
            shared = run_trunk(trunk, both).states_TD
        except InputError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"{type(trunk).__name__}: chosen and rejected cannot share their prompt in this model, which refuses "
                f"an attention mask of its own ({error}); Llama, Qwen and GPT-NeoX style models can"
            ) from error
        for k, response in enumerate((first, second)):
            ids = torch.tensor([prompt + response], device=device)
            apart = trunk(input_ids=ids, use_cache=False).last_hidden_state[0]
            at = both.at_BKR[0, k, : len(response)]
            difference = float((shared[at] - apart[len(prompt) :]).abs().max() / apart.abs().max())
            if not math.isfinite(difference):
                raise DivergedError(
                    f"{type(trunk).__name__}: the model's states are not finite: its training has diverged, or its "
                    "weights are damaged"
                )
            if not difference < tolerance:
                raise InputError(
                    f"{type(trunk).__name__}: chosen and rejected cannot share their prompt in this model "
                    f"(relative difference {difference:.2g}); Llama, Qwen and GPT-NeoX style models can"
                )
    finally:
        trunk.train(training)
