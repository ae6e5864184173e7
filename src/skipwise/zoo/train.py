"""Train a zoo model from its seed: `skipwise zoo train NAME`.

Masked diffusion: mask exactly k of the n answer tokens, k uniform in 1..n, and weigh the cross-entropy by 1/k (LLaDA's
likelihood bound, arXiv 2502.09992 eq. 6, which has the expectation of the 1/t loss and less variance).
Autoregressive: cross-entropy of the answer tokens. Everything else is the same for both kinds: data, blocks, width,
optimizer, number of sequences. A recipe with a parent goes on from that autoregressive model with the masked-diffusion
objective, as Dream did from Qwen2.5 (arXiv 2508.15487): attention looks both ways, position p is still predicted from
the state at p - 1.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from skipwise.errors import UserError
from skipwise.files import write_atomically, write_bytes_atomically, write_state
from skipwise.loading import load
from skipwise.models.dream import SHARED, DreamConfig, DreamModel
from skipwise.models.llada import LLaDAConfig, LLaDAModelLM, official_state_dict
from skipwise.zoo.tasks import MAX_LENGTH, TASKS, examples
from skipwise.zoo.tokenizer import build_tokenizer

Objective = Literal["masked_diffusion", "autoregressive"]
ZooModel = LLaDAModelLM | DreamModel | LlamaForCausalLM


@dataclass(frozen=True)
class Recipe:
    """All that determines a zoo model. `share` is each task's part of a batch; `parent` the model it goes on from."""

    objective: Objective
    parent: str | None = None
    blocks: int = 24
    width: int = 64
    heads: int = 4
    mlp_width: int = 160
    steps: int = 2400
    batch_size: int = 256
    learning_rate: float = 3e-3
    warmup: int = 100
    decay_from: float = 0.5
    share: tuple[tuple[str, float], ...] = (("addition", 0.35), ("chain", 0.25), ("sort", 0.25), ("reverse", 0.15))


CARD = """# {name}

A {objective} language model over generated tasks with exact answers: three-digit addition, chained arithmetic, sorting
and reversing digits. Made to measure what skipping blocks costs; of no other use. Apache-2.0, trained from scratch.

Reproduce it with `skipwise zoo train {name} --seed {seed}`; the log of the run that made these weights is train.jsonl.
"""

RECIPES = {
    "tiny-dllm": Recipe("masked_diffusion"),
    "tiny-ar": Recipe("autoregressive"),
    # on top of its parent's steps; a third of the learning rate, so that the parent is not forgotten
    "tiny-ar2dllm": Recipe("masked_diffusion", parent="tiny-ar", steps=1200, learning_rate=1e-3),
}


@dataclass(frozen=True)
class Batch:
    """Left-padded sequences (batch, MAX_LENGTH); `answer` is True on answer tokens, `attention` 0 on padding."""

    tokens: Tensor
    attention: Tensor
    answer: Tensor


def build_model(recipe: Recipe, seed: int, parent: str | None = None) -> ZooModel:
    """A freshly initialised model, or one with the weights of `parent` (what `load` takes; the recipe's by default)."""
    if recipe.parent:
        return _continued(parent or recipe.parent)
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    settings: dict[str, Any] = dict(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=recipe.mlp_width,
        num_hidden_layers=recipe.blocks,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        initializer_range=recipe.width**-0.5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model: LLaDAModelLM | LlamaForCausalLM
    if recipe.objective == "masked_diffusion":
        model = LLaDAModelLM(LLaDAConfig(mask_token_id=tokenizer.mask_token_id, **settings))
    else:
        model = LlamaForCausalLM(LlamaConfig(**settings))
    _shrink_branches(model)
    return model


@torch.no_grad()
def _shrink_branches(model: ZooModel) -> None:
    """Residual branches start small, so that depth does not blow up the stream."""
    for layer in model.model.layers:
        for branch_end in (layer.self_attn.o_proj, layer.mlp.down_proj):
            branch_end.weight.div_(math.sqrt(2 * len(model.model.layers)))


def _continued(parent: str) -> DreamModel:
    """A Dream with the weights of an autoregressive Llama; the biases that only Dream has are 0."""
    source, tokenizer = load(parent)
    if type(source) is not LlamaForCausalLM or tokenizer.mask_token_id is None:
        raise UserError(f"{parent} is a {type(source).__name__}; a parent is a zoo model such as tiny-ar.")
    shared = {key: value for key, value in source.config.to_dict().items() if key in SHARED}
    shared |= {"mask_token_id": tokenizer.mask_token_id, "rope_parameters": source.config.rope_parameters}
    model = DreamModel(DreamConfig(**shared))
    biases = {key: torch.zeros_like(value) for key, value in model.state_dict().items() if key.endswith(".bias")}
    model.load_state_dict(source.state_dict() | biases)
    return model.train()


def batches(recipe: Recipe, seed: int) -> Iterator[Batch]:
    """An endless stream of training batches."""
    tokenizer = build_tokenizer()
    ids = tokenizer.get_vocab()
    streams = {task: examples(task, "train", seed) for task, _ in recipe.share}
    counts = [round(recipe.batch_size * part) for _, part in recipe.share]
    tasks = [task for (task, _), count in zip(recipe.share, counts, strict=True) for _ in range(count)]
    while True:
        tokens = torch.full((len(tasks), MAX_LENGTH), tokenizer.pad_token_id)
        answer = torch.zeros(len(tasks), MAX_LENGTH, dtype=torch.bool)
        for row, task in enumerate(tasks):
            text = "".join(next(streams[task]))
            tokens[row, -len(text) :] = torch.tensor([ids[c] for c in text])
            answer[row, -TASKS[task].answer_length :] = True
        yield Batch(tokens, (tokens != tokenizer.pad_token_id).long(), answer)


def masked_diffusion_loss(model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
    """Mean over rows of sum_{masked} cross-entropy / k."""
    length = batch.answer.sum(1)  # (batch,)
    k = (torch.rand(length.shape, generator=generator) * length).long() + 1
    # the k answer positions that draw the smallest numbers are masked
    draws = torch.rand(batch.tokens.shape, generator=generator).where(batch.answer, 2.0)
    masked = draws.argsort(1).argsort(1) < k[:, None]
    noised = batch.tokens.where(~masked, cast(LLaDAConfig, model.config).mask_token_id or 0)
    logits = model(input_ids=noised, attention_mask=batch.attention).logits
    losses = _token_losses(logits, batch.tokens)
    return (losses * masked / k[:, None]).sum() / len(k)


def autoregressive_loss(model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
    """Mean over rows of the mean cross-entropy of the answer tokens, each predicted from those before it."""
    logits = model(input_ids=batch.tokens, attention_mask=batch.attention, use_cache=False).logits[:, :-1]
    target, scored = batch.tokens[:, 1:], batch.answer[:, 1:]
    losses = _token_losses(logits, target)
    return (losses * scored / scored.sum(1, keepdim=True)).sum() / len(target)


def _token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """(batch, length, vocabulary), (batch, length) -> cross-entropy of every token (batch, length)."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


LOSSES: dict[Objective, Callable[[nn.Module, Batch, torch.Generator], Tensor]] = {
    "masked_diffusion": masked_diffusion_loss,
    "autoregressive": autoregressive_loss,
}


def build_optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for embeddings, head and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in name)]
    return [
        torch.optim.Muon(matrices, lr=recipe.learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=recipe.learning_rate / 2, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def schedule(recipe: Recipe, step: int) -> float:
    """Learning-rate factor: linear warm-up, constant, linear decay to 2%."""
    remaining = (recipe.steps - step) / (recipe.steps * (1 - recipe.decay_from))
    return min(1.0, (step + 1) / recipe.warmup) * max(0.02, min(1.0, remaining))


@dataclass
class Progress:
    """What a log line says besides the accuracies."""

    step: int
    sequences: int
    loss: float
    seconds: float


def train(
    name: str,
    output: Path,
    seed: int = 0,
    compile_blocks: bool = False,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    every: int = 100,
    recipe: Recipe | None = None,
    stop_after: int | None = None,
    parent: str | None = None,
) -> ZooModel:
    """Train the zoo model `name`, logging to `output`/train.jsonl; a killed run goes on from `output`/state.pt.

    stop_after: end early, at this step, as if killed after it; parent: see `build_model`.
    """
    recipe = recipe or RECIPES[name]
    model = build_model(recipe, seed, parent)
    optimizers = build_optimizers(model, recipe)
    base = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    generator = torch.Generator().manual_seed(seed + 1)
    stream = batches(recipe, seed)
    output.mkdir(parents=True, exist_ok=True)
    first, elapsed = resume(output, model, optimizers, generator, stream)
    if compile_blocks:
        for layer in model.model.layers:
            layer.compile()
    with open(output / "train.jsonl", "a", encoding="utf-8") as log:
        if first == 0:
            log.write(
                json.dumps({"name": name, "seed": seed, "recipe": asdict(recipe), "torch": torch.__version__}) + "\n"
            )
        total, steps, began = 0.0, 0, time.monotonic()
        for step in range(first, stop_after or recipe.steps):
            loss = LOSSES[recipe.objective](model, next(stream), generator)
            total, steps = total + _update(model, loss, optimizers, base, schedule(recipe, step)), steps + 1
            if (step + 1) % every == 0 or step + 1 == recipe.steps:
                seconds = elapsed + time.monotonic() - began
                progress = Progress(
                    step + 1, (step + 1) * recipe.batch_size, round(total / steps, 5), round(seconds, 1)
                )
                log.write(json.dumps(asdict(progress) | _accuracies(model, evaluate)) + "\n")
                log.flush()
                save_state(output, step + 1, seconds, model, optimizers, generator)
                total, steps = 0.0, 0
    return model.eval()


def _update(
    model: nn.Module, loss: Tensor, optimizers: list[torch.optim.Optimizer], base: list[float], factor: float
) -> float:
    """One optimizer step at `factor` times the base learning rates; returns the loss."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group, rate in zip(groups, base, strict=True):
        group["lr"] = rate * factor
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.item()


def _accuracies(model: nn.Module, evaluate: Callable[[nn.Module], dict[str, float]] | None) -> dict[str, float]:
    if evaluate is None:
        return {}
    model.eval()
    with torch.compiler.set_stance("force_eager"):  # decoding has other shapes than training; not worth compiling
        accuracies = evaluate(model)
    model.train()
    return accuracies


def save_model(model: ZooModel, name: str, seed: int, folder: Path) -> Path:
    """Write a standard checkpoint: the official layouts of LLaDA and Dream, transformers' for the others."""
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer().save_pretrained(folder)
    if isinstance(model, LLaDAModelLM | DreamModel):
        weights = official_state_dict(model) if isinstance(model, LLaDAModelLM) else model.state_dict()
        write_bytes_atomically(folder / "model.safetensors", save(weights, {"format": "pt"}))
        write_atomically(folder / "config.json", json.dumps(model.config.to_official(), indent=2) + "\n")
    else:
        model.save_pretrained(folder)
    write_atomically(folder / "README.md", CARD.format(name=name, seed=seed, objective=RECIPES[name].objective))
    return folder


def save_state(
    output: Path,
    step: int,
    seconds: float,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    generator: torch.Generator,
) -> None:
    """Checkpoint for `resume`; written whole or not at all."""
    state = {
        "step": step,
        "seconds": seconds,
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "generator": generator.get_state(),
    }
    write_state(output / "state.pt", state)


def resume(
    output: Path,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    generator: torch.Generator,
    stream: Iterator[Batch],
) -> tuple[int, float]:
    """(step to go on from, seconds spent so far). The data stream is wound forward to where the run had been."""
    if not (output / "state.pt").exists():
        return 0, 0.0
    state = torch.load(output / "state.pt", weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    generator.set_state(state["generator"])
    for _ in range(state["step"]):
        next(stream)
    return state["step"], state["seconds"]
