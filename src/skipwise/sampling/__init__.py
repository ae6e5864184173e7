"""Decoding, one file a family. `generate` picks the family that a model belongs to and keeps the accounts."""

from skipwise.sampling.generate import Generated, Statistics, generate
from skipwise.sampling.llada import LLaDASettings, Step

__all__ = ["Generated", "LLaDASettings", "Statistics", "Step", "generate"]
