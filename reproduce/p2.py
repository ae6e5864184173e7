"""Paper 2 at the scale we have: one pair of a heavy and a light model, or one model of exact tasks, as Results.

    python reproduce/p2.py text tiny-text tiny-text-light --label tiny-text-0 --output runs/p2
    python reproduce/p2.py tasks tiny-dllm tiny-dllm-lighter tiny-dllm-light --label tiny-dllm-0 --output runs/p2

text: step importance, the paper's placements at 25% light steps, continuations of held-out prefixes, and the front of
schedules of every kind, judged by SmolLM2. tasks: the same front in exact match, and the light models' own schedules.
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
from skipwise.scheduling.front import FrontSettings, find_front

import skipwise as sw
from skipwise.evaluation import calibration_texts
from skipwise.evaluation.texts import documents
from skipwise.evaluation.writing import Writing
from skipwise.planners.sandwich import PLACEMENTS, schedule
from skipwise.scheduling.importance import measure_importance

SHARE = 0.25  # of light steps, the paper's
LENGTH, STEPS = 128, 64
PREFIX = 32  # tokens of a held-out text that are given
ALL_LIGHT = "all light"


class Study:
    """A heavy model, light ones beside it, and where their Results go."""

    def __init__(self, heavy: str, lights: Sequence[str], label: str, output: Path, quick: bool):
        self.model, self.tokenizer = sw.load(heavy)
        self.shape = sw.find_contract(self.model).shape
        # plans call the light models so whatever folder they came from
        self.lights = {Path(light).name.removesuffix(label[-2:]): sw.load(light)[0] for light in lights}
        self.label, self.output, self.quick = label, output, quick

    def save(self, what: str, result: sw.Result) -> None:
        """Write a Result. Stand-ins are not kept: a page needs what they saved and cost."""
        rows = tuple(row.model_copy(update={"plan": _bare(row.plan)}) for row in result.rows)
        result.model_copy(update={"rows": rows}).save(self.output / f"{self.label}.{what}.json")

    def placed(self, light: str, placement: str, share: float) -> sw.Plan:
        """A schedule of a light model, named by it where there are several."""
        name = ALL_LIGHT if share == 1 else placement
        return _named(
            schedule(self.shape, light, placement, share), f"{light} {name}" if len(self.lights) > 1 else name
        )


def _named(plan: sw.Plan, method: str) -> sw.Plan:
    return plan.model_copy(update={"made_by": plan.made_by.model_copy(update={"method": method})})


def _bare(plan: sw.Plan | None) -> sw.Plan | None:
    """The plan without the stand-ins' tensors, under the name of how it was made."""
    if plan is None or plan.stand_ins is None:
        return plan
    phases = tuple(phase.model_copy(update={"stand_in": None}) for phase in plan.phases)
    return _named(plan.model_copy(update={"phases": phases, "stand_ins": None}), plan.method)


class TextStudy(Study):
    """A pair of models that write English."""

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

    def run(self) -> None:
        """Everything, the cheap parts first."""
        ((name, light),) = self.lights.items()
        texts = calibration_texts(self.tokenizer, 8 if self.quick else 64)
        importance = measure_importance(
            self.model, light, self.tokenizer, texts, light_tokenizer=self.tokenizer, names=(self.label, name)
        )
        importance.save(self.output / f"{self.label}.importance.json")
        importance.plot(self.output / f"{self.label}.importance.svg")
        placed = [self.placed(name, placement, SHARE) for placement in PLACEMENTS]
        whole = self.placed(name, "first", 1.0)
        self.judge("placements", self.writing(128), [*placed, whole])
        self.judge("prefix", self.writing(96, self.prefixes()), [self.placed(name, "sandwich", SHARE), whole])
        self.front(name)

    def judge(self, what: str, task: Writing, plans: Sequence[sw.Plan]) -> None:
        """One task under plans."""
        result = sw.evaluate(self.model, self.tokenizer, [task], list(plans), name=self.label, others=self.lights)
        self.save(what, result)

    def prefixes(self) -> tuple[str, ...]:
        """The beginnings of held-out test passages of the documents that the models know the kind of."""
        found = [list(self._passages(documents("test")[name])) for name in ("moby-dick", "sotu")]
        return tuple(passage for pair in zip(*found, strict=False) for passage in pair)[:96]

    def _passages(self, text: str) -> Iterator[str]:
        ids = self.tokenizer(text, verbose=False)["input_ids"]
        for start in range(0, len(ids) - LENGTH, LENGTH):
            yield self.tokenizer.decode(ids[start : start + PREFIX])

    def front(self, light: str) -> None:
        """Schedules of every kind at the paper's saving and at the target."""
        task = self.writing(128)
        settings = FrontSettings(budgets=(0.17, 0.25), segments=4, moments=256, trials=0 if self.quick else 4)
        calibrate = replace(task, first=1000, samples=4 if self.quick else 32)
        result = find_front(
            self.model,
            self.tokenizer,
            [task],
            settings,
            calibrate_on=[calibrate],
            light=light,
            others=self.lights,
            name=self.label,
        )
        self.save("front", result)


class TaskStudy(Study):
    """A model of exact tasks, beside models with fewer blocks."""

    def run(self) -> None:
        """The front with the first light model, and what each light model does by itself."""
        examples = 20 if self.quick else 400
        settings = FrontSettings(
            budgets=(0.2,) if self.quick else (0.17, 0.25, 0.33, 0.4),
            segments=7,
            trials=0 if self.quick else 12,
            moments=128 if self.quick else 1024,
            examples=20 if self.quick else 200,
        )
        first = next(iter(self.lights))
        found = find_front(
            self.model,
            self.tokenizer,
            None,
            settings,
            light=first,
            others=self.lights,
            examples=examples,
            name=self.label,
        )
        self.save("front", found)
        plans = [
            self.placed(light, placement, share)
            for light in self.lights
            for placement, share in (*((p, SHARE) for p in PLACEMENTS), ("first", 1.0))
        ]
        self.save(
            "light",
            sw.evaluate(
                self.model, self.tokenizer, None, plans, examples=examples, name=self.label, others=self.lights
            ),
        )


STUDIES: dict[str, type[TextStudy] | type[TaskStudy]] = {"text": TextStudy, "tasks": TaskStudy}


def main() -> None:
    """One study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=STUDIES)
    parser.add_argument("heavy", help="what skipwise.load takes")
    parser.add_argument("light", nargs="+", help="likewise")
    parser.add_argument("--label", required=True, help="the model's name and its seed, such as tiny-text-0")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="a few samples, to see that it runs")
    given = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    STUDIES[given.kind](given.heavy, given.light, given.label, given.output, given.quick).run()
    print(f"{given.label}: {(time.monotonic() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
