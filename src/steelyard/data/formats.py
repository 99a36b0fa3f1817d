"""One function per public schema of preference data: a row in, a `Preference` out.

Formats known to `detect_format`:

- `hh`: Anthropic HH-RLHF; `chosen` and `rejected` are whole dialogues, as one transcript
  ("\\n\\nHuman: ... \\n\\nAssistant: ...", perhaps after "\\n\\nSystem: ...") or as a list of turns. The last
  assistant turn is the response.
- `trl`: TRL's `prompt`, `chosen`, `rejected` as text or as messages `[{"role", "content"}]`; without `prompt`, what
  `chosen` and `rejected` share at their start is the prompt.
- `strength`: `fnlp/hh-rlhf-strength-cleaned`, the data set published with Secrets of RLHF II (arXiv 2401.06080,
  section 2.2): dialogues with the ensemble's scores.

Columns `flip_prob`, `margin` and `weight` are read into the `Preference` in every format. Text is kept as it is: no
stripping, no merging of turns. A row that does not fit raises `RowError`; the loader adds file and line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast, get_args

from steelyard.data.dialogues import (
    RowError,
    is_transcript,
    parse_messages,
    parse_transcript,
    parse_turns,
    shown,
    split_dialogue,
    text_of,
)
from steelyard.types import Action, Message, Preference, Prompt, Strength

Row = Mapping[str, Any]

MEAN, STD = "mean preference difference", "std preference difference"
CHOSEN_SCORES, REJECTED_SCORES = "chosen score list", "rejected score list"
JUDGE_LABEL = "GPT4 label"
PUBLISHED_COLUMNS = (JUDGE_LABEL, MEAN, STD, CHOSEN_SCORES, REJECTED_SCORES)
ANNOTATION_COLUMNS = (
    "strength_mean",
    "strength_std",
    "votes",
    "voters",
    "p_flip",
    "suggested_action",
    "reason",
)

KNOWN_FORMATS = (
    "hh (chosen and rejected as '\\n\\nHuman: ... \\n\\nAssistant: ...' transcripts or lists of turns), "
    "trl (prompt, chosen, rejected as text or messages; the prompt may be implicit), "
    f"strength (chosen, rejected, '{MEAN}', ...)"
)

# ---- which format --------------------------------------------------------------------------------------------


def detect_format(row: Row) -> str:
    """Name the format of a row: "hh", "trl" or "strength".

    Raises `RowError` ("schema") with the columns received and the formats known when none fits.
    """
    missing = [name for name in ("chosen", "rejected") if row.get(name) is None]
    if missing:
        received = ", ".join(map(str, row)) or "none"
        what = f"no value in column {' and '.join(missing)}; columns received: {received}"
        raise RowError("schema", f"{what}; known formats: {KNOWN_FORMATS}")
    if row.get("prompt") is not None:
        return "trl"
    if row.get(MEAN) is not None:
        return "strength"
    chosen, rejected = row["chosen"], row["rejected"]
    if is_transcript(chosen) or is_transcript(rejected) or _is_turns(chosen):
        return "hh"
    return "trl"


def _is_turns(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(turn, str) for turn in value)


# ---- the formats ---------------------------------------------------------------------------------------------


def from_hh(row: Row, *, id: str = "", source: str = "") -> Preference:
    """HH-RLHF: two dialogues that agree up to their last turn, which both give to the assistant.

    Without `id` the row's own `id` is taken. Raises `RowError`.
    """
    prompt, chosen = split_dialogue(_dialogue(row, "chosen"), name="chosen")
    other, rejected = split_dialogue(_dialogue(row, "rejected"), name="rejected")
    if prompt != other:
        shared = _shared(prompt, other)
        raise RowError(
            "prompts-differ",
            "chosen and rejected must share every turn but the last: "
            f"chosen has {len(prompt) + 1} turns, rejected {len(other) + 1}, and they part at turn {shared + 1}",
        )
    return _preference(row, prompt, chosen, rejected, id, source)


def from_trl(row: Row, *, id: str = "", source: str = "") -> Preference:
    """TRL: `prompt`, `chosen`, `rejected` as text or messages, the prompt explicit or implicit.

    An implicit prompt in text is what both texts share at their start, cut back to the last whole word; a space
    at the cut belongs to the responses, as in TRL. Two equal texts with an implicit prompt cannot be split and
    raise `RowError` ("identical"); nor can two of which one begins with the other ("schema"). Raises `RowError` for
    everything else that does not fit.
    """
    prompt, chosen, rejected = row.get("prompt"), _field(row, "chosen"), _field(row, "rejected")
    if isinstance(chosen, list) or isinstance(rejected, list):
        first, chosen_text = _completion(prompt, chosen, "chosen")
        other, rejected_text = _completion(prompt, rejected, "rejected")
        if first != other:
            raise RowError("prompts-differ", "chosen and rejected must share every message but the last")
        return _preference(row, first, chosen_text, rejected_text, id, source)
    chosen, rejected = text_of(chosen, "chosen"), text_of(rejected, "rejected")
    if prompt is None:
        cut = _implicit_cut(chosen, rejected)
        prompt, chosen, rejected = chosen[:cut], chosen[cut:], rejected[cut:]
    return _preference(row, to_prompt(prompt), chosen, rejected, id, source)


def from_strength(row: Row, *, id: str = "", source: str = "") -> Preference:
    """The published strength format; `read_strength` reads its measurements. Raises `RowError`."""
    if row.get(MEAN) is None:
        raise RowError("schema", f"column '{MEAN}' must hold a number; columns received: {', '.join(row)}")
    read_strength(row)
    explicit = row.get("prompt") is not None
    return (from_trl if explicit else from_hh)(row, id=id, source=source)


FORMATS: dict[str, Callable[..., Preference]] = {"hh": from_hh, "trl": from_trl, "strength": from_strength}


# ---- the sides of a pair ----------------------------------------------------------------------------------------


def _dialogue(row: Row, name: str) -> tuple[Message, ...]:
    value = _field(row, name)
    if isinstance(value, list):
        return parse_turns(value, name=name)
    text = text_of(value, name)
    if not text.strip():
        raise RowError("empty", f"{name} is empty")
    return parse_transcript(text, name=name)


def _completion(prompt: Any, value: Any, name: str) -> tuple[tuple[Message, ...], str]:
    """The prompt and response of one side of a TRL row in messages; the side may repeat the prompt."""
    said, response = split_dialogue(parse_messages(value, name=name), name=name)
    if prompt is None:
        return said, response
    asked = to_prompt(prompt)
    if isinstance(asked, str):
        if said and all(message.content != asked for message in said):
            raise RowError("prompts-differ", f"the prompt does not occur among the messages of {name}")
        return said or (Message("user", asked),), response
    if said not in ((), asked):
        raise RowError("prompts-differ", f"{name} must repeat the prompt exactly or hold the response alone")
    return asked, response


def _implicit_cut(chosen: str, rejected: str) -> int:
    """Where the shared start of two texts ends: at a word's boundary, a space going to the responses."""
    if chosen == rejected:
        raise RowError("identical", "chosen and rejected are equal: the pair says nothing")
    cut = _shared(chosen, rejected)
    inside = any(cut < len(text) and not text[cut].isspace() for text in (chosen, rejected))
    while inside and cut > 0 and not chosen[cut - 1].isspace():
        cut -= 1
    if cut > 0 and chosen[cut - 1] == " ":
        cut -= 1
    if not chosen[:cut].strip():
        raise RowError("empty", "prompt is empty: there is no prompt column and chosen and rejected share no start")
    if not chosen[cut:].strip() or not rejected[cut:].strip():
        short, other = ("chosen", "rejected") if len(chosen) < len(rejected) else ("rejected", "chosen")
        raise RowError(
            "schema",
            f"the prompt cannot be told from the responses: there is no prompt column and {other} begins with all of "
            f"{short}; add a prompt column",
        )
    return cut


def _shared(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Length of the common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# ---- prompts and demonstrations ------------------------------------------------------------------------------


def to_prompt(value: Any, *, name: str = "prompt") -> Prompt:
    """A prompt from text or messages. Raises `RowError`, also when it is empty."""
    prompt = parse_messages(value, name=name) if isinstance(value, list) and value else value
    if prompt is None or prompt == []:
        raise RowError("empty", f"{name} is empty")
    _refuse_empty(prompt if isinstance(prompt, tuple) else text_of(prompt, name), name)
    return cast(Prompt, prompt)


def read_prompt(row: Row) -> Prompt:
    """The prompt of a row: `turns` (its first), a preference's prompt, or `prompt`. Raises `RowError`."""
    if row.get("chosen") is not None and row.get("rejected") is not None:
        return FORMATS[detect_format(row)](row).prompt
    if row.get("prompt") is not None:
        return to_prompt(row["prompt"])
    turns = row.get("turns")
    if turns is not None:
        if not isinstance(turns, list) or not turns:
            raise RowError("type", f"turns must be a list of texts, got {shown(turns)}")
        return to_prompt(turns[0], name="turns[0]")
    raise RowError(
        "schema",
        f"columns received: {', '.join(map(str, row)) or 'none'}; a prompt needs 'prompt' (text or messages), "
        "'turns' (a list of texts) or a preference (chosen, rejected)",
    )


def read_demonstration(row: Row) -> tuple[Prompt, str]:
    """Prompt and response for SFT: `prompt` with `response` or `completion`, or `messages`. Raises `RowError`."""
    given = [name for name in ("response", "completion", "messages") if row.get(name) is not None]
    if len(given) != 1 or (given != ["messages"] and row.get("prompt") is None):
        raise RowError(
            "schema",
            f"columns received: {', '.join(map(str, row)) or 'none'}; a demonstration needs 'prompt' with exactly "
            "one of 'response' and 'completion', or 'messages' alone",
        )
    value = row[given[0]]
    prompt: Prompt
    if given == ["messages"]:
        prompt, response = split_dialogue(parse_messages(value, name="messages"), name="messages")
    elif isinstance(value, list):
        prompt, response = _completion(row["prompt"], value, given[0])
    else:
        prompt, response = to_prompt(row["prompt"]), text_of(value, given[0])
    _refuse_empty(prompt, "prompt")
    _refuse_empty(response, given[0])
    return prompt, response


# ---- measurements in a row -----------------------------------------------------------------------------------


def read_strength(row: Row) -> Strength | None:
    """The strength that a row carries: Steelyard's own columns, else the published ones, else None.

    Mean and std are taken as recorded. Where the row does not say how members voted, `votes` and `voters` are 0.
    For published rows p_flip = mean_m sigmoid(-d_m) over the listed members, or sigmoid(-mean) without lists.
    Raises `RowError` when a measurement is not a number, p_flip not in [0, 1], or the lists do not match.
    """
    if row.get("strength_mean") is not None:
        action = row.get("suggested_action") or "keep"
        if action not in get_args(Action):
            known = ", ".join(get_args(Action))
            raise RowError("value", f"suggested_action must be one of {known}, got {shown(action)}")
        mean = number(row, "strength_mean")
        p_flip = number(row, "p_flip", default=_sigmoid(-mean))
        if not 0.0 <= p_flip <= 1.0:
            raise RowError("value", f"p_flip must lie in [0, 1], got {p_flip}")
        return Strength(
            mean=mean,
            std=number(row, "strength_std"),
            votes=number(row, "votes"),
            voters=int(number(row, "voters")),
            p_flip=p_flip,
            action=cast(Action, action),
            reason=str(row.get("reason") or ""),
        )
    if row.get(MEAN) is None:
        return None
    mean, margins = number(row, MEAN), read_margins(row)
    votes = sum(1.0 if d > 0 else 0.5 if d == 0 else 0.0 for d in margins)
    p_flip = sum(_sigmoid(-d) for d in margins) / len(margins) if margins else _sigmoid(-mean)
    return Strength(mean, number(row, STD), votes, len(margins), p_flip)


def read_margins(row: Row) -> tuple[float, ...]:
    """The members' margins, chosen score minus rejected score, of a published row; () without lists.

    Raises `RowError` when the lists do not match in length or hold something else than numbers.
    """
    chosen, rejected = row.get(CHOSEN_SCORES), row.get(REJECTED_SCORES)
    if chosen is None and rejected is None:
        return ()
    if not isinstance(chosen, list) or not isinstance(rejected, list) or len(chosen) != len(rejected):
        raise RowError("type", f"'{CHOSEN_SCORES}' and '{REJECTED_SCORES}' must be lists of equal length")
    return tuple(
        _finite(c, f"{CHOSEN_SCORES}[{m}]") - _finite(r, f"{REJECTED_SCORES}[{m}]")
        for m, (c, r) in enumerate(zip(chosen, rejected, strict=True))
    )


def read_judge_label(row: Row) -> int | None:
    """`GPT4 label`: 1 prefers chosen, 0 prefers rejected, None (-1 in the file, or no column) not judged."""
    value = row.get(JUDGE_LABEL)
    if value is None or value == -1:
        return None
    if isinstance(value, bool) or value not in (0, 1):
        raise RowError("value", f"'{JUDGE_LABEL}' must be 1, 0 or -1, got {shown(value)}")
    return int(value)


def number(row: Row, name: str, *, default: float = 0.0) -> float:
    """A finite number from a column; `default` where the column is absent or null. Raises `RowError`."""
    value = row.get(name)
    return default if value is None else _finite(value, name)


# ---- small checks --------------------------------------------------------------------------------------------


def _preference(row: Row, prompt: Prompt, chosen: str, rejected: str, id: str, source: str) -> Preference:
    for name, value in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
        _refuse_empty(value, name)
    if not id:
        id = "" if row.get("id") is None else str(row["id"])
    flip_prob, margin, weight = number(row, "flip_prob"), number(row, "margin"), number(row, "weight", default=1)
    try:
        return Preference(id, prompt, chosen, rejected, flip_prob, margin, weight, source, row)
    except ValueError as error:
        raise RowError("value", str(error).removeprefix(f"{source or id}: ")) from error


def _refuse_empty(value: Prompt, name: str) -> None:
    texts = [value] if isinstance(value, str) else [message.content for message in value]
    if not any(text.strip() for text in texts):
        raise RowError("empty", f"{name} is empty")


def _field(row: Row, name: str) -> Any:
    if row.get(name) is None:
        raise RowError("schema", f"no value in column {name}; columns received: {', '.join(map(str, row))}")
    return row[name]


def _finite(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RowError("type", f"{name} must be a number, got {shown(value)}")
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result):
        raise RowError("value", f"{name} must be finite, got {shown(value)}")
    return result


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))
