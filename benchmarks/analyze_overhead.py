"""What does an analysis cost beside its forwards? Time of `skipwise.analyze` / time of the same forwards alone.

What is measured: the part of an analysis that grows with the texts (the forwards, reading their states, and the forward
that finds the outlier channels) against the same forwards as anyone would run them, without anything attached and with
the logits, in turns in one process, `--pairs` pairs after `--warmup`; the order within a pair alternates. The figure is
the median of the pairs' ratios with its 95% bootstrap interval; 1.25 means that an analysis takes a quarter longer.
What an analysis does once whatever the texts (tracing the contract, pricing the blocks) is timed apart, in ms.

    python benchmarks/analyze_overhead.py                     # the layers, on three models
    python benchmarks/analyze_overhead.py --parts layers,tokens --cpu-time
The last line of stdout is JSON.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

import skipwise as sw
from skipwise.analysis.run import Run
from skipwise.analysis.samples import Batch, batches, tokenize
from skipwise.benchmarking.timing import in_turns, ratio, timed
from skipwise.blocks import find_contract
from skipwise.calibration import Text
from skipwise.cost import price_blocks
from skipwise.evaluation import calibration_texts
from skipwise.models import kind_of, mask_token
from skipwise.sampling import Denoiser, LLaDASettings
from skipwise.sampling.llada import decode
from skipwise.versions import versions

SETTINGS = {"outliers": 1, "noise_levels": 8, "step_bins": 8, "max_steps": 32, "seed": 0}  # the defaults of `analyze`


class Numbers:
    """A tokenizer for a random model: a text is a list of numbers."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        """As tokenizers give them."""
        return {"input_ids": [int(part) for part in text.split()]}


def embedded(name: str, count: int) -> tuple[nn.Module, Any, Sequence[Text]]:
    model, tokenizer = sw.load(name)
    return model, tokenizer, calibration_texts(tokenizer, count)


def llama(count: int) -> tuple[nn.Module, Any, Sequence[Text]]:
    """A random Llama of width 512 and 12 blocks, and one text of 256 tokens for every 32 of `count`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=1024, **sizes)).eval()
    texts = [" ".join(map(str, torch.randint(1024, (256,)).tolist())) for _ in range(max(1, count // 32))]
    return model, Numbers(), texts


def forwards(model: nn.Module, work: Sequence[Batch]) -> None:
    """What `analyze` runs, with nothing attached; and the logits, which it leaves out where nobody reads them."""
    diffusion = kind_of(model) == "masked diffusion"
    for batch in work if diffusion else ():
        prompt, length = batch.samples[0].prompt, len(batch.samples[0].ids)
        settings = LLaDASettings(gen_length=length - prompt, steps=min(length - prompt, SETTINGS["max_steps"]))
        decode(Denoiser(model), batch.ids[:, :prompt], settings)
    for batch in work:
        levels = SETTINGS["noise_levels"] if diffusion else 1
        for i in range(levels):
            masked = batch.noise(0) < (i + 0.5) / levels
            model(input_ids=batch.ids.masked_fill(masked, mask_token(model)) if diffusion else batch.ids)


def measure(
    name: str,
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[Text],
    parts: Sequence[str],
    pairs: int,
    warmup: int,
    clock: Callable[[], float],
) -> dict[str, object]:
    """The ratio for one model."""
    samples = tokenize(tokenizer, texts, 512)
    work = batches(samples, 64)
    began = time.perf_counter()
    contract = find_contract(model)
    price_blocks(model)
    once = time.perf_counter() - began
    stack = contract.main_stack

    def analysed() -> object:
        return Run(model, contract, stack, samples, work, parts, **SETTINGS).tensors()

    def plain() -> object:
        return forwards(model, work)

    with torch.no_grad():
        seconds = in_turns({"analysed": analysed, "plain": plain}, pairs, warmup, partial(timed, clock=clock))
    return {
        "model": name,
        "parts": ",".join(parts),
        "texts": len(samples),
        "tokens": sum(len(sample.ids) for sample in samples),
        **ratio(seconds["analysed"], seconds["plain"]).rounded(4),
        "plain_seconds": round(statistics.median(seconds["plain"]), 3),
        "once_ms": round(1000 * once, 1),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="layers", help="as in `skipwise analyze`")
    parser.add_argument("--texts", type=int, default=512, help="embedded models; the Llama reads 1 in 32")
    parser.add_argument("--pairs", type=int, default=11)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds of this process, for a shared machine")
    settings = parser.parse_args()
    clock = time.process_time if settings.cpu_time else time.perf_counter
    rows = []
    builders = {name: (lambda name=name: embedded(name, settings.texts)) for name in ("tiny-dllm", "tiny-ar")}
    for name, build in (builders | {"llama-512x12": lambda: llama(settings.texts)}).items():
        row = measure(name, *build(), settings.parts.split(","), settings.pairs, settings.warmup, clock)
        rows.append(row)
        print("{model} ({parts}): {ratio} ({low} to {high}), {once_ms} ms once".format(**row), flush=True)
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    machine |= {"clock": "cpu" if settings.cpu_time else "wall"}
    print(json.dumps({"rows": rows, "machine": machine, "versions": versions()}))


if __name__ == "__main__":
    main()
