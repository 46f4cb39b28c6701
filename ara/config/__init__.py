"""One frozen config per stage: every setting with its meaning, unit and range.

``--help``, the options of the commands, the manifests and the docs are made from these fields; see
:class:`ara.config.flags.Flag`. Unknown names are refused. Off is ``None``.
"""

from ara.config.allocate import AllocateConfig, BudgetConfig, CompareConfig, TuningConfig
from ara.config.base import (
    MethodOptions,
    PlacementConfig,
    Settings,
    StageConfig,
    build,
    method_options,
    problems,
)
from ara.config.bench import BenchConfig
from ara.config.decompose import DecomposeConfig
from ara.config.evaluate import EvalConfig
from ara.config.generate import AnswerConfig, ChatConfig, GenerateConfig
from ara.config.plan import PlanConfig
from ara.config.quantise import QuantiseConfig
from ara.config.recover import RecoverConfig
from ara.config.serve import ServeConfig
from ara.config.train_masks import MaskTrainingOptions, TrainMasksConfig
from ara.config.truncate import TruncateConfig

__all__ = [
    "AllocateConfig",
    "AnswerConfig",
    "BenchConfig",
    "BudgetConfig",
    "ChatConfig",
    "CompareConfig",
    "DecomposeConfig",
    "EvalConfig",
    "GenerateConfig",
    "MaskTrainingOptions",
    "MethodOptions",
    "PlacementConfig",
    "PlanConfig",
    "QuantiseConfig",
    "RecoverConfig",
    "ServeConfig",
    "Settings",
    "StageConfig",
    "TrainMasksConfig",
    "TruncateConfig",
    "TuningConfig",
    "build",
    "method_options",
    "problems",
]
