"""Paper 1, what lies behind the scores: states by depth, recency, and how far plans move the predictions.

    python reproduce/p1_states.py tiny-dllm --label tiny-dllm-0 --output docs/results/p1
    python reproduce/p1_states.py tiny-ar2dllm --label tiny-ar2dllm-0 --beside tiny-ar tiny-ar-0

Writes LABEL.states.json: the analysis as lists by depth, the mean KL of every bare plan in LABEL.result.json on test
texts, in pairs against similarity, and the CKA with the models beside it.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded; see docs/log.md

import numpy as np
import torch

import skipwise as sw
from skipwise.calibration import divergence, tokenize
from skipwise.evaluation import calibration_texts, default_tasks
from skipwise.evaluation.measure import interval, resamples
from skipwise.evaluation.texts import documents
from skipwise.files import write_atomically
from skipwise.zoo.tasks import TASKS, distinct_examples

KEPT = (
    "update_norm",
    "outlier_channels",
    "recency",
    "attention_recency",
    "attention_sink",
    "lens_agreement",
    "token_similarity_far",
)


def states(analysis: sw.Analysis) -> dict[str, Any]:
    """What the page shows of an analysis, by depth."""
    stack = analysis.main_stack
    found = {name: tensor.tolist() for name in KEPT if (tensor := analysis.get(stack, name)) is not None}
    for name in ("similarity", "similarity_without_outliers", "cka"):
        found[name] = torch.diagonal(analysis.tensors[f"{stack}/{name}"], offset=1).tolist()
    return found


def held_out(tokenizer: Any, examples: int) -> list:
    """Texts of the test split."""
    if default_tasks(tokenizer)[0] in TASKS:
        return [pair for task in TASKS for pair in distinct_examples(task, "test", examples)]
    return [text[i : i + 1200] for text in documents("test").values() for i in range(0, 2400, 1200)]


@torch.no_grad()
def predictions(calibration: sw.Calibration) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(where, log-probabilities of the predicted tokens), batch by batch, as the model is now."""
    return [(batch.predicted, batch.predictions(calibration.model)) for batch in calibration.batches()]


def divergences(calibration: sw.Calibration, plan: sw.Plan, wanted: list) -> np.ndarray:
    """(texts,): mean KL(whole || under the plan) over the predicted tokens of each text, in nats."""
    rows = []
    with sw.skip(calibration.model, plan):
        found = predictions(calibration)
    for (where, target), (_, other) in zip(wanted, found, strict=True):
        kl = torch.zeros(where.shape).masked_scatter_(where, divergence(target, other))
        rows.append((kl.sum(1) / where.sum(1)).numpy())
    return np.concatenate(rows)


def moved(model: Any, tokenizer: Any, result: sw.Result, examples: int) -> list[dict[str, Any]]:
    """For every plan without stand-ins or an adapter: its mean KL, and that of similarity minus its own, in pairs."""
    samples = tokenize(tokenizer, held_out(tokenizer, examples), 256)
    calibration = sw.Calibration(model, samples, batch_size=128 if len(samples[0].ids) < 64 else 3, seed=7)
    wanted = predictions(calibration)
    found: list[dict[str, Any]] = []
    base: dict[int, np.ndarray] = {}
    for row in result.rows:
        if row.plan is None or row.plan.stand_ins or row.plan.adapter:
            continue
        kl = divergences(calibration, row.plan, wanted)
        counts = resamples(len(kl), 0) / len(kl)
        if row.method == "similarity":
            base[row.k] = kl
        entry = {"method": row.method, "k": row.k, "kl": interval(float(kl.mean()), counts @ kl).model_dump()}
        if row.k in base:
            gain = base[row.k] - kl
            entry["less_than_similarity"] = interval(float(gain.mean()), counts @ gain).model_dump()
        found.append(entry)
    return found


def main() -> None:
    """Look at one model and write what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--label", required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/p1"))
    parser.add_argument("--beside", nargs=2, action="append", default=[], metavar=("MODEL", "LABEL"))
    parser.add_argument("--quick", action="store_true", help="a few texts, to see that it runs")
    given = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = sw.load(given.model)
    exact = default_tasks(tokenizer)[0] in TASKS
    texts = calibration_texts(tokenizer, 16 if given.quick else 128 if exact else 6)
    parts = ("layers", "tokens", "attention", "lens")
    analysis = sw.analyze(model, tokenizer, texts, name=given.label, max_tokens=256, parts=parts)
    result = sw.Result.load(given.output / f"{given.label}.result.json")
    found: dict[str, Any] = {
        "label": given.label,
        "kind": analysis.kind,
        "states": states(analysis),
        "moved": moved(model, tokenizer, result, 8 if given.quick else 64),
        "beside": {},
    }
    for other, label in given.beside:
        comparison = sw.compare(model, sw.load(other)[0], tokenizer, texts)
        found["beside"][label] = comparison.corresponding.tolist()
    write_atomically(given.output / f"{given.label}.states.json", json.dumps(found, indent=1) + "\n")
    print(f"{given.label}: states written", flush=True)


if __name__ == "__main__":
    main()
