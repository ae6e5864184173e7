"""The judge and the task of writing: scores against a plain loop, end-of-text rules by hand, samples by their seed."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import skipwise as sw
from skipwise.errors import UserError
from skipwise.evaluation import judge as judges
from skipwise.evaluation.diversity import distinct, token_entropy
from skipwise.evaluation.judge import Judge, counted
from skipwise.evaluation.texts import documents
from skipwise.evaluation.writing import Writing, family_of, until_end
from skipwise.models.mdlm import MDLM, MDLMConfig
from skipwise.sampling.denoiser import Denoiser
from skipwise.zoo.english import train_tokenizer
from skipwise.zoo.tokenizer import build_tokenizer

LIMIT = 96
TEXT = documents("calibration")["persuasion"]
TEXTS = [TEXT[:60], TEXT[60:75], "", TEXT[200:330], "a", TEXT[400:460]]


def small_judge(folder: Path, tokenizer: Any) -> str:
    """A random Llama over the tokenizer's tokens, saved."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LIMIT,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def english() -> Any:
    """A BPE of 400 tokens that has a begin of text."""
    tokenizer = train_tokenizer([TEXT[:20_000]], 400)
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    return tokenizer


@pytest.fixture(scope="module")
def name(tmp_path_factory: pytest.TempPathFactory, english: Any) -> str:
    return small_judge(tmp_path_factory.mktemp("judge"), english)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A judge of the zoo's tokens, which have no begin of text."""
    return small_judge(tmp_path_factory.mktemp("digits"), build_tokenizer())


@pytest.fixture(scope="module")
def writer() -> tuple[Any, Any]:
    torch.manual_seed(1)
    config = MDLMConfig(vocab_size=22, hidden_dim=32, cond_dim=8, n_blocks=4, n_heads=4, mask_token_id=1)
    model = MDLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model, build_tokenizer()


def plain(model: Any, ids: list[int]) -> Tensor:
    """-log p of every token but the first, one position after the other."""
    losses = torch.zeros(len(ids) - 1, dtype=torch.float64)
    with torch.no_grad():
        for i in range(len(ids) - 1):
            logits = model(torch.tensor([ids[: i + 1]])).logits[0, -1]
            losses[i] = F.cross_entropy(logits.double(), torch.tensor(ids[i + 1]))
    return losses


def test_scores_are_those_of_a_plain_loop(name: str) -> None:
    judge = Judge.load(name)
    nll, tokens = judge.score(TEXTS)
    for text, found, count in zip(TEXTS, nll, tokens, strict=True):
        ids = judge.tokenizer(text, add_special_tokens=False)["input_ids"]
        expected = plain(judge.model, [judge.tokenizer.bos_token_id, *ids])
        assert count == len(ids)
        assert found == pytest.approx(float(expected.sum()), rel=1e-5)
    assert (nll[2], tokens[2]) == (0, 0)
    assert nll.dtype == np.float64


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 3}, {"max_tokens": 7}, {"max_tokens": 80}])
def test_batches_and_pieces_change_nothing(name: str, options: dict[str, int]) -> None:
    """Neither neighbours and their padding, nor reading a long text piece by piece."""
    whole = Judge.load(name, batch_size=16).score(TEXTS)
    nll, tokens = Judge.load(name, **options).score(TEXTS)
    np.testing.assert_allclose(nll, whole[0], rtol=1e-5)
    np.testing.assert_array_equal(tokens, whole[1])


def test_memory_is_bounded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No forward sees more positions than were allowed, and every text is read once."""
    judge = Judge.load(name, max_tokens=16)
    seen = []
    forward = judge.model.forward

    def counting(*arguments: Any, **named: Any) -> Any:
        seen.append(named["input_ids"].numel())
        return forward(*arguments, **named)

    monkeypatch.setattr(judge.model, "forward", counting)
    _, tokens = judge.score(TEXTS)
    assert max(seen) <= 16
    assert sum(seen) >= tokens.sum()


def test_half_precision_weights_are_scored_in_single(name: str) -> None:
    judge = Judge.load(name, dtype="bfloat16")
    assert next(judge.model.parameters()).dtype == torch.bfloat16
    nll, tokens = judge.score(TEXTS[:1])
    with torch.no_grad():
        ids = [judge.tokenizer.bos_token_id, *judge.tokenizer(TEXTS[0])["input_ids"]]
        logits = judge.model(torch.tensor([ids])).logits[0, :-1].float()
    expected = F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum")
    assert nll[0] == pytest.approx(float(expected), rel=1e-5)
    assert tokens[0] == len(ids) - 1


def test_it_loads_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Judge.load(name)
    monkeypatch.setattr(judges, "load", lambda *_, **__: pytest.fail("loaded again"))
    assert Judge.load(name, batch_size=2).model is first.model


def test_only_the_continuation_is_scored(name: str) -> None:
    """Where tokens are additive: the score of all minus the score of the prefix."""
    judge = Judge.load(name)
    prefixes = [TEXT[:50].rsplit(" ", 1)[0], "", "He"]
    texts = [" and his own house", TEXT[:40], " was"]
    nll, tokens = judge.score(texts, prefixes)
    whole, whole_tokens = judge.score([a + b for a, b in zip(prefixes, texts, strict=True)])
    before, before_tokens = judge.score(prefixes)
    np.testing.assert_array_equal(tokens, whole_tokens - before_tokens)
    np.testing.assert_allclose(nll, whole - before, rtol=1e-4)
    assert (tokens > 0).all()


def test_a_token_across_the_border_is_scored(name: str) -> None:
    judge = Judge.load(name)
    text = next(t for t in judge.tokenizer.get_vocab() if len(t) > 3 and t.isalpha() and t.isascii())
    nll, tokens = judge.score([text[2:]], [text[:2]])
    whole, _ = judge.score([text])
    assert tokens[0] == 1
    assert nll[0] == pytest.approx(whole[0], rel=1e-5)


def test_without_a_begin_of_text_the_first_token_is_not_scored(digits: str) -> None:
    judge = Judge.load(digits)
    nll, tokens = judge.score(["1234", "12", "5"])
    assert tokens.tolist() == [3, 1, 0]
    assert nll[0] == pytest.approx(float(plain(judge.model, judge.tokenizer("1234")["input_ids"]).sum()), rel=1e-5)
    _, continued = judge.score(["34", "5"], ["12", "1"])
    assert continued.tolist() == [2, 1]


def test_which_tokens_the_rules_count() -> None:
    """9 is the judge's end of text."""
    ids = [9, 4, 5, 9, 6, 9, 7]
    assert counted(ids, 9, "cut") == [False, True, True, False, True, False, True]
    assert counted(ids, 9, "mdlm") == [True, True, True, False, True, False, True]
    assert counted([4, 9, 5, 9, 9], 9, "mdlm") == [True, True, True, False, False]
    assert counted([4, 5], None, "cut") == [True, True]


def test_the_official_count(digits: str) -> None:
    """The mask of MDLM's code over the loss of all tokens: token != EOS, or from the first EOS to before the second."""
    judge = Judge.load(digits)
    text = "12<eos>34<eos>5<eos>"
    ids = torch.tensor(judge.tokenizer(text)["input_ids"])
    eos = judge.tokenizer.eos_token_id
    mask = ((ids == eos).cumsum(0) == 1)[1:] | (ids != eos)[1:]
    nll, tokens = judge.score([text], rule="mdlm")
    assert tokens[0] == int(mask.sum()) == 5
    assert nll[0] == pytest.approx(float(plain(judge.model, ids.tolist())[mask].sum()), rel=1e-5)
    _, cut = judge.score(["1" * (LIMIT + 5)], rule="mdlm")
    assert cut[0] == LIMIT - 1


def test_where_a_sample_ends() -> None:
    """2 is the end of text, 7 the begin."""
    assert until_end([5, 6, 2, 7, 2], 2) == [5, 6]
    assert until_end([2, 5], 2) == []
    assert until_end([5, 6], 2) == until_end([5, 6], None) == [5, 6]
    assert until_end([7, 5, 2, 6], 2, begin=7) == [5]
    assert until_end([2, 5, 6, 2, 4], 2, begin=2) == [5, 6]  # GPT-2's: one token for both
    assert until_end([], 2, begin=2) == []


def test_diversity_by_hand() -> None:
    assert token_entropy([3, 3, 3]) == 0
    assert token_entropy([1, 2, 1, 2]) == pytest.approx(math.log(2))
    assert token_entropy([1, 1, 1, 2]) == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert distinct([1, 2, 1, 2, 1], 2) == pytest.approx(2 / 4)
    assert distinct([1, 2, 3], 3) == 1
    assert token_entropy([]) == distinct([4], 2) == distinct([], 1) == 0
    with pytest.raises(UserError, match="n=0"):
        distinct([1], 0)


SAMPLERS: list[tuple[str, dict[str, Any]]] = [
    ("mdlm", {}),
    ("mdlm", {"sampler": "ddpm_cache", "noise_dtype": "float32"}),
    ("mdlm", {"compat": "mdlm"}),
    ("llada", {"remasking": "random"}),
    ("dream", {}),
]


@pytest.mark.parametrize(("family", "settings"), SAMPLERS)
@pytest.mark.parametrize("prefixes", [(), ("12+3=", "9", "a45")])
def test_a_sample_is_its_seed_whatever_the_batch(
    writer: tuple[Any, Any], family: str, settings: dict[str, Any], prefixes: tuple[str, ...]
) -> None:
    written: dict[str, Any] = {"family": family, "settings": settings, "prefixes": prefixes, "length": 8, "steps": 6}
    task = Writing(judge="nobody", samples=7, batch_size=7, **written)
    ids = task.write(Denoiser(writer[0]), writer[1])
    assert ids.shape == (7, 8)
    assert len({tuple(row) for row in ids.tolist()}) == 7
    for size in (1, 3):
        assert torch.equal(replace(task, batch_size=size).write(Denoiser(writer[0]), writer[1]), ids)
    part = replace(task, first=3, samples=2)
    assert torch.equal(part.write(Denoiser(writer[0]), writer[1]), ids[3:5])
    assert part.texts(ids[3:5], writer[1]) == task.texts(ids, writer[1])[3:5]
    shifted = replace(task, seed=3, samples=2)
    if not prefixes:
        assert torch.equal(shifted.write(Denoiser(writer[0]), writer[1]), ids[3:5])


def test_writing_is_the_judges_score_of_what_was_written(writer: tuple[Any, Any], digits: str) -> None:
    model, tokenizer = writer
    task = Writing(judge=digits, samples=5, length=12, prefixes=("12+3=", "9"))
    perplexity, entropy, distinct_2, tokens = task.run(Denoiser(model), tokenizer)
    assert [m.metric for m in (perplexity, entropy, distinct_2)] == [
        "generative perplexity",
        "token entropy",
        "distinct-2",
    ]
    ids = task.write(Denoiser(model), tokenizer)
    said = [until_end(row, tokenizer.eos_token_id) for row in ids.tolist()]
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in said]
    assert task.texts(ids, tokenizer) == texts
    nll, count = Judge.load(digits).score(texts, ["12+3=", "9", "12+3=", "9", "12+3="])
    assert perplexity.value == pytest.approx(math.exp(nll.sum() / count.sum()), rel=1e-4)
    assert tokens.value == pytest.approx(count.mean())
    assert entropy.value == pytest.approx(np.mean([token_entropy(row) for row in said]))
    assert distinct_2.value == pytest.approx(np.mean([distinct(row, 2) for row in said]))


def test_the_official_rule_keeps_ends_of_text(writer: tuple[Any, Any], digits: str) -> None:
    tokenizer = writer[1]
    ids = torch.tensor([[5, 6, 2, 7, 2]])
    cut, official = (Writing(judge=digits, samples=1, length=5, end_of_text=rule) for rule in ("cut", "mdlm"))
    assert cut.texts(ids, tokenizer) == ["12"]
    assert official.texts(ids, tokenizer) == ["12<eos>3<eos>"]
    assert cut.score(ids, tokenizer)[3].value == 1
    assert official.score(ids, tokenizer)[3].value == 3
    assert official.score(ids, tokenizer)[1].value == pytest.approx(token_entropy([5, 6, 2, 7, 2]))


def test_empty_samples_divide_nothing_by_zero(writer: tuple[Any, Any], digits: str) -> None:
    tokenizer = writer[1]
    task = Writing(judge=digits, samples=2, length=4)
    some = task.score(torch.tensor([[2, 5, 6, 7], [5, 6, 7, 8]]), tokenizer)
    alone = replace(task, samples=1).score(torch.tensor([[5, 6, 7, 8]]), tokenizer)
    assert some[0].value == pytest.approx(alone[0].value, rel=1e-4)
    with np.errstate(all="raise"):
        scores = some[0].score(np.array([[2.0, 0.0], [0.0, 2.0]]))
    assert scores[0] == pytest.approx(22)  # only the empty one is drawn: guessing among 22 tokens
    assert scores[1] == pytest.approx(alone[0].value)
    assert [m.value for m in task.score(torch.full((2, 4), 2), tokenizer)] == pytest.approx([22, 0, 0, 0])


def test_an_autoregressive_model_writes_too(digits: str) -> None:
    model, tokenizer = sw.load("tiny-ar")
    task = Writing(judge=digits, samples=4, length=6, prefixes=("s3141592=",), family=family_of(model))
    ids = task.write(Denoiser(model), tokenizer)
    assert ids.shape == (4, 6)
    assert torch.equal(replace(task, first=2, samples=1, batch_size=9).write(Denoiser(model), tokenizer), ids[2:3])
    free = replace(task, prefixes=()).write(Denoiser(model), tokenizer)
    assert len({tuple(row) for row in free.tolist()}) > 1  # temperature 1
    assert task.facts["sampler"] == "token by token"
    greedy = replace(task, settings={"temperature": 0})
    assert greedy.texts(greedy.write(Denoiser(model), tokenizer), tokenizer) == ["112345"] * 4
    assert greedy.facts["noise_dtype"] == "none (greedy)"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, {"sampler": "first_hitting", "noise_dtype": "float64", "steps": "continuous time", "prefixes": 0}),
        ({"settings": {"sampler": "ddpm", "noise_dtype": "float32"}}, {"noise_dtype": "float32", "steps": 1000}),
        ({"settings": {"compat": "mdlm"}, "steps": 9}, {"sampler": "ddpm_cache", "noise_dtype": "float32", "steps": 9}),
        ({"family": "llada"}, {"sampler": "low_confidence", "noise_dtype": "float64", "steps": "one a token"}),
        ({"family": "dream", "settings": {"temperature": 0}}, {"sampler": "origin", "noise_dtype": "none (greedy)"}),
    ],
)
def test_facts_say_what_the_scores_depend_on(fields: dict[str, Any], said: dict[str, Any]) -> None:
    facts = Writing(judge="a-judge", **fields).facts
    assert facts.items() >= said.items()
    assert facts.items() >= {"judge": "a-judge", "samples": 64, "length": 128, "seed": 0}.items()
    assert facts["end_of_text"].startswith("what a sample says after its first end of text is dropped")
    assert json.loads(json.dumps(facts)) == facts


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"samples": 0}, "samples=0"),
        ({"length": 0}, "length=0"),
        ({"first": -1}, "first=-1"),
        ({"end_of_text": "mldm"}, "Did you mean 'mdlm'"),
        ({"prefixes": ("a", " ")}, "prefix is empty"),
        ({"family": "lada"}, "Did you mean 'llada'"),
        ({"settings": {"sampler": "ddpmcache"}}, "Did you mean 'ddpm_cache'"),
        ({"settings": {"noise_type": "float32"}}, "Did you mean 'noise_dtype'"),
        ({"settings": {"steps": 5}}, "give steps itself"),
        ({"settings": {"gen_length": 5}}, "give length itself"),
        ({"family": "autoregressive", "steps": 5}, "leave out steps"),
        ({"family": "autoregressive", "settings": {"alg": "origin"}}, "Available: temperature"),
    ],
)
def test_mistakes_are_found_at_once(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Writing(judge="a-judge", **fields)


def test_what_cannot_judge_or_be_judged(
    writer: tuple[Any, Any], digits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="'masked diffusion'; give a causal language model"):
        Judge.load("tiny-dllm")
    Judge.load(digits).model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="without a tokenizer"):
        Judge.load(str(tmp_path))
    words = T5Config(vocab_size=22, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(words).save_pretrained(tmp_path / "t5")
    with pytest.raises(UserError, match="'encoder-decoder'; give a causal language model"):
        Judge.load(str(tmp_path / "t5"))
    with pytest.raises(UserError, match=f"97 tokens of .* reads {LIMIT} at most"):
        Judge.load(digits).score(["1" * (LIMIT + 1)])
    with pytest.raises(UserError, match="rule 'all'"):
        Judge.load(digits).score(["1"], rule="all")
    with pytest.raises(UserError, match="max_tokens=0"):
        Judge.load(digits, max_tokens=0)
    task = Writing(judge="tiny-dllm", samples=1, length=4)
    monkeypatch.setattr(Writing, "write", lambda *_: pytest.fail("wrote for a judge that is none"))
    with pytest.raises(UserError, match="is no judge"):
        task.run(Denoiser(writer[0]), writer[1])


def test_a_family_that_does_not_fit_the_model(writer: tuple[Any, Any], digits: str) -> None:
    with pytest.raises(UserError, match="choose family='mdlm'"):
        Writing(judge=digits, family="autoregressive").write(Denoiser(writer[0]), writer[1])
    model, tokenizer = sw.load("tiny-ar")
    with pytest.raises(UserError, match="choose family='autoregressive'"):
        Writing(judge=digits).write(Denoiser(model), tokenizer)
    with pytest.raises(UserError, match="needs the model's tokenizer"):
        Writing(judge=digits).write(Denoiser(writer[0]), None)


def test_the_command_from_end_to_end(skipwise: Any, digits: str, tmp_path: Path) -> None:
    model, tokenizer = sw.load("tiny-dllm")
    stack = sw.find_contract(model)
    plan = sw.Plan.static(stack.shape, {stack.main_stack: [3, 11]})
    plan.save(tmp_path / "plan.json")
    prefixes = tmp_path / "prefixes.txt"
    prefixes.write_text("s3141592=\na123+456=\n\n")
    written = tmp_path / "result.json"
    call = ["judge", "tiny-dllm", "--judge", digits, "--samples", 4, "--length", 6, "--prefixes", prefixes]
    code, out, err = skipwise(
        *call, "--plan", tmp_path / "plan.json", "--set", "remasking=random", "--show", 1, "-o", written
    )
    assert (code, err.strip()) == (0, "")
    for fact in (f"judge: {digits}", "noise_dtype: float64", "samples: 4", "sampler: random", "prefixes: 2", "seed: 0"):
        assert fact in out.replace("\n", "")
    result = sw.Result.load(written)
    task = Writing(
        judge=digits,
        samples=4,
        length=6,
        prefixes=("s3141592=", "a123+456="),
        family="llada",
        settings={"remasking": "random"},
    )
    assert result.settings["writing"] == json.loads(json.dumps(task.facts))
    for row in result.rows:
        with sw.skip(model, row.plan or sw.Plan.static(stack.shape, {stack.main_stack: []})):
            found = {m.metric: m.value for m in task.run(Denoiser(model), tokenizer)}
        assert row.scores["writing"].value.value == pytest.approx(found["generative perplexity"])
        assert row.scores["writing (token entropy)"].value.value == pytest.approx(found["token entropy"])
        assert f"{found['generative perplexity']:.4g}" in out
        with sw.skip(model, row.plan or sw.Plan.static(stack.shape, {stack.main_stack: []})):
            text = task.texts(task.write(Denoiser(model), tokenizer), tokenizer)[0]
        assert f"0: s3141592={text}" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prefixes", "EMPTY"], "holds no prefixes"),
        (["--prefixes", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["--set", "remask=random"], "Did you mean 'remasking'"),
        (["--judge", "tiny-dllm"], "is no judge"),
        (["--judge", "nothing"], "Unknown model 'nothing'"),
        (["--end-of-text", "never"], "Unknown end-of-text rule"),
    ],
)
def test_mistakes_on_the_command_line(
    skipwise: Any, digits: str, tmp_path: Path, options: list[str], message: str
) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    given = [str(tmp_path / "empty.txt") if option == "EMPTY" else option for option in options]
    written = tmp_path / "result.json"
    base = ["--judge", digits] if "--judge" not in given else []
    code, out, err = skipwise("judge", "tiny-dllm", *base, *given, "--samples", 1, "--length", 4, "-o", written)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert not written.exists()
