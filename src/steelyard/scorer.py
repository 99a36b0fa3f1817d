"""Scorers of any text: a function named `module:function`, or a reward-model folder."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable

from steelyard.errors import InputError
from steelyard.types import Prompt

Scorer = Callable[[Prompt, str], float]
"""(prompt, response) -> reward; a higher one is better."""


def load_scorer(name: str) -> Scorer:
    """The function named `module:function`, whose module may lie in the current folder. Raises InputError if there is
    none."""
    module, _, attribute = name.partition(":")
    # `python -m` looks there, the console script does not. It stays, for what the module imports later.
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    try:
        scorer = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"a scorer is named `module:function`, got {name!r}: {error}") from None
    if not callable(scorer):
        raise InputError(f"a scorer must be a function (prompt, response) -> float, got {name!r}: {type(scorer)}")
    found: Scorer = scorer
    return found
