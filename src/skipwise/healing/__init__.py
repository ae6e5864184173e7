"""Making good what skipping loses: stand-ins fitted in closed form, and a LoRA trained by self-distillation."""

from skipwise.healing.adapter import HealSettings, heal
from skipwise.healing.fitting import fit_alone, fit_stand_ins

__all__ = ["HealSettings", "fit_alone", "fit_stand_ins", "heal"]
