"""Conversations as data files write them: transcripts, lists of turns, messages.

Text is kept as it is: no stripping, no merging of turns. What does not fit raises `RowError`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast, get_args

from steelyard.types import Message, Prompt, Role

_SPEAKERS: dict[str, Role] = {"Human": "user", "Assistant": "assistant", "System": "system"}
# A system turn counts only as the first one: HH-RLHF has none, so "System:" at the start of a later paragraph is what
# somebody said. Text that begins with it is a transcript only if "Human:" follows: others write "User:".
_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant): ?|\A\s*(System): ?")
_MESSAGE_FIELDS = ("role", "content", "name")
_TURN_PREFIX = re.compile(r"\s*(Human|Assistant|System): ?")
_TRANSCRIPT_START = re.compile(r"\s*(?:(?:Human|Assistant):|System:.*?\n\nHuman:)", re.DOTALL)


class RowError(ValueError):
    """A row that does not fit. `kind` is one word for counting; the message says what must hold and what came."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def is_transcript(value: object) -> bool:
    return isinstance(value, str) and bool(_TRANSCRIPT_START.match(value)) and "Assistant:" in value


def parse_transcript(text: str, *, name: str = "text") -> tuple[Message, ...]:
    """Turn "\\n\\nHuman: a\\n\\nAssistant: b" into messages. Only the one space after the colon is taken off.

    "System:" is a turn only at the start. Raises `RowError` ("schema") when the text does not start with a speaker.
    """
    marks = list(_TURN.finditer(text))
    if not marks or text[: marks[0].start()].strip():
        known = "'Human:', 'Assistant:' or 'System:'"
        raise RowError("schema", f"{name} must start with {known}, it starts with {text[:40]!r}")
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return tuple(
        Message(_SPEAKERS[mark[1] or mark[2]], text[mark.end() : end]) for mark, end in zip(marks, ends, strict=True)
    )


def to_transcript(messages: Sequence[Message]) -> str:
    """The inverse of `parse_transcript`, of conversations with no system turn but at the start."""
    names = {role: name for name, role in _SPEAKERS.items()}
    return "".join(f"\n\n{names[m.role]}: {m.content}" for m in messages)


def prompt_text(prompt: Prompt) -> str:
    """A prompt in one text for tables and people: a conversation as "role: content", turns apart by a blank line."""
    return prompt if isinstance(prompt, str) else "\n\n".join(f"{turn.role}: {turn.content}" for turn in prompt)


def parse_turns(turns: Sequence[Any], *, name: str = "turns") -> tuple[Message, ...]:
    """Turn a list of turns into messages: messages, "Human: ..." texts, or bare texts.

    Bare texts take turns, counted from the end: the last is the assistant's (as in the official reader of the
    published data). Raises `RowError`.
    """
    if turns and all(isinstance(turn, Mapping) for turn in turns):
        return parse_messages(turns, name=name)
    texts = [text_of(turn, f"{name}[{i}]") for i, turn in enumerate(turns)]
    if len(texts) == 1 and is_transcript(texts[0]):
        return parse_transcript(texts[0], name=name)
    marks = [_TURN_PREFIX.match(text) for text in texts]
    if all(marks):
        found = cast("list[re.Match[str]]", marks)
        return tuple(Message(_SPEAKERS[m[1]], t[m.end() :]) for m, t in zip(found, texts, strict=True))
    odd = len(texts) % 2
    return tuple(Message("assistant" if (i + odd) % 2 else "user", text) for i, text in enumerate(texts))


def parse_messages(value: Any, *, name: str) -> tuple[Message, ...]:
    """Check a list of `{"role", "content"}` and turn it into messages.

    `name`, which says who speaks, is passed over, as chat templates do, and so are fields that are empty. Raises
    `RowError`, also for every other field (`tool_calls`, ...): it would be lost without a word.
    """
    if not isinstance(value, list) or not value:
        raise RowError("type", f"{name} must be a list of messages, got {shown(value)}")
    messages = []
    for i, item in enumerate(value):
        if not isinstance(item, Mapping) or "role" not in item or "content" not in item:
            raise RowError("type", f"{name}[{i}] must be {{'role', 'content'}}, got {shown(item)}")
        if item["role"] not in get_args(Role):
            known = ", ".join(get_args(Role))
            raise RowError("type", f"{name}[{i}].role must be one of {known}, got {shown(item['role'])}")
        if lost := [str(key) for key, value in item.items() if key not in _MESSAGE_FIELDS and not is_empty(value)]:
            raise RowError(
                "schema",
                f"{name}[{i}] must hold role and content only, got also {', '.join(lost)}: write into content what "
                "counts of it, and remove it",
            )
        messages.append(Message(item["role"], text_of(item["content"], f"{name}[{i}].content")))
    return tuple(messages)


def split_dialogue(messages: tuple[Message, ...], *, name: str) -> tuple[tuple[Message, ...], str]:
    """Split a dialogue into its prompt and the assistant's last turn. Raises `RowError`."""
    if not messages or messages[-1].role != "assistant":
        got = messages[-1].role if messages else "nothing"
        raise RowError("schema", f"{name} must end with a turn of the assistant, it ends with {got}")
    return messages[:-1], messages[-1].content


def is_empty(value: object) -> bool:
    return value is None or (isinstance(value, (str, list, Mapping)) and not value)


def text_of(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RowError("type", f"{name} must be text, got {shown(value)}")
    return value


def shown(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
