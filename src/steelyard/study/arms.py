"""What studies of arms by seeds share: where models and pairs come from, their folders, the held-out pairs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from pydantic import Field

from steelyard.config import Config, Device, Seed
from steelyard.data.encode import Encoder
from steelyard.data.split import prompt_key
from steelyard.errors import InputError
from steelyard.recipe import DataConfig, Recipe, Settings, check, distinct_names
from steelyard.train.metarm import MetaRMConfig
from steelyard.train.pairwise import read_pairs
from steelyard.train.reward import RewardConfig
from steelyard.types import Preference


class ArmsStudy(Config):
    """Where the models of a study come from, what they are compared on, and how many are trained at once."""

    name: str = Field("Study", description="title of the report")
    seeds: tuple[Seed, ...] = Field((0, 1, 2), min_length=1, description="one reward model an arm for each")
    world_seed: int = Field(0, ge=0, description="of the small world, SFT and what else the arms share")
    world: Settings | None = Field(None, description="the built-in small world (fields of `steelyard simulate`)")
    data: DataConfig | None = Field(None, description="or your files, as in a recipe; `validation` is needed")
    model: str = Field("scratch", description="model folder to start from, or `scratch` (small world)")
    sft: Settings | None = Field(None, description="fields of `steelyard train sft`; none given: the model as it comes")
    device: Device = "cpu"
    workers: int | None = Field(
        None, ge=1, description="reward models trained side by side; none given: one per CPU, on a GPU one"
    )
    threads: int = Field(1, ge=1, description="threads of each of them")

    def recipe(self) -> Recipe:
        """The part that the study shares with a recipe: data and supervised fine-tuning. Raises InputError."""
        if self.data is not None and self.data.validation is None:
            raise InputError("data.validation: the study compares reward models on held-out pairs; name their file")
        fields = ("name", "world", "data", "model", "sft", "device", "workers", "threads")
        recipe = Recipe(seed=self.world_seed, **{name: getattr(self, name) for name in fields})
        check(recipe)
        return recipe


def require_arms(arms: Collection[str], control: str, seeds: tuple[int, ...]) -> None:
    """Raise InputError unless the control is an arm, no seed stands twice, and no two arms share a folder."""
    if control not in arms:
        raise InputError(f"control must be one of the arms {list(arms)}, got {control!r}")
    distinct_names("arms", arms)
    if len(set(seeds)) < len(seeds):
        raise InputError(f"seeds must differ from each other, got {list(seeds)}: a repeated run is no evidence")


def places(out: Path, arm: str, seed: int) -> tuple[Path, Path]:
    """The stage folder of one run, and the file of its examination."""
    name = arm.replace("/", "-")
    return out / "arms" / name / f"seed-{seed}", out / "examined" / name / f"seed-{seed}.json"


def held_out_pairs(
    config: RewardConfig | MetaRMConfig, folder: Path, prompts: Mapping[str, list[str]]
) -> dict[str, list[Preference]]:
    """The pairs that one run examined, by validation set.

    Examinations keep the pairs' prompts but no responses: the pairs are read again, as the run in `folder` read them.
    Raises RuntimeError for other pairs.
    """
    encoder = Encoder.load(folder / "model", max_length=config.max_length, on_overlong=config.on_overlong)
    found = {}
    for name, path in config.validation.items():
        found[name] = read_pairs(path, encoder, on_invalid=config.on_invalid)[0]
        if [prompt_key(p.prompt) for p in found[name]] != prompts[name]:
            raise RuntimeError(f"{path}: holds other pairs than those that were examined; start the study anew")
    return found
