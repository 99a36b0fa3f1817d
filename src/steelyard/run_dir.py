"""What a run leaves behind: its configuration, its logs, its checkpoints and its result.

A run may be killed at any moment, `kill -9` included, and is resumable afterwards. Three rules make it so: every
file that is replaced is written beside its place and renamed into it; logs only grow, are made durable before each
checkpoint, and are cut back to the lengths that the checkpoint recorded; one process owns a folder at a time.

Importing this module does not import torch, so that light commands may write their files with it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import numbers
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

from pydantic import BaseModel, ValidationError

from steelyard.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

METRICS, TIMINGS, SAMPLES = LOGS = ("metrics.jsonl", "timings.jsonl", "samples.jsonl")
_RUN_FILES = (*LOGS, "checkpoints", "result.json")
_STEP_FOLDER = re.compile(r"step-(\d{8,})")


def fsync_folder(path: Path) -> None:
    """Make the names in a folder durable: a new or renamed file is lost in a power cut without it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text_atomic(path: Path, text: str) -> None:
    """Write `text` (UTF-8) so that a reader, or a crash, sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(text.encode("utf-8"))
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    fsync_folder(path.parent)


def write_json_atomic(path: Path, value: Any) -> None:
    """Write `value` as indented, standard JSON through `write_text_atomic`; key order is kept.

    Raises InputError, naming the field, for what JSON cannot hold (NaN and infinity included).
    """
    write_text_atomic(path, json_text(value, path.name, indent=2) + "\n")


def json_text(value: Any, name: str, *, exact: bool = False, indent: int | None = None) -> str:
    """JSON in plain ASCII, so that no character inside a text can be taken for the end of a line.

    `exact` is for state that only this library reads back: the value must then survive the round trip unchanged, so
    tuples are refused (they would come back as lists) while NaN and infinity are kept. Otherwise tuples are written
    as lists and non-finite numbers are refused. Raises InputError that names the field within `name`.
    """
    if fault := _json_fault(value, name, exact):
        raise InputError(fault)
    return json.dumps(value, indent=indent, allow_nan=exact)


def _json_fault(value: Any, where: str, exact: bool) -> str | None:
    if value is None or isinstance(value, (bool, int, str)):
        return None
    if isinstance(value, float):
        return None if exact or math.isfinite(value) else f"{where} must be a finite number, got {value}"
    items: Iterator[tuple[str, Any]]
    if isinstance(value, dict):
        if wrong := [key for key in value if not isinstance(key, str)]:
            return f"{where} must have text keys only, got the key {wrong[0]!r}: use str(key)"
        items = ((f"{where}: {key}", item) for key, item in value.items())
    elif isinstance(value, list) or (isinstance(value, tuple) and not exact):
        items = ((f"{where}[{index}]", item) for index, item in enumerate(value))
    else:
        return f"{where} must be a plain JSON value, got {type(value).__name__}: convert it (float(), list(), str())"
    return next((fault for path, item in items if (fault := _json_fault(item, path, exact))), None)


class RunDir:
    """One run folder, owned by this process until `close` (or the end of a `with` block).

    Open it with `RunDir.open`. A loop over steps then reads:

        with RunDir.open(path, config, resume=resume) as run:
            if run.finished:
                return run.result()
            if restored := run.restore():
                step, tensors, state = restored
            ...
            run.log(step, {"train/loss": loss})
            run.save(step, tensors, state)
            ...
            run.finish(result)
    """

    def __init__(self, path: Path, *, keep: int, lock: int, ready: bool) -> None:
        self.path = path
        self.keep = keep
        self._lock: int | None = lock
        self._ready = self._new = ready
        self._files: dict[str, IO[bytes]] = {}

    @classmethod
    def open(cls, path: str | Path, config: BaseModel, *, resume: bool, keep: int = 2) -> RunDir:
        """Begin a run in `path`, or continue the one it holds.

        A folder that holds a run is refused unless `resume`; its config.json must then equal `config` in every
        field, and the files that `config` names must hold what they held (inputs.json). With `resume`, a folder without
        a run begins one: a run killed in its first moment left nothing.
        `keep` is the number of newest checkpoints to keep. Raises InputError for all of these, and if another
        process has the folder open.
        """
        path = Path(path)
        if keep < 1:
            raise InputError(f"keep must be at least 1, got {keep}: a run without checkpoints cannot be resumed")
        lock = acquire(path)
        try:
            begun = _check_folder(path, config, resume)
            if begun:
                _check_inputs(path, config)
            else:
                write_json_atomic(path / "inputs.json", _inputs(config))
                text = json.dumps(config.model_dump(mode="json"), indent=2)
                write_text_atomic(path / "config.json", text + "\n")
        except BaseException:
            os.close(lock)
            raise
        return cls(path, keep=keep, lock=lock, ready=not begun)

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end: result.json, which is written last, is there."""
        return (self.path / "result.json").exists()

    def result(self) -> dict[str, Any]:
        """What `finish` was given. Raises InputError if the run has not finished."""
        if not self.finished:
            raise InputError(f"{self.path} must hold a finished run (result.json), but it has not: resume it first")
        return _read_json(self.path / "result.json")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line to metrics.jsonl: deterministic numbers only, for a resumed run must repeat its bytes.

        Floats are written so that they read back exactly. Raises InputError, naming the metric, for a value that is
        not a finite number.
        """
        self._append(METRICS, step, _numbers(step, metrics))

    def time(self, step: int, timings: Mapping[str, float]) -> None:
        """Append one line to timings.jsonl: seconds, tokens per second and the like. Errors as for `log`."""
        self._append(TIMINGS, step, _numbers(step, timings))

    def sample(self, step: int, fields: Mapping[str, Any]) -> None:
        """Append one line to samples.jsonl: any JSON fields, in the order given, after the step."""
        self._append(SAMPLES, step, dict(fields))

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
        """Write checkpoints/step-XXXXXXXX and remove all but the newest `keep`; the logs are made durable first.

        Saving a step again replaces its checkpoint. Raises InputError for a step before the newest checkpoint,
        and what `checkpoint.save` raises.
        """
        from steelyard import checkpoint

        self._check_writable()
        folder = self.path / "checkpoints"
        if (steps := self._steps()) and step < steps[-1]:
            raise InputError(f"{folder}: step {step} must not lie before the newest checkpoint, step {steps[-1]}")
        folder.mkdir(exist_ok=True)
        record = {"step": step, "logs": self._sync_logs(), "state": dict(state)}
        target = folder / f"step-{step:08d}"
        checkpoint.save(target, tensors, record)
        self._prune()
        return target

    def restore(self) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        """The newest checkpoint that verifies, as (step, tensors, state); None where the run must begin anew.

        Cuts the logs back to their lengths at that checkpoint, so that steps done again leave identical bytes. A
        damaged checkpoint is renamed to `step-XXXXXXXX.damaged`, with a warning on standard error. Raises InputError
        if a log is shorter than the checkpoint recorded: somebody else changed it.
        """
        from steelyard import checkpoint

        if self.finished:
            raise InputError(f"{self.path} holds a finished run: read result() in place of restoring it")
        folder = self.path / "checkpoints"
        if folder.exists():
            checkpoint.settle(folder)
        found: tuple[int, dict[str, Tensor], dict[str, Any]] | None = None
        lengths = dict.fromkeys(LOGS, 0)
        for step in reversed(self._steps()):
            path = folder / f"step-{step:08d}"
            try:
                tensors, record = checkpoint.load(path)
            except checkpoint.CheckpointError as error:
                aside = checkpoint.set_aside(path)
                print(f"warning: {error} It is skipped and kept as {aside.name}.", file=sys.stderr, flush=True)
                continue
            found, lengths = (record["step"], tensors, record["state"]), record["logs"]
            break
        self._cut_logs(lengths)
        self._prune()
        self._ready = True
        return found

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write result.json, atomically and last: from now on the run is finished and takes no more lines."""
        self._check_writable()
        self._sync_logs()
        write_json_atomic(self.path / "result.json", dict(result))

    def close(self) -> None:
        """Close the logs and give the folder free. Safe to call twice."""
        for file in self._files.values():
            file.close()
        self._files.clear()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A run refused for bad input before its first line never began: the mended input may use the same folder.
        if self._new and isinstance(value, InputError) and not any((self.path / name).exists() for name in _RUN_FILES):
            for name in ("config.json", "inputs.json"):
                (self.path / name).unlink(missing_ok=True)
        self.close()

    def _steps(self) -> list[int]:
        folder = self.path / "checkpoints"
        names = (entry.name for entry in folder.iterdir()) if folder.exists() else ()
        return sorted(int(match[1]) for name in names if (match := _STEP_FOLDER.fullmatch(name)))

    def _prune(self) -> None:
        from steelyard import checkpoint

        for old in self._steps()[: -self.keep]:
            checkpoint.remove(self.path / "checkpoints" / f"step-{old:08d}")

    def _check_writable(self) -> None:
        if self._lock is None:
            raise RuntimeError(f"{self.path}: the run folder is closed")
        if self.finished:
            raise RuntimeError(f"{self.path}: the run is finished and takes no more lines or checkpoints")
        if not self._ready:
            raise RuntimeError(f"{self.path}: call restore() first: the logs may run past the last checkpoint")

    def _append(self, name: str, step: int, fields: dict[str, Any]) -> None:
        self._check_writable()
        if "step" in fields:
            raise InputError(f"{name}: 'step' is the line's own step: give the field another name")
        line = json_text({"step": step, **fields}, f"{name}, step {step}") + "\n"
        if name not in self._files:
            self._files[name] = (self.path / name).open("ab")
        self._files[name].write(line.encode("ascii"))
        self._files[name].flush()

    def _sync_logs(self) -> dict[str, int]:
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        fsync_folder(self.path)
        paths = {name: self.path / name for name in LOGS}
        return {name: path.stat().st_size if path.exists() else 0 for name, path in paths.items()}

    def _cut_logs(self, lengths: Mapping[str, int]) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()
        for name, length in lengths.items():
            path = self.path / name
            size = path.stat().st_size if path.exists() else 0
            if size < length:
                raise InputError(
                    f"{path} must hold at least the {length} bytes it had at the last checkpoint, but has {size}: "
                    "put the file back, or start again in another folder"
                )
            if size > length:
                os.truncate(path, length)


def _numbers(step: int, values: Mapping[str, float]) -> dict[str, Any]:
    checked: dict[str, Any] = {}
    for name in sorted(values):
        value: Any = values[name]
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise InputError(f"'{name}' at step {step} must be a number, got {type(value).__name__}: use float()")
        if not math.isfinite(value):
            raise InputError(
                f"'{name}' at step {step} must be a finite number, got {float(value)}: the computation has diverged "
                "(a lower learning rate often helps), or the quantity does not exist at this step: leave it out"
            )
        checked[name] = float(value)
    return checked


def acquire(path: Path) -> int:
    """Lock a folder, made if need be, for this process; `os.close` frees it, and so does any end of the process.

    Raises InputError if `path` is a file, or another process has the folder.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} must be a folder for the run, but it is a file: give another path")
    path.mkdir(parents=True, exist_ok=True)
    lock = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(lock, 32).decode("ascii", "replace").strip()
        os.close(lock)
        raise InputError(
            f"{path} must be used by one process at a time, but process {owner or '(unknown)'} has it open: "
            "wait for that process or end it, or use another folder"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            os.close(lock)
            raise
        # Some cluster file systems have no locks at all; that must not keep their users from training.
        print(f"warning: {path}: this file system has no locks: use the folder once at a time", file=sys.stderr)
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode("ascii"), 0)
    return lock


def _check_folder(path: Path, config: BaseModel, resume: bool) -> bool:
    """Whether the folder holds a run that may be continued with `config`."""
    stored = path / "config.json"
    if not stored.exists():
        if parts := [name for name in _RUN_FILES if (path / name).exists()]:
            raise InputError(f"{path} holds {', '.join(parts)} but no config.json: use another folder")
        return False
    if not resume:
        raise InputError(f"{path} already holds a run: continue it with --resume, or use another folder")
    # Through JSON and back, so that both sides have been written and read the same way.
    given = dict(_leaves(json.loads(json.dumps(config.model_dump(mode="json")))))
    before = dict(_leaves(completed(_read_json(stored), type(config))))
    lines = [
        f"  {name}: stored {before.get(name, '(absent)')}, given {given.get(name, '(absent)')}"
        for name in sorted(before.keys() | given.keys())
        if before.get(name) != given.get(name)
    ]
    if lines:
        raise InputError(
            f"{stored} must equal the given configuration for the run to be resumed, but these fields differ:\n"
            + "\n".join(lines)
            + "\nGive the stored values, or use another folder."
        )
    return True


def _inputs(config: BaseModel) -> dict[str, str]:
    """Digests of the files that a configuration names: with other pairs under the same name it is another run.

    Folders are left out: data sets in folders are not rewritten in place, and models are large.
    """
    leaves = [json.loads(text) for _, text in _leaves(json.loads(json.dumps(config.model_dump(mode="json"))))]
    files = sorted({leaf for leaf in leaves if isinstance(leaf, str) and _is_file(leaf)})
    return {name: _digest(Path(name)) for name in files}


def _check_inputs(path: Path, config: BaseModel) -> None:
    """Raise InputError if a file that a run reads was changed since it began. Runs of older versions recorded none."""
    stored = path / "inputs.json"
    before = _read_json(stored) if stored.exists() else {}
    now = _inputs(config)
    changed = [name for name, digest in before.items() if now.get(name, digest) != digest]
    if changed:
        raise InputError(
            f"{', '.join(changed)}: changed since the run in {path} began, so what it holds would not belong together; "
            "put the old file back, or use another folder"
        )


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except (OSError, ValueError):  # a text that is no path: too long, or with a null character
        return False


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def completed(stored: dict[str, Any], kind: type[BaseModel]) -> dict[str, Any]:
    """Stored settings with the fields that they lack at their defaults: nobody named them, or they are newer.

    As they are where they no longer validate; the comparison then says why.
    """
    try:
        return kind.model_validate(stored).model_dump(mode="json")
    except ValidationError:
        return stored


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every leaf as (dotted name, JSON text); texts, for NaN equals itself there and 1 is not true."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{name}.{key}" if name else key)
    elif isinstance(value, list) and value:
        for index, item in enumerate(value):
            yield from _leaves(item, f"{name}[{index}]")
    else:
        yield name, json.dumps(value)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path} must be a JSON file, but it does not parse ({error}): put it back") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value
