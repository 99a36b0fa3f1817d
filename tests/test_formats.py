"""Rows of every public schema, and what is said about rows that do not fit."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard.data.dialogues import RowError, parse_transcript, parse_turns, to_transcript
from steelyard.data.formats import (
    FORMATS,
    detect_format,
    from_hh,
    from_strength,
    from_trl,
    read_demonstration,
    read_judge_label,
    read_margins,
    read_prompt,
    read_strength,
)
from steelyard.types import Message, Preference

USER, ANSWER = Message("user", "Hi there"), Message("assistant", "Hello!")
HH = {
    "chosen": "\n\nHuman: Hi there\n\nAssistant: Hello!\n\nHuman: Sing\n\nAssistant: La la.",
    "rejected": "\n\nHuman: Hi there\n\nAssistant: Hello!\n\nHuman: Sing\n\nAssistant: No.",
}
DIALOGUE = (USER, ANSWER, Message("user", "Sing"))


def said(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def content(p: Preference) -> tuple[object, str, str]:
    return p.prompt, p.chosen, p.rejected


def refused(row: dict[str, object], kind: str, message: str) -> None:
    with pytest.raises(RowError, match=re.escape(message)) as caught:
        FORMATS[detect_format(row)](row)
    assert caught.value.kind == kind


def test_hh_transcripts_give_messages_and_the_last_answers() -> None:
    assert detect_format(HH) == "hh"
    p = from_hh(HH, id="a", source="f:1")
    assert content(p) == (DIALOGUE, "La la.", "No.")
    assert (p.id, p.source, p.row) == ("a", "f:1", HH)


def test_hh_keeps_blank_lines_colons_and_repeated_speakers() -> None:
    start = "\n\nHuman: List:\n\n- a\n\nHumans: b\n\nAssistant: One moment.\n\nAssistant: "
    p = from_hh({"chosen": start + " Two spaces", "rejected": start + "x"})
    assert p.prompt == (Message("user", "List:\n\n- a\n\nHumans: b"), Message("assistant", "One moment."))
    assert p.chosen == " Two spaces"


@pytest.mark.parametrize(
    ("chosen", "rejected", "kind", "message"),
    [
        ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: c\n\nAssistant: d", "prompts-differ", "they part at turn 1"),
        ("\n\nHuman: a\n\nAssistant: ", "\n\nHuman: a\n\nAssistant: d", "empty", "chosen is empty"),
        ("\n\nHuman: a\n\nAssistant: d", "\n\nHuman: a\n\nAssistant: \n", "empty", "rejected is empty"),
        ("\n\nHuman: a\n\nAssistant: d", "\n\nHuman: a", "schema", "rejected must end with a turn of the assistant"),
        ("\n\nHuman: a\n\nAssistant: d", "other text", "schema", "rejected must start with 'Human:'"),
        ("\n\nAssistant: d", "\n\nAssistant: e", "empty", "prompt is empty"),
        ("\n\nHuman: a\n\nAssistant: d", 3, "type", "rejected must be text, got int 3"),
    ],
)
def test_hh_refusals(chosen: object, rejected: object, kind: str, message: str) -> None:
    refused({"chosen": chosen, "rejected": rejected}, kind, message)


turn_text = st.text(st.characters(exclude_categories=["Cs"])).filter(
    lambda text: not re.search(r"\n\n(Human|Assistant):", "\n" + text)
)
turns = st.lists(st.builds(Message, st.sampled_from(["user", "assistant"]), turn_text), min_size=1, max_size=6)
systems = st.lists(st.builds(Message, st.just("system"), turn_text), max_size=1)


@settings(max_examples=200, deadline=None)
@given(systems, turns)
def test_transcripts_round_trip(system: list[Message], messages: list[Message]) -> None:
    assert parse_transcript(to_transcript(system + messages)) == (*system, *messages)


def test_a_system_turn_counts_only_at_the_start_of_a_transcript() -> None:
    row = {name: "\n\nSystem: Be kind." + HH[name] for name in HH}
    assert detect_format(row) == "hh"
    assert content(from_hh(row)) == ((Message("system", "Be kind."), *DIALOGUE), "La la.", "No.")
    spoken = "\n\nHuman: Two parts:\n\nSystem: a pump\n\nAssistant: "
    assert from_hh({"chosen": spoken + "a", "rejected": spoken + "b"}).prompt == (
        Message("user", "Two parts:\n\nSystem: a pump"),
    )
    others = "System: Be kind.\n\nUser: Hi\n\nAssistant:"
    row = {"chosen": others + " Hello", "rejected": others + " No"}
    assert detect_format(row) == "trl"
    assert from_trl(row).prompt == others


def test_trl_text_and_mixed_columns() -> None:
    row = {"prompt": "Why?", "chosen": "Because.", "rejected": "No", "margin": 2, "flip_prob": 0.25, "weight": 0.5}
    p = from_trl(row)
    assert detect_format(row) == "trl"
    assert content(p) == ("Why?", "Because.", "No")
    assert (p.margin, p.flip_prob, p.weight) == (2.0, 0.25, 0.5)
    plain = from_trl({"prompt": "Why?", "chosen": "a", "rejected": "b", "margin": None})
    assert (plain.margin, plain.flip_prob, plain.weight) == (0.0, 0.0, 1.0)
    assert from_trl({"prompt": said(("user", "Why?")), "chosen": "a", "rejected": "b"}).prompt == (
        Message("user", "Why?"),
    )


def test_trl_messages_explicit_repeated_and_implicit() -> None:
    prompt = said(("system", "Be kind."), ("user", "Hi"))
    good, bad = said(("assistant", "Hello")), said(("assistant", "Go away"))
    expected = ((Message("system", "Be kind."), Message("user", "Hi")), "Hello", "Go away")
    assert content(from_trl({"prompt": prompt, "chosen": good, "rejected": bad})) == expected
    assert content(from_trl({"chosen": prompt + good, "rejected": prompt + bad})) == expected
    assert content(from_trl({"prompt": prompt, "chosen": prompt + good, "rejected": prompt + bad})) == expected
    unsaid: dict[str, Any] = {"name": "Ann", "tool_calls": [], "refusal": None}
    assert content(from_trl({"prompt": prompt, "chosen": [good[0] | unsaid], "rejected": bad})) == expected
    # A text prompt beside full dialogues, as some public sets have it.
    assert content(from_trl({"prompt": "Hi", "chosen": prompt + good, "rejected": prompt + bad})) == expected
    assert content(from_trl({"prompt": "Hi", "chosen": good, "rejected": bad}))[0] == (Message("user", "Hi"),)


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("Q: sky? A: blue", "Q: sky? A: red", ("Q: sky? A:", " blue", " red")),
        ("Q: sky? A: blue", "Q: sky? A: black", ("Q: sky? A:", " blue", " black")),  # never inside a word
        ("Q: yes", "Q: yesterday", ("Q:", " yes", " yesterday")),
        ("Say\nfoo", "Say\nbar", ("Say\n", "foo", "bar")),
    ],
)
def test_trl_implicit_text_prompt(chosen: str, rejected: str, expected: tuple[str, str, str]) -> None:
    assert content(from_trl({"chosen": chosen, "rejected": rejected})) == expected


@pytest.mark.parametrize(
    ("row", "kind", "message"),
    [
        ({"prompt": "q", "response": "a"}, "schema", "columns received: prompt, response; known formats: hh ("),
        ({"prompt": "q", "chosen": "a", "rejected": None}, "schema", "no value in column rejected"),
        ({}, "schema", "columns received: none"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "empty", "prompt is empty"),
        ({"prompt": [], "chosen": "a", "rejected": "b"}, "empty", "prompt is empty"),
        ({"prompt": "q", "chosen": "", "rejected": "b"}, "empty", "chosen is empty"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "type", "prompt must be text, got int 3"),
        ({"prompt": "q", "chosen": "a", "rejected": {"x": 1}}, "type", "rejected must be text, got dict"),
        ({"chosen": "abc", "rejected": "xyz"}, "empty", "share no start"),
        ({"chosen": "abc", "rejected": "abc"}, "identical", "says nothing"),
        ({"chosen": "Q: Yes.", "rejected": "Q: Yes. So."}, "schema", "rejected begins with all of chosen; add a"),
        ({"chosen": "Q: Yes\n", "rejected": "Q: Yes"}, "schema", "begins with all of rejected; add a prompt column"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": "1"}, "type", "margin must be a number, got str"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": math.nan}, "value", "margin must be finite"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": 10**400}, "value", "margin must be finite"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "flip_prob": 1.5}, "value", "flip_prob must lie in [0, 1]"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "weight": True}, "type", "weight must be a number"),
        (
            {"chosen": said(("user", "q"), ("assistant", "a")), "rejected": said(("user", "r"), ("assistant", "a"))},
            "prompts-differ",
            "every message but the last",
        ),
        ({"chosen": said(("user", "q")), "rejected": said(("user", "q"))}, "schema", "it ends with user"),
        ({"chosen": said(("human", "q")), "rejected": said(("user", "q"))}, "type", "chosen[0].role must be one of"),
        ({"chosen": [{"role": "user"}], "rejected": [{}]}, "type", "chosen[0] must be {'role', 'content'}"),
        (
            {"prompt": "q", "chosen": [{"role": "assistant", "content": "a", "tool_calls": [{}]}], "rejected": []},
            "schema",
            "chosen[0] must hold role and content only, got also tool_calls",
        ),
        (
            {"prompt": "other", "chosen": said(("user", "q"), ("assistant", "a")), "rejected": "b"},
            "prompts-differ",
            "does not occur among the messages of chosen",
        ),
    ],
)
def test_trl_refusals(row: dict[str, object], kind: str, message: str) -> None:
    refused(row, kind, message)


STRENGTH = {
    "GPT4 label": 1,
    "mean preference difference": 1.0,
    "std preference difference": 0.8,
    "chosen score list": [2.0, 1.0, 0.5],
    "rejected score list": [0.0, 0.0, 0.5],
}


@pytest.mark.parametrize(
    "chosen",
    [
        HH["chosen"],
        ["Hi there", "Hello!", "Sing", "La la."],
        ["Human: Hi there", "Assistant: Hello!", "Human: Sing", "Assistant: La la."],
        ["\n\nHuman: Hi there", "\n\nAssistant: Hello!", "\n\nHuman: Sing", "\n\nAssistant: La la."],
        [HH["chosen"]],
        said(("user", "Hi there"), ("assistant", "Hello!"), ("user", "Sing"), ("assistant", "La la.")),
    ],
)
def test_published_rows_in_all_their_shapes(chosen: object) -> None:
    row = {"chosen": chosen, "rejected": ["Hi there", "Hello!", "Sing", "No."], **STRENGTH}
    assert detect_format(row) == "strength"
    assert content(from_strength(row)) == (DIALOGUE, "La la.", "No.")


def test_published_strength_is_read_back() -> None:
    assert read_margins(STRENGTH) == (2.0, 1.0, 0.0)
    s = read_strength(STRENGTH)
    assert s is not None
    # Two members for chosen, one tie; p_flip = (0.1192029 + 0.2689414 + 0.5) / 3.
    assert (s.mean, s.std, s.votes, s.voters) == (1.0, 0.8, 2.5, 3)
    assert s.p_flip == pytest.approx(0.2960481, abs=1e-6)
    alone = read_strength({"mean preference difference": -800.0})
    assert alone is not None
    assert (alone.p_flip, alone.voters) == (1.0, 0)
    assert read_strength(HH) is None
    assert [read_judge_label({"GPT4 label": x}) for x in (1, 0, -1, None)] == [1, 0, None, None]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean preference difference": "big"}, "must be a number, got str 'big'"),
        ({"chosen score list": [1.0]}, "lists of equal length"),
        ({"chosen score list": [1.0, None, 2.0]}, "chosen score list[1] must be a number"),
    ],
)
def test_published_refusals(change: dict[str, object], message: str) -> None:
    with pytest.raises(RowError, match=re.escape(message)):
        from_strength({**HH, **STRENGTH, **change})


def test_a_chance_of_a_wrong_label_is_one() -> None:
    with pytest.raises(RowError, match=re.escape("p_flip must lie in [0, 1], got 1.7")):
        read_strength({"strength_mean": -1, "p_flip": 1.7})


def test_odd_bare_turns_are_counted_from_the_end() -> None:
    assert [m.role for m in parse_turns(["c", "a", "b"])] == ["assistant", "user", "assistant"]


def test_prompts_and_demonstrations() -> None:
    assert read_prompt({"prompt": "q"}) == "q"
    assert read_prompt({"turns": ["first", "second"]}) == "first"
    assert read_prompt({"prompt": said(("user", "q"))}) == (Message("user", "q"),)
    assert read_prompt(HH) == DIALOGUE
    assert read_demonstration({"prompt": "q", "completion": "a"}) == ("q", "a")
    assert read_demonstration({"prompt": "q", "response": "a"}) == ("q", "a")
    dialogue = said(("user", "q"), ("assistant", "a"))
    assert read_demonstration({"messages": dialogue}) == ((Message("user", "q"),), "a")
    conversation = {"prompt": dialogue[:1], "completion": dialogue[1:]}
    assert read_demonstration(conversation) == ((Message("user", "q"),), "a")
    bad: list[dict[str, object]] = [{"text": "x"}, {"turns": "x"}, {"turns": []}, {"prompt": ""}]
    for row in bad:
        with pytest.raises(RowError):
            read_prompt(row)
    for incomplete in [{"prompt": "q"}, {"response": "a"}, {"prompt": "q", "response": "a", "completion": "b"}]:
        with pytest.raises(RowError, match="columns received: "):
            read_demonstration(incomplete)
    with pytest.raises(RowError, match="response is empty"):
        read_demonstration({"prompt": "q", "response": " "})
    with pytest.raises(RowError, match="prompt is empty"):
        read_demonstration({"messages": said(("assistant", "a"))})
