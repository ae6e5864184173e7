"""One file a method that makes a plan. A method registers itself; nothing here names one."""

import importlib
import pkgutil

from skipwise.planners.base import Allowance, Choice, make_plan, needs_model, planner_names

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["Allowance", "Choice", "make_plan", "needs_model", "planner_names"]
