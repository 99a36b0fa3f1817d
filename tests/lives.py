"""Run as a script: a process that has the imports done and forks a child for each life, for those that are killed.

Importing anew would take longer than the lives do. The fixture `life` talks to it.
"""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import sys
from typing import Any


def die_at_step(number: int) -> None:
    """From now on this process is killed, without warning, in its optimiser's step of that number."""
    import torch

    original, count = torch.optim.AdamW.step, iter(range(1, number + 1))

    def counted(*args: Any, **kwargs: Any) -> Any:
        if next(count) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    torch.optim.AdamW.step = counted  # type: ignore[method-assign]


def serve() -> None:
    """Fork a child for each (module, function, arguments) that comes in; send back how it ended."""
    import torch
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification  # noqa: F401

    import steelyard.iterate  # noqa: F401

    torch.set_num_threads(1)
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    while True:
        try:
            module, name, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        if (child := os.fork()) == 0:
            try:
                getattr(importlib.import_module(module), name)(*arguments)
                os._exit(0)
            finally:
                os._exit(1)
        pickle.dump(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), answer)
        answer.flush()


if __name__ == "__main__":
    serve()
