"""Which blocks of a pipeline to train: by their place, or by how much of the subject's words they bring."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from skipwise.finetuning.draws import Draw
from skipwise.finetuning.family import Family
from skipwise.finetuning.finetune import Progress, Subject, Work
from skipwise.finetuning.images import has_word
from skipwise.finetuning.pipelines import components_of, load_pipeline, read_index
from skipwise.finetuning.settings import FinetuneSettings
from skipwise.finetuning.train import Samples, TrainingSettings
from skipwise.loading import load_skeleton
from skipwise.plan import Plan
from skipwise.planners.vital import SCORED, choose_blocks, vital_plan

LEVELS = 4  # noise levels of each picture that blocks are scored on


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
    subject's pictures at four noise levels each, and mask the subject's token block by block. Pictures whose captions
    lack the token say nothing of it and are left out. Raises UserError as `finetune` and `choose_blocks` do.
    """
    settings, training = settings or FinetuneSettings(), TrainingSettings(draws=LEVELS, seed=seed)
    if rule not in SCORED or subject is None:
        return choose_blocks(load_skeleton(name, dtype=settings.dtype), budget, rule)
    with tempfile.TemporaryDirectory() as folder:
        work = Work.begin(name, subject, Path(folder), None, settings, training, device or "cpu", on_progress)
        draws = [draw for draw in work.groups[0] if has_word(draw.example.prompt, subject.token)]
        model = work.whole_model()
        samples = Samples(work.family, model, work.prepared(), settings, device=str(work.accelerator.device))
        places = _subject_positions(name, work.family, draws, subject.token, settings.text_tokens)
        tokens = [places[draw.example.prompt] for draw in draws]
        inputs = [samples([draw]).inputs for draw in draws]
        with torch.no_grad():
            return vital_plan(model, inputs, tokens, budget=budget, rule=rule, subject=_masks(draws, settings.pixels))


def _masks(draws: Sequence[Draw], pixels: int) -> list[Tensor] | None:
    """Where the subject is in each crop, when every picture says so."""
    masks = [mask for draw in draws if (mask := draw.mask(pixels)) is not None]
    return masks if len(masks) == len(draws) else None


def _subject_positions(
    name: str, family: Family, draws: Sequence[Draw], token: str, length: int | None
) -> dict[str, tuple[int, ...]]:
    """prompt -> where the token is in its text stream, by the pipeline's tokenizers, which alone are loaded."""
    pipeline = load_pipeline(
        name, leave_out=[part for part in components_of(read_index(name)) if not part.startswith("tokenizer")]
    )
    prompts = dict.fromkeys(draw.example.prompt for draw in draws)
    return {prompt: family.subject_positions(pipeline, prompt, token, length) for prompt in prompts}
