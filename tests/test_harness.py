"""lm-eval with the model `skipwise`, offline, on generated tasks; lm-eval's own HFLM is the oracle where it can be."""

import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ["HF_DATASETS_OFFLINE"] = "1"

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import skipwise as sw
from skipwise import cli
from skipwise.blocks import find_contract
from skipwise.evaluation.arguments import first_that_fits
from skipwise.evaluation.harness import SkipwiseLM
from skipwise.evaluation.likelihood import LikelihoodSettings, loglikelihoods
from skipwise.plan import Phase, Plan
from skipwise.zoo.tasks import distinct_examples
from tests.tiny_models import ROWS

GENERATE = """
task: zoo_sort
output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["+"], max_gen_toks: 7, do_sample: false, temperature: 0.0}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOOSE = """
task: zoo_choice
output_type: multiple_choice
doc_to_target: 0
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
COMMON = """
dataset_path: json
test_split: test
doc_to_text: "{{prompt}}"
target_delimiter: ""
dataset_kwargs: {data_files: {test: DATA}}
"""
EXAMPLES = distinct_examples("sort", "test", 12)


@pytest.fixture(autouse=True)
def _no_survey_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval asks pip and git what is installed, which takes seconds."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.fixture(scope="module", params=["tiny-dllm", "tiny-ar"])
def zoo(request: pytest.FixtureRequest) -> tuple[str, Any, Any]:
    return (request.param, *sw.load(request.param))


@pytest.fixture(scope="module")
def dllm() -> tuple[Any, Any]:
    return sw.load("tiny-dllm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks over one data file, and a cache for datasets."""
    import datasets

    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"prompt": p, "answer": a, "choices": [a, a[::-1], p[1:8], a[1:] + a[0]]} for p, a in EXAMPLES]
    (folder / "sort.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in (("sort", GENERATE), ("choice", CHOOSE)):
        (folder / f"{name}.yaml").write_text(task + COMMON.replace("DATA", str(folder / "sort.json")))
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    return folder


@pytest.fixture(scope="module")
def manager(folder: Path) -> TaskManager:
    return TaskManager(include_path=str(folder), include_defaults=False)


def plan_of(model: Any, *blocks: int) -> Plan:
    return Plan.static(find_contract(model).shape, {"model.layers": blocks})


def ask(kind: str, *arguments: Any) -> list[Instance]:
    return [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]  # type: ignore[arg-type]


def exact(model: Any, tokenizer: Any, plan: Plan | None) -> float:
    """The share of right answers by `generate`, without lm-eval."""
    prompts = tokenizer([prompt for prompt, _ in EXAMPLES], return_tensors="pt")["input_ids"]
    answers = tokenizer([answer for _, answer in EXAMPLES], return_tensors="pt")["input_ids"]
    out = sw.generate(model, prompts, plan=plan, gen_length=7)
    return float((out.sequences[:, -7:] == answers).all(1).double().mean())


def test_tasks_without_and_with_a_plan(zoo: tuple[str, Any, Any], manager: TaskManager, tmp_path: Path) -> None:
    """lm-eval's scores are those of `generate`; a plan changes them; the results say what was skipped and saved."""
    name, model, tokenizer = zoo
    plan = plan_of(model, 3, 4, 5, 6, 7, 8)
    path = plan.save(tmp_path / "plan.json")
    scores = []
    for given in (None, plan):
        found = lm_eval.simple_evaluate(
            model="skipwise",
            model_args={"pretrained": name, "batch_size": 5} | ({"plan": str(path)} if given else {}),
            tasks=["zoo_sort"],
            task_manager=manager,
        )
        scores.append(found["results"]["zoo_sort"]["exact_match,none"])
        assert scores[-1] == pytest.approx(exact(model, tokenizer, given))
    assert scores[0] == 1.0
    assert scores[1] < 1.0
    info = found["config"]["skipwise"]
    assert json.loads(json.dumps(info)) == info
    assert info["plan"] == plan.model_dump(mode="json")
    assert info["saved_block_flops"] == pytest.approx(0.25)
    assert info["generated"]["texts"] == 12
    assert 0 < info["generated"]["all_in_flops"] < info["generated"]["whole_all_in_flops"]


def test_choices_without_and_with_a_plan(zoo: tuple[str, Any, Any], manager: TaskManager) -> None:
    """The choice with the largest likelihood, as computed without lm-eval."""
    _, model, tokenizer = zoo
    settings = {"mc_num": 8} if zoo[0] == "tiny-dllm" else {}
    for plan in (None, plan_of(model, *range(2, 18))):
        lm = SkipwiseLM(model, tokenizer=tokenizer, plan=plan, batch_size=16, **settings)
        results = lm_eval.simple_evaluate(lm, tasks=["zoo_choice"], task_manager=manager)["results"]
        requests = [
            (tokenizer(p)["input_ids"], tokenizer(c)["input_ids"])
            for p, a in EXAMPLES
            for c in (a, a[::-1], p[1:8], a[1:] + a[0])
        ]
        with sw.skip(model, plan or plan_of(model)):
            values = torch.tensor([v for v, _ in loglikelihoods(model, requests, LikelihoodSettings(mc_num=8))])
        right = values.view(-1, 4).argmax(1) == 0
        assert results["zoo_choice"]["acc,none"] == pytest.approx(float(right.double().mean()))
    assert not right.all()


def test_autoregressive_is_as_in_lm_eval() -> None:
    """HFLM's likelihoods, of continuations and of whole texts in windows, and its generations."""
    model, tokenizer = sw.load("tiny-ar")
    ours = SkipwiseLM(model, tokenizer=tokenizer, batch_size=3, max_length=12)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, max_length=12, backend="causal")
    pairs = [
        ("s3141592=", "1123459"),
        ("s3141592=", "1"),
        ("", "a12"),
        ("r31 ", " 5"),
        ("a123+456=", "9"),
        ("c", "7+5*3"),
    ]
    for mine, its in zip(
        ours.loglikelihood(ask("loglikelihood", *pairs)),
        theirs.loglikelihood(ask("loglikelihood", *pairs)),
        strict=True,
    ):
        assert mine == (pytest.approx(its[0], abs=1e-4), its[1])
    texts = [("s3141592=1123459r3141592=2951413c7+5*3-1=265",), ("a1",)]
    rolling = ask("loglikelihood_rolling", *texts)
    assert ours.loglikelihood_rolling(rolling) == pytest.approx(theirs.loglikelihood_rolling(rolling), abs=1e-3)
    prompts = [("s3141=", {"until": ["4"], "max_gen_toks": 7}), ("s31415=", {"until": ["+"], "max_gen_toks": 5})]
    asked = ask("generate_until", *prompts, ("s3141592=", {"until": [], "max_gen_toks": 3}))
    assert ours.generate_until(asked) == theirs.generate_until(asked)


def test_rolling_of_a_diffusion_model_is_a_sum_over_windows(dllm: tuple[Any, Any]) -> None:
    """Windows of max_length - 1 tokens after the one before them, the last with as much before it as fits."""
    model, tokenizer = dllm
    lm = SkipwiseLM(model, tokenizer=tokenizer, batch_size=4, max_length=5)
    ids = tokenizer("s3141592=1")["input_ids"]
    windows = [([tokenizer.eos_token_id], ids[:4]), (ids[3:4], ids[4:8]), (ids[5:8], ids[8:])]
    expected = sum(value for value, _ in loglikelihoods(model, windows))
    assert lm.loglikelihood_rolling(ask("loglikelihood_rolling", ("s3141592=1",))) == [
        pytest.approx(expected, abs=1e-4)
    ]


def test_texts_end_at_the_end_of_text_and_at_until(dllm: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = dllm
    lm = SkipwiseLM(model, tokenizer=tokenizer)
    tokens = torch.tensor([*tokenizer("12+3")["input_ids"], tokenizer.eos_token_id, *tokenizer("4")["input_ids"]])
    assert lm._text(tokens, []) == "12+3"
    assert lm._text(tokens, ["3", "+"]) == "12"
    monkeypatch.setattr(model.config, "eos_token_id", [tokenizer.eos_token_id, tokenizer("2")["input_ids"][0]])
    assert lm._text(tokens, []) == "1"


def test_unequal_prompts_in_one_batch(zoo: tuple[str, Any, Any]) -> None:
    """Batching changes nothing, a prompt that is too long loses its beginning, an empty one is the prefix."""
    _, model, tokenizer = zoo
    limits = {"until": [], "max_gen_toks": 7}
    asked = ask(
        "generate_until", ("s3141592=", limits), ("c7+5*3-1=", limits), ("3", limits), ("", limits), ("9" * 99, limits)
    )
    one, four = (SkipwiseLM(model, tokenizer=tokenizer, batch_size=b).generate_until(asked) for b in (1, 4))
    assert one == four
    assert one[0] == "1123459"
    assert len(set(one)) > 3
    fitted = ask("generate_until", ("9" * 57, limits))
    assert SkipwiseLM(model, tokenizer=tokenizer).generate_until(fitted) == one[4:]


def test_who_sets_how_much_to_generate(dllm: tuple[Any, Any]) -> None:
    """model_args, then the task, then 256 tokens; a task's other generation_kwargs reach the sampler."""
    model, tokenizer = dllm
    lm = SkipwiseLM(model, tokenizer=tokenizer, gen_length=4)
    assert lm._generation({"max_gen_toks": 9, "until": "x"})[1] == {"gen_length": 4}
    lm = SkipwiseLM(model, tokenizer=tokenizer)
    assert lm._generation({"max_gen_toks": 9, "until": "x", "temperature": 0.5})[1]["temperature"] == 0.5
    assert lm._generation({"max_gen_toks": 9, "until": "x"}) == (["x", "<eos>"], {"gen_length": 9})
    assert lm._generation({"until": "x", "do_sample": False, "temperature": 1.0})[1] == {"gen_length": 256}
    with pytest.raises(sw.UserError, match="num_beams"):
        lm.generate_until(ask("generate_until", ("1", {"until": [], "num_beams": 4, "max_gen_toks": 2})))


def test_repeats_of_a_prompt_differ(dllm: tuple[Any, Any]) -> None:
    model, tokenizer = dllm
    asked = ask("generate_until", *[("a", {"until": [], "max_gen_toks": 8})] * 6)
    found = [SkipwiseLM(model, tokenizer=tokenizer, temperature=3.0, seed=s).generate_until(asked) for s in (0, 0, 100)]
    assert len(set(found[0])) > 3
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_chat_template(dllm: tuple[Any, Any]) -> None:
    model, tokenizer = dllm[0], copy.deepcopy(dllm[1])
    lm = SkipwiseLM(model, tokenizer=tokenizer)
    with pytest.raises(sw.UserError, match="no chat template"):
        lm.apply_chat_template([{"role": "user", "content": "1"}])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    )
    assert lm.apply_chat_template([{"role": "user", "content": "s31"}]) == "s31="
    assert lm.chat_template(True) == tokenizer.chat_template


def test_what_lm_eval_calls_auto(dllm: tuple[Any, Any]) -> None:
    """dtype=auto is the checkpoint's own; batch_size=auto is what fits, which on a CPU is no question."""
    lm = SkipwiseLM("tiny-dllm", dtype="auto", batch_size="auto:4", tokenizer="tiny-ar")
    assert (lm.batch_size, lm.likelihood.batch_size) == (8, 8)
    assert next(lm.model.parameters()).dtype == torch.float32
    assert SkipwiseLM("tiny-dllm", batch_size="auto", max_batch_size=3).batch_size == 3
    tried: list[int] = []

    def forward(rows: int) -> None:
        tried.append(rows)
        if rows > most:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    most = 20
    assert first_that_fits(forward, 64) == 16
    assert tried == [64, 32, 16]
    most = 0
    with pytest.raises(sw.UserError, match="no memory for a single row"):
        first_that_fits(forward, 2)


def test_an_adapter_of_peft(dllm: tuple[Any, Any], tmp_path: Path) -> None:
    """As peft's own model generates, alone and under a plan; answers of the plain model are another cache."""
    peft = pytest.importorskip("peft")
    model, tokenizer = dllm
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(
        copy.deepcopy(model),
        peft.LoraConfig(r=4, lora_alpha=400, target_modules=["q_proj", "up_proj"], init_lora_weights=False),
    )
    wrapped.save_pretrained(tmp_path / "adapter")
    merged = wrapped.merge_and_unload()
    asked = ask("generate_until", *[(f"s{n}141592=", {"until": [], "max_gen_toks": 7}) for n in range(4)])
    pairs = ask("loglikelihood", ("s3141592=", "1123459"))
    plain = SkipwiseLM(model, tokenizer=tokenizer, mc_num=4)
    for plan in (None, plan_of(model, 3)):
        ours = SkipwiseLM(model, tokenizer=tokenizer, peft=str(tmp_path / "adapter"), plan=plan, mc_num=4)
        theirs = SkipwiseLM(merged, tokenizer=tokenizer, plan=plan, mc_num=4)
        assert ours.generate_until(asked) == theirs.generate_until(asked)
        assert ours.loglikelihood(pairs)[0][0] == pytest.approx(theirs.loglikelihood(pairs)[0][0], abs=1e-4)
        assert ours.fingerprint not in (theirs.fingerprint, plain.fingerprint)
    assert ours.generate_until(asked) != plain.generate_until(asked)
    healed = plan_of(model, 3).with_adapter(tmp_path / "adapter")
    with pytest.raises(sw.UserError, match="carries an adapter already"):
        SkipwiseLM(model, tokenizer=tokenizer, peft=str(tmp_path / "adapter"), plan=healed)
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    emptied = SkipwiseLM(model, tokenizer=tokenizer, peft=str(tmp_path / "adapter"))
    with pytest.raises(sw.UserError, match=r"has no adapter_model\.safetensors"):
        emptied.generate_until(asked)


@pytest.mark.parametrize("name", ["tiny-dllm", "tiny-ar"])
def test_generations_that_escape_until(name: str) -> None:
    """As in Dream's official evaluation: only the end of text cuts."""
    asked = ask("generate_until", ("s3141592=", {"until": ["3"], "max_gen_toks": 7}))
    assert SkipwiseLM(name).generate_until(asked) == ["112"]
    assert SkipwiseLM(name, escape_until=True).generate_until(asked) == ["1123459"]


def test_a_begin_of_text_is_added_or_not(dllm: tuple[Any, Any]) -> None:
    """Before prompts, contexts and what follows them, once; and not before what stands behind a prefix already."""
    model, tokenizer = dllm[0], copy.deepcopy(dllm[1])
    assert tokenizer.bos_token is None
    lm, ids = SkipwiseLM(model, tokenizer=tokenizer, add_bos_token=True), tokenizer("s31")["input_ids"]
    assert lm.tok_encode("s31") == [tokenizer.eos_token_id, *ids]
    tokenizer.bos_token = "r"
    bos = tokenizer.bos_token_id
    assert lm.tok_encode("s31") == [bos, *ids]
    assert lm.tok_encode("rs31") == [bos, *ids]
    assert lm.tok_encode("s31", add_special_tokens=False) == ids
    assert lm._encode_pair("s3", "1") == ([bos, *ids[:-1]], ids[-1:])
    assert lm._prompt("s31", {"gen_length": 2}) == [bos, *ids]
    assert lm._whole_text("s31") == ids
    for never in (None, False):
        assert SkipwiseLM(model, tokenizer=tokenizer, add_bos_token=never).tok_encode("s31") == ids


class StoppedError(Exception):
    """Stands for a kill."""


def test_a_stopped_run_goes_on(
    dllm: tuple[Any, Any], manager: TaskManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --use_cache, what was answered is not asked again, and another plan's cache is refused."""
    model, tokenizer = dllm
    prompts: list[int] = []
    complete = SkipwiseLM._complete

    def counted(self: SkipwiseLM, batch: list[list[int]], *rest: Any) -> list[str]:
        if len(prompts) == 8 and fail:
            raise StoppedError
        prompts.extend(map(len, batch))
        return complete(self, batch, *rest)

    def evaluate(**settings: Any) -> Any:
        lm = SkipwiseLM(model, tokenizer=tokenizer, batch_size=4, **settings)
        return lm_eval.simple_evaluate(
            lm, tasks=["zoo_sort"], task_manager=manager, use_cache=str(tmp_path / "answers")
        )

    monkeypatch.setattr(SkipwiseLM, "_complete", counted)
    fail = True
    with pytest.raises(StoppedError):
        evaluate()
    fail = False
    assert evaluate()["results"]["zoo_sort"]["exact_match,none"] == 1.0
    assert len(prompts) == 12
    with pytest.raises(sw.UserError, match="another path"):
        evaluate(plan=plan_of(model, 3))


def test_likelihoods_are_cached_as_they_are_done(dllm: tuple[Any, Any]) -> None:
    model, tokenizer = dllm
    lm = SkipwiseLM(model, tokenizer=tokenizer)
    kept: list[tuple[str, Any, Any]] = []
    lm.cache_hook.add_partial = lambda *entry: kept.append(entry)  # type: ignore[method-assign]
    (value,) = lm.loglikelihood(ask("loglikelihood", ("s31=", "13")))
    (total,) = lm.loglikelihood_rolling(ask("loglikelihood_rolling", ("s31=13",)))
    assert kept == [("loglikelihood", ("s31=", "13"), value), ("loglikelihood_rolling", ("s31=13",), total)]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Exit code of `skipwise ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["skipwise", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("pretrained=tiny-dlm", "Did you mean 'tiny-dllm'"),
        ("pretrained=tiny-dllm,plan=none.json", "There is no plan at none.json"),
        ("pretrained=tiny-dllm,stepz=3", "stepz"),
        ("pretrained=tiny-dllm,gen_length=8,block_length=3", "block_length=3"),
        ("pretrained=tiny-dllm,gen_length=64", "leaves no room for a prompt"),
        ("pretrained=tiny-dllm,batch_size=some", "batch_size='some'"),
        ("pretrained=tiny-dllm,batch_size=0", "batch_size=0"),
        ("pretrained=tiny-dllm,peft=nothing", "peft=nothing is no folder"),
        ("pretrained=tiny-dllm,tokenizer=tiny-dlm", "Did you mean 'tiny-dllm'"),
        ("pretrained=tiny-dllm,trust_remote_code=True", "never run"),
        ("pretrained=tiny-ar,steps=8", "leave out steps"),
        ("pretrained=tiny-ar,mc_num=8", "leave out mc_num"),
    ],
)
def test_mistakes_are_named_before_any_request(arguments: str, words: str) -> None:
    with pytest.raises(sw.UserError, match=re.escape(words)) as caught:
        SkipwiseLM.create_from_arg_string(arguments, {"batch_size": 1, "device": None})
    assert "\n" not in str(caught.value)


def test_plans_that_do_not_fit(dllm: tuple[Any, Any]) -> None:
    model, tokenizer = dllm
    with pytest.raises(sw.UserError, match="made for a model with"):
        SkipwiseLM(model, tokenizer=tokenizer, plan=plan_of(ROWS["llada"](), 1))
    phased = Plan(model=find_contract(model).shape, phases=(Phase(until=0.5, skip={"model.layers": (3,)}), Phase()))
    lm = SkipwiseLM(model, tokenizer=tokenizer, plan=phased)
    assert lm.generate_until(ask("generate_until", ("s3141592=", {"until": [], "max_gen_toks": 7}))) == ["1123459"]
    with pytest.raises(sw.UserError, match="static plan"):
        lm.loglikelihood(ask("loglikelihood", ("1", "2")))
    with pytest.raises(sw.UserError, match="tokenizer=NAME"):
        SkipwiseLM(model)
    with pytest.raises(sw.UserError, match="needs a language model"):
        SkipwiseLM(ROWS["bert"](), tokenizer=tokenizer)


def test_the_command_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """lm-eval's own command and results file; a mistake is one line and exit code 2."""
    # reading lm-eval's thousands of tasks takes most of the time
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    tasks = ("--include_path", folder, "--tasks", "zoo_sort", "--limit", 4, "--output_path", tmp_path)
    words = ("lm-eval", "--model", "skipwise", *tasks, "--model_args")
    assert run(monkeypatch, *words, "pretrained=tiny-dllm,batch_size=4,steps=7,gen_length=7") == 0
    assert "zoo_sort" in capsys.readouterr().out
    found = json.loads(next(tmp_path.rglob("results_*.json")).read_text())
    assert found["results"]["zoo_sort"]["exact_match,none"] == 1.0
    assert found["config"]["skipwise"]["settings"] == {"steps": 7, "gen_length": 7}
    assert run(monkeypatch, *words, "pretrained=tiny-dllm,stepz=7") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
    assert run(monkeypatch, "lm-eval", "--help") == 0
    assert "Language Model Evaluation Harness" in capsys.readouterr().out


def test_without_lm_eval(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert run(monkeypatch, "lm-eval", "--tasks", "gsm8k") == 2
    assert "pip install 'skipwise[eval]'" in capsys.readouterr().err


def command(folder: Path, *launch: str) -> tuple[list[str], dict[str, str]]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    return [sys.executable, *launch, "-m", "skipwise", "lm-eval", "--model", "skipwise"], environment


def results_of(folder: Path) -> dict[str, Any]:
    (path,) = folder.rglob("results_*.json")
    return json.loads(path.read_text())["results"]


# without MPI, accelerate starts several processes on a CPU under this name only
LAUNCH = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")


def answers(folder: Path) -> dict[tuple[str, int], Any]:
    """(task, document) -> generated text, or log-likelihoods of the choices."""
    found = {}
    for path in folder.rglob("samples_*"):
        for row in map(json.loads, path.open()):
            task = "choice" if "zoo_choice" in path.name else "sort"
            given = [entry[0] if isinstance(entry, list) else entry for entry in row["filtered_resps"]]
            found[task, row["doc_id"]] = [float(value) for value in given] if task == "choice" else given
    return found


@pytest.mark.slow
def test_two_processes_are_as_one(folder: Path, tmp_path: Path) -> None:
    """`accelerate launch -m skipwise lm-eval` at two processes: the same scores, and the same answers a document."""
    model, _ = sw.load("tiny-dllm")
    plan = plan_of(model, 5, 6).save(tmp_path / "plan.json")
    for name, launch in (("one", ()), ("two", (*LAUNCH, "--mixed_precision", "no", "--dynamo_backend", "no"))):
        words, environment = command(folder, *launch)
        words += ["--model_args", f"pretrained=tiny-dllm,plan={plan},mc_num=8,batch_size=3", "--log_samples"]
        words += ["--include_path", str(folder), "--tasks", "zoo_sort,zoo_choice"]
        words += ["--output_path", str(tmp_path / name)]
        ran = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert ran.returncode == 0, ran.stderr[-2000:]
        assert ("on rank 1" in ran.stderr + ran.stdout) == (name == "two")
    one, two = (results_of(tmp_path / name) for name in ("one", "two"))
    assert one == two
    assert one["zoo_sort"]["exact_match,none"] == pytest.approx(0.75)
    one, two = (answers(tmp_path / name) for name in ("one", "two"))
    assert len(one) == 24
    assert one.keys() == two.keys()
    for key, given in one.items():
        assert two[key] == (given if key[0] == "sort" else pytest.approx(given, abs=1e-3))


@pytest.mark.slow
def test_a_killed_process_goes_on(folder: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle; the second run finds answers in the cache and completes."""
    words, environment = command(folder)
    words += ["--model_args", "pretrained=tiny-dllm,batch_size=1,steps=7,gen_length=7", "--tasks", "zoo_sort"]
    words += ["--include_path", str(folder), "--use_cache", str(tmp_path / "answers"), "--output_path", str(tmp_path)]
    cache = tmp_path / "answers_rank0.db"

    def answered() -> int:
        import sqlite3

        try:
            return (
                sqlite3.connect(f"file:{cache}?mode=ro", uri=True).execute("select count(*) from unnamed").fetchone()[0]
            )
        except sqlite3.Error:
            return 0

    process = subprocess.Popen(
        words, env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while answered() < 3 and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list(tmp_path.rglob("results_*.json"))
    before = answered() - 1  # one entry says what the answers are of
    assert 0 < before < len(EXAMPLES)
    ran = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert f"Cached requests: {before}," in ran.stderr + ran.stdout
    assert results_of(tmp_path)["zoo_sort"]["exact_match,none"] == 1.0


ROOT = Path(__file__).parent.parent


def block(language: str) -> str:
    """The one block of this language in docs/reproduce.md."""
    (code,) = re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / "reproduce.md").read_text(), flags=re.DOTALL)
    return code


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny-dllm", "tiny-ar"])
def test_the_documented_script(folder: Path, tmp_path: Path, model: str) -> None:
    """docs/reproduce.md from the analysis to the table of retention, on an embedded model."""
    _, environment = command(folder)
    environment |= {"MODEL": model, "DECODE": "gen_length=7", "DTYPE": "float32", "DEVICE": "cpu", "SKIPS": "2"}
    environment |= {"TASKS": "zoo_sort", "OPTIONS": f"--include_path {folder}", "RUN": str(tmp_path / "run")}
    environment |= {"LAUNCH": f"{sys.executable} -m skipwise"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    run_it = partial(subprocess.run, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    ran = run_it(["bash", "-c", block("bash")])
    assert ran.returncode == 0, ran.stderr[-2000:]
    table = run_it([sys.executable, "-c", block("python")])
    assert table.returncode == 0, table.stderr
    rows = [line.split() for line in table.stdout.splitlines()]
    assert [row[0] for row in rows] == ["random-2", "similarity-2", "whole"]
    assert all(row[1:3] == ["zoo_sort", "exact_match,none"] for row in rows)
    assert rows[2][3] == "100.0%"


@pytest.mark.slow
def test_the_documented_cost_is_what_the_script_prints() -> None:
    ran = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "reproduce_cost.py")], capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    printed = ran.stdout.splitlines()
    assert "\n".join(printed[:-1]).rstrip() in (ROOT / "docs" / "reproduce.md").read_text()
    first = json.loads(printed[-1])["rows"][0]
    # 2 FLOPs a weight and token for LLaDA-8B's 7.5 G weights (head included), and some attention on top
    assert 1.0 < first["pflop"][0] / (1319 * 256 * 1256 * 2 * 7.5e9 / 1e15) < 1.1
    assert first["pflop"][6] / first["pflop"][0] == pytest.approx(1 - 0.1745, abs=0.002)
