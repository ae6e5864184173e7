"""The main job from end to end: analyse models, plan, evaluate the plans, and write the report."""

from collections.abc import Callable, Sequence
from pathlib import Path

from skipwise.analysis import Analysis, analyze
from skipwise.evaluation import Result, calibration_texts, default_tasks, evaluate
from skipwise.evaluation.tasks import TASKS
from skipwise.files import check_writable
from skipwise.loading import load
from skipwise.plan import Plan
from skipwise.planners import make_plan
from skipwise.report import write_report

SKIPS = (1, 2, 3, 4, 6)
RANDOM_SEEDS = (0, 1, 2, 3, 4)

# (what is going on, done, total)
Progress = Callable[[str, int, int], None]


def run_demo(
    names: Sequence[str] = ("tiny-dllm", "tiny-ar"),
    output: str | Path = "runs/demo",
    skips: Sequence[int] = SKIPS,
    random_seeds: Sequence[int] = RANDOM_SEEDS,
    examples: int | None = None,
    on_progress: Progress | None = None,
    tokenizer: str | None = None,
) -> tuple[list[Result], Path]:
    """Analyse every model, skip `skips` blocks by similarity and at random, evaluate, and report.

    Skip sets are chosen on calibration texts, scores are on test examples (`examples` a task; 200 prompts or 6 windows
    of text when left out). tokenizer: of all the models, where it is not their own, as `skipwise.load` takes it.
    Leaves analysis-NAME/, plans/, result-NAME.json and report.html in `output`. Returns the results and the path of the
    report. Raises UserError before any work when the folder cannot be written.
    """
    output = check_writable(output)
    tell = on_progress or (lambda *_: None)
    results, analyses = [], []
    for name in names:
        result, analysis = _one_model(name, output, skips, random_seeds, examples, tell, tokenizer)
        results.append(result)
        analyses.append(analysis)
    return results, write_report(results, analyses, output / "report.html")


def _one_model(
    name: str,
    output: Path,
    skips: Sequence[int],
    random_seeds: Sequence[int],
    examples: int | None,
    tell: Progress,
    tokenizer_name: str | None,
) -> tuple[Result, Analysis]:
    model, tokenizer = load(name, tokenizer=tokenizer_name)
    label = name.strip("/").replace("/", "--")
    exact = default_tasks(tokenizer)[0] in TASKS
    texts = calibration_texts(tokenizer, 256 if exact else 12)
    analysis = analyze(model, tokenizer, texts, name=name, on_progress=lambda *at: tell(f"{name}: analyse", *at))
    analysis.save(output / f"analysis-{label}")
    plans = make_plans(analysis, skips, random_seeds)
    for plan in plans:
        plan.save(output / "plans" / f"{label}-{plan_label(plan)}.json")
    result = evaluate(
        model,
        tokenizer,
        plans=plans,
        examples=examples or (200 if exact else 6),
        name=name,
        on_progress=lambda *at: tell(f"{name}: evaluate", *at),
    )
    result.save(output / f"result-{label}.json")
    return result, analysis


def make_plans(analysis: Analysis, skips: Sequence[int], random_seeds: Sequence[int]) -> list[Plan]:
    """For every number of blocks one plan by similarity and one at random for each seed."""
    plans = []
    for skip in skips:
        plans.append(make_plan(analysis, "similarity", skip=skip))
        plans += [make_plan(analysis, "random", skip=skip, seed=seed) for seed in random_seeds]
    return plans


def plan_label(plan: Plan) -> str:
    """Method, number of blocks, and seed if there is one, such as `random-4-seed1`."""
    settings = plan.made_by.settings
    seed = f"-seed{settings['seed']}" if "seed" in settings else ""
    return f"{plan.made_by.method}-{settings.get('skip', settings.get('budget'))}{seed}"
