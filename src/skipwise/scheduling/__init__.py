"""Which model, or which blocks, at which denoising step (paper 2): step importance, and the search that it screens."""

from skipwise.scheduling.importance import Importance, measure_importance

__all__ = ["Importance", "measure_importance"]
