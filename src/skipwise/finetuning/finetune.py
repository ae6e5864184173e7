"""`finetune`: personalise an image DiT with a LoRA, holding in memory only the blocks that are trained (paper 3)."""

import json
import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from skipwise.blocks import module_list
from skipwise.errors import require
from skipwise.files import check_writable, write_atomically
from skipwise.finetuning.checks import check, check_machine
from skipwise.finetuning.draws import Draw, Example, make_draws
from skipwise.finetuning.family import Family
from skipwise.finetuning.hollow import Record, Shell, hollow, stored_runs
from skipwise.finetuning.lora import add_lora, lora_targets, save_lora
from skipwise.finetuning.making import OnTheFly, SampleOf, StoreSize, fill_store
from skipwise.finetuning.pipelines import pipeline_class
from skipwise.finetuning.precision import computing, lora_dtype, plain_norms
from skipwise.finetuning.prepare import Prepared, Progress, prepare
from skipwise.finetuning.residuals import DrawKey, ResidualStore
from skipwise.finetuning.runs import Run, skipped_runs
from skipwise.finetuning.settings import FinetuneSettings
from skipwise.finetuning.shards import Resident, Shards
from skipwise.finetuning.subject import Subject
from skipwise.finetuning.train import Records, Samples, Trainer, TrainingSettings
from skipwise.plan import Plan
from skipwise.versions import versions


def finetune(
    name: str,
    subject: Subject,
    output: str | Path,
    plan: Plan | None = None,
    settings: FinetuneSettings | None = None,
    training: TrainingSettings | None = None,
    *,
    device: str | None = None,
    on_progress: Progress | None = None,
    stop_after: int | None = None,
) -> Path:
    """Train a LoRA on the blocks in `plan.train` and return the file of the adapter, which stock pipelines load.

    name: a folder, hub id or embedded name of a diffusers pipeline of FLUX.1, SD3, SANA or PixArt. plan: without one,
    all blocks are trained, which is ordinary LoRA. `output` receives the adapter, plan.json, settings.json, train.jsonl
    and, while it runs, what was prepared and a checkpoint: a run that was killed goes on and ends as if it had not
    been. The text encoders, the autoencoder, the base model block by block, and the hollow model are in memory one
    after the other, never together.
    on_progress(what, done, total, more to say); a total of 0 announces. stop_after: end early, as if killed then.
    Raises UserError for mistakes in pictures, prompt, plan or settings and for a disk that is too small, before work is
    done that takes long; and for a loss that is not finite.
    """
    work = Work.begin(name, subject, Path(output), plan, settings, training, device, on_progress)
    return work.run(stop_after)


@dataclass
class Work:
    """One fine-tuning."""

    name: str
    folder: Path
    plan: Plan
    settings: FinetuneSettings
    training: TrainingSettings
    family: Family
    shards: Shards
    groups: list[list[Draw]]
    accelerator: Any
    tell: Progress

    @classmethod
    def begin(
        cls,
        name: str,
        subject: Subject,
        folder: Path,
        plan: Plan | None,
        settings: FinetuneSettings | None,
        training: TrainingSettings | None,
        device: str | None,
        on_progress: Progress | None,
    ) -> "Work":
        """Check everything that a user may have got wrong; nothing is computed yet."""
        accelerate = require("accelerate", "image")
        settings, training = settings or FinetuneSettings(), training or TrainingSettings()
        tell = on_progress or (lambda *_: None)
        checked = check(
            name, settings, training, subject=subject, plan=plan, tell=lambda line: tell("pictures", 0, 0, line)
        )
        check_machine(settings, device)
        accelerator = accelerate.Accelerator(cpu=device == "cpu")
        count = training.draws or _fresh(settings, training, checked.groups, accelerator.num_processes)
        times, crops, flip = checked.family.sample_t, training.crops(settings), training.random_flip
        draws = [make_draws(group, count, times, crops, training.seed, random_flip=flip) for group in checked.groups]
        return cls(
            name, check_writable(folder), checked.plan, settings, training, checked.family,
            Shards.open(name, dtype=settings.dtype), draws, accelerator, tell,
        )  # fmt: skip

    def run(self, stop_after: int | None) -> Path:
        """Prepare, make residuals, train, save."""
        device = str(self.accelerator.device)
        prepared = self.prepared()
        model = self._without_blocks()
        samples = Samples(self.family, model, prepared, self.settings, self.training.place, device)
        runs = stored_runs(self.shards.contract, self.plan.train, self.settings.late)
        if not self.training.draws:  # the base model makes the records as they are needed
            self._fill(model, whole=True)
        records = self._records(model, samples, runs)
        if self.training.draws:
            self._fill(model)
        with ExitStack() as stack:
            parameters = self._adapt(model)
            stack.enter_context(plain_norms(model, self.settings, torch.device(device).type))
            shell = stack.enter_context(hollow(model, self.plan, self.settings.late, blocks=self.shards))
            done = self._trainer(shell, samples, records, parameters).train(self._tell_step, stop_after)
        if done < self.training.steps:
            return self.folder
        return self._finish(model)

    @property
    def _runs(self) -> tuple[Run, ...]:
        return skipped_runs(self.shards.contract, self.plan.train)

    @property
    def _draws(self) -> list[Draw]:
        return [draw for group in self.groups for draw in group]

    def whole_model(self) -> nn.Module:
        """The base model with all its weights, on the device."""
        model = self._without_blocks()
        self._fill(model, whole=True)
        return model

    def _without_blocks(self) -> nn.Module:
        model = self.shards.skeleton()
        self.shards.fill_outside(model, device=self.accelerator.device)
        return model

    def prepared(self) -> Prepared:
        """Text embeddings and latents, from the folder or computed now."""
        path = self.folder / "prepared.safetensors"
        of = {"pipeline": self.name, "pixels": self.settings.pixels, "dtype": self.settings.dtype}
        of |= {"text_tokens": self.settings.text_tokens}
        with self.accelerator.main_process_first():
            found = Prepared.load(path, of) if path.exists() else None
            if found and found.covers(self._draws):
                return found
            prepared = prepare(
                self.name, self.family, self._draws, self.settings.pixels, dtype=self.settings.dtype,
                device=str(self.accelerator.device),
                max_length=self.settings.text_tokens, on_progress=self.tell,
            )  # fmt: skip
            prepared.save(path, of)
        return prepared

    def _records(self, model: nn.Module, samples: Samples, runs: Sequence[Run]) -> Records:
        """Where the records of draws come from: the store, which is filled first, or the whole base model."""
        if not runs:
            return lambda draws: {}
        by_key = {DrawKey.of(draw): draw for draw in self._draws}
        source = (self._stored if self.training.draws else self._on_the_fly)(
            model, runs, by_key, lambda key: samples.on("cpu")([by_key[key]]).inputs
        )
        return lambda draws: source.read([DrawKey.of(draw) for draw in draws])

    def _stored(
        self, model: nn.Module, runs: Sequence[Run], keys: Iterable[DrawKey], sample_of: SampleOf
    ) -> ResidualStore:
        with self.accelerator.main_process_first():
            store = ResidualStore.create(self.folder / "residuals", self._depends_on(runs))
            kind = self.accelerator.device.type
            with computing(self.settings, kind), plain_norms(model, self.settings, kind):
                fill_store(
                    store, keys, sample_of, model, runs, self.shards, device=self.accelerator.device,
                    announce=self._announce, on_block=self._tell_block,
                )  # fmt: skip
        return store

    def _announce(self, size: StoreSize) -> None:
        self.tell("residuals", 0, 0, str(size))

    def _tell_block(self, name: str) -> None:
        order = [f"{stack.name}.{i}" for stack in self.shards.contract.stacks.values() for i in range(stack.length)]
        self.tell("make residuals", order.index(name) + 1, len(order), name)

    def _depends_on(self, runs: Sequence[Run]) -> dict[str, Any]:
        """What records are made with, besides what the key of a draw says."""
        settings = self.settings
        return {
            "base": self.shards.fingerprint(),
            "runs": [run.name for run in runs],
            "dtype": "float32" if settings.dtype == "float32" else "bfloat16",
            "base_dtype": settings.dtype,
            "precision": settings.precision,
            "pixels": settings.pixels,
            "text_tokens": settings.text_tokens,
            "place": self.training.place,
            "guidance": self.training.guidance,
        }

    def _on_the_fly(
        self, model: nn.Module, runs: Sequence[Run], keys: Iterable[DrawKey], sample_of: SampleOf
    ) -> "_Precisely":
        device = self.accelerator.device
        return _Precisely(OnTheFly(model, sample_of, runs, Resident(model), device=device), self.settings, device.type)

    def _fill(self, model: nn.Module, whole: bool = False) -> None:
        """Bring in the blocks that stay: the trained ones, and the late ones when they are frozen; or all of them."""
        for name in self.shards.contract.stacks:
            gone = {n for run in self._runs if run.stack == name and self._leaves(run) for n in run.blocks}
            for number, block in enumerate(module_list(model, name)):
                if whole or number not in gone:
                    self.shards.fill(block, f"{name}.{number}", device=self.accelerator.device)

    def _leaves(self, run: Run) -> bool:
        return run.early or self.settings.late != "frozen"

    def _adapt(self, model: Any) -> list[nn.Parameter]:
        """The LoRA's parameters, the same for the same seed."""
        with torch.random.fork_rng():
            torch.manual_seed(self.training.seed)
            targets = lora_targets(model, self.plan.train, self.settings.targets)
            parameters = add_lora(model, targets, self.settings.rank, lora_dtype(self.settings))
        model.train()
        if self.settings.checkpointing:
            model.enable_gradient_checkpointing()
        return parameters

    def _trainer(self, shell: Shell, samples: Samples, records: Records, parameters: list[nn.Parameter]) -> Trainer:
        return Trainer(
            shell, samples, records, self.groups, self.settings, self.training, self.folder, self._facts(), parameters,
            self.accelerator,
        )  # fmt: skip

    def _tell_step(self, step: int, steps: int, how: str) -> None:
        self.tell("train", step, steps, how)

    def _facts(self) -> dict[str, Any]:
        """What a checkpoint belongs to: everything that decides the numbers, not for how long or how often saved."""
        training = asdict(self.training)
        del training["steps"], training["checkpoint_every"]
        examples = {(d.example.picture.sha256, d.example.prompt) for d in self._draws}
        return {
            "model": self.shards.fingerprint(),
            "plan": {name: list(numbers) for name, numbers in self.plan.train.items()},
            "settings": json.dumps(asdict(self.settings), sort_keys=True),
            "training": json.dumps(training, sort_keys=True),
            "pictures": sorted(map(list, examples)),
            "processes": self.accelerator.num_processes,
            "versions": versions(),
        }

    def _finish(self, model: nn.Module) -> Path:
        """Write the adapter, then forget what was of use to the training alone."""
        path = self.folder / "pytorch_lora_weights.safetensors"
        if self.accelerator.is_main_process:
            path = save_lora(pipeline_class(self.name), self.folder, model)
            self.plan.save(self.folder / "plan.json")
            write_atomically(self.folder / "settings.json", json.dumps(self._facts(), indent=2) + "\n")
            (self.folder / "state.pt").unlink(missing_ok=True)
            (self.folder / "prepared.safetensors").unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()
        return path


@dataclass(frozen=True)
class _Precisely:
    """Records on the fly, in the precision that stored ones are made in."""

    source: OnTheFly
    settings: FinetuneSettings
    device: str

    def read(self, keys: Sequence[DrawKey]) -> Record:
        with computing(self.settings, self.device), plain_norms(self.source.model, self.settings, self.device):
            return self.source.read(keys)


def _fresh(
    settings: FinetuneSettings, training: TrainingSettings, groups: Sequence[Sequence[Example]], processes: int
) -> int:
    """How many draws of each picture all steps need, if none is to be seen twice."""
    needed = training.steps * training.accumulate * settings.batch * processes
    return math.ceil(needed / min(map(len, groups)))
