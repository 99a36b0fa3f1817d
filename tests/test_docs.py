"""What the pages say can be typed: examples print what stands below them, options exist, recipes are read."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from steelyard.cli import GROUPS, VERBS, main

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    {ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("recipes/*/README.md")}
)
OPTION = re.compile(r"--([a-z][a-z0-9.-]*)")


class Block(NamedTuple):
    page: Path
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return [Block(page, language, text) for language, text in found]


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


# ---- Python ----------------------------------------------------------------------------------------------------


def run(text: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(compile(text, "example", "exec"), {"__name__": "example"})
    return said.getvalue()


EXAMPLES = [
    pytest.param(code, below, id=f"{named(page)}-{i}")
    for page in PAGES
    for i, (code, below) in enumerate(zip(blocks(page), blocks(page)[1:], strict=False))
    if code.language == "python" and not below.language and not below.text.startswith("steelyard")
]


@pytest.mark.parametrize(("code", "below"), EXAMPLES)
def test_an_example_prints_what_stands_below_it(code: Block, below: Block) -> None:
    assert run(code.text) == below.text


@pytest.mark.slow
def test_the_long_example_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = (b for b in blocks(ROOT / "README.md") if "write_world" in b.text)
    monkeypatch.chdir(tmp_path)
    assert run(example.text)
    assert (tmp_path / "runs" / "api" / "repaired.jsonl").exists()


# ---- commands --------------------------------------------------------------------------------------------------


class Command(NamedTuple):
    page: str
    verb: str
    args: list[str]


def commands() -> list[Command]:
    found = []
    for block in (b for page in PAGES for b in blocks(page) if b.language in ("", "sh", "bash")):
        for line in block.text.replace("\\\n", " ").splitlines():
            if not line.strip().startswith("steelyard "):
                continue
            words = shlex.split(line, comments=True)[1:]
            verb = " ".join(words[: 2 if words[0] in GROUPS else 1])
            if verb != "VERB":
                found.append(Command(named(block.page), verb, words[len(verb.split()) :]))
    return found


COMMANDS = commands()


@cache
def options(verb: str) -> set[str]:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main([*verb.split(), "--help"]) == 0
    return set(OPTION.findall(said.getvalue()))


@pytest.mark.parametrize("verb", sorted({c.verb for c in COMMANDS}))
def test_commands_on_the_pages_exist_with_their_options(verb: str) -> None:
    assert verb in VERBS
    for command in (c for c in COMMANDS if c.verb == verb):
        asked = {m[1] for word in command.args if (m := OPTION.match(word))}
        assert asked - options(verb) - {"help"} == set(), f"{command.page}: steelyard {verb} {shlex.join(command.args)}"


def test_recipes_that_the_pages_name_are_there() -> None:
    asked = {name for page in PAGES for name in re.findall(r"\brecipes/[\w-]+/[\w-]+\.yaml", page.read_text())}
    assert len(asked) > 8
    for name in sorted(asked):
        assert isinstance(yaml.safe_load((ROOT / name).read_text()), dict), name


# ---- names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if path.startswith(("http:", "https:", "mailto:")):
            continue
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{named(page)}: {target}"
        if anchor and there.suffix == ".md":
            heads = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in heads}, (
                f"{named(page)}: {target}"
            )
