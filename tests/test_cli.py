"""Every verb through `steelyard.cli.main`, from strength to report, and what it says of bad input."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import tiny
from conftest import Folders
from steelyard.cli import MODULES, VERBS, main, overview
from steelyard.errors import InputError

HELP = {
    "demo": ["--out", "--resume", "--set"],
    "audit": ["--data", "--model", "--truth-column", "--scoring", "--folds", "--member.optim.lr", "--rule.flip-above"],
    "simulate": ["--out", "--preferences", "--noise.uniform", "--data", "--scorer", " --uniform", "--on-invalid"],
    "train sft": ["--data", "--tokenizer", "--scratch.width", "--optim.lr", "--save-every"],
    "train reward": ["--data", "--model", "--validation", "--optim.warmup", "--margin-in-flip", "--resume"],
    "train dpo": ["--data", "--model", "--beta", "--reference", "--use-margin", "--optim.lr", "--answers", "--resume"],
    "train metarm": ["--data", "--model", "--meta", "--eta", "--direction", "--optim.lr", "--resume"],
    "train ppo": [
        "--policy",
        "--reward-model",
        "--baselines",
        "--actor.lr",
        "--critic.decay",
        "--sampling.temperature",
    ],
    "iterate": ["SETTINGS.yaml", "--set", "--out", "--resume", "meta_prompts", "patience", "keep_by"],
    "strength": ["--backend", "--members", "--temperature", "--member.epochs", "--out"],
    "repair": ["--recipe", "--q", "--alpha", "--margin-cap", "--data", "--out"],
    "sample": ["--policy", "--prompts", "--k", "--reward-model", "--sampling.max-new-tokens"],
    "evaluate reward": ["--model", "--data", "--max-length", "--out"],
    "evaluate policy": ["--sft", "--policies", "--gold", "--tie", "--strata"],
    "evaluate judge": ["--answers", "--run", "--url", "--model", "--key-variable", "--max-requests", "--reward-models"],
    "evaluate features": ["--models", "--data", "--drawn", "--perplexity", "--folds", "--out"],
    "study contrastive": ["STUDY.yaml", "--set", "--out", "--resume", "seeds", "features_set"],
    "study metarm": ["STUDY.yaml", "--set", "--out", "--resume", "seeds", "control_etas"],
    "study data": ["STUDY.yaml", "--out", "--resume", "--set", "scorers", "growing training sets: fractions"],
    "study policy": ["STUDY.yaml", "--set", "--out", "--resume", "cells", "arms", "repairs", "at_kl", "recommended"],
    "study rounds": ["STUDY.yaml", "--set", "--out", "--resume", "seeds", "arms"],
    "study strength": ["STUDY.yaml", "--set", "--out", "--resume", "backends", "sizes", "reference"],
    "report": ["--out"],
    "run": ["RECIPE.yaml", "--out", "--resume", "--set", "repair_from", "files: preferences, validation", "limit_eval"],
}


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def do(command: str, *more: str) -> int:
    return main([*command.split(), *more])


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Any:
    """fails(command, *parts): exit status 2, every part in what is said, and no innards of any library."""

    def check(command: str, *parts: str) -> None:
        capsys.readouterr()
        assert do(command) == 2
        captured = capsys.readouterr()
        said = " ".join((captured.err + captured.out).split())
        for part in parts:
            assert part in said
        for innards in ("Traceback", "pydantic", "Input should be", "\x00", "settings."):
            assert innards not in captured.err

    return check


@pytest.fixture(scope="module")
def shop(
    tmp_path_factory: pytest.TempPathFactory, language_model: Folders, reward_model: Folders, one_thread: None
) -> Path:
    """A folder of small inputs, good and bad: lm, rm, prefs.jsonl, prompts.jsonl, ..."""
    folder = tmp_path_factory.mktemp("shop")
    (folder / "lm").symlink_to(language_model("llama"))
    (folder / "rm").symlink_to(reward_model("llama"))
    rows, wrong = tiny.planted_pairs(40, flips=0.2, seed=4)
    for i, row in enumerate(rows):
        row |= {"truth": -1 if wrong[i] else 1, "note": f"n{i}"}
    rows[5]["chosen"] = rows[5]["rejected"]
    rows[11] |= {"chosen": "w1 " * 90, "rejected": "w2"}
    tiny.write_jsonl(folder / "prefs.jsonl", rows)
    tiny.write_jsonl(folder / "held.jsonl", tiny.planted_pairs(12, seed=5)[0])
    tiny.write_jsonl(folder / "prompts.jsonl", [{"prompt": f"w{i} w2 w3"} for i in range(8)])
    tiny.write_jsonl(folder / "long.jsonl", [{"prompt": "w1 " * 90}])
    tiny.write_jsonl(folder / "demos.jsonl", [{"prompt": r["prompt"], "response": r["chosen"]} for r in rows[:8]])
    (folder / "empty.jsonl").write_text("")
    (folder / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9", "chosen": "a", "rejected": "b"}\n')
    (folder / "wrong.csv").write_text("question,a,b\n1,2,3\n")
    (folder / "bare").mkdir()
    (folder / "run").mkdir()
    (folder / "run" / "config.json").write_text('{"data": "prefs.jsonl"}')
    (folder / "run" / "model").symlink_to(language_model("llama"))
    for name, file, text in (("torn", "model.safetensors", "x"), ("bent", "config.json", "{")):
        (folder / name).mkdir()
        for source in Path(language_model("llama")).iterdir():
            (folder / name / source.name).write_bytes(source.read_bytes())
        (folder / name / file).write_text(text)
    (folder / "bad.yaml").write_text("data: [1, 2\nmodel: x\n")
    (folder / "study.yaml").write_text("seeds: [0]\nworld: {}\ncells: []\nlooks: 3\n")
    (folder / "recipe.yaml").write_text("world: {}\nscorings: [in-sample]\npolicy: {}\n")
    (folder / "whole.yaml").write_text("data: prefs.jsonl\nmodel: lm\nstrength: {members: 3}\npolicy: {ppo: {}}\n")
    (folder / "unknown.yaml").write_text("data: prefs.jsonl\nmodel: lm\noptim: {lrr: 3}\n")
    (folder / "type.yaml").write_text("data: prefs.jsonl\nmodel: lm\nepochs: many\n")
    return folder


@pytest.fixture
def here(shop: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(shop)
    return shop


# ---- help ----------------------------------------------------------------------------------------------------------


def test_help_and_mistyped_verbs_answer_without_torch() -> None:
    code = (
        "import sys\nfrom steelyard.cli import main\n"
        "codes = [main(a) for a in ([], ['--help'], ['--version'], ['trein', 'sft'], ['train'], ['bogus'])]\n"
        "assert codes == [0, 0, 0, 2, 2, 2], codes\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pyarrow'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for verb, what in VERBS.items():
        assert verb in done.stdout
        assert what in done.stdout
    assert "unknown verb 'trein'. Did you mean `train`?" in done.stderr
    assert "say which: train sft or train reward or train ppo" in done.stderr
    assert "unknown verb 'bogus'. `steelyard --help`" in done.stderr


def test_a_group_of_verbs_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    told = capsys.readouterr().out
    for verb in VERBS:
        assert (f"  {verb} " in told) == verb.startswith("train "), verb
    assert main(["study", "-h"]) == 0
    assert "study policy" in capsys.readouterr().out


def test_the_overview_names_every_verb_that_has_a_command() -> None:
    commands = {module: list(importlib.import_module(f"steelyard.commands.{module}").COMMANDS) for module in MODULES}
    assert sorted(verb for verbs in commands.values() for verb in verbs) == sorted(VERBS) == sorted(HELP)
    for module, verbs in commands.items():
        assert {verb.split()[0] for verb in verbs} == set(MODULES[module])
    assert all(verb in overview() for verb in VERBS)


def test_the_package_runs_without_its_script() -> None:
    done = subprocess.run([sys.executable, "-m", "steelyard", "trein"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Did you mean `train`?" in done.stderr


def test_the_report_names_a_command_that_a_shell_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    from steelyard.settings import command_line

    monkeypatch.setattr(sys, "argv", ["/somewhere/steelyard/__main__.py", "demo", "--set", "name=my run"])
    assert command_line() == "steelyard demo --set 'name=my run'"


@pytest.mark.parametrize("verb", ["simulate", "repair", "report"])
def test_what_needs_no_model_does_not_wait_for_torch(verb: str) -> None:
    code = f"import sys; from steelyard.cli import main; main(['{verb}', '--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize("verb", list(HELP))
def test_each_verb_explains_its_options(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*verb.split(), "--help"]) == 0
    text = capsys.readouterr().out
    for option in HELP[verb]:
        assert option in text
    assert "default:" in text


def test_the_help_of_a_file_says_what_its_fields_may_hold(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["iterate", "--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    for said in (
        "- sft: the SFT model's folder: round 1 starts from it, and it is the reference of the KL (required)",
        "(one of metarm, plain, fixed; default: metarm)",
        "- rounds: rounds at most (default: 4)",
        "(one of gold, judge, nothing) - keep:",
    ):
        assert said in told
    assert main(["study", "data", "--help"]) == 0
    assert "- policy:" not in capsys.readouterr().out, "a recipe's, refused here"


def test_one_change_fits_every_file(fails: Any, tmp_path: Path) -> None:
    """`device` is the example that the help of --set gives."""
    (tmp_path / "empty.yaml").write_text("")
    for verb in [v for v in VERBS if v.startswith("study")] + ["run", "iterate"]:
        fails(f"{verb} {tmp_path}/empty.yaml --out {tmp_path}/out --set device=abacus", "device: must be cpu, cuda")


# ---- the road, verb by verb ----------------------------------------------------------------------------------------


def test_audit_gives_every_row_back_with_what_it_found(
    here: Path, capsys: pytest.CaptureFixture[str], fails: Any
) -> None:
    options = ["--model", "lm", "--members", "4", "--max-length", "64", "--truth-column", "truth"]
    assert main(["audit", "prefs.jsonl", "--out", "audit", *options]) == 0
    said = capsys.readouterr().out
    assert "identical: 1" in said
    assert "38 pairs weighed by 4 reward models" in said
    given, found = rows_of(here / "prefs.jsonl"), rows_of(here / "audit/annotated.jsonl")
    assert [{k: row[k] for k in given[0]} for row in found] == given
    assert [i for i, row in enumerate(found) if row["strength_mean"] is None] == [5, 11]
    assert "identical" in found[5]["reason"]
    assert found[11]["reason"] == "longer than max_length"
    assert {row["voters"] for row in found if row["voters"]} == {2}, "4 members in 2 folds: two did not see a pair"
    table = json.loads((here / "audit/summary.json").read_text())["tables"][0]
    assert table["title"] == "Finding wrong labels, out-of-fold"
    assert (here / "audit/report.html").exists()

    # The same again: refused, and with --resume the same annotation.
    before = (here / "audit/annotated.jsonl").read_bytes()
    assert main(["audit", "prefs.jsonl", "--out", "audit", *options]) == 2
    assert main(["audit", "prefs.jsonl", "--out", "audit", *options, "--resume"]) == 0
    assert (here / "audit/annotated.jsonl").read_bytes() == before

    (here / "mine").mkdir()
    (here / "mine/report.html").write_text("my own")
    fails(f"audit prefs.jsonl --out mine {' '.join(options)}", "mine/report.html: exists already")
    assert not (here / "mine/strength").exists()

    # Measured the other way, or from other rows, the files would contradict each other.
    again = f"audit prefs.jsonl --out audit {' '.join(options)}"
    fails(f"{again} --scoring in-sample", "audit: holds a measurement out-of-fold, whose annotated.jsonl would be")
    rows = (here / "prefs.jsonl").read_text().splitlines(keepends=True)
    (here / "prefs.jsonl").write_text("".join(rows[1:]))
    fails(f"{again} --resume", "prefs.jsonl: changed since the run in")
    own = "audit/published_format.jsonl"
    fails(f"audit {own} --out audit {' '.join(options[:-2])} --resume", f"{own}: is the input")
    assert (here / "audit/annotated.jsonl").read_bytes() == before


def test_rows_that_json_cannot_hold_come_back_as_parquet(here: Path) -> None:
    """Images for example: the run must not end in an error after all its work."""
    rows = rows_of(here / "prefs.jsonl")
    table = {name: [row[name] for row in rows] for name in ("prompt", "chosen", "rejected")}
    pq.write_table(pa.table(table | {"image": [b"\x00\xff"] * len(rows)}), here / "prefs.parquet")
    assert main(["strength", "--data", "prefs.parquet", "--model", "lm", "--out", "s", "--members", "2"]) == 0
    back = pq.read_table(here / "s/annotated.parquet").to_pylist()
    assert {row["image"] for row in back} == {b"\x00\xff"}
    assert sum(row["strength_mean"] is not None for row in back) > 30


def test_evidence_is_not_written_over(here: Path, fails: Any) -> None:
    assert do("repair --recipe keep --data prefs.jsonl --out kept.csv") == 0
    fails("repair --recipe keep --data prefs.jsonl --out kept.jsonl", "kept.changes.jsonl: exists already")
    assert not (here / "kept.jsonl").exists()


def test_from_strength_to_report_by_single_commands(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sampling = ["--max-length", "64", "--sampling.max-new-tokens", "6"]
    short = ["--batch-size", "8", "--max-length", "64", "--optim.lr", "3e-3"]
    assert do("train sft --data demos.jsonl --model lm --out road/sft --epochs 2", *short) == 0
    model = "road/sft/model"
    weigh = ["--data", "prefs.jsonl", "--model", model, "--members", "2", "--max-length", "64"]
    assert main(["strength", *weigh, "--out", "road/weighed"]) == 0
    assert not (here / "road/weighed/report.html").exists()
    repair = ["--data", "road/weighed/annotated.jsonl", "--recipe", "flip+margin", "--q", "0.2"]
    assert main(["repair", *repair, "--out", "road/repaired.jsonl"]) == 0
    assert "flip 7, margin" in capsys.readouterr().out, "a fifth of the 38 measured pairs"
    changes = rows_of(here / "road/repaired.changes.jsonl")
    flipped = {c["id"] for c in changes if c["action"] == "flip"}
    given = {row["id"]: row for row in rows_of(here / "prefs.jsonl")}
    for row in rows_of(here / "road/repaired.jsonl"):
        turned = row["chosen"] == given[row["id"]]["rejected"]
        assert turned == (row["id"] in flipped)
        assert row["note"] == given[row["id"]]["note"]

    reward = ["--data", "road/repaired.jsonl", "--model", model, "--validation", "held", "held.jsonl"]
    assert main(["train", "reward", *reward, "--out", "road/rm", *short]) == 0
    assert do("evaluate reward --model road/rm/model --data held.jsonl --out road") == 0
    assert [r["set"] for r in json.loads((here / "road/examine/reward.json").read_text())["rows"]] == ["held.jsonl"]

    sample = ["--policy", model, "--reward-model", "road/rm/model", "--prompts", "prompts.jsonl"]
    capsys.readouterr()
    assert main(["sample", *sample, "--k", "2", "--out", "road/baselines", *sampling]) == 0
    baselines = capsys.readouterr().out.split("baselines: ")[1].strip()
    steps = ["--steps", "2", "--prompts-per-step", "4", "--samples-per-prompt", "2"]
    assert main(["train", "ppo", *sample, "--baselines", baselines, "--out", "road/ppo/mine", *steps, *sampling]) == 0
    assert "8 of 8 prompts used\n" in capsys.readouterr().out
    answering = ["--prompts", "prompts.jsonl", "--answers", "2", "--reward-model", "road/rm/model", *sampling]
    assert main(["train", "dpo", "--data", "held.jsonl", "--model", model, "--out", "road/dpo/his", *answering]) == 0
    arms = ["mine", "road/ppo/mine/model", "his", "road/dpo/his/model"]
    policies = ["--sft", model, "--policies", *arms, "--reward-model", "road/rm/model"]
    gold = ["--prompts", "prompts.jsonl", "--gold", "tiny:count_good"]
    assert main(["evaluate", "policy", *policies, *gold, "--out", "road", *sampling]) == 0
    found = json.loads((here / "road/evaluate/policy.json").read_text())
    assert [a["arm"] for a in found["arms"]] == ["SFT", "mine", "his"]
    assert all(a["gold"] is not None for a in found["arms"])
    stand_in = ["--run", "road", "--against", "SFT", "--reward-models", "road/rm/model"]
    assert main(["evaluate", "judge", *stand_in, "--out", "road"]) == 0
    judged = json.loads((here / "road/evaluate/judge.json").read_text())["wins"]
    assert [(w["a"], w["b"], w["judge"]) for w in judged] == [
        (name, "SFT", "reward model road/rm/model") for name in ("mine", "his")
    ]
    assert main(["report", "road", "--out", "road/page.html"]) == 0
    page = (here / "road/page.html").read_text()
    assert "mine" in page
    assert main(["report", "road/ppo/mine"]) == 0
    assert main(["report", "road/dpo/his"]) == 0
    assert "DPO, step by step" in (here / "road/dpo/his/report.html").read_text()


def test_simulate_writes_a_world_and_relabels_pairs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--sft", "4", "--preferences", "6", "--validation", "3", "--rl-prompts", "2", "--eval-prompts", "2"]
    assert main(["simulate", "--out", "world", *sizes]) == 0
    assert len(rows_of(here / "world/preferences.jsonl")) == 6
    relabel = ["--scorer", "tiny:count_good", "--uniform", "0.3", "--bradley-terry", "0", "--systematic", "0"]
    assert main(["simulate", "--data=held.jsonl", "--out", "relabelled.jsonl", *relabel]) == 0
    truth, labels = rows_of(here / "relabelled.truth.jsonl"), rows_of(here / "relabelled.jsonl")
    assert [t["id"] for t in truth] == [r["id"] for r in labels]
    for t, row in zip(truth, labels, strict=True):
        assert t["wrong"] == (tiny.count_good("", row["chosen"]) < tiny.count_good("", row["rejected"]))
    assert f"{sum(t['wrong'] for t in truth)} of 12 labels are wrong" in capsys.readouterr().out


def test_a_scorer_may_lie_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from steelyard.scorer import load_scorer

    (tmp_path / "my_scorer.py").write_text("def length(prompt, response):\n    return float(len(response))\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])  # as the console script has it
    assert load_scorer("my_scorer:length")("?", "abc") == 3.0


@pytest.mark.parametrize("made", ["'good'", "None", "float('inf')", "[1.0, 2.0]"])
def test_a_scorer_returns_a_finite_number(made: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from steelyard.scorer import load_scorer

    monkeypatch.syspath_prepend(tmp_path)
    module = f"scorer_{abs(hash(made))}"
    (tmp_path / f"{module}.py").write_text(f"def made(prompt, response):\n    return {made}\n")
    with pytest.raises(InputError, match=rf"{module}:made: must return a finite number, got .* response 'abc'"):
        load_scorer(f"{module}:made")("?", "abc")


# ---- bad input -----------------------------------------------------------------------------------------------------

REWARD = "train reward --model lm --out new --data prefs.jsonl --max-length 64"
PPO = "train ppo --policy lm --reward-model rm --prompts prompts.jsonl --out new --max-length 64 --reward plain"
AUDIT = "audit prefs.jsonl --model lm --out new --max-length 64"


@pytest.mark.parametrize(
    ("command", "parts"),
    [
        (f"{REWARD} --lr 7", ["--lr"]),
        (f"{REWARD} --optim.lr 7", ["--optim.lr: must be at most 1, got 7.0"]),
        (f"{REWARD} --optim.lr fast", ["--optim.lr", "'fast'"]),
        (f"{REWARD} --epochs 0 --batch-size 0", ["--epochs: must be above 0", "--batch-size: must be at least 1"]),
        (f"{REWARD} --validation held", ["--validation", "key-value"]),
        (f"{REWARD} --validation held none.jsonl", ["none.jsonl: no such file"]),
        ("train reward --data prefs.jsonl", ["--model", "--out"]),
        ("train reward bad.yaml --out new", ["bad.yaml", "line 2"]),
        ("train reward unknown.yaml --out new", ["unknown.yaml: optim.lrr: no such setting"]),
        (
            "train reward whole.yaml --out new",
            ["whole.yaml: policy: no such setting", "whole.yaml looks like a recipe or a study; `steelyard run`"],
        ),
        ("train reward type.yaml --out new", ["type.yaml: epochs: must be a number, got 'many'"]),
        ("train reward none.yaml --out new", ["none.yaml: no such settings file"]),
        ("train reward --model lm --out new --data none.jsonl", ["none.jsonl: no such file"]),
        ("train reward --model lm --out new --data empty.jsonl", ["empty.jsonl: holds no rows"]),
        ("train reward --model lm --out new --data bare", ["bare: a folder must be"]),
        ("train reward --model lm --out new --data latin.jsonl", ["latin.jsonl:1: not UTF-8", "convert"]),
        ("train reward --model lm --out new --data wrong.csv", ["wrong.csv:2", "question, a, b", "chosen"]),
        ("train reward --model none --out new --data prefs.jsonl", ["none: no such model folder"]),
        ("train reward --model bare --out new --data prefs.jsonl", ["bare: a model folder must hold its tokenizer"]),
        ("train reward --model run --out new --data prefs.jsonl", ["run: holds a run, not a model", "run/model"]),
        (f"{PPO.replace('--reward-model rm', '--reward-model run')}", ["run: holds a run, not a model", "run/model"]),
        ("train reward --model torn --out new --data prefs.jsonl", ["torn: its weights are missing or damaged"]),
        ("train reward --model bent --out new --data prefs.jsonl", ["bent: its tokenizer or config.json cannot"]),
        ("train reward --model lm --out prompts.jsonl --data prefs.jsonl", ["prompts.jsonl must be a folder"]),
        ("train sft --data demos.jsonl --out new", ["`tokenizer` is needed"]),
        ("train sft --data demos.jsonl --model rm --out new", ["rm: holds", "must be a language model"]),
        (f"{PPO} --k 3", ["k: no effect with reward = plain"]),
        (f"{PPO} --scaling abs", ["scaling: no effect with reward = plain"]),
        (f"{PPO} --prompts-per-step 9 --sampling.max-new-tokens 6", ["8 of 8 prompts", "prompts_per_step = 9"]),
        (f"{PPO.replace(' plain', ' contrastive')}", ["baselines: contrastive rewards need", "steelyard sample"]),
        (f"{PPO} --gold tiny:none --prompts-per-step 1", ["`module:function`, got 'tiny:none'"]),
        (f"{PPO.replace('--policy lm', '--policy rm')}", ["rm: holds", "must be a language model"]),
        (f"{PPO.replace('--reward-model rm', '--reward-model lm')}", ["lm: holds", "steelyard train reward"]),
        (
            "sample --policy lm --prompts long.jsonl --out new --max-length 64",
            ["long.jsonl: 0 of 1 different prompts leave room", "lower sampling.max_new_tokens"],
        ),
        ("sample --policy none --prompts prompts.jsonl --out new", ["none: no such model folder"]),
        ("sample --policy lm --reward-model run --prompts prompts.jsonl --out new", ["run: holds a run", "run/model"]),
        ("sample --policy lm --reward-model lm --prompts prompts.jsonl --out new", ["lm: holds", "train reward"]),
        ("sample --policy lm --prompts prompts.jsonl --out demos.jsonl", ["demos.jsonl: File exists"]),
        (f"{AUDIT} --scoring in-sample --folds 2", ["folds: no effect", "in-sample"]),
        (f"{AUDIT} --members 3", ["members must be a multiple of folds"]),
        (f"{AUDIT} --truth-column trooth", ["prefs.jsonl: no column 'trooth'", "chosen", "truth, note"]),
        (f"{AUDIT} --backend fool", ["--backend", "'fool'", "full"]),
        (f"{AUDIT} --backend full --penalty 1", ["penalty: no effect with backend = full"]),
        ("repair --data prefs.jsonl --recipe flip --out r.jsonl", ["prefs.jsonl: no strengths in it", "audit"]),
        ("repair --data prefs.jsonl --recipe margin --q 0.1 --out r.jsonl", ["'margin' does not read q"]),
        ("repair --data prefs.jsonl --recipe keep --out held.jsonl", ["held.jsonl: exists already"]),
        ("repair --data prefs.jsonl --recipe keep --out r.txt", ["r.txt: the name must end with .jsonl"]),
        ("evaluate reward --model lm --data held.jsonl --out new", ["lm: holds", "train reward"]),
        ("evaluate reward --model rm --data --out new", ["--data: must have at least 1"]),
        (
            "evaluate reward --model rm --rewardbench-prior shp x --out new",
            ["rewardbench_prior", "no effect without rewardbench"],
        ),
        ("evaluate reward --model rm --data held.jsonl --out demos.jsonl", ["demos.jsonl", "give another path"]),
        (
            "evaluate policy --sft lm --policies SFT lm --reward-model rm --prompts prompts.jsonl --out new",
            ["--policies: the name SFT"],
        ),
        (
            "evaluate policy --sft lm --policies a lm --reward-model rm --prompts long.jsonl --out new --max-length 64",
            ["long.jsonl: 0 of 1 different prompts", "raise max_length"],
        ),
        ("report", ["name the run folder"]),
        ("report none", ["none: a report needs the folder of a run"]),
        ("report bare", ["bare: holds nothing a report can show"]),
        ("run", ["name the recipe"]),
        ("run none.yaml --out new", ["none.yaml: no such settings file"]),
        ("run type.yaml --out new", ["type.yaml: epochs: no such setting", "data: must be a section"]),
        ("run study.yaml --out new", ["study.yaml: has the fields of a file for `steelyard study policy`"]),
        ("study rounds recipe.yaml --out new", ["recipe.yaml: has the fields of a file for `steelyard run`; use that"]),
        (
            "study policy study.yaml --workers 1 --out new",
            ["--workers: is a field of the file", "`--set workers=VALUE`"],
        ),
        (
            "run recipe.yaml --strength.members=3 --out new",
            ["--strength.members: is a field", "--set strength.members="],
        ),
        ("run recipe.yaml more.yaml --out new", ["Unrecognized options: more.yaml"]),
        ("demo --out new --set name", ["section.field=value, got 'name'"]),
        ("demo --out new --set strength.members=3", ["strength: members must be a multiple of folds"]),
        ("demo --out new --set policy.ppo.steps=many", ["policy.ppo.steps: must be a whole number, got 'many'"]),
        ("demo --out demos.jsonl", ["demos.jsonl must be a folder"]),
        ("simulate --out bare --sft 0", ["--sft: must be at least 1, got 0"]),
        ("simulate --data held.jsonl --out r.jsonl --scorer none:f", ["`module:function`, got 'none:f'"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_named_and_nothing_is_begun(command: str, parts: list[str], here: Path, fails: Any) -> None:
    fails(command, *parts)
    assert not any((here / "new" / name).exists() for name in ("config.json", "recipe.yaml", "examine", "evaluate"))


def test_what_is_there_is_never_overwritten(here: Path, fails: Any) -> None:
    assert do("evaluate reward --model rm --data held.jsonl --out kept") == 0
    fails("evaluate reward --model rm --data held.jsonl --out kept", "reward.json: exists already", "--out")
    rows = [row | {"strength_mean": 1.0} for row in rows_of(here / "held.jsonl")]
    tiny.write_jsonl(here / "weighed.jsonl", rows)
    fails("audit weighed.jsonl --model lm --out again", "already has the columns strength_mean", "rename")
    assert not (here / "again").exists(), "known before the hours of work, not after"


def test_two_files_of_one_name_are_two_sets(here: Path) -> None:
    (here / "other").mkdir()
    tiny.write_jsonl(here / "other" / "held.jsonl", tiny.planted_pairs(5, seed=9)[0])
    assert do("evaluate reward --model rm --data held.jsonl other/held.jsonl --out two") == 0
    rows = json.loads((here / "two/examine/reward.json").read_text())["rows"]
    assert {r["set"]: r["n"] for r in rows} == {"held.jsonl": 12, "other/held.jsonl": 5}


def test_truth_may_stand_in_a_csv(here: Path, fails: Any) -> None:
    rows = tiny.planted_pairs(12, flips=0.3, seed=6)[0]
    lines = [f"{r['prompt']},{r['chosen']},{r['rejected']},{1 - 2 * (i % 2)}" for i, r in enumerate(rows)]
    (here / "truth.csv").write_text("\n".join(["prompt,chosen,rejected,truth", *lines]))
    options = "--model lm --members 2 --max-length 64 --truth-column truth"
    assert do(f"audit truth.csv --out csv {options}") == 0
    tiny.write_jsonl(here / "booleans.jsonl", [row | {"truth": True} for row in rows])
    fails(f"audit booleans.jsonl --out booleans {options}", "must be 1, 0 or -1", "got True")


def test_a_table_that_goes_into_a_file_has_its_cells_whole(capsys: pytest.CaptureFixture[str]) -> None:
    from steelyard.commands.common import show

    cells = [f"{i}.123 [0.{i}01, 0.{i}99]" for i in range(12)]
    show(
        [{"title": "wide", "columns": [f"a long name {i}" for i in range(12)], "rows": [cells], "note": "a note " * 40}]
    )
    lines = capsys.readouterr().out.splitlines()
    assert any(all(cell in line for cell in cells) for line in lines)
    assert any(all(f"a long name {i}" in line for i in range(12)) for line in lines)
