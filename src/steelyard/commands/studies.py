"""Commands that run a study from a YAML file."""

from __future__ import annotations

from collections.abc import Callable

from steelyard.commands.common import Args
from steelyard.commands.files import study
from steelyard.study.contrastive import ContrastiveStudy, run_contrastive
from steelyard.study.data import run_data_study
from steelyard.study.data_config import DataStudy
from steelyard.study.metarm import MetaRMStudy, run_metarm
from steelyard.study.policy import run_policy_study
from steelyard.study.policy_config import PolicyStudy
from steelyard.study.rounds import RoundsStudy, run_rounds_study
from steelyard.study.strength import StrengthStudy, run_strength_study

COMMANDS: dict[str, Callable[[Args], None]] = {
    "study contrastive": study(ContrastiveStudy, run_contrastive, "study contrastive"),
    "study data": study(DataStudy, run_data_study, "study data"),
    "study metarm": study(MetaRMStudy, run_metarm, "study metarm"),
    "study rounds": study(RoundsStudy, run_rounds_study, "study rounds"),
    "study policy": study(PolicyStudy, run_policy_study, "study policy"),
    "study strength": study(StrengthStudy, run_strength_study, "study strength"),
}
