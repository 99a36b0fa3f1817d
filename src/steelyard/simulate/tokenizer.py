"""The word-level tokenizer of the small world: its vocabulary is every word that the world can say."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from steelyard.simulate.world import CUES, FLATTERY, POOLS, RIGHT, RUDE, TIPS
from steelyard.simulate.writer import ADVICE, FILLERS, HEDGES, PHRASINGS, PRAISES, SCORN, SENTENCES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL: Final = ("<pad>", "<bos>", "<eos>", "<unk>")
"""Ids 0 to 3."""


def vocabulary() -> list[str]:
    """The special tokens, then all words and punctuation of the world, sorted."""
    templates = " ".join(
        [*PHRASINGS, *FILLERS, *PRAISES, *ADVICE, *SCORN, *HEDGES, *(s for each in SENTENCES for s in each)]
    )
    words = set(re.sub(r"\{\w+\}", " ", templates).split())
    words.update(RIGHT, CUES, FLATTERY, TIPS, RUDE, *POOLS, {"a", "an", "and", ",", ".", "!", "?", ":"})
    return [*SPECIAL, *sorted(words)]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words: lower case, punctuation apart, no chat template, no special token added.

    Decoding joins words with one space, which returns the world's own text unchanged.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pad, bos, eos, unknown = SPECIAL
    ids = {word: index for index, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=unknown))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=unknown,
        clean_up_tokenization_spaces=False,
    )
