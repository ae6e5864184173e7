"""Is decoding faster than the official loops, and does what a plan saves in FLOPs arrive as seconds?

Every row is two things on the same weights and prompts, run in turns in one process, the order alternating (pairs.py):
`plain`, mostly a transcription of the official loop (official_loops.py), and `ours`. Sections:

- zoo: the embedded models, batches of task prompts, padded and not.
- shapes: models of published vocabularies and heads with random weights: 8 blocks of width 512. Steps are fewer than
  tokens, or the official loop would take hours: what a step costs does not depend on how many tokens it commits.
- exact: each trick of exact decoding alone, with all but it against all (tricks.py).
- plan: the LLaDA shape under a plan without 2 of its 8 blocks, against the same mode without it.
- modes: approximate decoding against exact decoding.
- others: reading states for an analysis; block evaluations of the greedy planner, counted.

    python benchmarks/speed.py --compile -o docs/results/speed.json    # all; about 15 minutes of two idle cores
    python benchmarks/speed.py --quick                                 # small models, one pair: does it run?
docs/results/speed.md is made of the JSON by speed_page.py. The last line of stdout is the JSON.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from analyze_overhead import embedded, llama
from analyze_overhead import measure as measure_analysis
from pairs import Prompts, Row, Turns, compare, facts_of, official, ours, said
from subjects import dream_shape, llada_shape, mdlm_shape, random_prompts, zoo_prompts
from tricks import exact

import skipwise as sw
from skipwise.benchmarking.machine import machine
from skipwise.benchmarking.modes import caches as cache_settings
from skipwise.blocks import find_contract
from skipwise.calibration import Calibration
from skipwise.cost import estimate, price_blocks
from skipwise.evaluation import calibration_texts
from skipwise.examples import Size
from skipwise.files import write_atomically
from skipwise.plan import Plan
from skipwise.planners.greedy import Search

DELAYED = {"cache": "delayed"}
SKIPPED = (3, 5)  # of the shapes' 8 blocks, a quarter


# The embedded models

# how each family is decoded: the official loop's settings, and ours that are to give its tokens
GREEDY = {
    "llada": ({}, {}),
    "dream": ({"alg": "maskgit_plus"}, {"alg": "maskgit_plus", "compat": "dream"}),
    "mdlm": ({"sampler": "ddpm_cache"}, {"sampler": "ddpm_cache", "compat": "mdlm"}),
}
OWN = {"dream": {"alg": "maskgit_plus"}, "mdlm": {}}  # our own defaults, where they are not the same tokens
CASES = [(1, 32, False), (16, 8, False), (16, 32, True)]  # batch, new tokens, padded


def against_official(
    name: str, model: Any, prompts: Prompts, gen: int, steps: int, turns: Turns, compiled: bool = False
) -> Iterator[Row]:
    """Our decoding against the official loop: to the same tokens, and by our own default; that also compiled."""
    family = model.family
    given = {"gen_length": gen, "steps": steps}
    if family == "llada" and gen > 32:
        given["block_length"] = 32
    theirs, same = GREEDY[family]
    plain = official(model, family, prompts, given | theirs)
    found = [ours("same tokens", model, prompts, **given, **same)]
    if compiled:
        found.append(ours("compiled", model, prompts, compile=True, **given, **OWN.get(family, same)))
    if family in OWN:
        found.append(ours("our default", model, prompts, **given, **OWN[family]))
    price_blocks(model, Size(tokens=prompts.ids.shape[1] + gen))  # for the accounts; once a length
    yield from compare(plain, found, turns, facts_of(name, prompts, gen, steps))


def zoo(options: argparse.Namespace) -> Iterator[Row]:
    """The embedded models, in one thread: two are slower on matrices this small, and compiled ones most of all."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield from _zoo(options)
    finally:
        torch.set_num_threads(threads)


def _zoo(options: argparse.Namespace) -> Iterator[Row]:
    names = ("tiny-dllm", "tiny-dllm-light", "tiny-ar2dllm", "tiny-text")[3 * options.quick :]
    for name, (batch, gen, padded) in product(names, CASES[-1:] if options.quick else CASES):
        model, tokenizer = sw.load(name)
        if model.family == "mdlm" and padded:
            padded = False  # the official loop knows no padding
        prompts = zoo_prompts(tokenizer, batch, padded)
        gen = 4 if options.quick else gen
        compiled = batch == 1 and options.compile  # takes half a minute for each model and shape
        yield from against_official(name, model, prompts, gen, gen, Turns.of(options, 7), compiled)


# Published shapes, small


# shape -> builder, and (batch, prompt, new tokens, steps) of its rows
SHAPES: dict[str, tuple[Callable[[bool], Any], list[tuple[int, int, int, int]]]] = {
    "LLaDA shape": (llada_shape, [(1, 128, 128, 16), (1, 128, 256, 16), (4, 128, 128, 4), (4, 128, 256, 8)]),
    "Dream shape": (dream_shape, [(1, 128, 64, 8)]),
    "MDLM shape": (mdlm_shape, [(1, 128, 128, 16), (4, 128, 128, 8)]),
}
SMALL = [(2, 8, 64, 4)]


def shapes(options: argparse.Namespace) -> Iterator[Row]:
    """Random weights, published vocabularies."""
    for name, (build, cases) in SHAPES.items():
        model = build(options.quick)
        list(against_official(name, model, random_prompts(1, 8), 32, 1, Turns(1, 0)))  # sets all up; in no row
        for batch, prompt, gen, steps in SMALL if options.quick else cases:
            prompts = random_prompts(batch, prompt)
            yield from against_official(name, model, prompts, gen, steps, Turns.of(options, 3, warmup=0))


# Under a plan, and approximations


def modes_of(model: Any) -> dict[str, dict[str, Any]]:
    """Name -> settings of `generate`: exact first, then every cache."""
    return {"exact": {}, **{f"{kind} cache": settings for kind, settings in cache_settings(model).items()}}


def block_ratio(model: Any, plan: Plan, tokens: int) -> Row:
    """What the plan leaves of a forward's FLOPs: of the blocks alone, and with the head at every position."""
    cost = estimate(model, plan, Size(tokens=tokens))
    return {"left_block_flops": 1 - cost.saved_block_flops, "left_all_in_flops": 1 - cost.saved_all_in_flops}


def quarter(model: Any) -> Plan:
    contract = find_contract(model)
    return Plan.static(contract.shape, {contract.main_stack: SKIPPED})


def plan(options: argparse.Namespace) -> Iterator[Row]:
    """Each mode without 2 of 8 blocks against the same mode with all; and what is left of the FLOPs that happened."""
    model, prompts = llada_shape(options.quick), random_prompts(1, 128)
    chosen = quarter(model)
    settings = modes_of(model)
    cases = [(128, 32, "exact"), (256, 32, "exact"), (256, 64, "dual cache")]  # new tokens, steps, mode
    for gen, steps, mode in [(64, 8, mode) for mode in settings] if options.quick else cases:
        given = {"gen_length": gen, "steps": steps, "block_length": 32, **settings[mode]}
        stats = [sw.generate(model, prompts.ids, plan=p, stop_at_eos=False, **given).stats for p in (chosen, None)]
        whole = ours(f"{mode}, all blocks", model, prompts, **given)
        fewer = ours(f"{mode}, 6 of 8", model, prompts, plan=chosen, **given)
        (row,) = compare(whole, [fewer], Turns.of(options, 15), facts_of("LLaDA shape", prompts, gen, steps))
        yield {
            **row,
            **block_ratio(model, chosen, 128 + gen),
            "left_flops_as_happened": round(stats[0].taken_flops / stats[1].taken_flops, 4),
        }


def modes(options: argparse.Namespace) -> Iterator[Row]:
    """Approximations against exact decoding at one token a step: thresholds on trained models, caches on the shape."""
    for name in ("tiny-dllm", "tiny-ar2dllm"):
        model, tokenizer = sw.load(name)
        prompts = zoo_prompts(tokenizer, 16, False)
        given = {"gen_length": 7, "family": "llada"}
        exact = ours("exact", model, prompts, **given)
        threshold = ours("threshold 0.9", model, prompts, threshold=0.9, **given)
        yield from compare(exact, [threshold], Turns.of(options, 7), facts_of(name, prompts, 7, 7))
    yield from agreements(options)
    yield from caches(options)


def agreements(options: argparse.Namespace) -> Iterator[Row]:
    """Caches of a trained model, which writes 24 tokens in one block: how many of them are those of exact decoding."""
    model, tokenizer = sw.load("tiny-dllm")
    prompts, gen = zoo_prompts(tokenizer, 64, False), 24
    exact, *others = (
        ours(mode, model, prompts, gen_length=gen, **more)
        for mode, more in {**modes_of(model), "focus 4, refresh 8": {**DELAYED, "focus": 4, "refresh": 8}}.items()
    )
    yield from compare(exact, others, Turns.of(options, 3), facts_of("tiny-dllm", prompts, gen, gen))


def caches(options: argparse.Namespace) -> Iterator[Row]:
    """Each cache against exact decoding, at one token a step, all in one round: exact decoding takes a minute."""
    model, gen = llada_shape(options.quick), 64 if options.quick else 256
    prompts = random_prompts(1, 128)
    found = modes_of(model)
    for more in found.values():  # sets all up
        sw.generate(model, prompts.ids, gen_length=32, steps=2, **more)
    runs = [ours(mode, model, prompts, gen_length=gen, block_length=32, **more) for mode, more in found.items()]
    facts = facts_of("LLaDA shape", prompts, gen, gen)
    yield from compare(runs[0], runs[1:], Turns.of(options, 3, warmup=0), facts)


# What else has to be quick


def others(options: argparse.Namespace) -> Iterator[Row]:
    """An analysis beside its forwards; the greedy planner's block evaluations beside the naive count."""
    count = 8 if options.quick else 128
    builders = {name: partial(embedded, name) for name in ("tiny-dllm", "tiny-ar")} | {"llama-512x12": llama}
    for name, build in list(builders.items())[: 1 if options.quick else 3]:
        turns = Turns.of(options, 7)
        row = measure_analysis(name, *build(count), ["layers"], turns.pairs, turns.warmup, turns.clock)
        yield {"what": "an analysis of the layers / its forwards alone", **row}
    for name, skip in product(("tiny-dllm", "tiny-text"), (1, 4)):
        yield greedy(name, min(skip, 2 if options.quick else skip), 4)


def greedy(name: str, skip: int, texts: int) -> Row:
    """Blocks run to choose `skip` of them, all candidates tested in each round; naive: a whole forward a candidate."""
    model, tokenizer = sw.load(name)
    calibration = Calibration.of(model, tokenizer, calibration_texts(tokenizer, texts))
    search = Search(calibration, find_contract(model).main_stack)
    list(search.first(skip))
    rounds = range(skip)
    naive = len(search.batches) * sum((search.length - gone) * (search.length - gone - 1) for gone in rounds)
    row = {
        "what": "block evaluations of the greedy planner / naive",
        "model": name,
        "skip": skip,
        "blocks": search.length,
    }
    row |= {"evaluated": search.evaluated, "naive": naive, "ratio": round(search.evaluated / naive, 4)}
    return row


SECTIONS = {"zoo": zoo, "shapes": shapes, "exact": exact, "plan": plan, "modes": modes, "others": others}


def main() -> None:
    """Measure and print, and write after every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small models, one pair")
    parser.add_argument("--only", action="append", choices=SECTIONS, help="a section; repeat for several")
    parser.add_argument("--pairs", type=int, help="of every row; 1 to 7 by default, by what a run takes")
    parser.add_argument("--compile", action="store_true", help="also our decoding of the embedded models compiled")
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds of this process, for a shared machine")
    parser.add_argument("-o", "--output", type=Path, help="a .json file, written after every row")
    options = parser.parse_args()
    if options.quick:
        options.pairs = options.pairs or 1
    torch.manual_seed(0)
    began = time.perf_counter()
    result: dict[str, Any] = {
        "machine": machine(torch.device("cpu")).model_dump(),
        "quick": options.quick,
        "clock": "cpu" if options.cpu_time else "wall",
        "sections": {},
    }
    result["machine"]["command"] = f"python {' '.join(sys.argv)}"
    for section in options.only or SECTIONS:
        rows = result["sections"][section] = []
        for row in SECTIONS[section](options):
            rows.append(row)
            print(said(row), flush=True)
            result["minutes"] = round((time.perf_counter() - began) / 60, 2)
            if options.output:
                write_atomically(options.output, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
