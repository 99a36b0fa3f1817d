"""Several processes that train one model: each computes a share of every batch, and all take the same step.

`torchrun` starts the processes and says to each which one it is. The gradient is that of the whole batch whatever their
number, so what they train is the same up to rounding. Only the first writes the run's folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from pydantic import BaseModel
from torch import Tensor

from steelyard.errors import InputError
from steelyard.run_dir import RunDir

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Group:
    """The processes that train one model, seen from one of them; by default there is only that one."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that examines and writes."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """What this process computes of a batch: every `size`-th. May be nothing."""
        return list(items[self.rank :: self.size])

    def sum_(self, x: Tensor) -> None:
        """Sum over the processes, in place. The result is the same in all of them, bit for bit."""
        if self.size > 1:
            torch.distributed.all_reduce(x)

    def told(self, value: T) -> T:
        """The first process's value, in all of them."""
        if self.size == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]


ALONE = Group()


@contextmanager
def joined(device: str = "cpu") -> Iterator[Group]:
    """The group that `torchrun` started this process in, or a group of one.

    gloo on CPUs; on GPUs nccl, each process on the GPU of its local rank. Raises InputError if `device` names one GPU
    for all of several processes.
    """
    size = started()
    if size == 1:
        yield ALONE
        return
    if ":" in device:
        raise InputError(f"device = {device} names one GPU for {size} processes; with device = cuda each has its own")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("gloo" if device == "cpu" else "nccl")
    try:
        yield Group(torch.distributed.get_rank(), size)
    finally:
        torch.distributed.destroy_process_group()


def started() -> int:
    """How many processes `torchrun` started together; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class GroupRun:
    """The run folder of a group: the first process owns it, the others learn from it what they must know.

    A `RunDir` to the loops that use it. What is refused in the first process is refused in all of them.
    """

    def __init__(self, group: Group, path: Path, config: BaseModel, *, resume: bool) -> None:
        self.group = group
        self._run: RunDir | None = None
        fault: str | None = None
        if group.first:
            try:
                self._run = RunDir.open(path, config, resume=resume)
            except InputError as error:
                fault = str(error)
        if fault := group.told(fault):
            raise InputError(fault)

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end."""
        return self.group.told(bool(self._run and self._run.finished))

    def result(self) -> dict[str, Any]:
        """What `finish` was given; the others wait for the first to finish."""
        return self.group.told(self._run.result() if self._run else {})

    def restore(self) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        """The newest checkpoint, as every process needs it."""
        return self.group.told(self._run.restore() if self._run else None)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See RunDir."""
        if self._run:
            self._run.log(step, metrics)

    def time(self, step: int, timings: Mapping[str, float]) -> None:
        """See RunDir."""
        if self._run:
            self._run.time(step, timings)

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """See RunDir."""
        if self._run:
            self._run.save(step, tensors, state)

    def finish(self, result: Mapping[str, Any]) -> None:
        """See RunDir."""
        if self._run:
            self._run.finish(result)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._run:
            self._run.__exit__(*error)


def require_one_process() -> None:
    """Raise InputError if several processes were started together, for what only one can do."""
    if started() > 1:
        raise InputError(
            f"this runs in one process, but torchrun started {started()}: start it without torchrun (`train reward` "
            "and `train metarm` can share their batches among processes)"
        )
