"""Judging a model under plans: tasks, paired retention with confidence intervals, and the Result they end in."""

from skipwise.evaluation.evaluate import evaluate
from skipwise.evaluation.measure import difference, perplexity_ratio
from skipwise.evaluation.result import Interval, Result, Row, Score
from skipwise.evaluation.tasks import calibration_texts, default_tasks, task_names

__all__ = [
    "Interval",
    "Result",
    "Row",
    "Score",
    "calibration_texts",
    "default_tasks",
    "difference",
    "evaluate",
    "perplexity_ratio",
    "task_names",
]
