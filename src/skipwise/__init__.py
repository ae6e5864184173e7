"""skipwise: find the computation that a diffusion transformer does not need, skip it, and know what it cost you."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skipwise.analysis import Analysis, Comparison, analyze, compare
    from skipwise.blocks import find_contract
    from skipwise.calibration import Calibration
    from skipwise.cost import estimate
    from skipwise.errors import UserError
    from skipwise.evaluation import Result, evaluate
    from skipwise.exporting import export
    from skipwise.finetuning.finetune import Subject, finetune
    from skipwise.finetuning.memory.estimate import estimate_memory
    from skipwise.finetuning.selection import select_blocks
    from skipwise.finetuning.settings import FinetuneSettings
    from skipwise.finetuning.train import TrainingSettings
    from skipwise.healing import fit_stand_ins, heal
    from skipwise.loading import load, load_skeleton
    from skipwise.plan import Plan
    from skipwise.planners import make_plan
    from skipwise.planners.sandwich import schedule
    from skipwise.planners.vital import vital_plan
    from skipwise.report import write_report
    from skipwise.sampling import generate
    from skipwise.sampling.pipelines import follow
    from skipwise.scheduling.front import find_front, pick
    from skipwise.scheduling.importance import Importance, measure_importance
    from skipwise.scheduling.search import search_schedules
    from skipwise.skipping import skip

# Every public name and its module; imported when first used, so that `import skipwise` is quick and has no side effect.
_HOMES = {
    "Analysis": "analysis",
    "Calibration": "calibration",
    "Comparison": "analysis",
    "FinetuneSettings": "finetuning.settings",
    "Importance": "scheduling.importance",
    "Plan": "plan",
    "Result": "evaluation",
    "Subject": "finetuning.finetune",
    "TrainingSettings": "finetuning.train",
    "UserError": "errors",
    "analyze": "analysis",
    "compare": "analysis",
    "estimate": "cost",
    "estimate_memory": "finetuning.memory.estimate",
    "evaluate": "evaluation",
    "export": "exporting",
    "find_contract": "blocks",
    "find_front": "scheduling.front",
    "finetune": "finetuning.finetune",
    "fit_stand_ins": "healing",
    "follow": "sampling.pipelines",
    "generate": "sampling",
    "heal": "healing",
    "load": "loading",
    "load_skeleton": "loading",
    "make_plan": "planners",
    "measure_importance": "scheduling.importance",
    "pick": "scheduling.front",
    "schedule": "planners.sandwich",
    "search_schedules": "scheduling.search",
    "select_blocks": "finetuning.selection",
    "skip": "skipping",
    "vital_plan": "planners.vital",
    "write_report": "report",
}

__all__ = [
    "Analysis",
    "Calibration",
    "Comparison",
    "FinetuneSettings",
    "Importance",
    "Plan",
    "Result",
    "Subject",
    "TrainingSettings",
    "UserError",
    "analyze",
    "compare",
    "estimate",
    "estimate_memory",
    "evaluate",
    "export",
    "find_contract",
    "find_front",
    "finetune",
    "fit_stand_ins",
    "follow",
    "generate",
    "heal",
    "load",
    "load_skeleton",
    "make_plan",
    "measure_importance",
    "pick",
    "schedule",
    "search_schedules",
    "select_blocks",
    "skip",
    "vital_plan",
    "write_report",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"skipwise.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'skipwise' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
