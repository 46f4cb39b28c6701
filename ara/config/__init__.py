"""One frozen config per stage: what can be set, its unit and its range, said once.

The same descriptions feed ``--help``, the manifests and the docs. The options of the commands are made from the fields,
see :class:`ara.config.flags.Flag`. Unknown keys are refused. Off is ``None``.
"""

from ara.config.allocate import AllocateConfig
from ara.config.base import MethodOptions, PlacementConfig, Settings, StageConfig
from ara.config.bench import BenchConfig
from ara.config.building import build, method_options, problems
from ara.config.compare import CompareConfig
from ara.config.decompose import DecomposeConfig
from ara.config.evaluate import EvalConfig
from ara.config.generate import GenerateConfig
from ara.config.train_masks import MaskTrainingOptions, TrainMasksConfig
from ara.config.truncate import TruncateConfig
from ara.config.tuning import BudgetConfig, TuningConfig

__all__ = [
    "AllocateConfig",
    "BenchConfig",
    "BudgetConfig",
    "CompareConfig",
    "DecomposeConfig",
    "EvalConfig",
    "GenerateConfig",
    "MaskTrainingOptions",
    "MethodOptions",
    "PlacementConfig",
    "Settings",
    "StageConfig",
    "TrainMasksConfig",
    "TruncateConfig",
    "TuningConfig",
    "build",
    "method_options",
    "problems",
]
