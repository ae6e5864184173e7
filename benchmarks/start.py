"""Does loading a model, or entering a plan, take longer than it did? This tree against another commit, in turns.

What is measured, in CPU seconds of one thread, in a process of its own: importing `skipwise.loading`, the first and a
later `load("tiny-dllm")`, the first entry into a plan (the model is looked over) and 50 later ones; decoding of 4 rows
by quota, by a threshold and as Dream does; an analysis of tiny-dllm made, written and read; and a plan by number on
LLaDA-8B's shape, of which no weight is held. The figure is the median of the pairs' ratios, this tree over the other,
with its 95% bootstrap interval.

    python benchmarks/start.py --against HEAD~20 --pairs 9
The last line of stdout is JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from io import BytesIO
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SNIPPET = """
import gc, json, time
found, begun = {}, time.process_time()
def lap(name):
    global begun
    found[name] = time.process_time() - begun
    gc.collect()
    begun = time.process_time()
import torch, transformers
begun = time.process_time()
import skipwise as sw
from skipwise.loading import load
from skipwise.plan import Plan
lap("import")
load("tiny-dllm"); lap("first load")
model, _ = load("tiny-dllm"); lap("load")
plan = Plan.static(sw.find_contract(model).shape, {"model.layers": [3, 8, 9, 10, 11]})
with sw.skip(model, plan): pass
lap("first entry")
for _ in range(50):
    with sw.skip(model, plan): pass
lap("50 entries")
ids = torch.tensor([[5, 6, 7, 8]] * 4)
def decode():
    for settings in ({}, {"threshold": .9}, {"family": "dream", "alg": "entropy"}):
        sw.generate(model, ids, gen_length=32, **settings)
with sw.skip(model, plan): decode()
lap("first decoding")
for _ in range(4): decode()
lap("decoding")
if hasattr(Plan, "of"):
    skeleton = sw.load_skeleton("llada-8b"); lap("8B skeleton")
    Plan.of(sw.find_contract(skeleton).shape, [3, 8, 9, 10, 11]); lap("8B plan by number")
import tempfile
from skipwise.analysis import Analysis, analyze
from skipwise.evaluation import calibration_texts
tokenizer = load("tiny-dllm")[1]
made = analyze(model, tokenizer, calibration_texts(tokenizer, 16)); lap("analysis")
folder = made.save(tempfile.mkdtemp()); lap("analysis written")
for _ in range(200): Analysis.load(folder)
lap("200 analyses read")
print(json.dumps(found))
"""


def timed(source: Path) -> dict[str, float]:
    """One process that runs the snippet with the package in `source`."""
    env = os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", SNIPPET], env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", required=True, help="a commit")
    parser.add_argument("--pairs", type=int, default=9)
    asked = parser.parse_args()
    import torch

    from skipwise.benchmarking.machine import machine
    from skipwise.benchmarking.timing import ratio

    packed = subprocess.run(["git", "archive", asked.against, "src"], cwd=ROOT, capture_output=True, check=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=BytesIO(packed)) as archive:
            archive.extractall(folder, filter="data")
        trees = (ROOT / "src", Path(folder) / "src")
        pairs = []
        for number in range(asked.pairs):  # the order within a pair alternates
            first = number % 2
            here = {first: timed(trees[first])}
            here[1 - first] = timed(trees[1 - first])
            pairs.append((here[0], here[1]))
    rows = {}
    for name in pairs[0][0]:
        if name in pairs[0][1]:
            rows[name] = ratio([ours[name] for ours, _ in pairs], [theirs[name] for _, theirs in pairs]).rounded()
            print(f"{name}: {rows[name]}")
        else:
            rows[name] = sorted(ours[name] for ours, _ in pairs)[asked.pairs // 2]
            print(f"{name}: {rows[name]:.3f} s")
    print(json.dumps({"rows": rows, "against": asked.against, "machine": vars(machine(torch.device("cpu")))}))


if __name__ == "__main__":
    main()
