"""Everything that a user may have got wrong with a fine-tuning, found before anything is encoded.

A run makes these checks before its work, a dry run before its estimate, so that what is priced can be run.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from skipwise.blocks import find_contract
from skipwise.errors import UserError
from skipwise.finetuning.draws import Example
from skipwise.finetuning.families import family_of
from skipwise.finetuning.family import Family
from skipwise.finetuning.hollow import hollow
from skipwise.finetuning.images import Tell
from skipwise.finetuning.lora import lora_targets
from skipwise.finetuning.memory.encoders import components
from skipwise.finetuning.pipelines import check_components
from skipwise.finetuning.prepare import load_family
from skipwise.finetuning.runs import everything
from skipwise.finetuning.settings import FinetuneSettings
from skipwise.finetuning.shards import Resident, Shards
from skipwise.finetuning.subject import Subject
from skipwise.finetuning.train import TrainingSettings, optimizer_class
from skipwise.loading import check_no_single_file, check_plain, find, load_skeleton, read_device
from skipwise.plan import Plan
from skipwise.presets import names as preset_names


@dataclass(frozen=True)
class Checked:
    """What a fine-tuning is of. groups: of examples, as `Subject.examples` gives them; none without a subject."""

    family: Family
    plan: Plan
    groups: list[list[Example]]


def check(
    name: str,
    settings: FinetuneSettings,
    training: TrainingSettings,
    *,
    subject: Subject | None = None,
    plan: Plan | None = None,
    weights: bool = True,
    tell: Tell | None = None,
) -> Checked:
    """Raise UserError for a pipeline, pictures, captions, plan or settings that cannot be trained.

    plan: without one, all blocks are trained. weights: whether the pipeline's must be there, as for a run; a dry run
    also takes a preset, and looks at those weights that are there. tell: is given a line on every picture.
    """
    groups = _examples(subject, settings, training, tell)
    family, skeleton = _checked_model(name, weights)
    family.check_resolution(skeleton, settings.pixels)
    _check_guidance(family, skeleton, training)
    _check_place(family, settings, training)
    contract = find_contract(skeleton)
    plan = plan or Plan(model=contract.shape, train=everything(contract))
    with hollow(skeleton, plan, settings.late, blocks=Resident(skeleton)):  # raises where the plan does not fit
        lora_targets(skeleton, plan.train, settings.targets)
    return Checked(family, plan, groups)


def check_machine(settings: FinetuneSettings, device: str | None = None) -> None:
    """Raise UserError when this machine lacks what the run needs: a package, or the device."""
    optimizer_class(settings)
    read_device(device)


def _examples(
    subject: Subject | None, settings: FinetuneSettings, training: TrainingSettings, tell: Tell | None
) -> list[list[Example]]:
    if subject is None:
        return []
    return subject.examples(settings.resolution, training.prior_weight, training.center_crop, tell)


def _checked_model(name: str, weights: bool) -> tuple[Family, nn.Module]:
    """The family, and the transformer on the meta device."""
    preset = name in preset_names() and not weights
    if not preset:
        check_no_single_file(name, "fine-tuning")
        check_components(name, weights)
        check_plain(name, "fine-tuning")
    skeleton = load_skeleton(name)
    family = family_of(skeleton) if preset else load_family(name)
    vae = components(name).get("vae")
    config: Any = vae.skeleton().config if vae else {}
    family.check_transformer(skeleton, config.get("latent_channels"))
    if not preset and (weights or any(find(name, weights=False).folder.glob("*.safetensors"))):
        Shards.open(name).check(skeleton)
    return family, skeleton


def _check_guidance(family: Family, transformer: nn.Module, training: TrainingSettings) -> None:
    """Give the family the guidance that the model is told, if any is asked for."""
    if training.guidance is None:
        return
    if not family.takes_guidance(transformer):
        raise UserError(
            f"This {family.name} is told no guidance scale in training; leave guidance={training.guidance:g} out. "
            "Only FLUX.1-dev and its kin are."
        )
    family.guidance = training.guidance


def _check_place(family: Family, settings: FinetuneSettings, training: TrainingSettings) -> None:
    if training.place == "keep" and not family.can_place:
        raise UserError(f"{family.name} cannot be told where a crop lies in its picture; use place 'restart'.")
    if training.place == "keep" and settings.batch > 1:
        raise UserError(f"Crops can keep their places at batch 1 only, not {settings.batch}; use place 'restart'.")
