"""`skipwise demo --image`: teach tiny-dit a subject in three ways, and show what each one gives and costs."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from skipwise.evaluation.pictures import (
    Features,
    feature_net,
    fidelities,
    over_seeds,
    self_similarity,
    similarities,
)
from skipwise.files import check_writable, write_atomically
from skipwise.finetuning.finetune import Subject, finetune
from skipwise.finetuning.lora import load_lora
from skipwise.finetuning.memory.fitting import describe_blocks
from skipwise.finetuning.patches import PatchSchedule
from skipwise.finetuning.prepare import Progress
from skipwise.finetuning.selection import select_blocks
from skipwise.finetuning.settings import FinetuneSettings
from skipwise.finetuning.train import TrainingSettings, read_log
from skipwise.loading import pipeline_folder
from skipwise.plan import Plan
from skipwise.report.personalisation import Outcome, write_page
from skipwise.versions import versions
from skipwise.zoo import subject as shipped
from skipwise.zoo.text_to_image import load_pipeline, paint, through

MODEL = "tiny-dit"
BACKGROUNDS = ("blue", "orange", "black", "white")  # white alone is in a picture of the subject
SEEDS = (0, 1, 2)
SETTINGS = FinetuneSettings(resolution=64, batch=4, rank=8, dtype="float32", text_tokens=16)
# chosen for ordinary LoRA, with a seed of its own
TRAINING = TrainingSettings(steps=1000, learning_rate=5e-3, draws=96, checkpoint_every=100)


@dataclass(frozen=True)
class Way:
    """A way to personalise: which share of the blocks' weights is trained, chosen by which rule, and how.

    schedule: of the crops, by default that of TrainingSettings. train: what is called as `finetune` is.
    """

    name: str
    settings: FinetuneSettings
    blocks: str | None = None  # all
    rule: str = "vital"
    schedule: PatchSchedule | None = None
    train: Callable[..., Path] = finetune

    def plan(self, learnt: Subject, model: str) -> Plan | None:
        """The plan of one that does not train all blocks."""
        return select_blocks(model, self.blocks, self.rule, learnt, self.settings) if self.blocks else None


HALF = SETTINGS.but(rank=2 * SETTINGS.rank)  # as many parameters on half of the blocks
WAYS = (
    Way("LoRA on all blocks", SETTINGS),
    Way("LoRA on vital blocks", HALF.but(late="frozen"), "50%"),
    Way("BlockSkip", HALF.but(patch=32, late="residual"), "50%"),
    Way("Last half, exact", HALF.but(late="none", checkpointing=True), "50%", "last"),
)


@dataclass(frozen=True)
class Judge:
    """What pictures are held against: the subject, as the model's own autoencoder gives its pictures back, and the
    colours of the prompts, each of which is painted `repeats` times.
    """

    subject: list[np.ndarray]
    features: Features
    repeats: int = 1

    @property
    def prompts(self) -> list[str]:
        """Those that are painted."""
        return [f"{shipped.PROMPT} on a {colour} background" for colour in BACKGROUNDS] * self.repeats

    def __call__(self, name: str, pictures: list[list[np.ndarray]]) -> Outcome:
        """Scores of pictures[seed][prompt]."""
        alike, true = similarities(pictures, self.subject, self.features), fidelities(pictures, self.prompts)
        return Outcome(name, pictures, alike, true, over_seeds(alike), over_seeds(true))


def run_image_demo(
    output: str | Path = "runs/demo-image",
    ways: Sequence[Way] = WAYS,
    seeds: Sequence[int] = SEEDS,
    training: TrainingSettings = TRAINING,
    model: str = MODEL,
    features: Features | None = None,
    on_progress: Progress | None = None,
    repeats: int = 1,
) -> tuple[list[Outcome], Path]:
    """Personalise in every way with every seed, draw, measure, and write result.json and page.html.

    Adapters are in `output`/WAY-SEED. features: see `similarities`. repeats: pictures a prompt and seed. Returns the
    outcomes, the first of them that of the model as it was, and the page's path. Raises UserError without the extra
    `features`.
    """
    features = features or feature_net()  # before anything that takes long
    output, folder = check_writable(output), str(pipeline_folder(model))
    learnt = Subject(shipped.folder(), shipped.PROMPT)
    pipeline = load_pipeline(folder)
    judge = Judge(through(pipeline.vae, [p.pixels for p in shipped.subject()]), features, repeats)
    outcomes = [judge("as it was", [paint(pipeline, judge.prompts, seed) for seed in seeds])]
    for way in ways:
        plan = way.plan(learnt, folder)
        runs = [_personalise(way, plan, folder, learnt, replace(training, seed=s), output, on_progress) for s in seeds]
        pictures = [_draw(folder, run, judge.prompts, seed) for run, seed in zip(runs, seeds, strict=True)]
        outcomes.append(_costed(judge(way.name, pictures), plan, runs))
    content: dict[str, Any] = {"model": model, "prompts": judge.prompts, "seeds": list(seeds), "versions": versions()}
    content |= {"training": asdict(training), "of_the_subject_itself": self_similarity(judge.subject, features)}
    content |= {"outcomes": [outcome.to_json() for outcome in outcomes]}
    write_atomically(output / "result.json", json.dumps(content, indent=2) + "\n")
    return outcomes, write_page(outcomes, judge.prompts, judge.subject, output / "page.html")


def _personalise(
    way: Way,
    plan: Plan | None,
    model: str,
    learnt: Subject,
    training: TrainingSettings,
    output: Path,
    on_progress: Progress | None,
) -> Path:
    """The folder of the adapter."""
    folder = output / f"{way.name.replace(' ', '-').lower()}-{training.seed}"
    training = replace(training, schedule=way.schedule)
    way.train(model, learnt, folder, plan, way.settings, training, device="cpu", on_progress=on_progress)
    return folder


def _costed(outcome: Outcome, plan: Plan | None, runs: Sequence[Path]) -> Outcome:
    """With what training took: memory of one seed, which is that of all, and the median time of a step."""
    lines = [read_log(run / "train.jsonl")[-1] for run in runs]
    trained = "all" if plan is None else describe_blocks(plan.train)
    seconds = float(np.median([line["seconds_a_step"] for line in lines]))
    return replace(outcome, trained=trained, peak=lines[0]["peak_by_part"], seconds_a_step=seconds)


def _draw(model: str, adapter: Path, prompts: Sequence[str], seed: int) -> list[np.ndarray]:
    """By the stock pipeline, with all of its blocks."""
    pipeline = load_pipeline(model)
    load_lora(pipeline, adapter)
    return paint(pipeline, prompts, seed)
