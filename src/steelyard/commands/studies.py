"""Commands that run a study from a YAML file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from steelyard.commands.common import Args
from steelyard.commands.files import study
from steelyard.config import Config
from steelyard.study.contrastive import ContrastiveStudy, run_contrastive
from steelyard.study.data import run_data_study
from steelyard.study.data_config import DataStudy
from steelyard.study.metarm import MetaRMStudy, run_metarm
from steelyard.study.policy import run_policy_study
from steelyard.study.policy_config import PolicyStudy
from steelyard.study.rounds import RoundsStudy, run_rounds_study
from steelyard.study.strength import StrengthStudy, run_strength_study

STUDIES: dict[str, tuple[type[Config], Callable[..., dict[str, Any]]]] = {
    "contrastive": (ContrastiveStudy, run_contrastive),
    "data": (DataStudy, run_data_study),
    "metarm": (MetaRMStudy, run_metarm),
    "rounds": (RoundsStudy, run_rounds_study),
    "policy": (PolicyStudy, run_policy_study),
    "strength": (StrengthStudy, run_strength_study),
}
COMMANDS: dict[str, Callable[[Args], None]] = {
    f"study {name}": study(config, function, f"study {name}") for name, (config, function) in STUDIES.items()
}
