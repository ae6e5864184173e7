"""Which blocks of a pipeline to train: by their place, or by how much of the subject's words they bring."""

import inspect
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skipwise.finetuning.draws import Draw
from skipwise.finetuning.families import Family
from skipwise.finetuning.finetune import Progress, Subject, Work
from skipwise.finetuning.patches import crop_pixels
from skipwise.finetuning.pipelines import load_pipeline, read_index
from skipwise.finetuning.settings import FinetuneSettings
from skipwise.finetuning.train import Samples, TrainingSettings
from skipwise.loading import load_skeleton
from skipwise.plan import Plan
from skipwise.planners.vital import SCORED, choose_blocks, vital_plan
from skipwise.prompts import token_positions

LEVELS = 4  # noise levels of each picture that blocks are scored on
CLIP = 77  # tokens of CLIP, which come first in SD3's text stream


def select_blocks(
    name: str,
    budget: int | str,
    rule: str = "last",
    subject: Subject | None = None,
    settings: FinetuneSettings | None = None,
    *,
    device: str | None = None,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> Plan:
    """A plan that trains the blocks that a rule of `skipwise.planners.vital` chooses under a budget.

    "middle" and "last" read no weights. "vital" and "paper" run the whole base model, on the CPU by default, on the
    subject's pictures at four noise levels each, and mask the subject's token block by block.
    Raises UserError as `finetune` and `choose_blocks` do.
    """
    settings, training = settings or FinetuneSettings(), TrainingSettings(draws=LEVELS, seed=seed)
    if rule not in SCORED or subject is None:
        return choose_blocks(load_skeleton(name, dtype=settings.dtype), budget, rule)
    with tempfile.TemporaryDirectory() as folder:
        work = Work.begin(name, subject, Path(folder), None, settings, training, device or "cpu", on_progress)
        draws = work.groups[0]
        model = work.whole_model()
        samples = Samples(work.family, model, work.prepared(), settings, device=str(work.accelerator.device))
        tokens = subject_tokens(name, work.family, draws[0].example.prompt, subject.token, settings.text_tokens)
        inputs = [samples([draw]).inputs for draw in draws]
        with torch.no_grad():
            return vital_plan(model, inputs, tokens, budget=budget, rule=rule, subject=_masks(draws, settings.pixels))


def _masks(draws: Sequence[Draw], pixels: int) -> list[Tensor] | None:
    """Where the subject is in each crop, when every picture says so."""
    masks = [draw.example.picture.mask() for draw in draws]
    if any(mask is None for mask in masks):
        return None
    return [crop_pixels(m[None], d.patch, pixels)[0] for m, d in zip(masks, draws, strict=True) if m is not None]


def subject_tokens(name: str, family: Family, prompt: str, token: str, length: int | None = None) -> tuple[int, ...]:
    """Where the subject's token is in the text stream that the pipeline `name` makes of the prompt.

    length: tokens of the longest text encoder, by default what the pipeline generates with.
    Raises UserError when it is not there, or is cut off.
    """
    keep = ("tokenizer", "tokenizer_2", "tokenizer_3")
    components = [key for key, value in read_index(name).items() if isinstance(value, list)]
    pipeline = load_pipeline(name, leave_out=[key for key in components if key not in keep])
    return _POSITIONS[family.name](pipeline, prompt, token, length or _default(pipeline, "max_sequence_length"))


def _flux(pipeline: Any, prompt: str, token: str, length: int) -> tuple[int, ...]:
    return token_positions(pipeline.tokenizer_2, prompt, token, max_length=length)


def _sd3(pipeline: Any, prompt: str, token: str, length: int) -> tuple[int, ...]:
    clip = token_positions(pipeline.tokenizer, prompt, token, max_length=CLIP)
    if pipeline.tokenizer_3 is None:  # zeros stand in for T5
        return clip
    return clip + token_positions(pipeline.tokenizer_3, prompt, token, max_length=length, offset=CLIP)


def _sana(pipeline: Any, prompt: str, token: str, length: int) -> tuple[int, ...]:
    prefix = "\n".join(_default(pipeline, "complex_human_instruction"))
    return token_positions(pipeline.tokenizer, prompt.lower(), token, max_length=length, prefix=prefix)


def _pixart(pipeline: Any, prompt: str, token: str, length: int) -> tuple[int, ...]:
    return token_positions(pipeline.tokenizer, prompt.lower(), token, max_length=length)


def _default(pipeline: Any, name: str) -> Any:
    """What the pipeline's call takes when nothing is said."""
    return inspect.signature(type(pipeline).__call__).parameters[name].default


_POSITIONS: dict[str, Callable[[Any, str, str, int], tuple[int, ...]]] = {
    "FLUX": _flux,
    "SD3": _sd3,
    "SANA": _sana,
    "PixArt": _pixart,
}
