"""Run folders: what is refused, what is kept, and that a run killed anywhere continues to the same bytes."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import Field

from steelyard import checkpoint
from steelyard.config import Config
from steelyard.errors import InputError
from steelyard.run_dir import RunDir, write_json_atomic, write_text_atomic


class Inner(Config):
    sizes: tuple[int, ...] = (1, 2)
    limit: float = math.inf


class Settings(Config):
    lr: float = Field(0.1, ge=0)
    name: str = "x"
    inner: Inner = Inner()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def test_a_folder_that_holds_a_run_is_refused_without_resume(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run"
    RunDir.open(path, Settings(), resume=False).close()
    assert json.loads((path / "config.json").read_text())["lr"] == 0.1
    with pytest.raises(InputError, match="already holds a run: continue it with --resume, or use another folder"):
        RunDir.open(path, Settings(), resume=False)
    RunDir.open(path, Settings(), resume=True).close()


def test_a_run_of_an_older_version_goes_on_where_newer_settings_keep_their_defaults(tmp_path: Path) -> None:
    RunDir.open(tmp_path, Settings(lr=0.3), resume=False).close()
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["name"], stored["inner"]["sizes"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    RunDir.open(tmp_path, Settings(lr=0.3), resume=True).close()
    with pytest.raises(InputError, match='name: stored "x", given "y"'):
        RunDir.open(tmp_path, Settings(lr=0.3, name="y"), resume=True)


def test_resume_begins_a_run_where_there_is_none(tmp_path: Path) -> None:
    with RunDir.open(tmp_path, Settings(), resume=True) as run:
        run.log(1, {"a": 1.0})
        assert run.restore() is None


def test_a_file_and_a_folder_of_loose_parts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="must be a folder"):
        RunDir.open(tmp_path / "file", Settings(), resume=False)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match=r"holds metrics\.jsonl but no config\.json"):
        RunDir.open(tmp_path, Settings(), resume=True)
    with pytest.raises(InputError, match="keep must be at least 1"):
        RunDir.open(tmp_path, Settings(), resume=True, keep=0)


def test_resume_names_every_field_that_differs(tmp_path: Path) -> None:
    RunDir.open(tmp_path, Settings(), resume=False).close()
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(stored | {"extra": True}))
    changed = Settings(lr=1, inner=Inner(sizes=(1, 3, 4)))
    with pytest.raises(InputError) as error:
        RunDir.open(tmp_path, changed, resume=True)
    assert str(error.value).split("\n")[1:-1] == [
        "  extra: stored true, given (absent)",
        "  inner.sizes[1]: stored 2, given 3",
        "  inner.sizes[2]: stored (absent), given 4",
        "  lr: stored 0.1, given 1.0",
    ]
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json must be a JSON file"):
        RunDir.open(tmp_path, changed, resume=True)


def test_resume_notices_that_a_file_it_reads_was_changed(tmp_path: Path) -> None:
    """The configuration holds its name only: two halves of a run would come from different pairs."""
    run, data = tmp_path / "run", tmp_path / "pairs.jsonl"
    data.write_text("1\n")
    named = Settings(name=str(data))
    RunDir.open(run, named, resume=False).close()
    RunDir.open(run, named, resume=True).close()
    data.write_text("2\n")
    with pytest.raises(InputError, match=r"pairs\.jsonl: changed since the run in .*run began.*put the old file back"):
        RunDir.open(run, named, resume=True)
    data.unlink()  # what a finished run has read may be gone
    RunDir.open(run, named, resume=True).close()
    data.write_text("1\n")
    RunDir.open(run, named, resume=True).close()
    (run / "inputs.json").unlink()  # as an older version left it
    data.write_text("2\n")
    RunDir.open(run, named, resume=True).close()


def test_a_run_refused_for_bad_input_before_it_began_leaves_the_folder_free(tmp_path: Path) -> None:
    def begin(*, resume: bool, log: bool) -> None:
        with RunDir.open(tmp_path, Settings(), resume=resume) as run:
            if log:
                run.log(1, {"loss": 1.0})
            raise InputError("mend it")

    for resume in (False, True):
        with pytest.raises(InputError, match="mend it"):
            begin(resume=resume, log=False)
        assert not (tmp_path / "config.json").exists()
    with pytest.raises(InputError, match="mend it"):
        begin(resume=False, log=True)
    with pytest.raises(InputError, match="already holds a run"):
        begin(resume=False, log=False)
    with pytest.raises(InputError, match="mend it"):
        begin(resume=True, log=False)
    assert (tmp_path / "config.json").exists()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with (
        RunDir.open(tmp_path, Settings(), resume=False),
        pytest.raises(InputError, match=f"process {os.getpid()} has it open"),
    ):
        RunDir.open(tmp_path, Settings(), resume=True)
    RunDir.open(tmp_path, Settings(), resume=True).close()


def test_a_refused_folder_is_not_left_locked(tmp_path: Path) -> None:
    RunDir.open(tmp_path, Settings(), resume=False).close()
    for _ in range(2):
        with pytest.raises(InputError, match="already holds"):
            RunDir.open(tmp_path, Settings(), resume=False)


def test_log_lines_are_sorted_and_exact(tmp_path: Path) -> None:
    with RunDir.open(tmp_path, Settings(), resume=False) as run:
        single: Any = np.float32(0.1)
        run.log(3, {"z": 0.1 + 0.2, "a": 1, "m": single})
        run.time(3, {"seconds": 2.0})
        run.sample(3, {"prompt": "line\u2028break \ud800", "response": ["ü"]})
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"step": 3, "a": 1.0, "m": 0.10000000149011612, "z": 0.30000000000000004}\n'
    )
    assert (tmp_path / "timings.jsonl").read_text() == '{"step": 3, "seconds": 2.0}\n'
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 1
    expected = {"step": 3, "prompt": "line\u2028break \ud800", "response": ["ü"]}
    assert lines(tmp_path / "samples.jsonl") == [expected]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, "'train/loss' at step 7 must be a finite number, got nan"),
        (-math.inf, "'train/loss' at step 7 must be a finite number, got -inf"),
        (True, "'train/loss' at step 7 must be a number, got bool"),
        (torch.tensor(1.0), "'train/loss' at step 7 must be a number, got Tensor"),
        (None, "'train/loss' at step 7 must be a number, got NoneType"),
    ],
)
def test_what_is_not_a_finite_number_is_refused_by_name(tmp_path: Path, value: Any, message: str) -> None:
    with RunDir.open(tmp_path, Settings(), resume=False) as run:
        with pytest.raises(InputError, match=message):
            run.log(7, {"train/loss": value})
        with pytest.raises(InputError, match="'step' is the line's own step"):
            run.log(7, {"step": 1.0})
    assert not (tmp_path / "metrics.jsonl").exists()


def test_finish_is_recognised_and_ends_the_run(tmp_path: Path) -> None:
    with RunDir.open(tmp_path, Settings(), resume=False) as run:
        assert not run.finished
        with pytest.raises(InputError, match="must hold a finished run"):
            run.result()
        with pytest.raises(InputError, match=r"result\.json: a: b\[0\] must be a finite number"):
            run.finish({"a": {"b": [math.nan]}})
        run.finish({"accuracy": 0.75, "sets": ("a", "b")})
        with pytest.raises(RuntimeError, match="finished"):
            run.log(1, {"a": 1.0})
    with RunDir.open(tmp_path, Settings(), resume=True) as run:
        assert run.finished
        assert run.result() == {"accuracy": 0.75, "sets": ["a", "b"]}
        with pytest.raises(InputError, match="finished run"):
            run.restore()
    with pytest.raises(RuntimeError, match="closed"):
        run.save(1, {}, {})


def test_newest_checkpoints_are_kept_and_restored(tmp_path: Path) -> None:
    with RunDir.open(tmp_path, Settings(), resume=False) as run:
        for step in range(1, 6):
            run.save(step, {"x": torch.tensor(step)}, {"epoch": step})
        with pytest.raises(InputError, match="step 4 must not lie before the newest checkpoint, step 5"):
            run.save(4, {}, {})
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000004", "step-00000005"]
    with RunDir.open(tmp_path, Settings(), resume=True) as run:
        restored = run.restore()
        assert restored is not None
        assert (restored[0], restored[1]["x"].item(), restored[2]) == (5, 5, {"epoch": 5})


def test_logs_are_cut_to_the_checkpoint_and_half_lines_vanish(tmp_path: Path) -> None:
    with RunDir.open(tmp_path, Settings(), resume=False) as run:
        run.log(1, {"a": 1.0})
        run.save(1, {}, {})
        run.log(2, {"a": 2.0})
        run.sample(2, {"prompt": "p"})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "a"')
    with RunDir.open(tmp_path, Settings(), resume=True) as run:
        with pytest.raises(RuntimeError, match=r"call restore\(\) first"):
            run.log(2, {"a": 2.0})
        run.restore()
        run.log(2, {"a": 2.5})
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "a": 1.0}, {"step": 2, "a": 2.5}]
    assert (tmp_path / "samples.jsonl").read_bytes() == b""
    (tmp_path / "metrics.jsonl").write_bytes(b"")
    with (
        RunDir.open(tmp_path, Settings(), resume=True) as run,
        pytest.raises(InputError, match=r"metrics\.jsonl must hold at least the 22 bytes"),
    ):
        run.restore()


def test_damaged_checkpoints_are_skipped_aloud_and_kept_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoints"
    with RunDir.open(tmp_path, Settings(), resume=False) as run:
        for step in (1, 2):
            run.log(step, {"a": step})
            run.save(step, {"x": torch.tensor(step)}, {})
    (folder / "step-00000002/state.json").write_text("{}")
    (folder / "step-00000003.partial").mkdir()
    with RunDir.open(tmp_path, Settings(), resume=True) as run:
        restored = run.restore()
        assert restored is not None
        assert restored[0] == 1
        warning = capsys.readouterr().err
        assert warning.count("\n") == 1
        assert "step-00000002/state.json is damaged" in warning
        assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "a": 1.0}]
        run.save(2, {}, {})
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["step-00000001", "step-00000002", "step-00000002.damaged"]
    for name in names[:2]:
        (folder / name / "manifest.json").unlink()
    with RunDir.open(tmp_path, Settings(), resume=True) as run:
        assert run.restore() is None
    assert capsys.readouterr().err.count("warning") == 2
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_atomic_writers(tmp_path: Path) -> None:
    write_text_atomic(tmp_path / "new" / "a.txt", "ü")
    write_json_atomic(tmp_path / "new" / "b.json", {"z": 1, "a": (1, 2)})
    assert (tmp_path / "new/a.txt").read_bytes() == "ü".encode()
    assert json.loads((tmp_path / "new/b.json").read_text()) == {"z": 1, "a": [1, 2]}
    with pytest.raises(InputError, match=r"b\.json: a must be a plain JSON value, got set"):
        write_json_atomic(tmp_path / "new" / "b.json", {"a": {1}})
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["a.txt", "b.json"]


def loop(path: Path, steps: int, every: int) -> None:
    """A small training loop: all that it does follows from its restored state."""
    with RunDir.open(path, Settings(), resume=True) as run:
        if run.finished:
            return
        generator = torch.Generator().manual_seed(0)
        x, begin = torch.zeros(3), 0
        if restored := run.restore():
            begin, tensors, _ = restored
            x = tensors["x"]
            checkpoint.unpack_generator(generator, tensors["generator"])
        for step in range(begin + 1, steps + 1):
            x = 0.9 * x + torch.randn(3, generator=generator)
            run.log(step, {"x": x.sum().item()})
            run.sample(step, {"x": x.tolist()})
            if step % every == 0:
                run.save(step, {"x": x, "generator": checkpoint.pack_generator(generator)}, {})
        run.finish({"x": x.tolist()})


def outcome(path: Path) -> dict[str, bytes]:
    return {name: (path / name).read_bytes() for name in ("metrics.jsonl", "samples.jsonl", "result.json")}


class Crash(BaseException):
    pass


def test_a_crash_at_any_call_to_the_system_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Whether bytes have reached the disk cannot be seen from here; the calls still count as places to crash.
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    loop(tmp_path / "reference", 4, 1)
    calls = left = 0

    def crashing(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls, left
            calls, left = calls + 1, left - 1
            if left == 0:
                raise Crash
            return function(*args, **kwargs)

        return call

    for module, name in [(os, "rename"), (os, "replace"), (os, "fsync"), (os, "mkdir"), (os, "unlink"), (os, "rmdir")]:
        monkeypatch.setattr(module, name, crashing(getattr(module, name)))
    loop(tmp_path / "count", 4, 1)
    total = calls
    assert total > 60
    for point in range(1, total + 1):
        path = tmp_path / "run"
        # Two crashes: at this point, and again soon after the restart.
        for left in (point, 1 + point % 5):  # noqa: B007
            with contextlib.suppress(Crash):
                loop(path, 4, 1)
        left = 0
        loop(path, 4, 1)
        assert outcome(path) == outcome(tmp_path / "reference"), f"call {point}"
        assert sorted(each.name for each in (path / "checkpoints").iterdir()) == ["step-00000003", "step-00000004"]
        shutil.rmtree(path)


KILLS = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from test_run_dir import Settings, loop, outcome
from steelyard.run_dir import RunDir

os.fsync = lambda handle: None  # a killed process loses nothing that the system has; only a power cut does
root, seed, steps = Path(sys.argv[2]), 7, 160
loop(root / "reference", steps, 2)
reference = (root / "reference/metrics.jsonl").read_bytes().splitlines(keepends=True)
random.seed(seed)
kills = tries = 0
reached = set()
while not (root / "run/result.json").exists() and tries < 200:
    tries += 1
    if (child := os.fork()) == 0:
        loop(root / "run", steps, 2)
        os._exit(0)
    time.sleep(random.uniform(0.0, 0.04 + 0.002 * tries))  # longer and longer, so that a slow machine gets on too
    os.kill(child, signal.SIGKILL)
    kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    with RunDir.open(root / "run", Settings(), resume=True) as run:
        if not run.finished and (restored := run.restore()):
            reached.add(restored[0])
            written = (root / "run/metrics.jsonl").read_bytes()
            assert written == b"".join(reference[: restored[0]]), restored[0]
assert outcome(root / "run") == outcome(root / "reference")
print(kills, len(reached))
"""


def test_kill_minus_nine_at_random_moments_then_the_same_bytes(tmp_path: Path) -> None:
    script = [sys.executable, "-c", KILLS, str(Path(__file__).parent), str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(script, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    kills, reached = done.stdout.split()
    assert int(kills) >= 5
    assert int(reached) >= 3


def test_importing_the_module_does_not_import_torch() -> None:
    script = textwrap.dedent("""
        import sys
        import steelyard.run_dir, steelyard.parallel, steelyard.progress
        assert "torch" not in sys.modules
    """)
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
