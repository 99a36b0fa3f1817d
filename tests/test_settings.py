"""Settings from YAML and options: who wins, what counts as given, and what is said of mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import tyro
from pydantic import Field

from steelyard.config import Config
from steelyard.errors import InputError
from steelyard.settings import checked, override, parse, read_yaml
from steelyard.train.optim import OptimConfig
from steelyard.train.ppo import PPOConfig


class Wheel(Config):
    size: float = Field(1.0, gt=0, description="metres across")
    spokes: int = Field(8, ge=3, le=40, description="how many")
    solid: bool = Field(False, description="no spokes at all")


class Cart(Config):
    owner: str = Field(description="who pays")
    colour: Literal["red", "green"] = Field("red", description="paint")
    load: int = Field(2, ge=0, description="sacks")
    wheel: Wheel = Field(default_factory=lambda: Wheel(size=3.0), description="all of them")
    names: dict[str, str] = Field(default_factory=dict, description="horse -> name")


def read(args: list[str], **extra: Any) -> tuple[Cart, Any]:
    return parse(Cart, args, verb="build", about="builds a cart", **extra)


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    path = tmp_path / "cart.yaml"
    path.write_text("owner: Ann\nload: 5\nwheel: {spokes: 12}\n")
    return path


def test_options_win_over_the_file_and_the_rest_keeps_its_default(settings: Path) -> None:
    cart, extra = read(
        [str(settings), "--load", "2", "--names", "a", "Bo", "--wheel.solid"], out=(Path, Path("x"), "o")
    )
    assert cart == Cart(owner="Ann", load=2, names={"a": "Bo"}, wheel=Wheel(size=3.0, spokes=12, solid=True))
    assert extra.out == Path("x")
    # An option at its default still beats the file, and counts as given.
    assert cart.given() == {"owner", "load", "names", "wheel"}
    assert read(["--owner", "Bo"])[0].given() == {"owner"}
    assert read(["--owner=Bo", "--wheel.no-solid"])[0].wheel == Wheel(size=3.0, spokes=8, solid=False)


def test_a_section_given_in_part_keeps_the_default_of_its_owner() -> None:
    assert checked(Cart, {"owner": "Ann", "wheel": {"spokes": 5}}).wheel == Wheel(size=3.0, spokes=5)
    assert Cart(owner="Ann", wheel=Wheel(spokes=5)).wheel.size == 1.0, "a whole section is taken as it is"
    files = {"policy": "p", "reward_model": "r", "prompts": "x"}
    actor = checked(PPOConfig, files | {"actor": {"lr": 1e-4}}).actor
    assert actor == OptimConfig(lr=1e-4, decay=False)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--load", "-1"], "--load: must be at least 0, got -1"),
        (["--wheel.size", "0"], "--wheel.size: must be above 0, got 0.0"),
        (
            ["--wheel.spokes", "50", "--load", "-2"],
            "--load: must be at least 0, got -2\n--wheel.spokes: must be",
        ),
        (["--load", "1", "--load", "2"], "--load: given twice"),
        (["--names", "a", "Bo", "b", "Di", "a", "Ed"], "--names: a is named twice, and the first would be lost"),
    ],
)
def test_each_wrong_option_is_named_in_plain_words(args: list[str], said: str) -> None:
    with pytest.raises(InputError) as caught:
        read(["--owner", "Ann", *args])
    assert said in str(caught.value)
    assert "pydantic" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("load: many", "cart.yaml: load: must be a whole number, got 'many'"),
        ("load: 2.5", "cart.yaml: load: must be a whole number, got 2.5"),
        ("colour: blue", "cart.yaml: colour: must be 'red' or 'green', got 'blue'"),
        ("wheel: 3", "cart.yaml: wheel: must be a section of `name: value` lines, got 3"),
        ("wheel: {spoke: 3}", "cart.yaml: wheel.spoke: no such setting; remove it or check its spelling"),
        ("wheel: {solid: 7}", "cart.yaml: wheel.solid: must be true or false, got 7"),
        ("3: 4", "settings must have names of text, got"),
        ("- 1", "cart.yaml: settings must be `field: value` lines, got a list"),
        ("load: [1", 'cart.yaml", line'),
        ("owner: Bo", "owner stands twice in one section, and the first would be lost; keep one"),
        ("wheel: {size: 2, spokes: 9, size: 3}", "size stands twice in one section"),
        ("wheel:\n  size: 2\n  size: 3", 'cart.yaml", line 4'),
    ],
)
def test_each_wrong_line_of_the_file_is_named_with_the_file(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "cart.yaml"
    path.write_text(f"owner: Ann\n{text}\n" if text != "- 1" else text)
    with pytest.raises(InputError) as caught:
        read([str(path)])
    assert said in str(caught.value)
    assert str(path) in str(caught.value) or said.startswith("settings")


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"owner: caf\xe9")
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(InputError, match=r"latin\.yaml: not UTF-8 at byte offset 10"):
        read_yaml(tmp_path / "latin.yaml")
    with pytest.raises(InputError, match=r"none\.yaml: no such settings file"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="must be a readable file"):
        read_yaml(tmp_path)
    assert read_yaml(tmp_path / "empty.yaml") == {}
    (tmp_path / "anchors.yaml").write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\n")
    assert read_yaml(tmp_path / "anchors.yaml")["b"] == {"x": 3, "y": 2}, "what is merged in may be overridden"


def test_a_required_field_may_stand_in_the_file_or_on_the_command_line(
    settings: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert read([str(settings)])[0].owner == "Ann"
    assert read([str(settings), "--owner", "Bo"])[0].owner == "Bo"
    with pytest.raises(SystemExit) as ended:
        read(["--load", "1"], out=(Path, tyro.MISSING, "folder"))
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert "--owner" in said.out + said.err
    assert "--out" in said.out + said.err


def test_overrides_reach_into_sections_and_read_yaml() -> None:
    values = override({"a": {"b": 1}}, ["a.b=2.5", "a.c=[x, y]", "d.e.f=null", "g=1=2"])
    assert values == {"a": {"b": 2.5, "c": ["x", "y"]}, "d": {"e": {"f": None}}, "g": "1=2"}
    for change, said in (
        ("a", r"section\.field=value, got 'a'"),
        ("=3", r"section\.field=value"),
        ("d.e.f.g=1", "f holds a value, not a section"),
        ("a=[1", "the value is not valid YAML"),
    ):
        with pytest.raises(InputError, match=said):
            override(values, [change])
