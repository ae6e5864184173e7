"""Training the zoo: losses beside plain loops, equal from a seed, and a killed run goes on where it was."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import skipwise as sw
from skipwise.zoo.tasks import MAX_LENGTH, PROMPT_LENGTH
from skipwise.zoo.tokenizer import CHARACTERS, build_tokenizer
from skipwise.zoo.train import LOSSES, RECIPES, batches, build_model, save_model, schedule, train

SMALL = {"blocks": 2, "width": 16, "mlp_width": 24, "steps": 6, "batch_size": 20, "warmup": 2}


@pytest.mark.parametrize("name", RECIPES)
def test_batches_are_left_padded_tasks(name: str) -> None:
    batch = next(batches(replace(RECIPES[name], batch_size=20), seed=0))
    tokenizer = build_tokenizer()
    assert batch.tokens.shape == (20, MAX_LENGTH)
    for row, answer, attention in zip(batch.tokens, batch.answer, batch.attention, strict=True):
        text = tokenizer.decode(row[attention.bool()])
        assert text[PROMPT_LENGTH - 1] == "="
        assert len(text) == PROMPT_LENGTH + int(answer.sum())
        assert answer[-1]
        assert set(text) <= set(CHARACTERS)


def test_autoregressive_loss_beside_a_plain_loop() -> None:
    recipe = replace(RECIPES["tiny-ar"], **SMALL)
    model, batch = build_model(recipe, 0), next(batches(recipe, 0))
    found = LOSSES[recipe.objective](model, batch, torch.Generator())
    rows = []
    for tokens, answer, attention in zip(batch.tokens, batch.answer, batch.attention, strict=True):
        ids = tokens[attention.bool()]
        n = int(answer.sum())
        rows.append(F.cross_entropy(model(ids[None]).logits[0, -n - 1 : -1], ids[-n:]))
    assert float(found) == pytest.approx(float(torch.stack(rows).mean()), rel=1e-4)


def test_masked_loss_is_the_expectation_over_what_is_masked() -> None:
    """For an untrained head of zeros every masked token costs log V, so that a row costs log V whatever k is."""
    recipe = replace(RECIPES["tiny-dllm"], **SMALL)
    model, batch = build_model(recipe, 0), next(batches(recipe, 0))
    torch.nn.init.zeros_(model.lm_head.weight)
    found = LOSSES[recipe.objective](model, batch, torch.Generator().manual_seed(0))
    assert float(found) == pytest.approx(float(torch.log(torch.tensor(float(model.config.vocab_size)))), rel=1e-5)


def test_schedule() -> None:
    recipe = replace(RECIPES["tiny-ar"], steps=100, warmup=10, decay_from=0.5)
    assert [round(schedule(recipe, s), 2) for s in (0, 9, 49, 75, 99)] == [0.1, 1.0, 1.0, 0.5, 0.02]


@pytest.mark.parametrize("name", RECIPES)
def test_a_killed_run_goes_on(name: str, tmp_path: Path) -> None:
    """Stopped after half of the steps and resumed, the weights are those of a run that never stopped."""
    recipe = replace(RECIPES[name], **SMALL)
    whole = train(name, tmp_path / "whole", recipe=recipe, every=3)

    train(name, tmp_path / "cut", recipe=recipe, every=3, stop_after=3)
    resumed = train(name, tmp_path / "cut", recipe=recipe, every=3)
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )
    assert (tmp_path / "cut" / "train.jsonl").read_text().count('"step"') == 2


@pytest.mark.parametrize("name", RECIPES)
def test_saved_models_load(name: str, tmp_path: Path) -> None:
    recipe = replace(RECIPES[name], **SMALL)
    model = build_model(recipe, 0).eval()
    loaded, tokenizer = sw.load(str(save_model(model, name, 0, tmp_path)))
    assert type(loaded) is type(model)
    ids = torch.tensor([tokenizer("s3141592=")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert tokenizer("é")["input_ids"] == [tokenizer.unk_token_id]


def test_a_child_begins_as_its_parent(tmp_path: Path) -> None:
    """tiny-ar2dllm's first weights give tiny-ar's logits, one position later, when they look to the left alone."""
    child = build_model(RECIPES["tiny-ar2dllm"], 0).eval()
    parent, tokenizer = sw.load("tiny-ar")
    ids = torch.tensor([tokenizer("s3141592=1123459")["input_ids"]])
    with torch.no_grad():
        causal = child.model(ids, is_causal=True).last_hidden_state
        assert torch.equal(child.lm_head(causal), parent(ids).logits)
        assert not torch.equal(child(ids).logits[:, 1:], parent(ids).logits[:, :-1]), "but it looks both ways"
    with pytest.raises(sw.UserError, match=r"tiny-dllm is a LLaDAModelLM; a parent is a zoo model such as tiny-ar"):
        build_model(RECIPES["tiny-ar2dllm"], 0, parent="tiny-dllm")
