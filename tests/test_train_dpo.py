"""DPO: values and gradients against plain transformers and float64 numpy, what the pairs' fields do, that it learns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from conftest import Folders
from steelyard.data.encode import Encoder
from steelyard.errors import InputError
from steelyard.models.policy import PolicyModel
from steelyard.train.dpo import DPOConfig, Pairs, dpo_step, response_logprobs, train_dpo
from steelyard.train.optim import OptimConfig
from steelyard.types import Preference

CONFIG = DPOConfig(data="", model="", beta=0.4)


@pytest.fixture
def encoder(language_model: Folders) -> Encoder:
    return Encoder.load(language_model("llama"))


@pytest.fixture
def pairs() -> list[Preference]:
    fields = [(0.0, 0.0, 1.0), (0.3, 0.5, 2.0), (1.0, -1.0, 0.5), (0.1, 2.0, 0.0), (0.0, 1.5, 3.0)]
    return [
        Preference(row["id"], row["prompt"], row["chosen"], row["rejected"], flip_prob=a, margin=m, weight=w)
        for row, (a, m, w) in zip(tiny.planted_pairs(5)[0], fields, strict=True)
    ]


def other(seed: int = 9) -> Any:
    return tiny.build_model(tiny.build_config(), seed=seed)


def step(
    encoder: Encoder, pairs: Sequence[Preference], folder: str, config: DPOConfig = CONFIG
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """One step of another model than the reference, and its gradients."""
    trees = encoder.encode(pairs).trees
    reference = response_logprobs(PolicyModel.load(folder), trees, encoder.pad_id, 4096)
    model = PolicyModel(other())
    seen = dpo_step(model, Pairs(list(pairs), trees, reference), range(len(pairs)), encoder.pad_id, config)
    return seen, {n: p.grad for n, p in model.hf.named_parameters() if p.grad is not None}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 1e-4) -> bool:
    size = max(float(x.abs().max()) for x in b.values())
    return a.keys() == b.keys() and all(float((a[n] - b[n]).abs().max()) <= tolerance * size for n in a)


def log_likelihood(model: Any, encoder: Encoder, prompt: Any, response: str) -> torch.Tensor:
    """One text on its own through transformers, float64: every response token's log-probability, summed."""
    start, end = encoder.prompt_ids(prompt), encoder.response_ids(response)
    logits = model(input_ids=torch.tensor([start + end])).logits[0]
    assert logits.dtype == torch.float64
    rows = torch.log_softmax(logits, -1)[len(start) - 1 : -1]
    total: torch.Tensor = rows[torch.arange(len(end)), torch.tensor(end)].sum()
    return total


@pytest.mark.parametrize(
    ("use_margin", "margin_in_flip"), [(True, True), (True, False), (False, True)], ids=["both", "one term", "none"]
)
def test_values_and_gradient_are_those_of_separate_sequences(
    use_margin: bool, margin_in_flip: bool, language_model: Folders, encoder: Encoder, pairs: list[Preference]
) -> None:
    from transformers import AutoModelForCausalLM

    model, reference = other().double(), AutoModelForCausalLM.from_pretrained(language_model("llama")).double()
    losses, columns, backward = [], [], []
    for p in pairs:
        own = [log_likelihood(model, encoder, p.prompt, r) for r in (p.chosen, p.rejected)]
        with torch.no_grad():
            theirs = [log_likelihood(reference, encoder, p.prompt, r).item() for r in (p.chosen, p.rejected)]
        ratio = np.array([x.item() for x in own]) - np.array(theirs)
        m = p.margin if use_margin else 0.0
        d = 0.4 * (ratio[0] - ratio[1])
        right, wrong = 1 / (1 + np.exp(-(d - m))), 1 / (1 + np.exp(d - m if margin_in_flip else d))
        losses.append(-(1 - p.flip_prob) * np.log(right) - p.flip_prob * np.log(wrong))
        columns.append([*(0.4 * ratio), *(x.item() for x in own)])
        # d loss / d d = -(1 - a)(1 - right) + a (1 - wrong): of the two log-likelihoods the gradient is linear in it.
        slope = -(1 - p.flip_prob) * (1 - right) + p.flip_prob * (1 - wrong)
        backward.append(p.weight / 6.5 * 0.4 * slope * (own[0] - own[1]))
    torch.stack(backward).sum().backward()

    changes = {"use_margin": use_margin} | ({"margin_in_flip": margin_in_flip} if use_margin else {})
    config = DPOConfig.model_validate({"data": "", "model": "", "beta": 0.4} | changes)
    seen, gradient = step(encoder, pairs, language_model("llama"), config)
    np.testing.assert_allclose(seen[:, 0].numpy(), losses, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(seen[:, 1].numpy(), [1, 2, 0.5, 0, 3])
    np.testing.assert_allclose(seen[:, 2:].numpy(), columns, rtol=1e-4, atol=1e-4)
    assert same(gradient, {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None})


def test_the_token_budget_changes_neither_loss_nor_gradient(
    language_model: Folders, encoder: Encoder, pairs: list[Preference]
) -> None:
    whole = step(encoder, pairs, language_model("llama"))
    for max_tokens in (16, 40, 64):
        config = CONFIG.model_copy(update={"max_tokens": max_tokens})
        seen, gradient = step(encoder, pairs, language_model("llama"), config)
        torch.testing.assert_close(seen, whole[0], rtol=1e-4, atol=1e-4)
        assert same(gradient, whole[1])


def test_what_flips_weights_and_swaps_do(language_model: Folders, encoder: Encoder, pairs: list[Preference]) -> None:
    folder = language_model("llama")
    wrong = [replace(p, flip_prob=1.0, margin=-0.7, weight=1.0) for p in pairs]
    swapped = [replace(p, chosen=p.rejected, rejected=p.chosen, flip_prob=0.0, margin=0.7) for p in wrong]
    margins = CONFIG.model_copy(update={"use_margin": True})
    a, b = step(encoder, wrong, folder, margins), step(encoder, swapped, folder, margins)
    torch.testing.assert_close(a[0][:, 0], b[0][:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a[0][:, [2, 3, 4, 5]], b[0][:, [3, 2, 5, 4]], rtol=1e-4, atol=1e-4)
    assert same(a[1], b[1])

    without = [p for p in pairs if p.weight > 0]
    assert len(without) == 4
    assert same(step(encoder, pairs, folder)[1], step(encoder, without, folder)[1])
    assert same(
        step(encoder, [replace(p, weight=7 * p.weight) for p in pairs], folder)[1], step(encoder, pairs, folder)[1]
    )
    silent, gradient = step(encoder, [replace(p, weight=0.0) for p in pairs], folder)
    assert not silent.any()
    assert gradient == {}


def settings(planted: dict[str, str], model: str, **changes: Any) -> DPOConfig:
    values: dict[str, Any] = {
        "data": planted["clean"], "model": model, "validation": {"held-out": planted["held-out"]}, "epochs": 2,
        "batch_size": 16, "optim": OptimConfig(lr=2e-3), "max_length": 64, "log_every": 3, "eval_every": 6,
    }  # fmt: skip
    return DPOConfig.model_validate(values | changes)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_it_learns_the_planted_rule_and_says_how_far_it_went(
    language_model: Folders, planted: dict[str, str], planted_reward: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    config = settings(
        planted, language_model("llama"), prompts=planted["prompts"], gold="tiny:count_good",
        reward_model=str(planted_reward / "model"), sampling={"max_new_tokens": 6}, answers=10,
    )  # fmt: skip
    result = train_dpo(config, tmp_path / "dpo", quiet=True)
    assert (result["steps"], result["pairs"]) == (12, 96)
    rows = lines(tmp_path / "dpo" / "metrics.jsonl")
    training = [r for r in rows if "dpo/loss" in r]
    assert [r["step"] for r in training] == [3, 6, 9, 12]
    for r in training:
        assert r["dpo/margin"] == pytest.approx(r["dpo/reward_chosen"] - r["dpo/reward_rejected"])
    assert training[-1]["dpo/loss"] < training[0]["dpo/loss"] < 0.75
    assert training[-1]["dpo/accuracy"] > 0.9
    held_out = [r for r in rows if "validation/held-out/accuracy" in r]
    assert [r["step"] for r in held_out] == [6, 12]
    assert held_out[-1]["validation/held-out/accuracy"] > 0.9
    early, late = (r for r in rows if "dpo/kl" in r)
    assert min(early["dpo/kl"], late["dpo/kl"]) > 0.5
    assert {"dpo/reward_raw", "dpo/gold", "dpo/ended"} < late.keys() & early.keys()
    shown = lines(tmp_path / "dpo" / "samples.jsonl")
    assert [r["step"] for r in shown] == [6] * 4 + [12] * 4
    assert all(r["gold"] == r["response"].split().count("good") for r in shown)
    assert late["dpo/length"] <= 6

    # What the logs say of the pairs is what the saved model gives, through plain transformers.
    encoder = Encoder.load(tmp_path / "dpo" / "model", max_length=64)
    model, start = (
        AutoModelForCausalLM.from_pretrained(f).double() for f in (tmp_path / "dpo" / "model", config.model)
    )
    margins = []
    with torch.no_grad():
        for row in lines(Path(planted["held-out"])):
            ratio = [
                (log_likelihood(model, encoder, row["prompt"], t) - log_likelihood(start, encoder, row["prompt"], t))
                for t in (row["chosen"], row["rejected"])
            ]
            margins.append(0.1 * (ratio[0] - ratio[1]).item())
    assert held_out[-1]["validation/held-out/margin"] == pytest.approx(np.mean(margins), rel=1e-3)
    assert train_dpo(config, tmp_path / "dpo", resume=True, quiet=True) == result


def test_margins_that_are_left_out_are_told(
    language_model: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row | {"margin": 0.5 * (i % 2)} for i, row in enumerate(tiny.planted_pairs(8, seed=1)[0])]
    data = {"data": tiny.write_jsonl(tmp_path / "margins.jsonl", rows), "model": language_model("llama")}
    for use, told in ((False, True), (True, False)):
        config = DPOConfig.model_validate(data | {"use_margin": use, "eval_every": None, "batch_size": 8})
        train_dpo(config, tmp_path / str(use))
        assert ("margins.jsonl: the margins of 4 pairs are left out" in capsys.readouterr().out) == told


def test_another_reference_is_the_one_that_counts(
    language_model: Folders, planted: dict[str, str], tmp_path: Path, encoder: Encoder
) -> None:
    """With the model itself as reference the first loss is ln 2; with another one it is not."""
    folder = tiny.save_folder(other(), encoder.tokenizer, tmp_path / "other")
    first = {}
    for name, reference in (("own", None), ("other", folder)):
        config = settings(
            planted, language_model("llama"), reference=reference, log_every=1, epochs=0.01, validation={},
            eval_every=None, beta=1.0,
        )  # fmt: skip
        train_dpo(config, tmp_path / "runs" / name, quiet=True)
        first[name] = lines(tmp_path / "runs" / name / "metrics.jsonl")[0]
    assert first["own"]["dpo/loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert first["own"]["dpo/logprob_chosen"] == pytest.approx(first["other"]["dpo/logprob_chosen"])
    assert abs(first["other"]["dpo/loss"] - np.log(2)) > 0.01


def test_a_gradient_that_is_not_finite_ends_the_run_before_the_weights_take_it_in(
    language_model: Folders, planted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import steelyard.train.dpo as room

    seen: list[PolicyModel] = []
    whole = room.dpo_step

    def spoilt(model: PolicyModel, *rest: Any) -> Any:
        found = whole(model, *rest)
        seen.append(model)
        if len(seen) == 2:
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(float("nan"))  # type: ignore[union-attr]
        return found

    monkeypatch.setattr(room, "dpo_step", spoilt)
    config = settings(planted, language_model("llama"), log_every=1)
    with pytest.raises(FloatingPointError, match=r"step 2: the norm of the policy's gradient is nan.*optim\.lr"):
        train_dpo(config, tmp_path / "out", quiet=True)
    assert all(bool(p.isfinite().all()) for p in seen[0].parameters())
    assert [line["step"] for line in lines(tmp_path / "out" / "metrics.jsonl")] == [1]


def test_the_reference_is_computed_once_and_read_by_a_resumed_run(
    language_model: Folders, planted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import steelyard.train.dpo as room

    config = settings(planted, language_model("llama"), save_every=1)

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(room, "dpo_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_dpo(config, tmp_path / "out", quiet=True)
    count, compute = 0, room.response_logprobs

    def counted(*args: Any) -> Any:
        nonlocal count
        count += 1
        return compute(*args)

    monkeypatch.setattr(room, "response_logprobs", counted)
    train_dpo(config, tmp_path / "out", resume=True, quiet=True)
    assert count == 2, "examinations at steps 6 and 12, and nothing for the reference"
    # A damaged file is no reference: it is computed again.
    other_out = tmp_path / "damaged"
    with monkeypatch.context() as patch:
        patch.setattr(room, "dpo_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_dpo(config, other_out, quiet=True)
    (other_out / "reference" / "tensors.safetensors").write_bytes(b"broken")
    train_dpo(config, other_out, resume=True, quiet=True)
    a, b = (tmp_path / n / "model" / "model.safetensors" for n in ("out", "damaged"))
    assert a.read_bytes() == b.read_bytes()


class TestRefusals:
    def refuse(self, match: str, out: Path, planted: dict[str, str], model: str, **changes: Any) -> None:
        with pytest.raises(InputError, match=match):
            train_dpo(settings(planted, model, **changes), out, quiet=True)
        assert not (out / "config.json").exists(), "the mended input may use the same folder"

    def test_files_and_models_that_do_not_fit(
        self, tmp_path: Path, planted: dict[str, str], language_model: Folders, reward_model: Folders
    ) -> None:
        model, out = language_model("llama"), tmp_path / "out"
        same = {"prompt": "w1", "chosen": "good", "rejected": "good"}
        row = {"prompt": "w1 w2 w3 w4 w5 w6 w7", "chosen": "good w1", "rejected": "bad"}
        long = tiny.write_jsonl(tmp_path / "long.jsonl", [row, same | {"rejected": " good"}])
        self.refuse("no usable pair is left", out, planted, model, data=long, max_length=8, on_overlong="drop")
        self.refuse("a reward model; a policy must be a language model", out, planted, reward_model("llama"))
        idle = tiny.write_jsonl(tmp_path / "idle.jsonl", [r | {"weight": 0} for r in tiny.planted_pairs(4)[0]])
        self.refuse("all 4 usable pairs have weight 0", out, planted, model, data=idle)
        asked = {"prompts": planted["prompts"], "sampling": {"max_new_tokens": 6}}
        self.refuse("not a reward model", out, planted, model, reward_model=model, **asked)
        no_room = {"prompts": planted["prompts"], "sampling": {"max_new_tokens": 64}}
        self.refuse("no prompt leaves room for 64 new tokens", out, planted, model, **no_room)
        words = (*tiny.VOCABULARY[:-1], "another")
        strange = tiny.save_folder(other(), tiny.build_tokenizer(words=words), tmp_path / "strange")
        self.refuse("the reference must share one tokenizer with", out, planted, model, reference=strange)

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"gold": "tiny:count_good"}, "gold: no effect without prompts"),
            ({"eval_every": None}, "validation: no effect without eval_every"),
            ({"use_margin": False, "margin_in_flip": False}, "margin_in_flip: no effect without use_margin"),
            ({"beta": 0}, "beta"),
        ],
    )
    def test_settings_without_effect(self, changes: dict[str, Any], said: str, planted: dict[str, str]) -> None:
        with pytest.raises(ValueError, match=said):
            settings(planted, "", **changes)
