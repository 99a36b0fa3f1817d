"""Files of answers: what policies said to prompts, one JSON line an answer, to be judged later."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from steelyard.data.dialogues import RowError
from steelyard.data.formats import to_prompt
from steelyard.data.read import read_rows
from steelyard.data.split import prompt_key
from steelyard.errors import InputError
from steelyard.evaluate.policy import Answers
from steelyard.run_dir import write_text_atomic
from steelyard.types import Prompt

FOLDER = "answers"  # within evaluate/


@dataclass(frozen=True, slots=True)
class Answer:
    """One response to one prompt; `ended` is False where it was cut off."""

    prompt: Prompt
    response: str
    ended: bool = True


def write_answers(folder: Path, answers: Mapping[str, Answers], prompts: Sequence[Prompt]) -> None:
    """One file for each policy, named after it (characters that file names cannot hold are quoted as in addresses)."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, held in answers.items():
        lines = []
        for n, prompt in enumerate(prompts):
            asked = prompt if isinstance(prompt, str) else [{"role": m.role, "content": m.content} for m in prompt]
            for k, text in enumerate(held.texts[n]):
                row: dict[str, Any] = {"prompt": asked, "response": text, "ended": bool(held.ended_NK[n, k])}
                row |= {"tokens": int(held.length_NK[n, k]), "kl": float(held.kl_NK[n, k])}
                row |= {"proxy": float(held.proxy_NK[n, k])}
                row |= {} if held.gold_NK is None else {"gold": float(held.gold_NK[n, k])}
                lines.append(json.dumps(row) + "\n")
        write_text_atomic(folder / f"{quote(name, safe=' +,()')}.jsonl", "".join(lines))


def read_folder(run: str | Path) -> dict[str, dict[str, list[Answer]]]:
    """Policy -> prompt key -> answers, of a folder that `evaluate policy` or a recipe left. Raises InputError.

    The order of the policies is that of `evaluate/policy.json`: the SFT model first.
    """
    folder = Path(run) / "evaluate" / FOLDER
    files = {unquote(p.stem): p for p in sorted(folder.glob("*.jsonl"))}
    if not files:
        raise InputError(f"{folder}: no answers in it; make them with `steelyard evaluate policy`, or give files")
    summary = folder.parent / "policy.json"
    try:
        named = [arm["arm"] for arm in json.loads(summary.read_text())["arms"]] if summary.exists() else []
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(f"{summary}: must be what `evaluate policy` wrote ({error!r}); restore it") from None
    order = [name for name in named if name in files] + [name for name in files if name not in named]
    return {name: read_answers(files[name]) for name in order}


def read_answers(path: str | Path) -> dict[str, list[Answer]]:
    """Prompt key -> its answers, in the file's order. Rows have `prompt` (text or messages), `response` and, if they
    may have been cut off, `ended`. An empty response is an answer, too.

    Raises InputError with file and line.
    """
    found: dict[str, list[Answer]] = {}
    for line, row in read_rows(path):
        try:
            if isinstance(row, RowError):
                raise row
            answer = _answer(row)
        except RowError as error:
            raise InputError(f"{path}:{line}: {error}") from None
        found.setdefault(prompt_key(answer.prompt), []).append(answer)
    if not found:
        raise InputError(f"{path}: holds no rows; an answer needs 'prompt' and 'response'")
    return found


def _answer(row: Mapping[str, Any]) -> Answer:
    if missing := [name for name in ("prompt", "response") if row.get(name) is None]:
        raise RowError("schema", f"an answer needs 'prompt' and 'response'; {' and '.join(missing)} missing")
    if not isinstance(row["response"], str):
        raise RowError("type", f"response must be a text, got {type(row['response']).__name__}")
    ended = row.get("ended", True)
    if not isinstance(ended, bool):
        raise RowError("type", f"ended must be true or false, got {ended!r}")
    return Answer(to_prompt(row["prompt"]), row["response"], ended)
