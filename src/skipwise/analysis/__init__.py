"""Analyses of hidden states (paper 1): what every block changes, layer by layer, token by token and step by step."""

from skipwise.analysis.analyze import PARTS, analyze
from skipwise.analysis.compare import Comparison, compare
from skipwise.analysis.record import Analysis

__all__ = ["PARTS", "Analysis", "Comparison", "analyze", "compare"]
