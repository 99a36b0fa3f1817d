"""Write a small world to a folder: demonstrations, noisy preferences, prompts, the truth, and a tokenizer."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
from pydantic import Field

from steelyard.config import Config
from steelyard.errors import InputError
from steelyard.simulate.annotators import AnnotatorConfig, Truth, annotate
from steelyard.simulate.tokenizer import build_tokenizer
from steelyard.simulate.world import gold
from steelyard.simulate.writer import Writer, prompts
from steelyard.types import Preference

TRAIN_PROMPTS: Final = 2400
"""At most so many distinct training prompts; larger sets ask them again, in the same order."""

FILES: Final = {
    "sft": "sft.jsonl",
    "preferences": "preferences.jsonl",
    "validation": "validation.jsonl",
    "truth": "truth.jsonl",
    "validation_truth": "validation_truth.jsonl",
    "prompts": "prompts.jsonl",
    "eval_prompts": "eval_prompts.jsonl",
    "tokenizer": "tokenizer",
    "world": "world.json",
}


class WorldConfig(Config):
    """Sizes, seed and label noise of a small world."""

    sft: int = Field(default=3000, ge=1, description="demonstrations for supervised fine-tuning")
    preferences: int = Field(default=2000, ge=1, description="training pairs")
    validation: int = Field(default=500, ge=1, le=800, description="validation pairs, each with a prompt of its own")
    rl_prompts: int = Field(default=400, ge=1, le=800, description="prompts for reinforcement learning")
    eval_prompts: int = Field(default=200, ge=1, le=800, description="prompts for evaluating policies")
    difficulty: float = Field(
        default=0.0, ge=0, le=3, description="how far animals differ in how well the writer answers; 0: not at all"
    )
    seed: int = Field(default=0, ge=0, description="seed of all prompts, responses and labels")
    noise: AnnotatorConfig = Field(
        default=AnnotatorConfig(), description="label noise of training and validation pairs"
    )


def write_world(config: WorldConfig, out: Path) -> dict[str, Path]:
    """Write the world into the new folder `out`; returns its files by name (the keys of `FILES`).

    sft.jsonl holds prompt, response; preferences.jsonl and validation.jsonl id, prompt, chosen, rejected with
    noisy labels; truth.jsonl and validation_truth.jsonl, in the same order, id, wrong, noise, gold_chosen,
    gold_rejected; prompts.jsonl (for RL) and eval_prompts.jsonl id, prompt; tokenizer/ a Hugging Face tokenizer;
    world.json the configuration.

    Training (sft and preferences share prompts), validation, RL and evaluation have no prompt in common; they
    may ask the same question in other words. The folder appears whole or not at all; its bytes depend on the
    configuration alone. Raises InputError if `out` exists and is not an empty folder, or a noise rate is out of
    reach.
    """
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out}: the folder must be new or empty. Remove it or name another one.")
    tables = make_tables(config)
    draft = out.parent / f".{out.name}.{os.getpid()}.part"
    draft.mkdir(parents=True)
    try:
        for name, rows in tables.items():
            _write_lines(draft / FILES[name], rows)
        build_tokenizer().save_pretrained(draft / FILES["tokenizer"])
        (draft / FILES["world"]).write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")
        draft.replace(out)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return {name: out / file for name, file in FILES.items()}


def make_tables(config: WorldConfig) -> dict[str, list[dict[str, Any]]]:
    """The rows of all JSON Lines files of a world, by the keys of `FILES`."""
    streams = np.random.SeedSequence(config.seed).spawn(4)
    asking, showing, training, validating = (np.random.default_rng(stream) for stream in streams)
    held_out = config.validation + config.rl_prompts + config.eval_prompts
    train = min(max(config.sft, config.preferences), TRAIN_PROMPTS)
    asked = prompts(held_out + train, asking)
    validation_end, rl_end = config.validation, config.validation + config.rl_prompts
    writer = Writer(difficulty=config.difficulty)
    train_prompts = asked[held_out:]
    train_pairs = _pairs("train", train_prompts, config.preferences, writer, training)
    validation_pairs = _pairs("val", asked[:validation_end], config.validation, writer, validating)
    labels, truth = annotate(train_pairs, gold, config.noise, config.seed)
    validation_labels, validation_truth = annotate(validation_pairs, gold, config.noise, config.seed + 1)
    demonstrations = [train_prompts[index % train] for index in range(config.sft)]
    return {
        "sft": [{"prompt": text, "response": writer.respond(text, showing)} for text in demonstrations],
        "preferences": [_pair_row(pair) for pair in labels],
        "validation": [_pair_row(pair) for pair in validation_labels],
        "truth": [_truth_row(each) for each in truth],
        "validation_truth": [_truth_row(each) for each in validation_truth],
        "prompts": _prompt_rows("rl", asked[validation_end:rl_end]),
        "eval_prompts": _prompt_rows("eval", asked[rl_end:held_out]),
    }


def _pairs(name: str, texts: list[str], count: int, writer: Writer, rng: np.random.Generator) -> list[Preference]:
    """Pairs of two responses of the writer to one prompt. Of equal gold, both are drawn again."""
    pairs: list[Preference] = []
    while len(pairs) < count:
        prompt = texts[len(pairs) % len(texts)]
        first, second = writer.respond(prompt, rng), writer.respond(prompt, rng)
        if gold(prompt, first) != gold(prompt, second):
            pairs.append(Preference(f"{name}-{len(pairs):06d}", prompt, first, second))
    return pairs


def _pair_row(pair: Preference) -> dict[str, Any]:
    return {name: getattr(pair, name) for name in ("id", "prompt", "chosen", "rejected")}


def _truth_row(truth: Truth) -> dict[str, Any]:
    return asdict(truth)


def _prompt_rows(name: str, texts: list[str]) -> list[dict[str, Any]]:
    return [{"id": f"{name}-{index:06d}", "prompt": text} for index, text in enumerate(texts)]


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
