"""What the parts of DiT-BlockSkip give and cost on tiny-dit: each way of fine-tuning, trained with every seed.

    python reproduce/p3.py tricks --output docs/results/p3
writes p3/GROUP.json and GROUP.png, a row of pictures a way. All ways of all groups train for as many steps, from the
same pictures; skipped blocks are chosen on the training pictures, and what is scored is painted from new prompts.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded; see docs/log.md

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from p3_results import BLOCKSKIP, LAST, LORA
from PIL import Image
from torch import nn

from skipwise.finetuning.draws import Draw
from skipwise.finetuning.finetune import Subject, Work
from skipwise.finetuning.making import OnTheFly, shared_twin
from skipwise.finetuning.patches import PatchSchedule
from skipwise.finetuning.residuals import DrawKey
from skipwise.finetuning.runs import Run
from skipwise.finetuning.shards import Resident
from skipwise.finetuning.train import Records, Samples
from skipwise.image_demo import SETTINGS, TRAINING, Way, run_image_demo
from skipwise.report.personalisation import Outcome

SEEDS = (0, 1, 2)
REPEATS = 4  # pictures a prompt and seed
RANKS = {"50%": 16, "30%": 24}  # so that all ways train about as many parameters as rank 8 on all blocks


@dataclass
class Refreshed(Work):
    """A fine-tuning whose residuals never go stale: the whole model, adapter and all, makes them anew at every step.

    Not a way to save memory. It tells what of the paper's loss is staleness, and what is the gradient that the skipped
    late blocks do not pass on.
    """

    def _fill(self, model: nn.Module, whole: bool = False) -> None:
        super()._fill(model, whole=True)

    def _adapt(self, model: Any) -> list[nn.Parameter]:
        parameters = super()._adapt(model)
        self.adapted = shared_twin(model)
        return parameters

    def _records(self, model: nn.Module, samples: Samples, runs: Sequence[Run]) -> Records:
        by_key = {DrawKey.of(draw): draw for draw in self._draws}

        def read(draws: Sequence[Draw]) -> Any:
            source = OnTheFly(
                self.adapted, lambda key: samples([by_key[key]]).inputs, runs, Resident(self.adapted), device="cpu"
            )
            return source.read([DrawKey.of(draw) for draw in draws])

        return read


def refreshed(model: str, learnt: Subject, folder: Path, *rest: Any, device: str, on_progress: Any) -> Path:
    """`finetune`, with residuals that are refreshed at every step."""
    return Refreshed.begin(model, learnt, folder, *rest, device, on_progress).run(None)


def part(name: str, rule: str = "vital", share: str = "50%", **changes: Any) -> Way:
    """A way that trains some of the blocks, on patches of half the side if nothing else is said."""
    training = {key: changes.pop(key) for key in ("schedule", "train") if key in changes}
    settings: dict[str, Any] = {"patch": 32, "rank": RANKS[share], "late": "residual", **changes}
    return Way(name, SETTINGS.but(**settings), share, rule, **training)


GROUPS = {
    "tricks": (
        Way(LORA, SETTINGS),
        Way("patches alone", SETTINGS.but(patch=32)),
        part("half the blocks alone", patch=None),
        part(BLOCKSKIP),
        part("BlockSkip, 30% of the blocks", share="30%"),
    ),
    "late": (
        part("late blocks streamed", late="streamed"),
        part("residuals refreshed", train=refreshed),
        part("last half, exact", rule="last", late="none"),
        part(LAST, rule="last", late="none", patch=None),
        part(LAST + ", checkpointing", rule="last", late="none", patch=None, checkpointing=True),
    ),
    "rules": (
        part("blocks by the paper's rule", rule="paper"),
        part("middle blocks", rule="middle"),
    ),
    "schedules": (
        part("cosine schedule", schedule=PatchSchedule("cosine", 0.5, 1.0)),
        part("step schedule", schedule=PatchSchedule("step", 0.5, 1.0)),
        part("whole pictures, made small", schedule=PatchSchedule("linear", 1.0, 1.0)),
        part("small crops alone", schedule=PatchSchedule("linear", 0.5, 0.5)),
    ),
}


def contact_sheet(outcomes: Sequence[Outcome], path: Path, columns: int = 8) -> None:
    """A row a way: the first pictures of the first two seeds."""
    rows = [[picture for seed in outcome.pictures[:2] for picture in seed[: columns // 2]] for outcome in outcomes]
    Image.fromarray(np.concatenate([np.concatenate(row, axis=1) for row in rows])).save(path, optimize=True)


def main() -> None:
    """Train, paint and judge one group."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", default="tiny-dit", help="a pipeline of tiny-dit's kind")
    parser.add_argument("--label", help="of the files; the group by default")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    given = parser.parse_args()
    torch.set_num_threads(1)
    training = replace(TRAINING, steps=2, draws=2) if given.quick else TRAINING
    label = given.label or given.group
    work = Path("runs/p3-quick" if given.quick else "runs/p3") / label
    outcomes, _ = run_image_demo(
        work, GROUPS[given.group], SEEDS[: 2 if given.quick else None], training, given.model,
        repeats=1 if given.quick else REPEATS,
    )  # fmt: skip
    given.output.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(work / "result.json", given.output / f"{label}.json")
    contact_sheet(outcomes, given.output / f"{label}.png")


if __name__ == "__main__":
    main()
