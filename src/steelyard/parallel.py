"""Independent jobs in worker processes, with results that do not depend on how many there are.

Every job runs in a process of its own, so that no state leaks from one to the next and a process that dies names its
job. Jobs and results travel as plain pickles, also when all run in this process: tensors are copied, never shared.
A job must seed whatever randomness it uses.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from steelyard.errors import InputError
from steelyard.memory import keep_freed_memory

R = TypeVar("R")

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
_GRACE_SECONDS = 2.0
# transformers imports its parts when they are first used: without the last two every worker would spend seconds on it.
_PRELOAD = ("torch", "transformers", "transformers.modeling_utils", "transformers.models.llama.modeling_llama")


class JobError(RuntimeError):
    """A job failed. The message names the job and holds the traceback, or the cause of death, of its process."""


def default_workers(device: str = "cpu") -> int:
    """The number of CPUs that this process may use; on a GPU 1, for jobs side by side would share its memory."""
    if device != "cpu":
        return 1
    if hasattr(os, "process_cpu_count"):
        return os.process_cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_jobs(
    function: Callable[..., R],
    jobs: Sequence[tuple[Any, ...]],
    *,
    workers: int,
    threads: int = 1,
    labels: Sequence[str] | None = None,
    on_done: Callable[[int, R], None] | None = None,
    preload: Sequence[str] | None = None,
) -> list[R]:
    """`[function(*job) for job in jobs]`, by up to `workers` processes at a time with `threads` threads each.

    `function` must be importable (defined at the top of a module); jobs and results must pickle. Results come in the
    order of the jobs; `on_done(index, result)` is called here as each job ends. With `workers=1` the jobs run in this
    process, under the same number of threads, which is put back afterwards. `labels` name the jobs in errors.
    `preload` are the modules that the process from which workers are forked imports once (it lives on, so the first
    call decides); by default torch, transformers and the module of `function`.

    The first failure ends all other jobs. Raises InputError where the job did, JobError for every other failure,
    a process killed by a signal included; both messages begin with the job's label.
    """
    if workers < 1 or threads < 1:
        raise InputError(f"workers and threads must be at least 1, got workers={workers}, threads={threads}")
    if labels is not None and len(labels) != len(jobs):
        raise ValueError(f"there must be one label for each of the {len(jobs)} jobs, got {len(labels)}")
    names = list(labels) if labels is not None else [f"job {index}" for index in range(len(jobs))]
    pickled = [_pickle_job(function, job, name) for job, name in zip(jobs, names, strict=True)]
    if preload is None:
        preload = (*_PRELOAD, getattr(function, "__module__", "torch"))
    outcomes = _here(pickled, threads) if workers == 1 else _elsewhere(pickled, names, workers, threads, preload)
    results: dict[int, R] = {}
    try:
        for index, kind, payload in outcomes:
            if kind == "input":
                raise InputError(f"{names[index]}: {payload}")
            if kind == "error":
                raise JobError(f"{names[index]}: {payload}")
            results[index] = pickle.loads(payload)
            if on_done is not None:
                on_done(index, results[index])
    finally:
        outcomes.close()
    return [results[index] for index in range(len(jobs))]


# (index of the job, "result" | "input" | "error", pickled result or message)
_Outcome = tuple[int, str, Any]


def _pickle_job(function: Callable[..., Any], job: tuple[Any, ...], name: str) -> bytes:
    try:
        return pickle.dumps((function, job))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(
            f"{name}: the function must be defined at the top of a module and its arguments must pickle: {error}"
        ) from error


def _attempt(pickled: bytes) -> tuple[str, Any]:
    try:
        function, job = pickle.loads(pickled)
        return "result", pickle.dumps(function(*job))
    except KeyboardInterrupt:
        raise
    except InputError as error:
        return "input", str(error)
    except FloatingPointError as error:
        return "error", str(error)  # a training that diverged says all that there is to say
    except BaseException:
        return "error", f"the job failed:\n{traceback.format_exc()}"


def _here(pickled: Sequence[bytes], threads: int) -> Generator[_Outcome, None, None]:
    for index, job in enumerate(pickled):
        with _thread_limit(threads):
            outcome = _attempt(job)
        yield (index, *outcome)


@contextmanager
def _thread_limit(threads: int) -> Iterator[None]:
    """The thread count of the workers, here, for a while: sums split among threads round differently."""
    import torch
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    before = torch.get_num_threads()
    with threadpool_limits(limits=threads):
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def _elsewhere(
    pickled: Sequence[bytes], names: Sequence[str], workers: int, threads: int, preload: Sequence[str]
) -> Generator[_Outcome, None, None]:
    context = _context(preload)
    waiting = list(enumerate(pickled))[::-1]
    running: dict[int, tuple[BaseProcess, Connection]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                index, job = waiting.pop()
                _start(running, index, context, job, names[index], threads)
            # A process of the job's own may keep the pipe open after the worker has died: watch the worker too.
            ready = wait([end for process, pipe in running.values() for end in (pipe, process.sentinel)])
            # The lowest job first, so that of two failures at once the same one is always reported.
            index = min(i for i, (process, pipe) in running.items() if pipe in ready or process.sentinel in ready)
            process, pipe = running[index]
            outcome = _receive(pipe)
            process.join(_GRACE_SECONDS)
            code = process.exitcode
            _end([running.pop(index)])
            yield (index, *(outcome or ("error", _cause_of_death(code))))
    finally:
        _end(list(running.values()))


def _context(preload: Sequence[str]) -> BaseContext:
    """A process that has the imports done and forks a clean child for each job; not all systems have it."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([name for name in preload if name != "__main__"])
    return context


def _start(
    running: dict[int, tuple[BaseProcess, Connection]],
    index: int,
    context: BaseContext,
    job: bytes,
    name: str,
    threads: int,
) -> None:
    variables = dict.fromkeys(_THREAD_VARIABLES, str(threads)) | {"STEELYARD_QUIET": "1"}
    receiver, sender = context.Pipe(duplex=False)
    # Libraries read these while they are imported, so they must be there before the process is.
    with _environment(variables):
        process = context.Process(  # type: ignore[attr-defined]
            target=_child, args=(sender, job, threads, dict(os.environ)), name=name
        )
        # Before it starts: an interrupt in between would leave it running, and this process waiting for it at its end.
        running[index] = process, receiver
        process.start()
    sender.close()


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _child(sender: Connection, job: bytes, threads: int, environment: dict[str, str]) -> None:
    # Ctrl-C reaches the whole group of processes; it is the parent that ends its children.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    # The server that forked this process may have begun under another environment.
    os.environ.clear()
    os.environ.update(environment)
    keep_freed_memory()
    outcome = _prepare(job, threads) or _attempt(job)
    sender.send_bytes(pickle.dumps(outcome))
    sender.close()


def _prepare(job: bytes, threads: int) -> tuple[str, Any] | None:
    """Import what the job needs, then set the thread counts of the libraries that came with it."""
    import sys

    try:
        pickle.loads(job)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(threads)
        if "numpy" in sys.modules:
            from threadpoolctl import threadpool_limits

            threadpool_limits(limits=threads)
    except BaseException:
        return "error", f"the job could not be prepared:\n{traceback.format_exc()}"
    return None


def _die_with_parent() -> None:
    """A parent killed outright cannot end its children, and they would hold the locks of their run folders."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _receive(receiver: Connection) -> tuple[str, Any] | None:
    """What the worker sent, or None if it died first."""
    try:
        outcome: tuple[str, Any] | None = pickle.loads(receiver.recv_bytes()) if receiver.poll() else None
    except (EOFError, OSError):
        return None
    return outcome


def _cause_of_death(code: int | None) -> str:
    if code is None or code >= 0:
        return f"its process ended with status {code} and without a result"
    number = -code
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = "unknown"
    advice = ""
    if number == signal.SIGKILL:
        advice = "; most likely memory ran out: use fewer workers, or smaller batches or models"
    return f"its process was killed by signal {number} ({name}){advice}"


def _end(workers: Sequence[tuple[BaseProcess, Connection]]) -> None:
    started = [process for process, _ in workers if process.pid is not None]
    for process in started:
        process.terminate()
    for process in started:
        process.join(_GRACE_SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
        process.close()
    for _, pipe in workers:
        pipe.close()
