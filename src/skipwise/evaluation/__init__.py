"""Judging a model under plans: tasks, paired retention with confidence intervals, and the Result they end in."""

from skipwise.evaluation.evaluate import evaluate
from skipwise.evaluation.result import Interval, Result, Row, Score
from skipwise.evaluation.tasks import default_tasks, task_names

__all__ = ["Interval", "Result", "Row", "Score", "default_tasks", "evaluate", "task_names"]
