"""The vital blocks: found where they were planted, chosen under a budget, written into a plan."""

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import skipwise as sw
from skipwise.analysis.vitality import BlockScores, _Trial, in_order, score_vital
from skipwise.blocks import find_contract, module_list
from skipwise.examples import Size, example_inputs
from skipwise.masking import subject_masked
from skipwise.planners.vital import Budget, choose_blocks, vital_plan
from tests.tiny_models import IMAGE, output

SUBJECT = [1, 2]
STACK = "transformer_blocks"


@cache
def model_of(name: str) -> nn.Module:
    return IMAGE[name]()


@cache
def planted(name: str) -> nn.Module:
    """A model in which two blocks read the text to an effect: there, what the text adds is made large, else small."""
    model = IMAGE[name]()
    with torch.no_grad():
        for stack, number in in_order(find_contract(model)):
            block: Any = module_list(model, stack)[number]
            reads = block.attn2.to_v if name == "pixart" else getattr(block.attn, "add_v_proj", None)
            if reads is not None:
                factor = 4 if (stack, number) in PLANTED[name] else 0.05
                reads.weight *= factor
                reads.bias *= factor
    return model


PLANTED = {"pixart": [(STACK, 1), (STACK, 2)], "sd3": [(STACK, 0), (STACK, 2)]}


def samples(model: nn.Module, count: int = 2, batch: int = 1) -> list[dict[str, Any]]:
    """Calls at several noise levels."""
    made = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        inputs = example_inputs(model, Size(batch=batch))
        noise = torch.randn(inputs["hidden_states"].shape, generator=generator)
        made.append(inputs | {"hidden_states": noise, "timestep": inputs["timestep"] * (number + 1) / count})
    return made


def half(side: int = 8) -> Tensor:
    """A subject that fills the left half of the picture."""
    mask = torch.zeros(side, side)
    mask[:, : side // 2] = 1
    return mask


@pytest.mark.parametrize("name", ["pixart", "sd3"])
def test_scores_find_the_planted_blocks(name: str) -> None:
    model = planted(name)
    scores = score_vital(model, samples(model), SUBJECT)
    order = sorted(in_order(find_contract(model)), key=lambda block: -scores.score[block[0]][block[1]])
    assert sorted(order[:2]) == PLANTED[name]
    values = sorted(scores.score[STACK], reverse=True)
    assert values[1] > 3 * values[2]
    plan = choose_blocks(model, 2, "vital", scores)
    assert plan.train == {STACK: tuple(number for _, number in PLANTED[name])}


def test_scores_are_the_change_inside_less_the_change_outside() -> None:
    """Against the definition, written out with forwards of the whole model."""
    model, (sample, *_) = model_of("pixart"), samples(model_of("pixart"), batch=2)
    scores = score_vital(model, [sample], SUBJECT, [half(64)], queries="all")
    base = output(model, sample)[:, :4]  # the other four channels are a variance
    for number in range(4):
        with subject_masked(model, {STACK: [number]}, SUBJECT, queries="all"):
            delta = (output(model, sample)[:, :4] - base).square() / base.square().mean()
        inside, outside = float(delta[..., :4].mean()), float(delta[..., 4:].mean())
        assert scores.inside[STACK][number] == pytest.approx(inside, rel=1e-4)
        assert scores.outside[STACK][number] == pytest.approx(outside, rel=1e-4)
        assert scores.score[STACK][number] == pytest.approx(inside - outside, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("name", ["flux", "flux2", "sd3", "sana", "chroma"])
def test_what_is_known_is_not_run_again(name: str) -> None:
    """Resuming behind the last unmasked block gives what a whole forward gives, bit for bit, for half of the blocks."""
    model = model_of(name)
    (sample,) = samples(model, 1)
    trial = _Trial(model, find_contract(model), sample, SUBJECT, {})
    for stack, number in trial.order:
        with subject_masked(model, {stack: [number]}, SUBJECT):
            whole = (output(model, sample) - trial.base).square()
        change = trial.change([(stack, number)]) * trial.base.square().mean()
        torch.testing.assert_close(change, whole.mean(2 if whole.ndim == 3 else 1), rtol=1e-5, atol=0)
        assert float(change.max()) > 0
    blocks = len(trial.order)
    assert trial.evaluated == blocks + blocks * (blocks + 1) // 2
    assert not any("forward" in module_list(model, stack)[n].__dict__ for stack, n in trial.order)


def test_windows_go_over_the_border_of_stacks() -> None:
    """The score of a block is the mean over the windows that hold it."""
    model = model_of("flux")
    (sample,) = samples(model, 1)
    base, changes = output(model, sample), list[float]()
    order = in_order(find_contract(model))
    for start in range(len(order) - 1):
        blocks: dict[str, list[int]] = {}
        for stack, number in order[start : start + 2]:
            blocks.setdefault(stack, []).append(number)
        with subject_masked(model, blocks, SUBJECT):
            changes.append(float((output(model, sample) - base).square().mean() / base.square().mean()))
    scores = score_vital(model, [sample], SUBJECT, window=2)
    found = [scores.score[stack][number] for stack, number in order]
    expected = [changes[0], *((a + b) / 2 for a, b in pairwise(changes)), changes[-1]]
    assert found == pytest.approx(expected, rel=1e-4)


def test_samples_may_differ_in_tokens_and_are_averaged() -> None:
    model = model_of("pixart")
    both = samples(model)
    together = score_vital(model, both, [[1], [2, 3]])
    alone = [score_vital(model, [both[0]], [1]), score_vital(model, [both[1]], [2, 3])]
    mean = [(a + b) / 2 for a, b in zip(alone[0].score[STACK], alone[1].score[STACK], strict=True)]
    assert list(together.score[STACK]) == pytest.approx(mean)


def test_masks_of_packed_pictures() -> None:
    """FLUX's tokens are rows of 2 x 2 latent pixels; a mask may have any resolution of the picture's shape."""
    model = model_of("flux")
    (sample,) = samples(model, 1)
    scores = score_vital(model, [sample], SUBJECT, [half(128)])
    base = output(model, sample)
    with subject_masked(model, {STACK: [1]}, SUBJECT):
        delta = ((output(model, sample) - base).square() / base.square().mean()).reshape(1, 4, 4, -1)
    assert scores.inside[STACK][1] == pytest.approx(float(delta[:, :, :2].mean()), rel=1e-4)


def test_the_same_samples_give_the_same_plan() -> None:
    model = model_of("pixart")
    plans = [vital_plan(model, samples(model), SUBJECT, budget=2, subject=[half(), half()]) for _ in range(2)]
    assert plans[0] == plans[1]
    made_by = plans[0].made_by
    assert made_by.method == "vital/vital"
    masks = {"subject_masks": True}
    assert made_by.settings == {"budget": 2, "rule": "vital", "window": 1, "queries": "image"} | masks
    assert made_by.calibration["samples"] == 2
    assert len(made_by.scores[STACK]["score"]) == len(made_by.scores[STACK]["outside"]) == 4
    assert sw.Plan.parse(plans[0].model_dump(mode="json")) == plans[0]
    other = vital_plan(model, samples(model), [1], budget=2, subject=[half(), half()])
    assert other.made_by.calibration["sha256"] != made_by.calibration["sha256"]


def weight(model: nn.Module, stack: str, number: int) -> int:
    return sum(p.numel() * p.element_size() for p in module_list(model, stack)[number].parameters())


@pytest.mark.parametrize("rule", ["vital", "paper", "middle", "last"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 1.0])
def test_bytes_are_never_exceeded(rule: str, share: float) -> None:
    """Blocks of FLUX's two stacks differ in size."""
    model = model_of("flux")
    order = in_order(find_contract(model))
    sizes = {block: weight(model, *block) for block in order}
    scores = BlockScores({STACK: (1.0, 3.0, 2.0), "single_transformer_blocks": (0.1, 4.0, 0.2, 0.3)}, {}, {})
    for budget in (f"{100 * share:g}%", f"{int(share * sum(sizes.values()))}B"):
        plan = choose_blocks(model, budget, rule, scores)
        chosen = [(stack, number) for stack, numbers in plan.train.items() for number in numbers]
        spent = sum(sizes[block] for block in chosen)
        assert 0 < spent <= share * sum(sizes.values()) * (1 + 1e-9)
        if rule in ("vital", "last"):  # nothing more fits
            left = [block for block in order if block not in chosen][-1:] if rule == "last" else set(order) - {*chosen}
            assert all(spent + sizes[block] > share * sum(sizes.values()) for block in left)
    assert sum(len(numbers) for numbers in choose_blocks(model, "100%", rule, scores).train.values()) == 7


def test_score_per_byte_decides() -> None:
    """Under bytes a small block of half the score comes first, under a number of blocks the greater score."""
    model = model_of("flux")
    double, single = weight(model, STACK, 0), weight(model, "single_transformer_blocks", 0)
    assert single < 0.7 * double
    scores = BlockScores({STACK: (1.0, 0.0, 0.0), "single_transformer_blocks": (0.0, 0.0, 0.8, 0.0)}, {}, {})
    assert choose_blocks(model, 1, "vital", scores).train == {STACK: (0,)}
    assert choose_blocks(model, f"{single}B", "vital", scores).train == {"single_transformer_blocks": (2,)}
    by_bytes = choose_blocks(model, f"{double}B", "vital", scores).train
    assert by_bytes == {"single_transformer_blocks": (0, 2)}, "and what is left is filled"


def test_the_papers_rule_is_the_best_window_across_stacks() -> None:
    model = model_of("flux")
    scores = BlockScores({STACK: (5.0, 0.0, 3.0), "single_transformer_blocks": (1.0, 3.0, 0.0, 1.0)}, {}, {})
    assert choose_blocks(model, 3, "paper", scores).train == {STACK: (0, 1, 2)}
    scores = BlockScores({STACK: (3.0, 0.0, 3.0), "single_transformer_blocks": (1.0, 3.0, 0.0, 1.0)}, {}, {})
    assert choose_blocks(model, 3, "paper", scores).train == {STACK: (2,), "single_transformer_blocks": (0, 1)}


@pytest.mark.parametrize(
    ("rule", "blocks", "expected"),
    [
        ("middle", 1, {"single_transformer_blocks": (0,)}),
        ("middle", 3, {STACK: (2,), "single_transformer_blocks": (0, 1)}),
        ("middle", 4, {STACK: (1, 2), "single_transformer_blocks": (0, 1)}),
        ("last", 2, {"single_transformer_blocks": (2, 3)}),
        ("last", 5, {STACK: (2,), "single_transformer_blocks": (0, 1, 2, 3)}),
    ],
)
def test_plain_rules_need_no_samples(rule: str, blocks: int, expected: dict[str, Sequence[int]]) -> None:
    plan = vital_plan(model_of("flux"), budget=blocks, rule=rule)
    assert plan.train == expected
    assert (plan.made_by.method, plan.made_by.scores) == (f"vital/{rule}", {})


def test_stacks_may_be_left_out() -> None:
    model = model_of("lumina2")
    with pytest.raises(sw.UserError, match="takes no `encoder_hidden_states`"):
        score_vital(model, [example_inputs(model)], SUBJECT)
    model = model_of("flux")
    scores = score_vital(model, samples(model, 1), SUBJECT, stacks=["single_transformer_blocks"])
    assert list(scores.score) == ["single_transformer_blocks"]
    assert list(choose_blocks(model, "50%", "vital", scores).train) == ["single_transformer_blocks"]
    assert choose_blocks(model, 2, "last", stacks=[STACK]).train == {STACK: (1, 2)}


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (0, "0 is no budget; give a number of blocks"),
        (8, "Cannot train 8 blocks: there are 3. Choose 1 to 3"),
        ("2.5", "'2.5' is no budget"),
        ("6GB", "'6GB' is no budget"),
        ("101%", "'101%' is no budget"),
        ("nan%", "'nan%' is no budget"),
        ("9B", "No block fits in 9B: the smallest weighs"),
    ],
)
def test_budgets_that_cannot_be(budget: int | str, message: str) -> None:
    with pytest.raises(sw.UserError, match=message):
        Budget.of(budget, [10, 20, 30])


def test_budgets() -> None:
    assert Budget.of("2", [10, 20, 30]) == Budget((1, 1, 1), 2)
    assert Budget.of("50%", [10, 20, 30]) == Budget((10, 20, 30), 30)
    assert Budget.of("0.5KiB", [10, 20, 30]).limit == 512
    assert Budget.of("1GiB", [10]).limit == 2**30
    assert Budget.of("40%", [3] * 10).holds([0, 1, 2, 3])
    assert not Budget.of("40%", [3] * 10).holds([0, 1, 2, 3, 4])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rule": "vitl"}, "Unknown rule 'vitl'. Did you mean 'vital'"),
        ({"budget": 9}, "Cannot train 9 blocks"),
        ({"samples": []}, "There are 0 samples"),
        ({"tokens": []}, "A sample has no tokens of the subject"),
        ({"tokens": [[1]] * 3}, "There are 2 samples and tokens for 3"),
        ({"subject": [torch.ones(8, 8)] * 3}, "2 samples and 3 masks"),
        ({"subject": [torch.ones(8, 8)] * 2}, "is empty or covers the whole picture"),
        ({"subject": [torch.ones(8)] * 2}, r"has shape \(8,\)"),
        ({"window": 5}, "A window of 5 blocks does not fit; choose 1 to 4"),
        ({"stacks": ["blocks"]}, "Unknown stack 'blocks'"),
        ({"tokens": [7]}, "Token 7 is not in the text"),
    ],
)
def test_mistakes(changes: dict[str, Any], message: str) -> None:
    model = model_of("pixart")
    settings: dict[str, Any] = {"samples": samples(model), "tokens": SUBJECT, "budget": 2} | changes
    with pytest.raises(sw.UserError, match=message):
        vital_plan(model, **settings)


def test_a_mask_of_another_shape_is_refused() -> None:
    model = model_of("flux")
    mask = torch.zeros(10, 20)
    mask[:5] = 1
    with pytest.raises(sw.UserError, match="does not have the shape of a picture of 16 tokens"):
        score_vital(model, samples(model, 1), SUBJECT, [mask])


def test_a_rule_without_its_scores_is_refused() -> None:
    with pytest.raises(sw.UserError, match="Rule paper goes by scores"):
        choose_blocks(model_of("flux"), 2, "paper")


def test_progress_is_told() -> None:
    told: list[tuple[str, int, int]] = []
    model = model_of("pixart")
    score_vital(model, samples(model, 1), SUBJECT, on_progress=lambda *args: told.append(args))
    assert told == [("mask blocks", done, 4) for done in (1, 2, 3, 4)]
