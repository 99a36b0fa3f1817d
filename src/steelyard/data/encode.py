"""Text to tokens, in one place, for training, strength, sampling, scoring and serving.

A sequence is `tokenise(prompt) + tokenise(response) + end`. The prompt and the response are tokenised apart, so
the boundary between them is known exactly, no BPE merge crosses it, and a sampled response (which starts after
the prompt's tokens) is scored on the very tokens that were drawn. The reward is read at the last token.

With a chat template the prompt is the conversation with the generation prompt appended, and `end` is the token
that the template puts after an assistant turn. Without one, a conversation is written as an HH-RLHF transcript,
plain text as it is, and `end` is the tokenizer's EOS.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from steelyard.errors import InputError
from steelyard.types import Message, Preference, Prompt

OnOverlong = Literal["drop", "truncate-prompt", "error"]
_SPEAKER = {"system": "System", "user": "Human", "assistant": "Assistant"}


@dataclass(frozen=True, slots=True)
class Tree:
    """One prompt and the K responses that share it, as token ids (end token included where there is one)."""

    prompt: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.prompt) + sum(map(len, self.responses))

    @property
    def longest(self) -> int:
        """Tokens of the prompt with the longest response: what counts against the model's context."""
        return len(self.prompt) + max(map(len, self.responses))


@dataclass(frozen=True, slots=True)
class Encoded:
    """Preferences as trees, `index[i]` saying which preference `trees[i]` came from; and what was left out or cut."""

    trees: list[Tree]
    index: list[int]
    left_out: dict[int, str]
    truncated: int = 0

    def text(self) -> str:
        """One line on what was left out or cut, empty if nothing was."""
        kinds = Counter(self.left_out.values())
        said = [f"{count} pairs left out: {reason}" for reason, count in sorted(kinds.items())]
        if self.truncated:
            said.append(f"{self.truncated} pairs lost the start of a prompt longer than max_length")
        return "; ".join(said)


class Encoder:
    """The tokenizer with the rules of this file. `max_length` counts prompt and one response, in tokens."""

    def __init__(self, tokenizer: Any, *, max_length: int = 1024, on_overlong: OnOverlong = "truncate-prompt") -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.on_overlong = on_overlong
        self.templated = bool(getattr(tokenizer, "chat_template", None))
        end_id = self._end_of_turn() if self.templated else tokenizer.eos_token_id
        if end_id is None:
            raise InputError("the tokenizer must name an end token (eos_token); set one and save it again")
        self.end_id = int(end_id)
        self.pad_id = _pad_id(tokenizer, self.end_id)

    @classmethod
    def load(
        cls, folder: str | Path, *, max_length: int = 1024, on_overlong: OnOverlong = "truncate-prompt"
    ) -> Encoder:
        """Read the tokenizer saved in a model folder. Raises InputError if there is none."""
        from transformers import AutoTokenizer

        if not Path(folder).is_dir():
            raise InputError(f"{folder}: no such model folder (tokenizer_config.json is missing); download one first")
        refuse_run(folder)
        if not (Path(folder) / "tokenizer_config.json").exists():
            raise InputError(f"{folder}: a model folder must hold its tokenizer (tokenizer_config.json is missing)")
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # The Rust tokenizers raise nothing more special for a damaged file.
            raise InputError(f"{folder}: its tokenizer or config.json cannot be read: {error}") from error
        return cls(tokenizer, max_length=max_length, on_overlong=on_overlong)

    def prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """Tokens of everything before the response. Raises InputError if the chat template refuses the conversation."""
        if self.templated:
            turns = (Message("user", prompt),) if isinstance(prompt, str) else prompt
            text = self._render(turns, add_generation_prompt=True)
            return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)
        ids = list(self.tokenizer(self._transcript(prompt)).input_ids)
        return tuple(ids[:-1] if ids and ids[-1] == self.end_id else ids)

    def response_ids(self, text: str, *, ended: bool = True) -> tuple[int, ...]:
        """Tokens of a response; `ended=False` for one that was cut off and so has no end token."""
        ids = tuple(self.tokenizer(text, add_special_tokens=False).input_ids)
        return (*ids, self.end_id) if ended else ids

    def tree(self, prompt: Prompt, responses: Sequence[str]) -> Tree:
        """Raises OverlongError when the longest response does not fit and the setting does not mend it."""
        return self.fit(prompt, tuple(self.response_ids(r) for r in responses))

    def fit(self, prompt: Prompt, responses: tuple[tuple[int, ...], ...]) -> Tree:
        """A tree within `max_length`: the oldest turns go first, then the prompt's oldest tokens."""
        return self._fit(prompt, responses)[0]

    def _fit(self, prompt: Prompt, responses: tuple[tuple[int, ...], ...]) -> tuple[Tree, bool]:
        """The tree, and whether its prompt was cut."""
        ids = self.prompt_ids(prompt)
        room = self.max_length - max(map(len, responses))
        if len(ids) <= room:
            return Tree(ids, responses), False
        if self.on_overlong != "truncate-prompt" or room < 1:
            raise OverlongError(
                f"prompt and response have {len(ids) + self.max_length - room} tokens, more than "
                f"max_length = {self.max_length}"
            )
        while not isinstance(prompt, str) and len(prompt) > 1 and len(ids) > room:
            prompt = prompt[1:]
            # Chat templates refuse a conversation that begins with the assistant.
            while len(prompt) > 1 and prompt[0].role == "assistant":
                prompt = prompt[1:]
            ids = self.prompt_ids(prompt)
        return Tree(ids[-room:], responses), True

    def encode(self, preferences: Sequence[Preference]) -> Encoded:
        """Pairs as trees (chosen first).

        Raises InputError on an over-long pair if `on_overlong` is "error", and on one that the chat template refuses.
        """
        trees, index, left_out, truncated = [], [], {}, 0
        for i, p in enumerate(preferences):
            try:
                tree, cut = self._fit(p.prompt, (self.response_ids(p.chosen), self.response_ids(p.rejected)))
            except OverlongError as error:
                if self.on_overlong == "error":
                    raise InputError(
                        f"{p.source or p.id}: {error}; raise max_length, or use --on-overlong drop|truncate-prompt"
                    ) from None
                left_out[i] = "longer than max_length"
                continue
            except InputError as error:
                raise InputError(f"{p.source or p.id}: {error}") from None
            if tree.responses[0] == tree.responses[1]:
                left_out[i] = "chosen and rejected are the same tokens"
                continue
            trees.append(tree)
            index.append(i)
            truncated += cut
        return Encoded(trees, index, left_out, truncated)

    def with_room(self, prompts: Sequence[Prompt], new_tokens: int, path: str) -> list[int]:
        """Numbers of the prompts from `path` that leave room for a response; says so where not all do.

        Raises InputError if none does.
        """
        room = self.max_length - new_tokens
        fits = [i for i, prompt in enumerate(prompts) if len(self.prompt_ids(prompt)) <= room]
        said = (
            f"{path}: {len(fits)} of {len(prompts)} different prompts leave room for {new_tokens} new tokens within "
            f"max_length = {self.max_length}"
        )
        if not fits:
            raise InputError(f"{said}; raise max_length, or lower sampling.max_new_tokens")
        if len(fits) < len(prompts):
            print(f"{said}; the others are left out", flush=True)
        return fits

    def reads_as(self, other: Encoder) -> bool:
        """Whether both turn every text into the same tokens: what one was scored on, the other reads alike."""

        def habits(encoder: Encoder) -> tuple[Any, ...]:
            own = encoder.tokenizer
            # A token that is added to the beginning, or another end, stands in no vocabulary's difference.
            tried = encoder.prompt_ids("Which one?"), encoder.response_ids("This one.")
            return own.get_vocab(), own.chat_template, encoder.end_id, tried

        return habits(self) == habits(other)

    def require_same(self, folder: str | Path, *, what: str, of: str) -> None:
        """Raise InputError unless the tokenizer in `folder` reads texts as this one does: `what` scores the tokens that
        the model in `of` drew."""
        if not self.reads_as(Encoder.load(folder, max_length=self.max_length)):
            raise InputError(
                f"{folder}: the {what} must share one tokenizer with {of} (vocabulary, chat template, tokens at the "
                "beginning and at the end), for it reads the tokens that were drawn; train both from one model"
            )

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a response, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer, padding with `pad_id`: whoever pads with it then pools where rewards are read here."""
        tokenizer = copy.deepcopy(self.tokenizer)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(self.pad_id)
        tokenizer.save_pretrained(folder)

    def _transcript(self, prompt: Prompt) -> str:
        if isinstance(prompt, str):
            return prompt
        return "".join(f"\n\n{_SPEAKER[t.role]}: {t.content}" for t in prompt) + "\n\nAssistant:"

    def _render(self, turns: Sequence[Message], **options: Any) -> str:
        """The conversation as the chat template writes it."""
        from jinja2 import TemplateError  # What templates refuse with, and raise where they are wrong.

        messages = [{"role": t.role, "content": t.content} for t in turns]
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **options))
        except TemplateError as error:
            raise InputError(
                f"the tokenizer's chat template refuses the turns {', '.join(t.role for t in turns)}: {error}; change "
                "them (a system turn's text can open the first user turn, two turns of one role can be one), or use a "
                "model whose template takes them"
            ) from None

    def _end_of_turn(self) -> int | None:
        """The token after an assistant turn: some templates close turns with another token than EOS."""
        mark = "wxyzzyw"
        text = self._render([Message("user", "?"), Message("assistant", mark)])
        tail = self.tokenizer(text[text.rindex(mark) + len(mark) :], add_special_tokens=False).input_ids
        special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
        return int(tail[0]) if tail and tail[0] in special else self.tokenizer.eos_token_id


def refuse_run(folder: str | Path) -> None:
    """Raise InputError, naming the model in it, if a training run's folder is given for a model's."""
    inner = Path(folder) / "model"
    if (inner / "config.json").exists() and not (Path(folder) / "tokenizer_config.json").exists():
        raise InputError(f"{folder}: holds a run, not a model; name the model in it: {inner}")


class OverlongError(ValueError):
    """A pair does not fit into `max_length` tokens."""


def _pad_id(tokenizer: Any, end_id: int) -> int:
    """A padding token that is not the end token.

    transformers pools a classifier at the last token that is not padding: with pad == end it would read the
    token *before* the end, and a checkpoint would score differently there than here.
    """
    for candidate in (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id):
        if candidate is not None and candidate != end_id:
            return int(candidate)
    others = [i for i in tokenizer.all_special_ids if i != end_id]
    if others:
        return int(others[0])
    raise InputError(
        "the tokenizer has no token to pad with but its end token; add a pad token (tokenizer.add_special_tokens)"
    )
