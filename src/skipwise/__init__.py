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
    from skipwise.healing import fit_stand_ins, heal
    from skipwise.loading import load, load_skeleton
    from skipwise.plan import Plan
    from skipwise.planners import make_plan
    from skipwise.report import write_report
    from skipwise.sampling import generate
    from skipwise.skipping import skip

# Every public name and its module; imported when first used, so that `import skipwise` is quick and has no side effect.
_HOMES = {
    "Analysis": "analysis",
    "Calibration": "calibration",
    "Comparison": "analysis",
    "Plan": "plan",
    "Result": "evaluation",
    "UserError": "errors",
    "analyze": "analysis",
    "compare": "analysis",
    "estimate": "cost",
    "evaluate": "evaluation",
    "export": "exporting",
    "find_contract": "blocks",
    "fit_stand_ins": "healing",
    "generate": "sampling",
    "heal": "healing",
    "load": "loading",
    "load_skeleton": "loading",
    "make_plan": "planners",
    "skip": "skipping",
    "write_report": "report",
}

__all__ = [
    "Analysis",
    "Calibration",
    "Comparison",
    "Plan",
    "Result",
    "UserError",
    "analyze",
    "compare",
    "estimate",
    "evaluate",
    "export",
    "find_contract",
    "fit_stand_ins",
    "generate",
    "heal",
    "load",
    "load_skeleton",
    "make_plan",
    "skip",
    "write_report",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"skipwise.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'skipwise' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
