"""`make reproduce-p1`: everything about paper 1 that fits on two cores in an hour, and the page that shows it.

Studies the shipped models (seed 0) and SmolLM2-135M, two at a time, and makes docs/results/p1.md from their Results and
from those of seeds 1 and 2, which are kept in docs/results/p1. How those were made: docs/results/p1/README.md.
"""

from pathlib import Path

from running import Run, run_script

from skipwise.files import user_cache

# model -> models to hold its states beside; those that take longest come first
STUDIES = {
    "smollm2-135m": (),
    "tiny-ar2dllm": ("tiny-ar", "tiny-dllm"),
    "tiny-dllm": ("tiny-ar",),
    "tiny-ar": (),
}


def study(model: str, output: Path, quick: bool) -> None:
    """Retention and states of one model."""
    label = model if model.startswith("smollm2") else f"{model}-0"
    common = ["--label", label, "--output", str(output), *(["--quick"] if quick else [])]
    beside = [word for other in STUDIES[model] for word in ("--beside", other, f"{other}-0")]
    for script, more in (("p1.py", []), ("p1_states.py", beside)):
        run_script(script, model, *common, *more)


def main() -> None:
    """Run the studies and write the page."""
    run = Run.asked(__doc__, "p1", "a few small plans")
    run.two_at_a_time(study, [m for m in STUDIES if m != "smollm2-135m" or (user_cache() / m / "config.json").exists()])
    if run.quick:
        print(f"all studies ran {run.after}; a quick run has too few plans for the page")
    else:
        run.write_page("p1_page.py")


if __name__ == "__main__":
    main()
