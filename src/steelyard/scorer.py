"""Scorers of any text: a function named `module:function`, or a reward-model folder."""

from __future__ import annotations

import functools
import importlib
import math
import os
import sys
from collections.abc import Callable

from steelyard.errors import InputError
from steelyard.types import Prompt

Scorer = Callable[[Prompt, str], float]
"""(prompt, response) -> reward; a higher one is better."""


def load_scorer(name: str) -> Scorer:
    """The function named `module:function`, whose module may lie in the current folder.

    Raises InputError if there is none; and what is returned, if the function's reward is not a finite number.
    """
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

    @functools.wraps(scorer)
    def checked(prompt: Prompt, response: str) -> float:
        reward = scorer(prompt, response)
        try:
            number = float(reward)
        except (TypeError, ValueError):
            number = math.nan
        if math.isfinite(number):
            return number
        raise InputError(f"{name}: must return a finite number, got {reward!r} for the response {response[:80]!r}")

    return checked
