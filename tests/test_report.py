"""The report page: what it shows, when it shows it, and that hostile input is harmless."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from steelyard.errors import InputError
from steelyard.report import build_report
from steelyard.report.blocks import arm_styles, duration, free_table, interval, percent
from steelyard.report.plots import Series, lines, thin

HOSTILE = "<script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)> \"'>&amp; {{ 7*7 }} \x00 \u202e 😀"
RM_ARMS = ("plain", "flip", "margin", "flip+margin", "soft+margin", "drop", "random flip", "oracle flip")
PPO_ARMS = ("plain", "contrastive", "flip+margin")
SETS = ("original", "relabelled", "agreement")
SECTIONS = ("summary", "strength", "pairs", "sft", "reward", "policy", "made")


# A run that could have been: the fixture. Sizes are small for tests; call it with larger ones to look at the page.


def write_run(run: Path, *, pairs: int = 240, steps: int = 12, text: str = "") -> Path:
    """A whole pipeline's folder with plausible figures. `text` is put into every free text."""
    rng = np.random.default_rng(7)
    _json(
        run / "run.json",
        {
            "name": "small-world" + text,
            "version": "0.1.0",
            "commit": "f48cdf9a0b1c2d3e4f5061728394a5b6c7d8e9f0",
            "versions": {"python": "3.11.9", "torch": "2.13.0", "transformers": "5.23.0", "platform": "Linux-x86_64"},
            "seed": 20240501,
            "started": "2026-02-11T09:14:22+00:00",
            "seconds": 4281.4,
            "command": "steelyard run recipes/small-world/recipe.yaml --seed 20240501",
        },
    )
    (run / "recipe.yaml").write_text(f"name: small-world  # {text}\nrepair:\n  oracle flip: {{recipe: oracle flip}}\n")
    _write_summary(run, text)
    _write_strength(run, rng, pairs, text)
    _write_stages(run, rng, steps, text)
    _write_examine(run, rng)
    _write_policy(run, rng, text)
    return run


def _json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def _lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _write_summary(run: Path, text: str) -> None:
    stages = [
        ("simulate the world", 41.2),
        ("sft", 312.0),
        ("strength, out-of-fold", 1893.5),
        ("rm", 840.1),
        ("ppo", 1194.6),
    ]
    table = {
        "title": "What repairing the labels brings" + text,
        "columns": ["arm", "accuracy (agreement)", "gold reward", "KL, nats", "n"],
        "rows": [
            ["plain", "0.742 [0.723, 0.761]", 1.8317, 14.25, 2000],
            ["flip+margin", "0.791 [0.773, 0.809]", 2.2054, 12.5, 2000],
            ["oracle flip" + text, "0.823 [0.806, 0.840]", None, -0.5, 12000],
        ],
        "note": "Intervals are 95 % bootstrap intervals by prompt." + text,
    }
    _json(
        run / "summary.json", {"tables": [table], "stages": [{"name": n, "seconds": s, "note": ""} for n, s in stages]}
    )


def _write_strength(run: Path, rng: Any, pairs: int, text: str) -> None:
    truth = np.where(rng.random(pairs) < 0.18, -1, 1)
    truth[rng.random(pairs) < 0.04] = 0
    kinds = np.array(["uniform", "bradley_terry", "systematic"])[rng.integers(0, 3, pairs)]
    gap = np.abs(rng.normal(2.2, 1.6, pairs))
    words = [
        "the",
        "answer",
        "should",
        "name",
        "the",
        "shop,",
        "its",
        "hours",
        "and",
        "the",
        "nearest",
        "stop;",
        "be",
        "brief",
        "and",
        "say",
        "what",
        "is",
        "not",
        "known.",
    ]
    said = [" ".join(rng.choice(words, int(rng.integers(8, 150)))).capitalize() for _ in range(2 * pairs)]
    for scoring, shift, spread in (("in-sample", 0.9, 0.7), ("out-of-fold", 0.0, 1.1)):
        seen = np.where(kinds == "systematic", 0.5, 1.0)
        mean = truth * gap * seen + shift * (rng.random(pairs) < 0.6) + rng.normal(0, spread, pairs)
        std = 0.35 + 0.09 * np.abs(mean) + rng.gamma(1.4, 0.22, pairs)
        p_flip = 1 / (1 + np.exp(mean))
        columns = {
            "id": [f"pair-{i:05d}" for i in range(pairs)],
            "prompt": [f"Question {i}: where can I mend a bicycle near the harbour?{text}" for i in range(pairs)],
            "chosen": [s + text for s in said[:pairs]],
            "rejected": [s + text for s in said[pairs:]],
            "strength_mean": mean,
            "strength_std": std,
            "votes": np.clip(np.round(5 + 2 * mean), 0, 10),
            "voters": np.full(pairs, 10),
            "p_flip": p_flip,
            "suggested_action": np.where(p_flip > 0.9, "flip", np.where(p_flip > 0.6, "review", "keep")),
            "reason": [f"{v:.1f} of reward against the label{text}" if v < 0 else "" for v in mean],
            "length_chosen": [len(s) for s in said[:pairs]],
            "length_rejected": [len(s) for s in said[pairs:]],
            "truth": truth,
            "noise": np.where(truth == -1, kinds, ""),
        }
        folder = run / "strength" / scoring
        folder.mkdir(parents=True)
        pq.write_table(pa.table(columns), folder / "strength.parquet")
        order = np.array_split(np.argsort(mean), 20)
        groups = [
            {
                "low": float(mean[g].min()),
                "high": float(mean[g].max()),
                "n": len(g),
                "mean": float(mean[g].mean()),
                "std": float(std[g].mean()),
                "agreement": float((truth[g] == 1).mean()),
            }
            for g in order
        ]
        base = 0.93 if scoring == "out-of-fold" else 0.861
        detection = [
            {
                "scorer": scorer,
                "noise": noise,
                "auroc": round(base - less - hard, 4),
                "average_precision": round(0.71 - less - hard, 4),
                "n": pairs,
                "positives": int((truth == -1).sum() if noise == "all" else ((truth == -1) & (kinds == noise)).sum()),
            }
            for scorer, less in (("strength", 0), ("single member", 0.06), ("longer text", 0.4))
            for noise, hard in (("all", 0.02), ("uniform", 0.0), ("bradley_terry", 0.03), ("systematic", 0.15))
        ]
        result = {
            "members": 10,
            "backend": "bank of heads",
            "scoring": scoring,
            "seconds": 1893.5,
            "tokens": 18_250_000,
        }
        result |= {"folds": 5 if scoring == "out-of-fold" else None, "share_negative": float((mean < 0).mean())}
        _json(folder / "result.json", result | {"groups": groups, "detection": detection})


def _write_stages(run: Path, rng: Any, steps: int, text: str) -> None:
    t = np.arange(1, steps + 1) / steps
    sft = [{"step": i + 1, "train/loss": 4 * np.exp(-3 * u) + 1.5 + rng.normal(0, 0.05)} for i, u in enumerate(t)]
    _stage(run / "sft", sft, {"lr": 2e-5})
    for j, arm in enumerate(RM_ARMS):
        rows = []
        for i, u in enumerate(t):
            row = {"step": 10 * (i + 1), "train/loss": 0.69 * np.exp(-1.2 * u) + rng.normal(0, 0.02) - 0.01 * j}
            row |= {"train/accuracy": 0.5 + 0.3 * u**0.4 + rng.normal(0, 0.02), "train/margin": 1.4 * u**0.5 + 0.05 * j}
            row |= {"train/reward_mean": 2.6 * u**2 + rng.normal(0, 0.08) + 0.2 * j, "train/reward_std": 1 + u}
            if i % 3 == 2:
                for k, name in enumerate(SETS):
                    level = 0.66 + 0.05 * k + 0.012 * j
                    row[f"validation/{name}/accuracy"] = level + 0.1 * (u - (0.5 if arm == "plain" else 0.2) * u * u)
                    row[f"validation/{name}/loss"] = 0.6 - 0.1 * u + 0.02 * k
            rows.append({k: float(v) if k != "step" else v for k, v in row.items()})
        _stage(run / "rm" / arm, rows, {"lr": 5e-6, "note": text})
    for j, arm in enumerate(PPO_ARMS):
        rows = []
        for i, u in enumerate(t):
            row = {"ppo/reward_raw": 3 * u + 0.4 * j * u, "ppo/reward_shaped": 2.4 * u, "ppo/kl": 14 * u**1.3 - j * u}
            row |= {"ppo/ppl_sft": 9 + u * (4 - j), "ppo/length": 42 + 30 * u / (1 + j), "ppo/entropy": 2.5 - 1.2 * u}
            row |= {
                "ppo/clip_fraction": 0.02 + 0.1 * u,
                "ppo/value_loss": 0.6 * np.exp(-2 * u),
                "ppo/gold": u * (2 + j - u),
            }
            row |= {"ppo/explained_variance": 1 - np.exp(-3 * u), "ppo/scale": 1 + 0.2 * u, "ppo/return": 2.2 * u}
            noise = {k: float(v + rng.normal(0, 0.03) * abs(v)) for k, v in row.items()}
            rows.append({"step": i + 1, **noise})
        samples = [{"step": 10, "prompt": "p" + text, "response": "r" + text, "reward": 1.25}]
        _stage(run / "ppo" / arm, rows, {"lr": 5e-7}, samples)


def _stage(folder: Path, rows: list[dict[str, Any]], config: Any, samples: list[dict[str, Any]] | None = None) -> None:
    _lines(folder / "metrics.jsonl", rows)
    _lines(folder / "timings.jsonl", [{"step": r["step"], "seconds": 0.5} for r in rows])
    _json(folder / "config.json", config)
    _json(folder / "result.json", {"steps": len(rows)})
    if samples:
        _lines(folder / "samples.jsonl", samples)


def _write_examine(run: Path, rng: Any) -> None:
    rows, reliability, by_strength = [], [], []
    for j, arm in enumerate(RM_ARMS):
        for k, name in enumerate(SETS):
            accuracy = round(0.7 + 0.04 * k + 0.011 * j, 4)
            row = {"arm": arm, "set": name, "n": 2000 - 300 * k, "accuracy": accuracy, "low": accuracy - 0.019}
            row |= {
                "high": accuracy + 0.019,
                "nll": 0.55 - 0.01 * j,
                "ece": 0.08 - 0.006 * j,
                "margin_mean": 1.1 + 0.1 * j,
            }
            rows.append(row | {"reward_mean": -0.4 + 0.2 * j, "reward_std": 1.31})
            x = np.linspace(0.53, 0.97, 8)
            bins = [
                {"confidence": float(c), "accuracy": float(c - 0.12 * (c - 0.5) + rng.normal(0, 0.01)), "n": 90}
                for c in x
            ]
            reliability.append({"arm": arm, "set": name, "bins": bins})
            m = np.linspace(-4, 7, 12)
            y = 1 / (1 + np.exp(-m * (0.9 - 0.08 * j)))
            groups = [{"mean": float(a), "accuracy": float(b), "n": 100} for a, b in zip(m, y, strict=True)]
            by_strength.append({"arm": arm, "set": name, "groups": groups})
    _json(run / "examine" / "reward.json", {"rows": rows, "reliability": reliability, "by_strength": by_strength})


def _write_policy(run: Path, rng: Any, text: str) -> None:
    arms, frontier, difficulty = [], [], []
    for j, arm in enumerate(("sft", *PPO_ARMS)):
        gold = 0.31 + 0.62 * j
        row = {
            "arm": arm,
            "gold": gold,
            "gold_low": gold - 0.12,
            "gold_high": gold + 0.12,
            "proxy": 2.4 * j,
            "proxy_low": None,
        }
        arms.append(row | {"proxy_high": None, "kl": 4.7 * j, "length": 41.5 + 8 * j, "ended": 0.97 - 0.02 * j})
        for i in range(9):
            kl = 0.3 * i * i * (1 if j else 0)
            reached = float(np.sqrt(kl) * (1 + 0.2 * j) - 0.11 * kl + 0.3)
            if j or i == 0:
                frontier.append(
                    {"arm": arm, "step": 10 * i, "kl": kl, "gold": reached, "proxy": float(np.sqrt(kl) * 1.4)}
                )
        for i, stratum in enumerate(("hard", "middle", "easy")):
            bounds = {"low": -3.0 + 2 * i, "high": -1.0 + 2 * i}
            value = {"gold": gold - 1 + 0.8 * i + (0.3 if arm == "contrastive" and i == 0 else 0), "proxy": 2.1 * j + i}
            ends = {
                f"{name}_{end}": x + 0.2 * way for name, x in value.items() for end, way in (("low", -1), ("high", 1))
            }
            difficulty.append({"arm": arm, "stratum": stratum, "n": 100} | bounds | value | ends)
    wins = [
        {"a": "contrastive", "b": "plain", "judge": "gold", "win": 0.47, "tie": 0.14, "lose": 0.39}
        | {"score": 0.54, "low": 0.493, "high": 0.587, "n": 400},
        {"a": "flip+margin", "b": "plain", "judge": "gold", "win": 0.535, "tie": 0.12, "lose": 0.345}
        | {"score": 0.595, "low": 0.549, "high": 0.641, "n": 400},
        {"a": "plain", "b": "sft", "judge": "gold", "win": 280, "tie": 40, "lose": 80}
        | {"score": 0.75, "low": 0.71, "high": 0.79, "n": 400},
    ]
    reply = "Ask at the green kiosk by the pier: open from nine to five, closed on Mondays. " * 3
    samples = [
        {
            "prompt": f"Sample {i}: where can I rent a boat?{text}",
            "responses": {
                arm: {"text": reply * (1 + j) + text, "gold": 0.4 + j, "proxy": 1.1 * j}
                for j, arm in enumerate(("sft", *PPO_ARMS))
            },
        }
        for i in range(4)
    ]
    parts = {"arms": arms, "wins": wins, "frontier": frontier, "difficulty": difficulty, "samples": samples}
    _json(run / "evaluate" / "policy.json", parts)


class Page(HTMLParser):
    """Every tag with its attributes, the ids, and the text outside of style."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self._style = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))
        self._style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._style = False

    def handle_data(self, data: str) -> None:
        if not self._style:
            self.text += data

    @property
    def sections(self) -> list[str]:
        return [attrs["id"] for tag, attrs in self.tags if tag == "section"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("report") / "small-world")


@pytest.fixture(scope="module")
def html(whole: Path) -> str:
    return build_report(whole).read_text(encoding="utf-8")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def _copy(whole: Path, run: Path, *names: str) -> None:
    for name in names:
        source, target = whole / name, run / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copy(source, target)


def _page(run: Path) -> Page:
    return Page(build_report(run).read_text(encoding="utf-8"))


def test_whole_run_shows_every_section_once_and_stays_small(whole: Path, html: str) -> None:
    page = Page(html)
    assert page.sections == list(SECTIONS)
    assert [a["href"] for t, a in page.tags if t == "a" and a["href"] != "#summary"] == [f"#{s}" for s in SECTIONS[1:]]
    assert "Notes" not in page.text
    assert (whole / "report.html").stat().st_size < 5_000_000
    assert sorted(p.name for p in whole.iterdir() if p.name.startswith(".")) == []


def test_page_is_self_contained_and_runs_no_code(html: str) -> None:
    for tag, attrs in Page(html).tags:
        assert tag not in ("script", "iframe", "object", "embed", "link", "base", "form")
        assert not any(name.startswith("on") for name in attrs)
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            value = attrs.get(name, "#")
            assert value.startswith(("#", "data:image/png;base64,")), (tag, name, value[:60])
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)
    policies = [a["content"] for t, a in Page(html).tags if t == "meta" and "http-equiv" in a]
    assert len(policies) == 1
    assert "default-src 'none'" in policies[0]
    assert "script-src" not in policies[0]


def test_ids_are_unique_and_every_reference_has_its_target(html: str) -> None:
    ids = re.findall(r'\sid="([^"]*)"', html)
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', html))
    assert used <= set(ids)


def test_hostile_text_is_shown_and_harmless(run: Path) -> None:
    write_run(run, pairs=60, steps=3, text=HOSTILE)
    arm = "$\\frac{<b>$ & {{ 7*7 }}"
    shutil.copytree(run / "rm" / "plain", run / "rm" / "<i>plain$x_$")
    _json(run / "examine" / "reward.json", {"rows": [{"arm": arm, "set": "<u>$^$", "n": 5, "accuracy": 0.8}]})
    page = _page(run)
    assert not {"script", "img", "u", "b>$"} & {t for t, _ in page.tags}
    assert all(a.get("class", "").startswith("box") for t, a in page.tags if t == "i")
    assert "alert" not in str([a for _, a in page.tags])
    assert "<script>alert(1)</script>" in page.text
    assert "{{ 7*7 }}" in page.text


def test_lone_surrogates_do_not_stop_the_page(run: Path) -> None:
    (run / "run.json").write_text('{"name": "odd \\ud800 name"}')
    assert "odd ? name" in _page(run).text


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["run.json"], ["summary", "made"]),
        (["summary.json"], ["summary", "made"]),
        (["strength"], ["summary", "strength", "pairs"]),
        (["strength/in-sample/strength.parquet"], ["summary", "strength", "pairs"]),
        (["strength/in-sample/result.json"], ["summary", "strength"]),
        (["sft"], ["summary", "sft", "made"]),
        (["rm/plain"], ["summary", "reward", "made"]),
        (["examine"], ["summary", "reward"]),
        (["ppo/plain"], ["summary", "policy", "made"]),
        (["evaluate"], ["summary", "policy"]),
    ],
)
def test_a_section_appears_exactly_when_its_file_does(
    whole: Path, run: Path, names: list[str], expected: list[str]
) -> None:
    _copy(whole, run, *names)
    assert _page(run).sections == expected


@pytest.mark.parametrize(("stage", "section"), [("rm/flip", "reward"), ("ppo/plain", "policy"), ("sft", "sft")])
def test_a_single_stage_folder_is_enough(whole: Path, tmp_path: Path, stage: str, section: str) -> None:
    folder = shutil.copytree(whole / stage, tmp_path / "stage")
    assert _page(folder).sections == ["summary", section, "made"]


def test_a_single_audit_folder_is_enough(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole / "strength" / "out-of-fold", tmp_path / "audit")
    page = _page(folder)
    assert page.sections == ["summary", "strength", "pairs"]
    assert "240 pairs were weighed with 10 reward models, out-of-fold" in page.text


@pytest.mark.parametrize("settings", ["repair_from: in-sample\n", "repair_from: [\n"])
@pytest.mark.usefixtures("no_figures")
def test_the_scoring_that_repaired_comes_first(whole: Path, tmp_path: Path, settings: str) -> None:
    """What the summary says of strength is what the repairs went by; settings that cannot be read say nothing."""
    folder = shutil.copytree(whole, tmp_path / "run")
    (folder / "recipe.yaml").write_text(settings)
    expected = "in-sample" if settings.endswith("sample\n") else "out-of-fold"
    assert f"240 pairs were weighed with 10 reward models, {expected}" in _page(folder).text


@pytest.mark.parametrize(
    ("settings", "best"),
    [
        ("repair: {oracle flip: {recipe: oracle flip}}", "random flip"),
        ("repair: {oracle flip: {recipe: flip}, random flip: {recipe: oracle flip}}", "oracle flip"),
        ("repair: [", "oracle flip"),
    ],
)
@pytest.mark.usefixtures("no_figures")
def test_the_best_arm_needs_no_truth_whatever_its_name(whole: Path, tmp_path: Path, settings: str, best: str) -> None:
    folder = shutil.copytree(whole, tmp_path / "run")
    (folder / "recipe.yaml").write_text(settings)
    assert f"the reward model “{best}” is most accurate" in _page(folder).text


def test_numbers_shown_are_those_of_the_files(whole: Path, html: str) -> None:
    text = Page(html).text
    for shown in ("1.832", "2.205", "12 000".replace(" ", "\u202f"), "−0.50", "14.25", "0.791 [0.773, 0.809]"):
        assert shown in text, shown
    result = json.loads((whole / "strength/out-of-fold/result.json").read_text())
    assert f"{100 * result['share_negative']:.1f}\u00a0% of them lie below zero" in text
    for d in result["detection"]:
        assert f"{d['auroc']:.3f}" in text
        assert f"{d['average_precision']:.3f}" in text
    for row in json.loads((whole / "examine/reward.json").read_text())["rows"]:
        assert f"{row['accuracy']:.3f} [{row['low']:.3f}, {row['high']:.3f}]" in text
    for arm in json.loads((whole / "evaluate/policy.json").read_text())["arms"]:
        assert f"{arm['gold']:.3f} [{arm['gold_low']:.3f}, {arm['gold_high']:.3f}]" in text


def test_ten_weakest_pairs_come_first_and_in_order(whole: Path, html: str) -> None:
    table = pq.read_table(whole / "strength/out-of-fold/strength.parquet").to_pandas()
    expected = table.sort_values("strength_mean")["id"].tolist()[:10]
    shown = re.findall(r'<span class="id">(pair-\d+)</span>', html)
    assert shown[:10] == expected
    assert len(shown) == len(set(shown)) == 16
    strongest = table.sort_values("strength_mean")["id"].tolist()[-3:]
    assert sorted(shown[13:]) == sorted(strongest)


def test_review_curve_counts_the_planted_labels(run: Path) -> None:
    """Ten pairs, the two weakest are the two wrong ones: the weakest 20 % hold all of them."""
    folder = run / "strength" / "in-sample"
    folder.mkdir(parents=True)
    n = 10
    columns: dict[str, Any] = {k: [f"{k}{i}" for i in range(n)] for k in ("id", "prompt", "chosen", "rejected")}
    columns |= {"strength_mean": np.arange(n) - 2.5, "strength_std": np.ones(n), "truth": [-1, -1] + [1] * 8}
    pq.write_table(pa.table(columns), folder / "strength.parquet")
    text = re.sub(r"\s+", " ", _page(run).text)
    assert "Reviewing the weakest 10 % of the pairs finds 50.0 % of the wrong labels" in text
    assert "30.0 % of the pairs lie below zero" in text
    assert "20 %22100.0 %100.0 %" in text


def test_win_counts_and_win_shares_give_the_same_bar(html: str) -> None:
    assert 'class="win" style="width: 70.00%" title="win 70.0 %">70<' in html
    assert 'class="win" style="width: 47.00%" title="win 47.0 %">47<' in html
    text = Page(html).text
    assert "no clear difference" in text
    assert "flip+margin better" in text


def test_the_same_files_give_the_same_page(whole: Path, html: str, tmp_path: Path) -> None:
    again = build_report(whole, tmp_path / "again.html")
    assert again == tmp_path / "again.html"
    assert again.read_text(encoding="utf-8") == html


def test_out_may_be_a_folder(whole: Path, run: Path, tmp_path: Path) -> None:
    _copy(whole, run, "run.json")
    assert build_report(run, tmp_path) == tmp_path / "report.html"
    with pytest.raises(InputError, match="cannot be written"):
        build_report(run, tmp_path / "no" / "such" / "page.html")


def test_nothing_to_show_is_said(run: Path) -> None:
    with pytest.raises(InputError, match="holds nothing a report can show"):
        build_report(run)
    with pytest.raises(InputError, match="needs the folder of a run"):
        build_report(run / "missing")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("summary.json", '{"tables": [', r"summary\.json:1: must be JSON"),
        ("summary.json", '{"tables": [{"columns": ["a", "b"], "rows": [[1]]}]}', "must have 2 cells, one has 1"),
        (
            "examine/reward.json",
            '{"rows": [{"arm": "a", "set": "s", "n": 3}]}',
            r"reward\.json: field rows\.0\.accuracy",
        ),
        ("evaluate/policy.json", "[]", r"policy\.json: field the whole file"),
        ("strength/in-sample/result.json", '{"groups": 3}', r"result\.json: field groups"),
        ("strength/in-sample/strength.parquet", "no parquet", r"strength\.parquet: must be a Parquet file"),
        ("rm/plain/metrics.jsonl", '{"step": 1}\nnot json\n{"step": 2}\n', r"metrics\.jsonl:2: each line"),
        ("rm/plain/metrics.jsonl", '{"train/loss": 1}\n', 'must have an integer "step"'),
        ("rm/plain/metrics.jsonl", '{"step": 1, "train/loss": "low"}\n', "step 1: train/loss must be a number"),
    ],
)
def test_damaged_results_are_refused_by_name(run: Path, name: str, content: str, message: str) -> None:
    path = run / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        build_report(run)


def test_missing_columns_are_named(run: Path) -> None:
    folder = run / "strength" / "in-sample"
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"id": ["a"], "prompt": ["b"]}), folder / "strength.parquet")
    with pytest.raises(InputError, match=r"must have the columns chosen, rejected, strength_mean, strength_std"):
        build_report(run)


def test_damage_that_costs_no_result_is_a_note(whole: Path, run: Path) -> None:
    _copy(whole, run, "rm/plain", "summary.json")
    (run / "run.json").write_text("{")
    (run / "rm/plain/result.json").unlink()
    (run / "rm/plain/config.json").write_text("oops")
    with (run / "rm/plain/metrics.jsonl").open("a") as file:
        file.write('{"step": 999, "train/lo')
    page = _page(run)
    for shown in ("run.json:1: must be JSON", "config.json:1", "rm/plain has no result.json", "the last line is cut"):
        assert shown in page.text
    assert page.sections == ["summary", "reward", "made"]


def test_no_truth_no_gold_leaves_those_parts_out(whole: Path, run: Path) -> None:
    folder = run / "strength" / "out-of-fold"
    folder.mkdir(parents=True)
    table = pq.read_table(whole / "strength/out-of-fold/strength.parquet").drop_columns(["truth", "noise", "votes"])
    pq.write_table(table, folder / "strength.parquet")
    _json(run / "evaluate" / "policy.json", {"frontier": [{"arm": "plain", "step": 1, "kl": 1.0, "proxy": 0.5}]})
    page = _page(run)
    assert "truth:" not in page.text
    assert "What a review would find" not in page.text
    assert "Gold reward" not in page.text
    assert "Proxy reward" in page.text
    assert "nan" not in page.text.lower().split()


def test_an_empty_data_set_and_unknown_values_do_not_break_the_page(run: Path) -> None:
    folder = run / "strength" / "in-sample"
    folder.mkdir(parents=True)
    text = {k: pa.array(["a", "b"], pa.string()) for k in ("id", "prompt", "chosen", "rejected")}
    numbers = {k: pa.array([None, float("nan")], pa.float64()) for k in ("strength_mean", "strength_std")}
    pq.write_table(pa.table(text | numbers), folder / "strength.parquet")
    assert _page(run).sections == ["summary", "strength", "pairs"]
    pq.write_table(pa.table(text | numbers).slice(0, 0), folder / "strength.parquet")
    assert _page(run).sections == ["summary", "strength"]


def test_the_last_line_of_a_repeated_step_wins(run: Path) -> None:
    rows = [{"step": 1, "train/margin": 1.0}, {"step": 2, "train/margin": 5.0}, {"step": 2, "train/margin": 2.0}]
    _stage(run, rows, {})
    from steelyard.report.read import read_run

    steps, values = read_run(run).rm["run"].metrics["train/margin"]
    assert steps.tolist() == [1.0, 2.0]
    assert values.tolist() == [1.0, 2.0]


def test_an_arm_keeps_its_style_and_styles_differ() -> None:
    styles = arm_styles(["zebra", "contrastive", "SFT", "plain"])
    assert list(styles) == ["SFT", "plain", "contrastive", "zebra"]
    many = arm_styles([f"arm {i:02d}" for i in range(24)])
    assert len({(s.colour, s.dash, s.marker) for s in many.values()}) == 24


def test_thin_averages_equal_runs_and_keeps_short_lines() -> None:
    x, y = thin([1, 2, 3, 4], [10, 20, 30, 50], limit=2)
    assert x.tolist() == [1.5, 3.5]
    assert y.tolist() == [15.0, 40.0]
    x, y = thin([1, 2, 3], [1, float("nan"), 3])
    assert x.tolist() == [1.0, 3.0]


def test_a_long_line_keeps_its_band() -> None:
    x, y, low = thin(range(4), [1, 2, 3, 5], [0, float("nan"), 2, 4], limit=3)
    assert (x.tolist(), y.tolist(), low.tolist()) == ([0, 2, 3], [1, 3, 5], [0, 2, 4])
    values = list(range(1000))
    svg = lines("x", [Series(values, values, arm_styles(["plain"])["plain"], values, values)], "step", "y")
    assert "var(--c0)" in svg


def test_plots_take_the_colours_of_the_page() -> None:
    svg = lines("x", [Series([1, 2], [3, 4], arm_styles(["plain"])["plain"])], "step", "a < b & $c$")
    assert "var(--c0)" in svg
    assert "#0000" not in svg
    assert "a &lt; b &amp; $c$" in svg


def test_numbers_are_written_plainly() -> None:
    assert interval(0.5, 0.25, 0.75) == "0.500 [0.250, 0.750]"
    assert interval(-0.0001, None, None) == "0.000"
    assert percent(0.2137) == "21.4\u00a0%"
    assert [duration(s) for s in (1.25, 59.7, 192, 7500, None)] == [
        "1.2\u00a0s",
        "1\u00a0min 00\u00a0s",
        "3\u00a0min 12\u00a0s",
        "2\u00a0h 05\u00a0min",
        "–",
    ]
    table = free_table("t", ["a", "b", "c"], [["x", 1, 5e-6], ["y", 23456, None]])
    assert table.rows == [["x", "1", "5e−06"], ["y", "23\u202f456", "–"]]
    assert table.numeric == [False, True, True]


def test_no_torch_is_imported(whole: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from steelyard.report import build_report; "
        f"build_report(Path({str(whole / 'sft')!r}), Path({str(tmp_path / 'x.html')!r})); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_dpo_arms_and_judges_of_their_own_file(tmp_path: Path) -> None:
    """A judge's name is data, like all others; a judge that decided nothing still has its row."""
    rows = [{"step": n, "dpo/loss": 0.69 - 0.1 * n, "dpo/kl": 1.0 * n} for n in range(3)]
    _stage(tmp_path / "dpo" / "mine", rows, {"beta": 0.1}, [])
    trusted = {"consistency": 0.75, "first_share": 0.5, "replies": 40, "unreadable": 1, "refused": 0}
    wins = [
        {"a": "mine", "b": "SFT", "judge": HOSTILE, "win": 0.6, "tie": 0.3, "lose": 0.1, "score": 0.75, "low": 0.6,
         "high": 0.9, "n": 19, "without_verdict": 1} | trusted,
        {"a": "mine", "b": "x", "judge": "reward model rm", "win": 0.0, "tie": 0.0, "lose": 0.0, "score": None, "n": 0},
    ]  # fmt: skip
    _json(tmp_path / "evaluate" / "judge.json", {"wins": wins, "judges": []})
    page = build_report(tmp_path).read_text()
    for text in (
        "DPO, step by step",
        "Head to head",
        "Judge models",
        "mine better",
        "reward model rm",
        "KL to the ref",
    ):
        assert text in page
    assert "<script" not in page
    assert page.index("Judge models") < page.index("DPO, step by step")
    (tmp_path / "evaluate" / "judge.json").write_text('{"wins": [{"a": "x"}]}')
    with pytest.raises(InputError, match=r"judge.json: field wins.0.b"):
        build_report(tmp_path)
