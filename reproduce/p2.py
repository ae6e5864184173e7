"""Paper 2 at the scale we have: one pair of a heavy and a light model, or one model of exact tasks, as Results.

    python reproduce/p2.py text tiny-text tiny-text-light --label tiny-text-0 --output runs/p2
    python reproduce/p2.py tasks tiny-dllm tiny-dllm-light --label tiny-dllm-0 --output runs/p2

text: step importance, the paper's placements at 25% light steps, continuations of held-out prefixes, and the front of
schedules of every kind, judged by SmolLM2. tasks: the same front in exact match, and the light model's placements.
Plans are chosen on the calibration split; scores are on the test split. The page is made by reproduce/p2_page.py.
"""

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded; see docs/log.md

import torch

import skipwise as sw
from skipwise.evaluation import calibration_texts
from skipwise.evaluation.texts import documents
from skipwise.evaluation.writing import Writing
from skipwise.planners.sandwich import PLACEMENTS, schedule
from skipwise.report.importance import plot_importance
from skipwise.scheduling.front import FrontSettings, find_front
from skipwise.scheduling.importance import measure_importance

SHARE = 0.25  # of light steps, the paper's
LENGTH, STEPS = 128, 64
PREFIX = 32  # tokens of a held-out text that are given
ALL_LIGHT = "all light"


class Study:
    """A heavy model, a light one beside it, and where their Results go."""

    def __init__(self, heavy: str, light: str, label: str, output: Path, quick: bool):
        self.model, self.tokenizer = sw.load(heavy)
        self.shape = sw.find_contract(self.model).shape
        self.light = Path(light).name.removesuffix(label[-2:])  # plans call it so, whatever folder it came from
        self.others = {self.light: sw.load(light)[0]}
        self.label, self.output, self.quick = label, output, quick

    def save(self, what: str, result: sw.Result) -> None:
        """Write a Result. The stand-ins that its plans name are not kept: a page needs what they saved and cost."""
        result.save(self.output / f"{self.label}.{what}.json")

    def placed(self) -> list[sw.Plan]:
        """The paper's placements of the light model, and the light model all the way."""
        plans = [schedule(self.shape, self.light, placement, SHARE) for placement in PLACEMENTS]
        return [*plans, schedule(self.shape, self.light, share=1.0).named(ALL_LIGHT)]


class TextStudy(Study):
    """A pair of models that write English."""

    parts = ("importance", "placements", "prefix", "front")

    def writing(self, samples: int, prefixes: tuple[str, ...] = (), first: int = 0) -> Writing:
        """The task: `samples` texts, read by SmolLM2 in bfloat16."""
        return Writing(
            judge="smollm2-135m",
            judge_dtype="bfloat16",
            samples=4 if self.quick else samples,
            first=first,
            length=LENGTH - PREFIX if prefixes else LENGTH,
            steps=STEPS,
            prefixes=prefixes,
        )

    def importance(self) -> None:
        """Loss and KL by noise level, and their picture."""
        texts = calibration_texts(self.tokenizer, 8 if self.quick else 64)
        importance = measure_importance(
            self.model,
            self.others[self.light],
            self.tokenizer,
            texts,
            light_tokenizer=self.tokenizer,
            names=(self.label, self.light),
        )
        importance.save(self.output / f"{self.label}.importance.json")
        plot_importance(importance, self.output / f"{self.label}.importance.svg")

    def placements(self) -> None:
        """The paper's placements, written from nothing."""
        self.judge("placements", self.writing(128), self.placed())

    def prefix(self) -> None:
        """The sandwich and the light model, continuing held-out text."""
        some = [plan for plan in self.placed() if plan.made_by.method in ("sandwich", ALL_LIGHT)]
        self.judge("prefix", self.writing(96, self.prefixes()), some)

    def judge(self, what: str, task: Writing, plans: Sequence[sw.Plan]) -> None:
        """One task under plans."""
        result = sw.evaluate(self.model, self.tokenizer, [task], list(plans), name=self.label, others=self.others)
        self.save(what, result)

    def prefixes(self) -> tuple[str, ...]:
        """The beginnings of held-out test passages of the documents that the models know the kind of."""
        found = [list(self._passages(documents("test")[name])) for name in ("moby-dick", "sotu")]
        return tuple(passage for pair in zip(*found, strict=False) for passage in pair)[:96]

    def _passages(self, text: str) -> Iterator[str]:
        ids = self.tokenizer(text, verbose=False)["input_ids"]
        for start in range(0, len(ids) - LENGTH, LENGTH):
            yield self.tokenizer.decode(ids[start : start + PREFIX])

    def front(self) -> None:
        """Schedules of every kind at the paper's saving and at the target."""
        task = self.writing(96)
        settings = FrontSettings(budgets=(0.17, 0.25), segments=4, moments=32 if self.quick else 256, trials=0)
        calibrate = replace(task, first=1000, samples=4 if self.quick else 32)
        result = find_front(
            self.model,
            self.tokenizer,
            [task],
            settings,
            calibrate_on=[calibrate],
            light=self.light,
            others=self.others,
            name=self.label,
        )
        self.save("front", result)


class TaskStudy(Study):
    """A model of exact tasks, and one with fewer blocks."""

    parts = ("placements", "front")

    @property
    def examples(self) -> int:
        """Test prompts of a task."""
        return 20 if self.quick else 400

    def front(self) -> None:
        """Schedules of every kind for a ladder of savings."""
        settings = FrontSettings(
            # just below what 4, 5, 6 and 8 blocks of 24 save, so that all kinds can save the same
            budgets=(0.2,) if self.quick else (0.166, 0.207, 0.249, 0.332),
            segments=7,
            trials=0,  # local search found nothing beyond the noise: docs/log.md
            moments=128 if self.quick else 1024,
            examples=20 if self.quick else 200,
        )
        found = find_front(
            self.model,
            self.tokenizer,
            None,
            settings,
            light=self.light,
            others=self.others,
            examples=self.examples,
            name=self.label,
        )
        self.save("front", found)

    def placements(self) -> None:
        """The paper's placements of the light model."""
        self.save("placements", self._evaluate(self.placed()))

    def _evaluate(self, plans: Sequence[sw.Plan]) -> sw.Result:
        return sw.evaluate(
            self.model,
            self.tokenizer,
            None,
            list(plans),
            examples=self.examples,
            name=self.label,
            others=self.others,
        )


STUDIES: dict[str, type[TextStudy] | type[TaskStudy]] = {"text": TextStudy, "tasks": TaskStudy}


def main() -> None:
    """One study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=STUDIES)
    parser.add_argument("heavy", help="what skipwise.load takes")
    parser.add_argument("light", help="likewise")
    parser.add_argument("--label", required=True, help="the model's name and its seed, such as tiny-text-0")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--part", action="append", help="only this part; repeat for several")
    parser.add_argument("--quick", action="store_true", help="a few samples, to see that it runs")
    given = parser.parse_args()
    torch.set_num_threads(1)
    study = STUDIES[given.kind](given.heavy, given.light, given.label, given.output, given.quick)
    for part in given.part or study.parts:
        began = time.monotonic()
        getattr(study, part)()
        print(f"{given.label}, {part}: {(time.monotonic() - began) / 60:.1f} minutes", flush=True)


if __name__ == "__main__":
    main()
