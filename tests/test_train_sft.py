"""Supervised fine-tuning: the loss against a plain reference, micro-batches, and that it learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from conftest import Folders
from steelyard.data.encode import Encoder, Tree
from steelyard.errors import InputError
from steelyard.models.policy import PolicyModel
from steelyard.train.optim import OptimConfig, batches, epoch_order, total_steps
from steelyard.train.sft import ScratchConfig, SFTConfig, sft_loss, sft_step, train_sft


@pytest.fixture
def trees(language_model: Folders) -> list[Tree]:
    encoder = Encoder.load(language_model("llama"))
    texts = [("w1 w2 w3", "good w4 w5 w6"), ("w1", "bad"), ("w5 w6", "w7 w8"), ("w1 w2 w3 w4 w5 w6", "w9 good")]
    return [encoder.tree(prompt, [response]) for prompt, response in texts]


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_the_loss_is_transformers_own_over_the_response_tokens(language_model: Folders, trees: list[Tree]) -> None:
    """transformers leaves out labels of -100; the mean over all response tokens weighs texts by their length."""
    model = PolicyModel.load(language_model("llama"))
    losses, counts = [], []
    for tree in trees:
        ids = torch.tensor([tree.prompt + tree.responses[0]])
        labels = torch.tensor([(-100,) * len(tree.prompt) + tree.responses[0]])
        losses.append(model.hf(input_ids=ids, labels=labels).loss)
        counts.append(len(tree.responses[0]))
    expected = sum(loss * n for loss, n in zip(losses, counts, strict=True)) / sum(counts)
    expected.backward()
    theirs = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    for max_tokens in (16, 4096):
        model.zero_grad()
        loss, tokens = sft_step(model, trees, tiny.PAD, max_tokens)
        assert tokens == sum(counts) == 13
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        for mine, other in zip((p.grad for p in model.parameters()), theirs, strict=True):
            assert mine is not None
            torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)
        assert sft_loss(model, trees, tiny.PAD, max_tokens) == pytest.approx(expected.item(), rel=1e-5)


def test_it_learns_and_its_model_loads_anywhere(
    language_model: Folders, planted: dict[str, str], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    data = planted["demonstrations"]
    config = SFTConfig(
        data=data, model=language_model("llama"), validation=data, epochs=4, batch_size=16, log_every=3,
        optim=OptimConfig(lr=5e-3), max_length=64,
    )  # fmt: skip
    result = train_sft(config, tmp_path / "sft", quiet=True)
    assert (result["steps"], result["examples"]) == (12, 48)
    first, *_, last, validation = metrics(tmp_path / "sft")
    assert [line["step"] for line in metrics(tmp_path / "sft")] == [3, 6, 9, 12, 12]
    assert last["train/loss"] < 0.5 * first["train/loss"]
    assert validation["validation/loss"] == result["validation_loss"] < first["train/loss"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sft" / "model")
    with torch.no_grad():
        logits = model(
            input_ids=torch.tensor([[tiny.VOCABULARY.index(w) for w in ["w1", "w2", "w9", "good", "w1", "w2"]]])
        ).logits
    assert tiny.VOCABULARY[int(logits[0, -1].argmax())] == "good"
    assert train_sft(config, tmp_path / "sft", resume=True, quiet=True) == result


def test_from_scratch(planted: dict[str, str], language_model: Folders, tmp_path: Path) -> None:
    config = SFTConfig(
        data=planted["demonstrations"], tokenizer=language_model("llama"), batch_size=24, optim=OptimConfig(lr=1e-2),
        scratch=ScratchConfig(layers=1, width=16, heads=2, context=32), max_length=32, log_every=1,
    )  # fmt: skip
    train_sft(config, tmp_path / "a", quiet=True)
    train_sft(config, tmp_path / "b", quiet=True)
    assert (tmp_path / "a" / "metrics.jsonl").read_bytes() == (tmp_path / "b" / "metrics.jsonl").read_bytes()
    losses = [line["train/loss"] for line in metrics(tmp_path / "a")]
    # Fresh weights know nothing: the first loss is that of a uniform guess.
    assert losses[0] == pytest.approx(np.log(len(tiny.VOCABULARY)), rel=0.05)
    assert losses[-1] < losses[0]


class TestRefusals:
    def refuse(self, match: str, tmp_path: Path, planted: dict[str, str], **settings: Any) -> None:
        config = SFTConfig.model_validate({"data": planted["demonstrations"]} | settings)
        with pytest.raises(InputError, match=match):
            train_sft(config, tmp_path / "out", quiet=True)

    def test_settings_without_effect(self, tmp_path: Path, planted: dict[str, str], language_model: Folders) -> None:
        model = language_model("llama")
        self.refuse("`tokenizer` is needed with `model: scratch`", tmp_path, planted)
        self.refuse("and only then", tmp_path / "b", planted, model=model, tokenizer=model)
        self.refuse("`scratch` .* no effect", tmp_path / "c", planted, model=model, scratch={"layers": 2})
        shape = {"heads": 3, "width": 16}
        self.refuse("heads must divide", tmp_path / "d", planted, tokenizer=model, scratch=shape)

    def test_a_resolved_configuration_is_not_mistaken_for_a_choice(
        self, tmp_path: Path, planted: dict[str, str], language_model: Folders
    ) -> None:
        """A saved configuration sets every field; reading it back must not turn defaults into choices."""
        config = SFTConfig(data=planted["demonstrations"], model=language_model("llama"), batch_size=48, max_length=32)
        again = SFTConfig.model_validate(config.model_dump())
        assert train_sft(again, tmp_path / "out", quiet=True)["steps"] == 1

    def test_demonstrations_that_do_not_fit(
        self, tmp_path: Path, planted: dict[str, str], language_model: Folders
    ) -> None:
        data = tiny.write_jsonl(tmp_path / "long.jsonl", [{"prompt": "w1", "response": "w2 " * 20}])
        model = language_model("llama")
        self.refuse(
            "no demonstration fits into max_length = 8", tmp_path, planted, data=data, model=model, max_length=8
        )
        settings = {"data": data, "model": model, "max_length": 8, "on_overlong": "error"}
        self.refuse("raise max_length", tmp_path / "b", planted, **settings)


class TestSchedule:
    def test_the_rate_rises_then_falls_to_zero(self) -> None:
        config = OptimConfig(lr=0.1, warmup=0.25)
        rates = [config.rate(step, 8) for step in range(8)]
        assert rates == pytest.approx([0.05, 0.1, 0.1, 0.1 * 5 / 6, 0.1 * 4 / 6, 0.05, 0.1 * 2 / 6, 0.1 / 6])
        assert OptimConfig(lr=0.1, warmup=0.25, decay=False).rate(7, 8) == 0.1

    def test_batches_cover_each_pass_once_and_continue_anywhere(self) -> None:
        steps = list(batches(10, 4, 3, 0, 6))
        assert [len(s) for s in steps] == [4, 4, 2, 4, 4, 2]
        first_pass, second_pass = ([i for step in steps[at : at + 3] for i in step] for at in (0, 3))
        assert sorted(first_pass) == sorted(second_pass) == list(range(10))
        assert first_pass != second_pass
        for first in range(6):
            assert list(batches(10, 4, 3, first, 6)) == steps[first:]
        assert epoch_order(10, 3, 0) != epoch_order(10, 4, 0)

    def test_too_small_a_rest_waits_for_another_pass(self) -> None:
        assert [len(s) for s in batches(10, 4, 3, 0, 6, least=2)] == [4, 4, 2, 4, 4, 2]
        steps = list(batches(10, 4, 3, 0, 40, least=3))
        assert {len(s) for s in steps} == {4}
        assert steps[2] == epoch_order(10, 3, 1)[:4]
        assert len({i for step in steps for i in step}) == 10
        assert list(batches(10, 4, 3, 5, 40, least=3)) == steps[5:]
        assert (total_steps(10, 4, 2.0), total_steps(10, 4, 0.01)) == (6, 1)
