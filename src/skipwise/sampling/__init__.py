"""Decoding, one file a family. `generate` picks the family that a model belongs to and keeps the accounts."""

from skipwise.sampling.agreement import agreement
from skipwise.sampling.denoiser import Denoiser, Step
from skipwise.sampling.dream import DreamSettings
from skipwise.sampling.generate import FAMILIES, Generated, Statistics, generate
from skipwise.sampling.llada import LLaDASettings
from skipwise.sampling.mdlm import MDLMSettings

__all__ = [
    "FAMILIES",
    "Denoiser",
    "DreamSettings",
    "Generated",
    "LLaDASettings",
    "MDLMSettings",
    "Statistics",
    "Step",
    "agreement",
    "generate",
]
