"""Analyses of hidden states (paper 1): what every block changes, layer by layer and step by step."""

from skipwise.analysis.analyze import analyze
from skipwise.analysis.record import Analysis

__all__ = ["Analysis", "analyze"]
