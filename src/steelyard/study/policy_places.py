"""Where a policy study keeps what each seed makes."""

from __future__ import annotations

from pathlib import Path

from steelyard.study.policy_config import Cell, PolicyStudy


def of_seed(out: Path, seed: int) -> Path:
    """All that one seed makes."""
    return out / "seeds" / f"{seed}"


def start_of(study: PolicyStudy, out: Path, seed: int) -> str:
    """The SFT model of a seed."""
    return study.model if study.sft is None else str(of_seed(out, seed) / "sft" / "model")


def labels_of(out: Path, seed: int, data: tuple[str, str]) -> Path:
    """A file of training pairs: (world, repair)."""
    return of_seed(out, seed) / "labels" / data[0].replace(" %", "") / f"{data[1]}.jsonl"


def reward_of(out: Path, seed: int, data: tuple[str, str], member: int = 0) -> Path:
    """The folder of a reward model trained on (world, repair)."""
    return of_seed(out, seed) / "rm" / data[0].replace(" %", "") / data[1] / f"{member}"


def run_of(out: Path, seed: int, cell: Cell) -> Path:
    """The folder of a policy."""
    return of_seed(out, seed) / "runs" / cell.place
