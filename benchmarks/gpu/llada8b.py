"""Tokens a second of LLaDA-8B on a GPU: the official loop, exact decoding and a cache, without and with a plan.

The model has its full size and random weights in bfloat16. Random weights can show no quality, so every contender
commits the same fixed number of tokens a forward, by quota: what differs is what a forward costs. Contenders of a
workload run in turns, `--rounds` times after a first run each; a figure is the median. The plan skips 6 of 32 blocks;
one workload is also run compiled.
Each row has the peak of torch's allocator, weights included, and the shares of the matrix rate and of the bandwidth
that were measured beforehand (FLOPs by formula, as they happened; weights read once a forward).

    python benchmarks/gpu/llada8b.py -o docs/results/gpu/llada8b.json      # an estimated 6 minutes of an H200
    python benchmarks/gpu/llada8b.py --model dream-7b -o docs/results/gpu/dream7b.json
    python benchmarks/gpu/llada8b.py --tiny                                # a tiny model, also without a GPU
The file is written after every workload; none is begun after `--minutes`. The last line of stdout is JSON.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import skipwise as sw
from skipwise.benchmarking.ceiling import measure_ceiling
from skipwise.benchmarking.machine import machine
from skipwise.benchmarking.memory import measuring_peak
from skipwise.benchmarking.result import Ceiling
from skipwise.benchmarking.timing import in_turns
from skipwise.blocks import find_contract
from skipwise.cost import price_blocks
from skipwise.examples import Size
from skipwise.files import write_atomically
from skipwise.loading import load_random
from skipwise.models import LLaDA
from skipwise.plan import Plan
from skipwise.sampling import FAMILIES

sys.path.insert(0, str(Path(__file__).parent.parent))
from official_loops import LOOPS

PROMPT, BLOCK = 128, 32
SKIPPED = (8, 11, 14, 17, 20, 23)  # 6 of 32; which ones does not matter to the time
# new tokens, rows, tokens committed a forward
WORKLOADS = [(256, 1, 4), (256, 1, 1), (512, 1, 4), (256, 8, 4), (512, 8, 4)]
COMPILED = (256, 1)  # new tokens and rows that are also compiled for, which takes a minute for each model
TINY_WORKLOADS = [(64, 2, 4)]
OFFICIAL = "official loop"
# name -> settings of `skipwise.generate`
OURS: dict[str, dict[str, Any]] = {
    "ours, exact": {},
    "ours, dual cache": {"cache": "dual"},
    "ours, delayed cache, focus 8": {"cache": "delayed", "focus": 8},
}
QUOTED = {
    "source": "ES-dLLM, arXiv 2603.10088, on an H200: tokens a second as printed, not measured here",
    "llada-8b": 226.57,
    "dream-7b": 308.51,
}


@dataclass
class Contender:
    """What is timed, and what it took: forwards, all-in FLOPs and peak bytes of one run, its tokens."""

    call: Callable[[], Tensor]
    plan: Plan | None
    forwards: int = 0
    flops: int = 0
    peak: int | None = None
    tokens: Tensor | None = None


@dataclass(frozen=True)
class Workload:
    """A model and its prompts."""

    model: Any
    ids: Tensor
    gen: int
    steps: int
    compiled: bool = False

    @property
    def given(self) -> dict[str, Any]:
        """Settings that all share."""
        return {"gen_length": self.gen, "steps": self.steps}

    def official(self, plan: Plan | None) -> Tensor:
        """The official loop of the model's family, under a plan."""
        family = self.model.family
        more = {"block_length": BLOCK} if family == "llada" else {"alg": "maskgit_plus"}
        settings = FAMILIES[family].settings(**self.given, **more)
        with sw.skip(self.model, plan) if plan else nullcontext():
            return LOOPS[family](self.model, self.ids, None, settings)

    def ours(self, plan: Plan | None, settings: dict[str, Any]) -> Any:
        """skipwise's block-wise sampler."""
        more = {"block_length": BLOCK, "family": "llada", "stop_at_eos": False, **settings}
        return sw.generate(self.model, self.ids, plan=plan, **self.given, **more)

    def contenders(self, plan: Plan) -> dict[str, Contender]:
        """All of them, each without and with the plan."""
        found = {}
        ways = OURS | ({"ours, exact, compiled": {"compile": True}} if self.compiled else {})
        for chosen, ending in ((None, ""), (plan, " + plan")):
            found[OFFICIAL + ending] = Contender(partial(self.official, chosen), chosen)
            for name, settings in ways.items():
                found[name + ending] = Contender(partial(self.ours, chosen, settings), chosen)
        return found

    def price(self, plan: Plan | None) -> Any:
        """Of one forward of one row at full length."""
        skip = plan.phases[0].skip if plan else None
        return price_blocks(self.model, Size(tokens=self.ids.shape[1] + self.gen)).forward(skip)


def first_run(work: Workload, contender: Contender) -> None:
    """One run for the peak and the accounts."""
    with measuring_peak(work.ids.device) as peak:
        out = contender.call()
    contender.peak = peak.bytes
    if isinstance(out, Tensor):  # the official loop keeps no accounts: every forward is whole
        contender.tokens, contender.forwards = out, work.steps
        contender.flops = work.steps * len(work.ids) * work.price(contender.plan).flops
    else:
        contender.tokens, contender.forwards = out.sequences, out.stats.forwards
        contender.flops = out.stats.taken_flops


def timed(call: Callable[[], object]) -> float:
    """Seconds, the GPU's work included."""
    began = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(work: Workload, plan: Plan, rounds: int, ceiling: Ceiling) -> dict[str, Any]:
    """Name -> row of every contender of a workload."""
    contenders = work.contenders(plan)
    for contender in contenders.values():
        first_run(work, contender)
    seconds = in_turns({name: contender.call for name, contender in contenders.items()}, rounds, measure=timed)
    return {name: row(work, contender, seconds[name], contenders, ceiling) for name, contender in contenders.items()}


def row(
    work: Workload, contender: Contender, times: list[float], contenders: dict[str, Contender], ceiling: Ceiling
) -> dict[str, Any]:
    took = statistics.median(times)
    table = sum(p.numel() * p.element_size() for p in work.model.get_input_embeddings().parameters())
    weights = work.price(contender.plan).weight_bytes - table
    whole = contenders[OFFICIAL].tokens
    return {
        "tokens_per_second": round(len(work.ids) * work.gen / took, 2),
        "seconds": round(took, 4),
        "forwards": contender.forwards,
        "ms_a_forward": round(1000 * took / contender.forwards, 3),
        "peak_bytes": contender.peak,
        "share_of_matrix_rate": round(contender.flops / took / ceiling.matrix_flops, 4),
        "share_of_bandwidth": round(contender.forwards * weights / took / ceiling.bandwidth, 4),
        "equal_to_official": round(float((contender.tokens == whole)[:, PROMPT:].double().mean()), 4),
    }


def build(name: str, tiny: bool, device: torch.device) -> Any:
    if tiny:
        return LLaDA.from_dims(width=64, layers=32, heads=4, mlp=96, vocab=999, device=device)
    return load_random(name, dtype=torch.bfloat16, device=device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llada-8b", choices=("llada-8b", "dream-7b"))
    parser.add_argument("--tiny", action="store_true", help="a tiny model instead of the full size")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=9.0, help="no workload is begun after so many")
    parser.add_argument("-o", "--output", type=Path, help="a .json file, written after every workload")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.tiny:
        parser.error("the full size needs a GPU with room for 20 GiB; without one, use --tiny")
    began = time.perf_counter()
    model = build(options.model, options.tiny, device)
    contract = find_contract(model)
    plan = Plan.static(contract.shape, {contract.main_stack: SKIPPED})
    ceiling = measure_ceiling(device, next(model.parameters()).dtype)
    result: dict[str, Any] = {
        "model": f"{options.model} ({'tiny' if options.tiny else 'full size'}, random weights)",
        **machine(device).model_dump(),
        "command": f"python {' '.join(sys.argv)}",
        "seconds_to_build": round(time.perf_counter() - began, 2),
        "ceiling": ceiling.model_dump(),
        "prompt": PROMPT,
        "block_length": BLOCK,
        "skipped": SKIPPED,
        "rounds": options.rounds,
        "quoted": QUOTED,
        "workloads": [],
    }
    print(f"{device}: {ceiling.matrix_flops / 1e12:.1f} TFLOP/s, {ceiling.bandwidth / 1e9:.0f} GB/s", flush=True)
    for gen, batch, tokens in TINY_WORKLOADS if options.tiny else WORKLOADS:
        ids = torch.randint(900, (batch, PROMPT), generator=torch.Generator().manual_seed(0)).to(device)
        facts = {"gen": gen, "batch": batch, "tokens_a_forward": tokens}
        if time.perf_counter() - began > 60 * options.minutes:
            result["workloads"].append({**facts, "not run": f"after {options.minutes} minutes"})
            continue
        compiled = (gen, batch) == COMPILED and device.type == "cuda"
        rows = measure(Workload(model, ids, gen, gen // tokens, compiled), plan, options.rounds, ceiling)
        result["workloads"].append({**facts, "rows": rows})
        for name, figures in rows.items():
            print(
                f"{gen} tokens x {batch}, {tokens} a forward, {name}: {figures['tokens_per_second']} tokens/s",
                flush=True,
            )
        if options.output:
            write_atomically(options.output, json.dumps(result, indent=1) + "\n")
    result["minutes"] = round((time.perf_counter() - began) / 60, 2)
    if options.output:
        write_atomically(options.output, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
