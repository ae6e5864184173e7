"""Paper 1 at the scale we have: retention of every planner, stand-in and healing on one model, as a Result.

    python reproduce/p1.py tiny-dllm --label tiny-dllm-0 --output docs/results/p1
    python reproduce/p1.py runs/tiny-dllm-1 --label tiny-dllm-1 --output docs/results/p1

Plans are chosen, stand-ins fitted and adapters trained on the calibration split; scores are on the test split. The page
is made from the Results by reproduce/p1_page.py.
"""

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded; see docs/log.md

import torch

import skipwise as sw
from skipwise.evaluation import calibration_texts, default_tasks
from skipwise.healing import HealSettings
from skipwise.zoo.tasks import TASKS

SEEDS = (0, 1, 2)  # of random plans


class Study:
    """One model, its calibration data, and every plan that is to be judged."""

    def __init__(self, name: str, output: Path, label: str, quick: bool, core: bool):
        self.model, self.tokenizer = sw.load(name)
        self.output, self.label, self.quick, self.core = output, label, quick, core
        self.exact = default_tasks(self.tokenizer)[0] in TASKS
        self.tasks = default_tasks(self.tokenizer)
        self.analysis = sw.analyze(
            self.model, self.tokenizer, self.texts(self.tasks, 256), name=label, parts=("layers",)
        )

    def texts(self, tasks: Sequence[str], count: int) -> list:
        """Calibration texts of some tasks; of English a piece of each, because a forward takes seconds there."""
        count = count if self.exact else len(tasks)
        return calibration_texts(self.tokenizer, 24 if self.quick else count, tasks=tasks)

    def calibration(self, tasks: Sequence[str] | None = None, count: int = 256, batch_size: int = 64) -> sw.Calibration:
        """The model with calibration texts."""
        texts = self.texts(tasks or self.tasks, count)
        tokens = 256 if self.exact else 128
        return sw.Calibration.of(self.model, self.tokenizer, texts, max_tokens=tokens, batch_size=batch_size)

    def plans(self) -> Iterator[sw.Plan]:
        """All plans, the cheap ones first."""
        sizes = self.sizes()
        some = [skip for skip in sizes if skip in ((4, 6) if self.exact else (3, 6))]
        for skip in sizes:
            yield sw.make_plan(self.analysis, "similarity", skip=skip)
        for skip in some:
            for seed in SEEDS:
                yield sw.make_plan(self.analysis, "random", skip=skip, seed=seed)
            yield sw.make_plan(self.analysis, "window", skip=skip)
            if not self.core:
                spread = sw.make_plan(self.analysis, "similarity", skip=skip, forbid_neighbours=True)
                yield spread.named("similarity, no neighbours")
        calibration = self.calibration()
        order = self.greedy_order(self.calibration(count=1024, batch_size=128), max(sizes))
        greedy = {skip: self.cut(order, skip) for skip in sizes}
        yield from greedy.values()
        if not self.core:
            yield from self.other_tasks((6 if self.exact else 3) if not self.quick else max(sizes))
        if 5 in sizes:
            spared = sw.make_plan(self.analysis, "similarity", skip=5)
            yield sw.fit_stand_ins(spared, calibration, "linear")
        for skip in (5, 6, 8) if self.exact else (3, 6):
            if skip in greedy:
                yield sw.fit_stand_ins(greedy[skip], calibration, "linear")
                if skip == 6:
                    yield sw.fit_stand_ins(greedy[skip], calibration, "constant")
        yield from self.healed(greedy)

    def sizes(self) -> tuple[int, ...]:
        """Numbers of blocks to skip."""
        if self.quick:
            return (2, 4)
        if not self.exact:
            return (1, 2, 3, 4, 6)
        return (2, 4, 5, 6, 8) if self.core else (1, 2, 3, 4, 5, 6, 8)

    def greedy_order(self, calibration: sw.Calibration, skip: int) -> sw.Plan:
        """One greedy search; smaller plans are its beginnings."""
        began = time.monotonic()
        plan = sw.make_plan(self.analysis, "greedy", skip=skip, calibration=calibration)
        print(f"{self.label}: greedy search for {skip} blocks took {time.monotonic() - began:.0f} s", flush=True)
        return plan

    def cut(self, longest: sw.Plan, skip: int) -> sw.Plan:
        """The greedy plan of `skip` blocks, from the order in which the longest one gave them up."""
        stack = self.analysis.main_stack
        order = longest.made_by.scores[stack]["order"][:skip]
        settings = longest.made_by.settings | {"skip": skip}
        made_by = longest.made_by.model_copy(update={"settings": settings})
        return sw.Plan.static(longest.model, {stack: [int(block) for block in order]}, made_by)

    def other_tasks(self, skip: int) -> Iterator[sw.Plan]:
        """Greedy calibrated on one task alone, and on all but one."""
        for task in self.tasks:
            others = [other for other in self.tasks if other != task]
            for tasks, name in (([task], f"greedy on {task} alone"), (others, f"greedy on all but {task}")):
                calibration = self.calibration(tasks, 128)
                plan = sw.make_plan(self.analysis, "greedy", skip=skip, calibration=calibration)
                yield plan.named(name)

    def healed(self, greedy: dict[int, sw.Plan]) -> Iterator[sw.Plan]:
        """Greedy plans with an adapter, and one with stand-ins and an adapter."""
        if not self.exact:
            return
        calibration = self.calibration(count=2048)
        settings = HealSettings(steps=5 if self.quick else 300)
        folder = Path("runs") / "p1" / self.label
        for skip in (6, 8):
            if skip not in greedy:
                continue
            yield sw.heal(greedy[skip], calibration, folder / f"healed-{skip}.json", settings)
        if 8 in greedy and not self.core:
            linear = sw.fit_stand_ins(greedy[8], self.calibration(), "linear")
            yield sw.heal(linear, calibration, folder / "healed-8-linear.json", settings)


def main() -> None:
    """Study one model and write its Result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--label")
    parser.add_argument("--output", type=Path, default=Path("runs/p1"))
    parser.add_argument("--examples", type=int, help="prompts a task (200), or windows of a text (3)")
    parser.add_argument("--core", action="store_true", help="fewer plans, for the seeds that show the spread")
    parser.add_argument("--quick", action="store_true", help="a few small plans, to see that it runs")
    given = parser.parse_args()
    torch.set_num_threads(1)
    label = given.label or given.model.strip("/").replace("/", "--")
    began = time.monotonic()
    study = Study(given.model, given.output, label, given.quick, given.core)
    plans = list(study.plans())
    print(f"{label}: {len(plans)} plans made in {time.monotonic() - began:.0f} s", flush=True)
    result = sw.evaluate(
        study.model,
        study.tokenizer,
        plans=plans,
        examples=given.examples or (20 if given.quick else 200) if study.exact else given.examples or 3,
        name=label,
        on_progress=lambda done, total: done % 20 or print(f"{label}: {done}/{total}", flush=True),
    )
    result.save(given.output / f"{label}.result.json")
    print(f"{label}: done in {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
