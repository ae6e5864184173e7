"""The page: rules that cannot flatter, figures that are there, nothing fetched, nothing unescaped."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import skipwise as sw
from skipwise.analysis.record import Analysis
from skipwise.evaluation.result import Interval, Result, Row, Score
from skipwise.plan import ModelShape, Plan, Provenance
from skipwise.report import table, write_report
from skipwise.report.page import render
from skipwise.report.summary import against_random, early_plateau, largest_saving, papers_finding, redundancy, summarize

N = 24
SHAPE = ModelShape(architecture="Toy", stacks={"model.layers": N}, hidden_size=8)


def analysis(name: str = "toy", kind: str = "masked diffusion", early: float = 0.5, late: float = 0.5) -> Analysis:
    """Successive cosine `early` in the first third of the blocks and `late` in the rest."""
    similarity = torch.full((N + 1, N + 1), 0.3, dtype=torch.float64).fill_diagonal_(1.0)
    for i in range(N):
        similarity[i, i + 1] = similarity[i + 1, i] = early if i < N // 3 else late
    tensors = {"similarity": similarity, "update_norm": torch.linspace(20, 0.1, N, dtype=torch.float64)}
    if kind == "masked diffusion":
        tensors |= {"progress": torch.linspace(0, 1, 7), "noise_levels": torch.linspace(0.1, 0.9, 8)}
        for prefix, rows in (("step", 7), ("noise", 8)):
            tensors |= {
                f"{prefix}_similarity": torch.rand(rows, N),
                f"{prefix}_update_norm": torch.rand(rows, N) + 0.01,
            }
    return Analysis(name, SHAPE, kind, {f"model.layers/{k}": t for k, t in tensors.items()})


def row(method: str, k: int, value: float, error: float = 0.01, task: str = "sort", metric: str = "exact match") -> Row:
    kept = Interval(value=value, low=value - error, high=value + error)
    scores = {task: Score(metric=metric, value=kept, examples=100, retention=kept if k else None)}
    if metric != "exact match":
        ppl = Interval(value=23.0 + k, low=22.0, high=30.0)
        scores[f"{task} (perplexity)"] = Score(metric="perplexity", value=ppl, examples=100)
    plan = Plan.static(SHAPE, {"model.layers": range(k)}, Provenance(method=method)) if k else None
    saved = k / N
    return Row(
        plan=plan,
        method=method,
        k=k,
        saved_block_flops=saved,
        saved_all_in_flops=saved * 0.98,
        seconds=1.5,
        scores=scores,
        mean_retention=kept if k else None,
    )


def result(*rows: Row, name: str = "toy", whole: Row | None = None) -> Result:
    return Result(
        name=name,
        kind="masked diffusion",
        model=SHAPE.model_dump(),
        rows=(whole or row("whole model", 0, 1.0), *rows),
        device="cpu",
        dtype="float32",
        seeds={"examples": 0},
        date="2026-01-01",
    )


@pytest.mark.parametrize(
    ("similarity", "random", "expected"),
    [
        (0.9, [0.5, 0.6, 0.95], "better than most random plans at k = 4 (.*k = 4: 2 of 3 beaten, 1 better)"),
        (0.9, [0.5, 0.93, 0.95], "worse than most random plans at k = 4"),
        (0.9, [0.895, 0.905, 0.5], "no better than random at any k tried"),
        (0.9, [0.9], "no better than random at any k tried (.*0 of 1 beaten, 0 better)"),
    ],
)
def test_better_only_where_intervals_are_apart(similarity: float, random: list[float], expected: str) -> None:
    found = against_random(
        result(row("similarity", 4, similarity), *(row("random", 4, r) for r in random)), "similarity"
    )
    assert re.search(
        expected.replace("(.", r"\(.").replace("beaten)", r"beaten\)").replace("better)", r"better\)"), found
    )


def test_mixed_verdicts_name_their_k() -> None:
    found = against_random(
        result(row("similarity", 1, 1.0), row("random", 1, 1.0), row("similarity", 2, 0.9), row("random", 2, 0.1)),
        "similarity",
    )
    assert "better than most random plans at k = 2, no different from most random plans at k = 1" in found


def test_without_a_control_nothing_is_claimed() -> None:
    assert "no random control" in against_random(result(row("similarity", 1, 1.0)), "similarity")


def test_largest_saving_goes_by_the_lower_end() -> None:
    """91% with an interval that reaches below 90% is not a saving that keeps 90%."""
    found = largest_saving(result(row("similarity", 3, 0.95), row("similarity", 6, 0.91, error=0.02)))
    assert "12.5% of block FLOPs, 12.2% all-in: similarity, k = 3" in found
    lucky = result(row("similarity", 3, 0.7), row("random", 6, 1.0))
    assert "None of the plans tried keeps 90%" in largest_saving(lucky), "the best random plan is known only afterwards"
    assert "None of the plans tried keeps 90%" in largest_saving(result(row("similarity", 3, 0.7)))


def test_the_papers_finding_needs_both_halves() -> None:
    plateau, flat = analysis("d", early=0.99), analysis("a", "autoregressive")
    assert early_plateau(plateau)
    assert not early_plateau(flat)
    assert not early_plateau(analysis(early=0.5, late=0.99))
    assert papers_finding([plateau, flat]).endswith("shows in these models.")
    assert papers_finding([plateau, analysis("a", "autoregressive", early=0.99)]).endswith(
        "does not show in these models."
    )
    assert papers_finding([analysis("d"), flat]).endswith("does not show in these models.")
    assert papers_finding([plateau]) is None


def test_redundancy_counts() -> None:
    found = redundancy(analysis(early=0.99))
    assert "8 of 24 blocks" in found
    assert "100% of the first, 0% of the middle, 0% of the last third" in found


def test_every_summary_says_what_it_cannot() -> None:
    groups = summarize([result(row("similarity", 1, 1.0))], [analysis()])
    assert groups[-1][0] == "All models"
    assert any("not about kinds of models" in sentence for sentence in groups[-1][1])


PERPLEXITY = result(
    row("similarity", 2, 0.8, task="sotu", metric="next-token accuracy"),
    row("random", 2, 0.3, task="sotu", metric="next-token accuracy"),
    whole=row("whole model", 0, 0.5, task="sotu", metric="next-token accuracy"),
)
CASES: dict[str, tuple[list[Result], list[Analysis]]] = {
    "everything": (
        [result(row("similarity", 1, 1.0), row("random", 1, 0.5), row("random", 1, 0.9)), result(name="other")],
        [analysis(), analysis("other", "autoregressive")],
    ),
    "no analyses": ([result(row("similarity", 1, 1.0))], []),
    "no results": ([], [analysis()]),
    "no plans": ([result()], [analysis("toy", "autoregressive")]),
    "perplexity": ([PERPLEXITY], []),
    "one random plan": ([result(row("random", 3, 0.2))], []),
}


@pytest.mark.parametrize("case", CASES)
def test_page(case: str, tmp_path: Path) -> None:
    results, analyses = CASES[case]
    path = write_report(results, analyses, tmp_path / "deep" / "report.html")
    page = path.read_text()
    assert not re.search(r"(?:src|href)\s*=\s*[\"'](?!#|data:)", page), "something would be fetched"
    assert "<script" not in page
    assert all(item.name in page for item in (*results, *analyses))
    assert page.count("<img") == page.count('alt="') >= len(analyses)
    assert len(page) < 2_000_000
    for item in results:
        assert page.count("<tr>") >= len(item.rows)
    assert "speed-up" not in page.lower()
    assert "speedup" not in page.lower()


def test_diffusion_models_show_steps_and_noise() -> None:
    page = render([], [analysis()])
    assert page.count("<img") == 1 + 2 + 4
    assert "along its own trajectories" in page
    assert "on noised texts" in page


def test_perplexities_are_not_percentages() -> None:
    page = render([PERPLEXITY], [])
    assert "25 (22 to 30)" in page
    assert "2500" not in page


def test_names_are_escaped() -> None:
    page = render([result(row("similarity", 1, 1.0), name="<script>alert(1)</script>")], [analysis("<b>bold</b>")])
    assert "<script>alert" not in page
    assert "&lt;script&gt;" in page
    assert "<b>bold" not in page


def test_nan_is_drawn_not_fatal() -> None:
    broken = analysis()
    for tensor in broken.tensors.values():
        tensor.view(-1)[0] = torch.nan
    assert render([], [broken]).count("<img") == 7


def test_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(sw.UserError, match="There is nothing to report"):
        write_report([], [], tmp_path / "r.html")
    (tmp_path / "file").write_text("")
    with pytest.raises(sw.UserError, match="Cannot write"):
        write_report([result()], [], tmp_path / "file" / "r.html")


def shown(found: Any) -> str:
    console = Console(width=110)
    with console.capture() as capture:
        console.print(table(found))
    return capture.get()


def test_table_for_the_terminal() -> None:
    text = shown(result(row("similarity", 6, 0.834, 0.012), row("random", 6, 0.0, 0.0), row("random", 6, 0.8, 0.0)))
    assert re.search(r"similarity\s+6\s+25.00/24.50\s+83.4\s+83.4 \(82.2 to 84.6\)", text)
    assert re.search(r"random x2\s+6\s+25.00/24.50\s+40.0\s+40.0 \(0.0 to 80.0\)", text)
    assert re.search(r"ppl 25", shown(PERPLEXITY))


def test_every_part_of_an_analysis_is_shown() -> None:
    """A full analysis shows its recency, lens and outliers; one without the layers is drawn without them."""
    model, tokenizer = sw.load("tiny-dllm")
    texts = [("s3141592=", "1123459"), ("r3141592=", "2951413")]
    full = sw.analyze(model, tokenizer, texts, name="toy", parts=("layers", "tokens", "attention", "lens"))
    page = render([], [full])
    channels = full.get("model.layers", "outlier_channels")
    assert channels is not None
    for words in ("Recency", "Logit lens", f"Outlier channels: {int(channels[0])}"):
        assert words in page
    tokens = sw.analyze(model, tokenizer, texts, name="toy", parts=("tokens",))
    page = render([result(row("similarity", 2, 0.9))], [tokens, tokens])
    assert "Recency" in page
    assert "Heat map of the cosine" not in page


def test_an_analysis_given_twice_is_told_once() -> None:
    told = summarize([result(row("similarity", 2, 0.9))], [analysis(), analysis()])
    assert len(set(told[0][1])) == len(told[0][1])


def test_a_result_has_a_row_of_the_whole_model(tmp_path: Path) -> None:
    whole = result(row("similarity", 2, 0.9))
    path = tmp_path / "result.json"
    path.write_text(Result.model_construct(**{**dict(whole), "rows": whole.rows[1:]}).model_dump_json())
    with pytest.raises(sw.UserError, match="one row without a plan"):
        Result.load(path)
