"""What would paper 1's evaluation cost? GPU hours by formula: nothing is run, no weight is allocated.

A masked diffusion model runs prompt + new tokens at every step. An autoregressive one, with a KV cache, runs every
position once. The time of a forward is the larger of FLOPs / (utilisation x peak FLOP/s) and weight bytes /
(utilisation x bandwidth): the first decides for diffusion, the second for decoding token by token. Reading the KV
cache, scoring the answers and loading are not counted. FLOPs are all-in (head and attention included).

    python benchmarks/reproduce_cost.py                       # the table of docs/reproduce.md
    python benchmarks/reproduce_cost.py --new 512 --batch 16
The last line of stdout is JSON.
"""

import argparse
import json

from torch import nn

from skipwise.blocks import find_contract
from skipwise.cost import Price, Prices, price_blocks
from skipwise.examples import Size
from skipwise.loading import load_skeleton
from skipwise.models import kind_of

# task -> (documents, tokens of a prompt with the task's own number of examples). Documents are those of the test
# splits; tokens are round guesses, not measured: a tokenizer of an 8B model is not at hand here.
TASKS = {"gsm8k": (1319, 1000), "minerva_math500": (500, 700), "humaneval": (164, 150), "mbpp": (500, 600)}
MODELS = ("llada-8b", "dream-7b", "qwen2.5-7b")
SKIPPED = range(7)  # blocks, as in the paper


def forwards(prices: Prices, skip: dict[str, range], diffusion: bool, prompt: int, new: int) -> list[tuple[int, Price]]:
    """(how many, price of one) of the forwards that one document takes; prices are those at prompt + new tokens."""
    whole = prices.forward(skip)
    if diffusion:
        return [(new, whole)]  # one step a token
    blocks, length = prices.of_blocks(skip), prompt + new
    linear, head = (blocks.flops - blocks.attention_flops) // length, prices.outside.flops // length

    def price(queries: int, keys: int) -> Price:
        attention = blocks.attention_flops * queries * keys // length**2
        return Price(flops=linear * queries + attention + head, weight_bytes=whole.weight_bytes)

    return [(1, price(prompt, prompt)), (new - 1, price(1, prompt + new // 2))]


def cost(model: nn.Module, task: str, options: argparse.Namespace) -> list[tuple[float, float]]:
    """(PFLOP, GPU hours) of all documents of a task with 0, 1, ... 6 blocks skipped."""
    documents, prompt = TASKS[task]
    prices = price_blocks(model, Size(tokens=prompt + options.new))
    stack, diffusion = find_contract(model).main_stack, kind_of(model) == "masked diffusion"
    every = []
    for skipped in SKIPPED:
        flops = seconds = 0.0
        for count, price in forwards(prices, {stack: range(skipped)}, diffusion, prompt, options.new):
            flops += count * documents * price.flops
            compute = options.batch * price.flops / (options.utilisation * options.peak * 1e12)
            reading = price.weight_bytes / (options.utilisation * options.bandwidth * 1e12)
            seconds += count * documents / options.batch * max(compute, reading)
        every.append((flops / 1e15, seconds / 3600))
    return every


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--new", type=int, default=256, help="new tokens a document, one step each")
    parser.add_argument("--batch", type=int, default=8, help="documents a forward")
    parser.add_argument("--peak", type=float, default=989, help="TFLOP/s; H100 SXM, bfloat16, dense: 989")
    parser.add_argument("--bandwidth", type=float, default=3.35, help="TB/s; H100 SXM: 3.35")
    parser.add_argument("--utilisation", type=float, default=0.4, help="fraction of both that is reached, 0..1")
    options = parser.parse_args()
    print(
        f"{options.new} new tokens a document, batch {options.batch}, {options.utilisation:.0%} of {options.peak:g} "
        f"TFLOP/s and of {options.bandwidth:g} TB/s\n"
    )
    print("| model | task | documents | prompt tokens | PFLOP | GPU hours | 6 skipped: PFLOP | hours | 0 to 6: hours |")
    print("|---|---|--:|--:|--:|--:|--:|--:|--:|")
    rows = []
    for model in MODELS:
        total, skeleton = 0.0, load_skeleton(model, dtype="bfloat16")
        for task, (documents, prompt) in TASKS.items():
            every = cost(skeleton, task, options)
            hours = sum(h for _, h in every)
            total += hours
            (flops, whole), (few, least) = every[0], every[6]
            print(
                f"| {model} | {task} | {documents:,} | {prompt:,} | {flops:,.0f} | {whole:.1f} "
                f"| {few:,.0f} | {least:.1f} | {hours:.1f} |"
            )
            rows.append({"model": model, "task": task, "pflop": [f for f, _ in every], "hours": [h for _, h in every]})
        print(f"| **{model}** | all four | | | | | | | **{total:.0f}** |")
    print(json.dumps({"settings": vars(options), "rows": rows}))


if __name__ == "__main__":
    main()
