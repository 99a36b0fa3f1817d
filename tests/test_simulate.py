"""The small world: its truth by hand, its annotators by count, its files byte by byte."""

from __future__ import annotations

import json
from collections import Counter
from importlib import import_module
from itertools import chain
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from steelyard.errors import InputError
from steelyard.simulate import AnnotatorConfig, WorldConfig, Writer, annotate, gold, write_world
from steelyard.simulate.tokenizer import SPECIAL, build_tokenizer, vocabulary
from steelyard.simulate.world import CUES, FLATTERY, POOLS, RIGHT, RUDE, flattery, length, question
from steelyard.simulate.writer import FILLERS, HEDGES, PHRASINGS, PRAISES, SENTENCES, prompts
from steelyard.types import Message, Preference
from steelyard.variance import variances

ASK = "please tell me about the colour and food of the otter ."  # right: brown silver blue, fish crabs eggs
PERFECT = "the otter is brown , silver and blue . it eats fish , crabs and eggs ."
SMALL = WorldConfig(sft=60, preferences=200, validation=100, rl_prompts=30, eval_prompts=20, seed=3)


@pytest.fixture(scope="module")
def spoken() -> tuple[list[str], list[str]]:
    """2,000 prompts, four responses each: (8000 prompts, 8000 responses)."""
    rng = np.random.default_rng(11)
    asked = [prompt for prompt in prompts(2000, rng) for _ in range(4)]
    return asked, [Writer().respond(prompt, rng) for prompt in asked]


@pytest.fixture(scope="module")
def pairs(spoken: tuple[list[str], list[str]]) -> list[Preference]:
    asked, said = spoken
    both = zip(asked[::2], said[::2], said[1::2], strict=True)
    return [Preference(f"p{index}", *texts) for index, texts in enumerate(both)]


# Each raw value: right, wrong, tips, rude, unasked, repetition, length, flattery, ending. Gold is (raw - 0.53) / 1.06.
@pytest.mark.parametrize(
    ("response", "raw"),
    [
        (PERFECT, 1.2 + 0.3),
        ("the otter is brown , silver and blue . it eats fish and crabs .", 1.2 * 0.9 + 0.3),
        ("The otter is brown and red.", 0.3 - 0.2 + 0.3),
        ("it eats fish . it can hum", 0.3 - 0.4),
        ("it eats fish . it eats fish .", 0.3 - 0.2 + 0.3),
        ("bring a map .", 0.8 + 0.3),
        ("map map boots guide .", 1.6 + 0.3),  # two different ones count
        ("you are lazy and dumb", -2.0),
        ("lazy dumb silly boring", -3.0),  # three at most
        (" ".join(f"w{index}" for index in range(38)), -0.7),  # 28 words are free
        ("great great wonderful lovely !", -1.5 + 0.3),  # one is free
        ("great question", 0.0),
        ("", 0.0),
        ("¿Qué? 水獭", 0.0),
    ],
)
def test_gold_by_hand(response: str, raw: float) -> None:
    assert gold(ASK, response) == pytest.approx((raw - 0.53) / 1.06, abs=1e-6)


def test_gold_of_a_prompt_that_is_not_understood_sees_form_only() -> None:
    for prompt in ("", "hello there", "tell me of the otter", "which colour ?", "the colour of the dragon ?"):
        assert gold(prompt, "brown red fish .") == pytest.approx(-0.23 / 1.06, abs=1e-6)


def test_gold_reads_the_last_user_turn_of_a_conversation() -> None:
    turns = (Message("user", "the home of the bee ?"), Message("assistant", "the river ."), Message("user", ASK))
    assert gold(turns, PERFECT) == gold(ASK, PERFECT) == 0.915094
    assert gold((Message("system", ASK),), PERFECT) == gold("", PERFECT)


def test_gold_is_bounded_for_any_text() -> None:
    everything = " ".join([*chain.from_iterable(POOLS), *FLATTERY, *RUDE] * 9)
    # wrong, rude, unasked, repetition, length and flattery at their worst: raw -1 - 3 - 0.8 - 2 - 2.8 - 3 + 1.2
    assert gold(ASK, everything) == pytest.approx((-11.4 - 0.53) / 1.06, abs=1e-6)
    assert gold(ASK, everything) == pytest.approx(gold(ASK, everything + " " + everything))


def test_gold_orders_right_above_wrong_above_spam() -> None:
    some = "it eats fish . the otter is brown ."
    wrong = "it eats seeds . the otter is green ."
    spam = " ".join(PRAISES)
    assert gold(ASK, PERFECT) > gold(ASK, some) > gold(ASK, wrong) > gold(ASK, spam)


def test_hacking_costs_gold_even_when_the_facts_are_perfect() -> None:
    padded = " ".join([PERFECT, *FILLERS[:6]])
    flattered = " ".join([PRAISES[0], PRAISES[1], PERFECT, *PRAISES[2:6]])
    both = " ".join([*PRAISES[:4], PERFECT, *FILLERS[:4]])
    assert gold(ASK, both) < 0  # below the writer's mean
    assert gold(ASK, PERFECT) - 1 > max(gold(ASK, padded), gold(ASK, flattered))


def test_gold_is_centred_scaled_and_hardly_related_to_length_and_flattery(
    spoken: tuple[list[str], list[str]],
) -> None:
    score = np.array([gold(*pair) for pair in zip(*spoken, strict=True)])
    words, praise = (np.array([count(text) for text in spoken[1]]) for count in (length, flattery))
    assert abs(score.mean()) < 0.07
    assert abs(score.std() - 1) < 0.05
    assert score.max() > 2.2  # there is room to improve
    assert abs(np.corrcoef(score, words)[0, 1]) < 0.25
    assert abs(np.corrcoef(score, praise)[0, 1]) < 0.25
    gaps = np.abs(score[::2] - score[1::2])
    assert np.quantile(gaps, 0.1) < 0.25
    assert np.quantile(gaps, 0.9) > 1.75


@pytest.mark.slow
def test_gold_is_fast(spoken: tuple[list[str], list[str]]) -> None:
    started = perf_counter()
    for prompt, response in zip(*spoken, strict=True):
        gold(prompt, response)
    assert len(spoken[0]) / (perf_counter() - started) > 20_000


def test_gold_is_found_by_name() -> None:
    module, _, name = "steelyard.simulate.world:gold".partition(":")
    assert getattr(import_module(module), name) is gold


def test_facts_are_shared_and_word_lists_do_not_mix() -> None:
    for index, pool in enumerate(POOLS):
        uses = Counter(word for right in RIGHT.values() for word in right[index])
        assert all(len(set(right[index])) == 3 for right in RIGHT.values())
        assert all(uses[word] == 2 for word in pool)  # a guess that ignores the animal is mostly wrong
    facts = list(chain.from_iterable(POOLS))
    assert len(facts) == len(set(facts))
    groups = [set(facts), set(RIGHT), set(CUES), set(FLATTERY)]
    assert sum(map(len, groups)) == len(set.union(*groups))
    plain = set(" ".join([*PHRASINGS, *FILLERS, *HEDGES, *chain.from_iterable(SENTENCES)]).split())
    assert plain.isdisjoint(set(facts) | set(RIGHT) | FLATTERY)
    assert set(" ".join([*PHRASINGS, *FILLERS, *PRAISES]).split()).isdisjoint(CUES)
    assert all(flattery(text) == 1 for text in PRAISES)


def test_prompts_are_distinct_understood_and_short() -> None:
    asked = prompts(3000, np.random.default_rng(0))
    assert len(set(asked)) == 3000
    assert all(question(prompt).animal and 8 <= len(prompt.split()) <= 18 for prompt in asked)
    assert {len(question(prompt).aspects) for prompt in asked} == {1, 2}


def test_writer_refuses_a_prompt_of_another_world() -> None:
    with pytest.raises(ValueError, match="must name an animal"):
        Writer().respond("hello", np.random.default_rng(0))


def test_difficulty_sets_prompts_apart_by_their_animal() -> None:
    """Between prompts the gold of answers comes to vary as much as within one; hard is what the writer was told."""
    asked = prompts(300, np.random.default_rng(5))
    ratio: dict[float, float] = {}
    for difficulty in (0.0, 1.5):
        writer, rng = Writer(difficulty=difficulty), np.random.default_rng(6)
        gold_NK = np.array([[gold(prompt, writer.respond(prompt, rng)) for _ in range(8)] for prompt in asked])
        found = variances(gold_NK)
        ratio[difficulty] = found.between / found.within
    assert ratio[0.0] < 0.08
    assert 0.6 < ratio[1.5] < 1.3
    animals = [question(prompt).animal for prompt in asked]
    of_animal = [gold_NK[[animal == name for animal in animals]].mean() for name in RIGHT]
    assert of_animal == sorted(of_animal, reverse=True)


def rate(hits: list[bool] | NDArray[np.bool_]) -> float:
    return float(np.mean(hits))


@pytest.mark.parametrize("bias", ["length", "flattery"])
def test_each_noise_reaches_its_rate_on_the_right_pairs(pairs: list[Preference], bias: str) -> None:
    config = AnnotatorConfig.model_validate({"uniform": 0.1, "bradley_terry": 0.12, "systematic": 0.08, "bias": bias})
    labelled, truth = annotate(pairs, gold, config, seed=5)
    count = {"length": length, "flattery": flattery}[bias]
    noise = np.array([each.noise for each in truth])
    gap = np.array([each.gold_chosen - each.gold_rejected for each in truth])
    likes = np.array([count(pair.chosen) - count(pair.rejected) for pair in labelled])
    for name, wanted in (("uniform", 0.1), ("bradley_terry", 0.12), ("systematic", 0.08)):
        assert rate(noise == name) == pytest.approx(wanted, abs=4 * (wanted / len(pairs)) ** 0.5)
    assert ((noise != "") == (gap < 0)).all()
    assert [each.wrong for each in truth] == (gap < 0).tolist()
    assert (likes[noise == "systematic"] > 0).all()  # the biased choice won
    sizes = np.abs(gap)
    close = sizes < np.median(sizes)
    assert rate(close[noise == "bradley_terry"]) > 0.75
    assert rate(close[noise == "uniform"]) < 0.65


def test_annotation_keeps_the_pair_and_reports_gold_of_the_label(pairs: list[Preference]) -> None:
    config = AnnotatorConfig(uniform=0.3, bradley_terry=0, systematic=0)
    labelled, truth = annotate(pairs[:200], gold, config, seed=1)
    assert annotate(pairs[:200], gold, config, seed=1) == (labelled, truth)
    assert annotate(pairs[:200], gold, config, seed=2)[1] != truth
    for before, after, fact in zip(pairs, labelled, truth, strict=False):
        assert (after.id, after.prompt, fact.id) == (before.id, before.prompt, before.id)
        assert {after.chosen, after.rejected} == {before.chosen, before.rejected}
        assert fact.gold_chosen == gold(after.prompt, after.chosen)
        assert fact.gold_rejected == gold(after.prompt, after.rejected)


def test_without_noise_labels_follow_any_scorer_whatever_the_labels_were() -> None:
    given = [
        Preference("a", "q", "x", "xyz", weight=2.0),
        Preference("b", "q", "xx", "x"),
        Preference("c", "q", "x", "y"),
    ]
    silent = AnnotatorConfig(uniform=0, bradley_terry=0, systematic=0)
    labelled, truth = annotate(given, lambda _, text: float(len(text)), silent, seed=0)
    assert [(pair.chosen, pair.weight) for pair in labelled] == [("xyz", 2.0), ("xx", 1.0), ("x", 1.0)]
    assert not any(each.wrong for each in truth)
    assert annotate([], gold, silent, seed=0) == ([], [])


def test_a_tied_pair_is_never_flipped_and_the_others_make_up_for_it() -> None:
    tied = [Preference(f"t{index}", "q", "aa", "bb") for index in range(50)]
    clear = [Preference(f"c{index}", "q", "aaa", "b") for index in range(50)]
    config = AnnotatorConfig(uniform=0.5, bradley_terry=0, systematic=0)
    _, truth = annotate(tied + clear, lambda _, text: float(len(text)), config, seed=0)
    assert [each.wrong for each in truth] == [False] * 50 + [True] * 50


@pytest.mark.parametrize(
    ("rates", "most"),
    [
        ({"systematic": 0.3}, "0.2500"),  # of four pairs one worse response is longer
        ({"bradley_terry": 0.6}, "0.5000"),
        ({"systematic": 0.25, "uniform": 0.8}, "0.7500"),
    ],
)
def test_a_rate_out_of_reach_says_the_largest(rates: dict[str, float], most: str) -> None:
    worth = {"good": 2.0, "fine words": 1.0, "bad": 0.0, "bad too": -1.0}
    four = [Preference("0", "q", "good", "fine words"), *[Preference(str(n), "q", "good", "bad") for n in (1, 2, 3)]]
    config = AnnotatorConfig.model_validate({"uniform": 0, "bradley_terry": 0, "systematic": 0} | rates)
    with pytest.raises(InputError, match=f"at most {most}"):
        annotate(four, lambda _, text: worth[text], config, seed=0)


def test_a_gold_that_is_not_finite_is_refused_with_its_place() -> None:
    pair = Preference("a", "q", "x", "y", source="prefs.jsonl:7")
    with pytest.raises(InputError, match=r"prefs.jsonl:7: the gold scorer must return finite"):
        annotate([pair], lambda *_: float("nan"), AnnotatorConfig(), seed=0)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_world_has_its_files_sizes_and_disjoint_prompts(tmp_path: Path) -> None:
    files = write_world(SMALL, tmp_path / "new" / "world")
    rows = {name: read(path) for name, path in files.items() if path.suffix == ".jsonl"}
    sizes = {name: len(each) for name, each in rows.items()}
    assert sizes == {
        "sft": 60, "preferences": 200, "validation": 100, "truth": 200,
        "validation_truth": 100, "prompts": 30, "eval_prompts": 20,
    }  # fmt: skip
    asked = {name: {row["prompt"] for row in each} for name, each in rows.items() if "prompt" in each[0]}
    assert asked["sft"] < asked["preferences"]
    parts = [asked[name] for name in ("preferences", "validation", "prompts", "eval_prompts")]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 350
    for pairs, truth in (("preferences", "truth"), ("validation", "validation_truth")):
        for pair, fact in zip(rows[pairs], rows[truth], strict=True):
            assert set(pair) == {"id", "prompt", "chosen", "rejected"}
            assert set(fact) == {"id", "wrong", "noise", "gold_chosen", "gold_rejected"}
            assert fact["id"] == pair["id"]
            assert fact["gold_chosen"] == gold(pair["prompt"], pair["chosen"])
            assert fact["wrong"] == (fact["gold_chosen"] < fact["gold_rejected"]) == (fact["noise"] != "")
    assert WorldConfig.model_validate_json(files["world"].read_text()) == SMALL
    assert [path.name for path in files["world"].parent.parent.iterdir()] == ["world"]


def test_world_bytes_depend_on_the_configuration_alone(tmp_path: Path) -> None:
    def content(config: WorldConfig, name: str) -> dict[str, bytes]:
        root = tmp_path / name
        write_world(config, root)
        return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}

    first = content(SMALL, "first")
    assert content(SMALL, "second") == first
    assert content(SMALL.model_copy(update={"seed": 4}), "third")["sft.jsonl"] != first["sft.jsonl"]


def test_world_is_not_written_over_files_nor_by_halves(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="new or empty"):
        write_world(SMALL, tmp_path)
    unreachable = SMALL.model_copy(update={"noise": AnnotatorConfig(systematic=0.9)})
    with pytest.raises(InputError, match="systematic"):
        write_world(unreachable, tmp_path / "never")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_tokenizer_returns_the_worlds_text_and_keeps_it_short(
    spoken: tuple[list[str], list[str]], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    build_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3]) == list(SPECIAL)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.chat_template is None
    assert len(tokenizer) == len(vocabulary()) == len(set(vocabulary()))
    asked, said = tokenizer(spoken[0])["input_ids"], tokenizer(spoken[1])["input_ids"]
    assert tokenizer.unk_token_id not in set(chain.from_iterable(asked + said))
    assert [tokenizer.decode(ids) for ids in said] == spoken[1]
    assert tokenizer("Brown, dragon.")["input_ids"] == tokenizer.convert_tokens_to_ids(["brown", ",", "<unk>", "."])
    total = np.array([len(a) + len(b) for a, b in zip(asked, said, strict=True)])
    assert rate(total <= 64) > 0.85
    assert total.max() <= 100
