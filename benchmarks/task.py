"""What the sampling and PPO benchmarks compute on: written once, read by every worker. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Task:
    """Prompts as tokens and what is done with them.

    `start` holds the folders `policy` and, for PPO, `reward`. `responses` are k to each prompt (PPO). `fixed`: every
    response has `new_tokens` tokens, the end token is not drawn before. `options` are the benchmark's own.
    """

    start: str
    precision: str
    threads: int
    k: int
    new_tokens: int
    fixed: bool
    max_prompt: int
    seed: int
    end_id: int = -1
    pad_id: int = -1
    prompts: list[list[int]] = field(default_factory=list)
    responses: list[list[list[int]]] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """As JSON, for the workers."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Task:
        """What `write` wrote."""
        return cls(**json.loads(path.read_text()))

    def about(self) -> dict[str, Any]:
        """The settings, for the record: no tokens, no folders."""
        return {k: v for k, v in asdict(self).items() if k not in ("start", "prompts", "responses")}
