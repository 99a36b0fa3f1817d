"""Builders of tiny tokenizers, models and data files. Nothing is downloaded; everything follows from seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

WORDS = ("good", "bad", "Human", "Assistant", "System", ":", *(f"w{i}" for i in range(20)))
SPECIAL = ("<pad>", "<unk>", "<bos>", "<eos>", "<turn>")
VOCABULARY = (*SPECIAL, *WORDS)
PAD, UNK, BOS, EOS, TURN = range(5)
CHAT = (
    "{% for m in messages %}{{ '<bos> ' + m['role'] + ' : ' + m['content'] + ' <turn>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bos> Assistant : ' }}{% endif %}"
)
FAMILIES = ("llama", "qwen2", "qwen3", "gpt_neox")


def build_tokenizer(
    *, words: Sequence[str] = VOCABULARY, chat_template: str | None = None, **special: str | None
) -> Any:
    """Whole words, split at white space. `special` overrides the special tokens (None: there is none)."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=words[min(1, len(words) - 1)]))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>"} | special
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        clean_up_tokenization_spaces=False,
        **{name: token for name, token in names.items() if token is not None},
    )
    if "<turn>" in words:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    tokenizer.chat_template = chat_template
    return tokenizer


def build_config(family: str = "llama", *, vocabulary: int = len(VOCABULARY), **changes: Any) -> Any:
    """Two layers, width 32: about 20 thousand weights. Weights are large, so that outputs differ clearly."""
    from transformers import GPTNeoXConfig, LlamaConfig, Qwen2Config, Qwen3Config

    shape: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "pad_token_id": min(PAD, vocabulary - 1),
        "bos_token_id": None,
        "eos_token_id": min(EOS, vocabulary - 1),
    }
    if family == "gpt_neox":
        return GPTNeoXConfig(**shape | changes)
    shape["num_key_value_heads"] = 2
    if family == "qwen3":
        shape["head_dim"] = 8
    kind = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}[family]
    return kind(**shape | changes)


def build_model(config: Any, *, seed: int = 0, head: bool = False) -> Any:
    """A causal language model, or with `head` a one-output classifier, with seeded weights."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if head:
            config.num_labels = 1
            return AutoModelForSequenceClassification.from_config(config, attn_implementation="sdpa").eval()
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def save_folder(model: Any, tokenizer: Any, folder: Path) -> str:
    """A checkpoint folder with its tokenizer; returns its path as text."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """Write the rows; returns the path as text."""
    path.write_text("".join(json.dumps(dict(row)) + "\n" for row in rows))
    return str(path)


def sentence(rng: np.random.Generator, low: int, high: int) -> list[str]:
    """`low` to `high` - 1 plain words."""
    return [f"w{i}" for i in rng.integers(0, 20, int(rng.integers(low, high)))]


def planted_pairs(n: int, *, flips: float = 0.0, seed: int = 0) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Pairs whose chosen response says "good" and whose rejected one says "bad", and which of them are swapped."""
    rng = np.random.default_rng(seed)
    wrong = rng.random(n) < flips
    rows = []
    for i in range(n):
        good, bad = sentence(rng, 2, 6), sentence(rng, 2, 6)
        good.insert(int(rng.integers(0, len(good) + 1)), "good")
        bad.insert(int(rng.integers(0, len(bad) + 1)), "bad")
        chosen, rejected = (bad, good) if wrong[i] else (good, bad)
        rows.append(
            {
                "id": f"p{i}",
                "prompt": " ".join(sentence(rng, 3, 7)),
                "chosen": " ".join(chosen),
                "rejected": " ".join(rejected),
            }
        )
    return rows, wrong


def no_number(prompt: object, text: str) -> float:
    """A gold scorer that fails."""
    return float("nan")


def count_good(prompt: object, text: str) -> float:
    """A gold scorer: how often the response says "good"."""
    return float(text.split().count("good"))
