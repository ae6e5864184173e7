"""The command line from end to end on a tiny model, and every mistake: one line, exit code 2, nothing half-written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import skipwise as sw
from skipwise import cli
from skipwise.zoo.tasks import TASKS

COMMANDS = (
    "inspect",
    "analyze",
    "bench",
    "plan",
    "heal",
    "finetune",
    "generate",
    "eval",
    "judge",
    "lm-eval",
    "export",
    "report",
    "demo",
)

GROUPS = ("schedule", "zoo")


def test_a_plan_with_all_that_travels_with_it(skipwise, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """analyze, greedy with stand-ins; greedy, heal, export: each step from the command line alone."""
    folder, plan, healed, small = (tmp_path / name for name in ("a", "plan.json", "healed.json", "small"))
    assert skipwise("analyze", "tiny-dllm", "-o", folder, "--count", 8)[0] == 0
    greedy = ["plan", folder, "--skip", 2, "--method", "greedy", "--model", "tiny-dllm", "--count", 8]
    code, out, _ = skipwise(*greedy, "--stand-in", "linear", "-o", tmp_path / "linear.json")
    assert code == 0
    assert "(a linear stand-in each)" in out
    assert sw.Plan.load(tmp_path / "linear.json").method == "greedy + linear stand-ins"
    assert skipwise(*greedy, "-o", plan)[0] == 0
    code, out, _ = skipwise("heal", plan, "tiny-dllm", "-o", healed, "--steps", 3, "--count", 8)
    assert code == 0
    assert "healed by an adapter" in out
    assert skipwise("export", healed, "tiny-dllm", small)[0] == 0
    for model, chosen in (("tiny-dllm", ["--plan", healed]), (small, [])):
        code, out, _ = skipwise("generate", model, "s3141592=", "--gen-length", 7, *chosen)
        assert "s3141592=1123459" in out
    code, _, err = skipwise("export", healed, "tiny-dllm", small)
    assert code == 2
    assert "small" in err
    code, _, err = skipwise("plan", folder, "--skip", 2, "--method", "greedy")
    assert (code, "name it with --model, such as --model tiny-dllm" in err) == (2, True)


@pytest.mark.parametrize("model", ["tiny-dllm", "tiny-ar"])
def test_the_whole_chain(skipwise, model: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder, plan, result, page = (tmp_path / name for name in ("a", "plan.json", "result.json", "page.html"))
    code, out, _ = skipwise("analyze", model, "-o", folder, "--count", 8)
    assert (code, "tokens of" in out) == (0, True)
    code, out, _ = skipwise("plan", folder, "--skip", 2, "-o", plan)
    assert code == 0
    assert "skip model.layers:" in out
    code, out, _ = skipwise("generate", model, "s3141592=", "r3141592=", "--gen-length", 7, "--plan", plan)
    assert code == 0
    assert "s3141592=1123459" in out
    assert "r3141592=2951413" in out
    assert "8.3% saved" in out
    code, out, _ = skipwise("eval", model, "--plan", plan, "--task", "sort", "--examples", 8, "-o", result)
    assert code == 0
    assert "similarity" in out
    assert sw.Result.load(result).rows[1].k == 2
    code, out, _ = skipwise("report", result, "--analysis", folder, "-o", page)
    assert code == 0
    assert model in page.read_text()


def test_inspect_needs_no_weights(skipwise) -> None:  # type: ignore[no-untyped-def]
    code, out, _ = skipwise("inspect", "llada-8b", "--skip", 6)
    assert code == 0
    assert "model.layers" in out
    assert "18.75% of block FLOPs" in " ".join(out.split())
    assert "17.45% with the head" in " ".join(out.split())
    code, out, _ = skipwise("inspect", "sana-1.6b", "--image", 32)
    assert "SanaTransformerBlock" in out


@pytest.mark.slow
def test_demo(skipwise, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    code, out, _ = skipwise("demo", "--model", "tiny-dllm", "-o", tmp_path, "--examples", 4)
    assert code == 0
    result = sw.Result.load(tmp_path / "result-tiny-dllm.json")
    ks = {method: [row.k for row in result.rows if row.method == method] for method in ("similarity", "random")}
    assert ks == {"similarity": [1, 2, 3, 4, 6], "random": [k for k in (1, 2, 3, 4, 6) for _ in range(5)]}
    assert result.rows[-1].saved_block_flops == pytest.approx(0.25)
    assert len(list((tmp_path / "plans").iterdir())) == 30
    assert sw.Analysis.load(tmp_path / "analysis-tiny-dllm").name == "tiny-dllm"
    assert (tmp_path / "report.html").stat().st_size > 20_000
    assert "report.html" in out


def test_zoo_list(skipwise) -> None:  # type: ignore[no-untyped-def]
    code, out, _ = skipwise("zoo", "list")
    assert code == 0
    assert "tiny-dllm: masked diffusion, 24 blocks, width 64" in out


MISTAKES = {
    "model": (["inspect", "tiny-dlm"], "Unknown model 'tiny-dlm'. Did you mean 'tiny-dllm'"),
    "plan missing": (["eval", "tiny-dllm", "--plan", "{tmp}/no.json"], "There is no plan at"),
    "plan foreign": (["eval", "tiny-dllm", "--plan", "{tmp}/foreign.json"], "was made for a model with architecture"),
    "plan unreadable": (["eval", "tiny-dllm", "--plan", "{tmp}/garbage.json"], "cannot be read as a plan"),
    "k too large": (["plan", "{tmp}/analysis", "--skip", "99"], "Cannot skip 99 blocks: model.layers has 24"),
    "no k": (["plan", "{tmp}/analysis"], "Give either skip"),
    "method": (["plan", "{tmp}/analysis", "--skip", "1", "--method", "similar"], "Did you mean 'similarity'"),
    "setting": (["plan", "{tmp}/analysis", "--skip", "1", "--set", "sede=1"], "Unknown setting of similarity 'sede'"),
    "setting without value": (["plan", "{tmp}/analysis", "--skip", "1", "--set", "seed"], "has no value"),
    "no analysis": (["plan", "{tmp}", "--skip", "1"], "holds no readable analysis"),
    "task": (["eval", "tiny-dllm", "--task", "sortt"], "Unknown task 'sortt'. Did you mean 'sort'"),
    "empty prompt": (["generate", "tiny-dllm", ""], "A prompt is empty"),
    "empty texts": (["analyze", "tiny-dllm", "--texts", "{tmp}/empty.txt", "-o", "{tmp}/x"], "There are no texts"),
    "texts missing": (
        ["analyze", "tiny-dllm", "--texts", "{tmp}/none.txt", "-o", "{tmp}/x"],
        "cannot be read as UTF-8",
    ),
    "output of analyze": (["analyze", "tiny-dllm", "-o", "{tmp}/file/x"], "Cannot write in"),
    "output of plan": (["plan", "{tmp}/analysis", "--skip", "1", "-o", "{tmp}/file/p.json"], "Cannot write"),
    "output of eval": (["eval", "tiny-dllm", "-o", "{tmp}/file/r.json"], "Cannot write in"),
    "output of demo": (["demo", "-o", "{tmp}/file/demo"], "Cannot write in"),
    "result": (["report", "{tmp}/garbage.json"], "is not a readable skipwise-result/1 file"),
    "steps": (["generate", "tiny-dllm", "s1=", "--gen-length", "6", "--block-length", "4"], "is not a multiple of"),
    "guidance of dream": (
        ["generate", "tiny-dllm", "s1=", "--family", "dream", "--cfg-scale", "1"],
        "Unknown setting of the dream sampler 'cfg_scale'",
    ),
    "nothing to fill": (["generate", "tiny-dllm", "s1=", "--gen-length", "0"], "the prompt holds no mask token"),
    "steps of ar": (["generate", "tiny-ar", "s1=", "--steps", "4"], "is not a masked diffusion model; leave out steps"),
    "recipe": (["zoo", "train", "tiny-dlm"], "Unknown recipe 'tiny-dlm'"),
    "dtype": (["analyze", "tiny-ar", "--dtype", "int3", "-o", "{tmp}/x"], "Unknown dtype 'int3'"),
    "dtype of what is inspected": (["inspect", "llada-8b", "--dtype", "int3"], "Unknown dtype 'int3'"),
    "dtype of the judge": (["judge", "tiny-text", "--judge-dtype", "int3"], "Unknown dtype 'int3'"),
    "no device": (["generate", "tiny-dllm", "s1=", "--device", "gpu"], "device='gpu' is no device; use cpu"),
    "device elsewhere": (["eval", "nothing", "--device", "xla:7"], "There is no device 'xla:7' for weights on this"),
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mistakes")
    model, tokenizer = sw.load("tiny-dllm")
    analysis = sw.analyze(model, tokenizer, [("s3141592=", "1123459")], noise_levels=1)
    analysis.save(folder / "analysis")
    plan = sw.make_plan(analysis, skip=1)
    foreign = plan.model_copy(update={"model": plan.model.model_copy(update={"architecture": "Other"})})
    foreign.save(folder / "foreign.json")
    (folder / "garbage.json").write_text("not json")
    (folder / "empty.txt").write_text("\n\n")
    (folder / "file").write_text("")
    return folder


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(skipwise, mistake: str, workplace: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)  # defaults such as plan.json would land here
    arguments, message = MISTAKES[mistake]
    before = sorted(str(path) for path in workplace.rglob("*.json"))
    code, _, err = skipwise(*(argument.replace("{tmp}", str(workplace)) for argument in arguments))
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert sorted(str(path) for path in workplace.rglob("*.json")) == before
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], "something was half-written"


def test_unknown_options_exit_with_2(skipwise) -> None:  # type: ignore[no-untyped-def]
    assert skipwise("plan", "x", "--skpi", "1")[0] == 2
    assert skipwise("nonsense")[0] == 2


def test_every_command_has_an_example() -> None:
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    assert set(commands) == {*COMMANDS, *GROUPS}
    described = [c for name, c in commands.items() if name not in GROUPS] + [commands["zoo"].commands["train"]]
    described += commands["schedule"].commands.values()
    assert all("skipwise " in (command.help or "") for command in described)


def test_importing_skipwise_is_quick_and_has_no_side_effect() -> None:
    """Neither torch nor any extra is loaded until something is used."""
    code = "import sys, skipwise; "
    code += "print(sorted(set(sys.modules) & {'torch', 'diffusers', 'lm_eval', 'matplotlib', 'transformers'}))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
    code = "import sys, skipwise; skipwise.generate, skipwise.evaluate, skipwise.load; "
    code += "print(sorted(set(sys.modules) & {'diffusers','lm_eval','matplotlib'}))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_public_names_are_there() -> None:
    assert all(getattr(sw, name) for name in sw.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'sikp'"):
        sw.sikp  # noqa: B018


def test_training_log_is_that_of_the_recipe() -> None:
    """The shipped models' logs begin with the recipe that is in the code, and end at full accuracy."""
    from dataclasses import asdict
    from importlib.resources import files

    from skipwise.zoo.recipes import RECIPES, Recipe

    for name, recipe in RECIPES.items():
        lines = files("skipwise.zoo").joinpath("weights", name, "train.jsonl").read_text().splitlines()
        head, last = json.loads(lines[0]), json.loads(lines[-1])
        since = json.loads(json.dumps(asdict(Recipe("masked_diffusion"))))  # settings that older logs do not name
        assert since | head["recipe"] == json.loads(json.dumps(asdict(recipe)))
        assert last["step"] == recipe.steps
        if recipe.corpus == "tasks":
            assert all(last[task] >= 0.95 for task in TASKS)
    assert asdict(RECIPES["tiny-dllm"]) | {"objective": 0} == asdict(RECIPES["tiny-ar"]) | {"objective": 0}
