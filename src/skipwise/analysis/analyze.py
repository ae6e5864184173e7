"""`analyze`: run a model over texts and keep statistics of what its blocks do to the stream."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from skipwise.analysis.record import Analysis, not_measured
from skipwise.analysis.run import Run
from skipwise.analysis.samples import batches, tokenize
from skipwise.blocks import Contract, find_contract
from skipwise.calibration import Text, fingerprint
from skipwise.cost import price_blocks
from skipwise.errors import UserError, unknown
from skipwise.examples import Size, check_text_alone
from skipwise.finite import not_finite
from skipwise.models import kind_of
from skipwise.skipping import whole
from skipwise.versions import versions
from skipwise.wrapping import unwrap

PARTS = ("layers", "tokens", "attention", "lens")


def analyze(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[Text],
    *,
    name: str | None = None,
    parts: Sequence[str] = ("layers", "tokens"),
    max_tokens: int = 512,
    batch_size: int = 64,
    outliers: int = 1,
    noise_levels: int = 8,
    step_bins: int = 8,
    max_steps: int = 32,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Analysis:
    """Statistics of a language model's hidden states over `texts`; `Analysis` lists them.

    An autoregressive model or an encoder reads each text once. A masked diffusion model is followed along its own
    denoising trajectories (prompt kept, one token a step but at most `max_steps` steps; of a plain text the first half
    is the prompt), by step in `step_bins` bins of progress, and reads the texts with a fraction of the tokens masked,
    by `noise_levels` levels. A plan in force is put aside meanwhile: blocks are the whole model's.

    parts: what to measure. "layers" is what planners need: similarity of every pair of layers, CKA, update norms;
    "tokens" are similarity of neighbouring tokens and recency. Not measured by default, as they take forwards of their
    own: "attention" (mass by distance, with the eager implementation) and "lens" (agreement with the final
    prediction); both look at 16 texts at most, evenly chosen. outliers: how many channels
    `similarity_without_outliers` leaves out; they are found in one more forward over 64 tokens of the first texts, half
    masked for a diffusion model. texts are cut to `max_tokens`; batch_size: texts a forward (rounded up to 128 tokens),
    it changes no result beyond rounding.

    Under `accelerate launch` or torch.distributed the batches are shared out, and every process returns the statistics
    of all. on_progress(done, total) is called after every batch of this process.
    Raises UserError for an empty list of texts, for unknown parts, for a model that does not run on text alone, and for
    one whose numbers are not finite.
    """
    model = unwrap(model)
    if kind_of(model) == "block diffusion":
        raise UserError(
            f"{type(model).__name__} cannot be analysed: it reads a prompt and writes a canvas by its own sampler."
        )
    check_text_alone(model, "analysed over", whole=True)
    parts = check_parts(parts)
    samples = tokenize(tokenizer, texts, max_tokens)
    settings = {"noise_levels": noise_levels, "step_bins": step_bins, "max_steps": max_steps, "seed": seed}
    settings |= {"outliers": outliers}
    with whole(model), torch.no_grad():
        contract = find_contract(model)
        stack = contract.main_stack
        work = batches(samples, batch_size)
        run = Run(model, contract, stack, samples, work, parts, **settings, on_progress=on_progress)
        tensors = run.tensors()
        if not_measured(tensors):
            raise not_finite(model, lambda: [model(batch.ids.to(run.device)) for batch in work])
        tensors["block_flops"] = _block_flops(model, contract, stack, max(len(s.ids) for s in samples))
    return Analysis(
        name=name or type(model).__name__,
        model=contract.shape,
        kind=kind_of(model),
        tensors={f"{stack}/{key}": tensor.contiguous() for key, tensor in tensors.items()},
        calibration=fingerprint(samples),
        settings={"parts": list(parts), "max_tokens": max_tokens, **settings},
        versions=versions(),
    )


def check_parts(parts: Sequence[str]) -> tuple[str, ...]:
    """The parts in the order of PARTS. Raises UserError for an unknown one, or none."""
    for part in parts:
        if part not in PARTS:
            raise unknown("part of an analysis", part, PARTS)
    if not parts:
        raise UserError(f"An analysis needs something to measure; give parts out of {', '.join(PARTS)}.")
    return tuple(part for part in PARTS if part in parts)


def _block_flops(model: nn.Module, contract: Contract, stack: str, tokens: int) -> Tensor:
    prices = price_blocks(model, Size(tokens=tokens), contract).blocks[stack]
    return torch.tensor([price.flops for price in prices], dtype=torch.float64)
