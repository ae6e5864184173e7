"""An export is the source under its plan, bit for bit, in a standard folder that is there whole or not at all."""

import json
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from huggingface_hub import metadata_load
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import skipwise as sw
from skipwise import cli, examples
from skipwise.blocks import find_contract
from skipwise.calibration import Calibration
from skipwise.evaluation import calibration_texts
from skipwise.exporting import bake, checkpoint, folder
from skipwise.files import PARTIAL
from skipwise.healing import HealSettings, fit_stand_ins, heal
from skipwise.plan import Phase, Plan
from tests.test_native_models import DREAM, LLADA, MDLM, dream_shapes, llada_shapes, mdlm_shapes, random_weights, write
from tests.tiny_models import DECODER, ROWS, _lm, example, output

SMALL = "16KB"  # the largest shard, of models of 50 to 150 KB


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def saved(row: Callable[[], nn.Module], at: Path, shard: str = "1GB") -> Path:
    row().save_pretrained(at, max_shard_size=shard)
    return at


def window_from_a_number(at: Path, shard: str) -> Path:
    """Qwen2 as its hub configs are: windows begin at max_window_layers, no list says so."""
    settings = DECODER | {"num_hidden_layers": 6, "use_sliding_window": True, "max_window_layers": 3}
    saved(partial(_lm, "Qwen2Config", "Qwen2ForCausalLM", **settings, sliding_window=3), at, shard)
    edit(at / "config.json", lambda config: config.pop("layer_types"))
    return at


def pattern_from_a_number(at: Path, shard: str) -> Path:
    """Gemma3 as its hub configs are: every third layer is full, no list says so."""
    saved(ROWS["gemma3"], at, shard)
    edit(at / "config.json", lambda config: config.pop("layer_types"))
    edit(at / "config.json", lambda config: config.update(sliding_window_pattern=3))
    return at


def old_gpt2(at: Path, shard: str) -> Path:
    """GPT-2 as on the hub: keys without the outer prefix, and buffers that nothing reads any more."""
    saved(ROWS["gpt2"], at)
    weights = {key.removeprefix("transformer."): tensor for key, tensor in load_file(at / "model.safetensors").items()}
    weights |= {f"h.{i}.attn.bias": torch.ones(1, 1, 4, 4) for i in range(4)}
    save_file(weights, at / "model.safetensors", {"format": "pt"})
    return at


def official(config: dict[str, Any], shapes: Callable[[], Any], prefix: str, at: Path, shard: str) -> Path:
    return write(at, config, random_weights(shapes()), prefix, shards=3 if shard == SMALL else 1)


def row(name: str) -> Callable[[Path, str], Path]:
    return partial(saved, ROWS[name])


mixtral = partial(
    _lm, "MixtralConfig", "MixtralForCausalLM", **DECODER, num_local_experts=4, num_experts_per_tok=2, sliding_window=3
)
tied = partial(_lm, "LlamaConfig", "LlamaForCausalLM", **DECODER, tie_word_embeddings=True)

# name -> (how its source is made, what is skipped)
Make = Callable[[Path, str], Path]
SOURCES: dict[str, tuple[Make, dict[str, list[int]]]] = {
    "llama": (row("llama"), {"model.layers": [1, 2]}),
    "llama, tied": (partial(saved, tied), {"model.layers": [0]}),
    "mistral": (row("mistral"), {"model.layers": [3]}),
    "mixtral": (partial(saved, mixtral), {"model.layers": [0, 2]}),  # transformers fuses its experts
    "qwen2": (window_from_a_number, {"model.layers": [1, 4]}),
    "gemma3": (row("gemma3"), {"model.layers": [0, 2]}),
    "gemma3, pattern": (pattern_from_a_number, {"model.layers": [1, 5]}),
    "smollm3": (row("smollm3"), {"model.layers": [0]}),
    "gpt2": (row("gpt2"), {"transformer.h": [1]}),
    "gpt2, old": (old_gpt2, {"transformer.h": [0, 2]}),
    "gpt_neox": (row("gpt_neox"), {"gpt_neox.layers": [2]}),
    "bert": (row("bert"), {"bert.encoder.layer": [1]}),
    "modernbert": (row("modernbert"), {"model.layers": [1, 2]}),
    "llada": (partial(official, LLADA, llada_shapes, "model."), {"model.layers": [1]}),
    "llada, no prefix": (partial(official, LLADA, llada_shapes, ""), {"model.layers": [0]}),
    "dream": (partial(official, DREAM, dream_shapes, ""), {"model.layers": [0]}),
    "mdlm": (partial(official, MDLM, mdlm_shapes, "backbone."), {"blocks": [1]}),
    "flux": (row("flux"), {"transformer_blocks": [1], "single_transformer_blocks": [0, 2]}),
    "sd3": (row("sd3"), {"transformer_blocks": [0]}),  # its list of block numbers must be counted anew
    "sana": (row("sana"), {"transformer_blocks": [2]}),
    "pixart": (row("pixart"), {"transformer_blocks": [0, 3]}),
    "wan": (row("wan"), {"blocks": [1]}),
    "z_image": (row("z_image"), {"layers": [1], "noise_refiner": [0], "context_refiner": [2]}),
}


def stock(at: Path) -> Any:
    """The folder as the library that its config is for loads it, ours only for what is ours."""
    config = json.loads((at / "config.json").read_text())
    if "_class_name" in config:
        return getattr(diffusers, config["_class_name"]).from_pretrained(at, use_safetensors=True).eval()
    if config["model_type"] in ("llada", "Dream", "mdlm"):
        return sw.load(str(at))[0]
    auto = {"bert": "MaskedLM", "modernbert": "MaskedLM"}.get(config["model_type"], "CausalLM")
    loader = getattr(transformers, f"AutoModelFor{auto}")
    model, report = loader.from_pretrained(at, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def plan_for(model: nn.Module, skip: dict[str, list[int]]) -> sw.Plan:
    return sw.Plan.static(sw.find_contract(model).shape, skip)


def contents(at: Path) -> dict[str, bytes]:
    return {str(path.relative_to(at)): path.read_bytes() for path in sorted(at.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("name", "shard"), [*((name, SMALL) for name in SOURCES), *((name, "1GB") for name in ("llama", "mdlm", "flux"))]
)
def test_an_export_is_the_source_under_its_plan(name: str, shard: str, tmp_path: Path) -> None:
    make, skipped = SOURCES[name]
    source = make(tmp_path / "source", shard)
    model, _ = sw.load(str(source))
    plan, inputs = plan_for(model, skipped), example(model)
    before, whole = contents(source), output(model, inputs)
    assert sw.export(plan, source, tmp_path / "target") == tmp_path / "target"
    exported = stock(tmp_path / "target")
    with sw.skip(model, plan):
        expected = output(model, inputs)
    assert torch.equal(output(exported, inputs), expected)
    assert not torch.equal(expected, whole), "skipping changes nothing: the law is not tested"
    left = {stack: length - len(skipped.get(stack, ())) for stack, length in plan.model.stacks.items()}
    assert {stack: len(exported.get_submodule(stack)) for stack in left} == left
    assert contents(source) == before


@pytest.mark.parametrize("name", ["llama", "gemma3", "flux"])
def test_shards_and_index(name: str, tmp_path: Path) -> None:
    """Every key is where the index says, sizes are true, metadata is kept, files can be shared."""
    make, skipped = SOURCES[name]
    model, _ = sw.load(str(make(tmp_path / "source", SMALL)))
    target = sw.export(plan_for(model, skipped), tmp_path / "source", tmp_path / "target")
    (path,) = target.glob("*.index.json")
    index = json.loads(path.read_text())
    shards = sorted(target.glob("*.safetensors"))
    assert len(shards) > 1
    assert [shard.name for shard in shards] == sorted(set(index["weight_map"].values()))
    assert shards[-1].name.endswith(f"-{len(shards):05d}-of-{len(shards):05d}.safetensors")
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        with safe_open(shard, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        here = load_file(shard)
        assert all(index["weight_map"][key] == shard.name for key in here)
        tensors |= here
    assert tensors.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    if "total_parameters" in index["metadata"]:
        assert index["metadata"]["total_parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert target.stat().st_mode & 0o777 == 0o755
    assert {item.stat().st_mode & 0o777 for item in target.iterdir()} == {0o644}


def a_shard_a_block(source: Path) -> None:
    weights = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    parts = {key: key.split(".")[2] if "layers" in key else "ends" for key in weights}
    for part in set(parts.values()):
        save_file({k: t for k, t in weights.items() if parts[k] == part}, source / f"part-{part}.safetensors")
    weight_map = {key: f"part-{part}.safetensors" for key, part in parts.items()}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return saved(ROWS["llama"], tmp_path / "llama")


@pytest.fixture
def plan() -> sw.Plan:
    return plan_for(ROWS["llama"](), {"model.layers": [1, 2]})


def test_empty_shards_are_left_out(llama: Path, plan: sw.Plan, tmp_path: Path) -> None:
    a_shard_a_block(llama)
    target = sw.export(plan, llama, tmp_path / "target")
    assert len(list(llama.glob("*.safetensors"))) == 5
    assert sorted(path.name for path in target.glob("*.safetensors")) == [
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]
    with safe_open(target / "model-00001-of-00003.safetensors", "pt") as shard:
        assert shard.metadata() is None


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    source = saved(tied, tmp_path / "source")
    target = sw.export(plan_for(tied(), {"model.layers": [0]}), source, tmp_path / "target")
    assert "lm_head.weight" not in load_file(target / "model.safetensors")
    model = stock(target)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_old_buffers_are_left_behind(tmp_path: Path) -> None:
    source = old_gpt2(tmp_path / "source", "1GB")
    target = sw.export(plan_for(ROWS["gpt2"](), {"transformer.h": [0]}), source, tmp_path / "target")
    keys = load_file(target / "model.safetensors").keys()
    assert {key.split(".")[1] for key in keys if key.startswith("h.")} == {"0", "1", "2"}
    assert not [key for key in keys if key.endswith(".attn.bias")]


def test_official_layouts_keep_their_names(tmp_path: Path) -> None:
    source = official(LLADA, llada_shapes, "model.", tmp_path / "source", "1GB")
    plan = plan_for(sw.load(str(source))[0], {"model.layers": [0]})
    target = sw.export(plan, source, tmp_path / "target")
    assert json.loads((target / "config.json").read_text()) == LLADA | {"n_layers": LLADA["n_layers"] - 1}
    before, after = (load_file(at / "model.safetensors") for at in (source, target))
    kept = {key: tensor for key, tensor in before.items() if ".blocks.0." not in key}
    assert after.keys() == {key.replace("blocks.1", "blocks.0").replace("blocks.2", "blocks.1") for key in kept}
    assert torch.equal(
        after["model.transformer.blocks.1.ff_out.weight"], before["model.transformer.blocks.2.ff_out.weight"]
    )


def test_per_layer_settings(tmp_path: Path) -> None:
    """What is said of single layers goes with them, in the sections where it was said."""
    source = window_from_a_number(tmp_path / "qwen2", SMALL)
    plan = plan_for(sw.load(str(source))[0], {"model.layers": [1, 4]})
    config = json.loads((sw.export(plan, source, tmp_path / "a") / "config.json").read_text())
    assert (config["num_hidden_layers"], config["max_window_layers"]) == (4, 2)
    assert "layer_types" not in config
    loaded = transformers.AutoConfig.from_pretrained(tmp_path / "a")
    assert loaded.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    source = pattern_from_a_number(tmp_path / "gemma3", SMALL)
    plan = plan_for(sw.load(str(source))[0], {"model.layers": [1, 5]})
    config = json.loads((sw.export(plan, source, tmp_path / "b") / "config.json").read_text())
    assert config["layer_types"] == ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
    source = saved(ROWS["sd3"], tmp_path / "sd3")
    plan = plan_for(ROWS["sd3"](), {"transformer_blocks": [0]})
    config = json.loads((sw.export(plan, source, tmp_path / "c") / "config.json").read_text())
    assert (config["num_layers"], config["dual_attention_layers"]) == (3, [0])


def test_nested_text_config(tmp_path: Path) -> None:
    """A language model with eyes: the number of its text layers changes, that of its equally many vision layers not."""
    text = {key: value for key, value in ROWS["gemma3"]().config.to_dict().items() if key != "architectures"}
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision | {"num_hidden_layers": text["num_hidden_layers"]}, mm_tokens_per_image=4
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "source")
    (stack,) = (name for name in sw.find_contract(model).stacks if "language" in name)
    plan = plan_for(model, {stack: [2]})
    target = sw.export(plan, tmp_path / "source", tmp_path / "target")
    exported = transformers.Gemma3ForConditionalGeneration.from_pretrained(target).eval()
    assert exported.config.text_config.layer_types == text["layer_types"][:2] + text["layer_types"][3:]
    assert exported.config.vision_config.num_hidden_layers == text["num_hidden_layers"]
    with sw.skip(model, plan):
        assert torch.equal(output(exported, example(model)), output(model, example(model)))


@pytest.mark.parametrize("name", ["gemma3", "qwen2"])
def test_generation_with_a_cache(name: str, tmp_path: Path) -> None:
    make, skipped = SOURCES[name]
    model, _ = sw.load(str(make(tmp_path / "source", "1GB")))
    plan = plan_for(model, skipped)
    exported = stock(sw.export(plan, tmp_path / "source", tmp_path / "target"))
    settings: dict[str, Any] = dict(max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0)
    ids = torch.arange(3, 13).view(2, 5)
    with sw.skip(model, plan):
        expected = model.generate(ids, **settings)
    assert torch.equal(exported.generate(ids, **settings), expected)


def test_one_shard_in_memory_and_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved(ROWS["llama"], tmp_path / "source", SMALL)
    plan = plan_for(ROWS["llama"](), {"model.layers": [1]})
    alive: dict[int, Path] = {}
    most: dict[Path, int] = {}

    class Watched:
        def __init__(self, path: Path, framework: str):
            self.path, self.opened = path, safe_open(path, framework)

        def __enter__(self) -> "Watched":
            self.opened.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.opened.__exit__(*error)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.opened, name)

        def get_tensor(self, key: str) -> Tensor:
            assert set(alive.values()) <= {self.path}, "tensors of another shard are still in memory"
            tensor = self.opened.get_tensor(key)
            alive[id(tensor)] = self.path
            weakref.finalize(tensor, alive.pop, id(tensor))
            most[self.path] = max(most.get(self.path, 0), len(alive))
            return tensor

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(checkpoint, "safe_open", Watched)
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", forbidden)
    target = sw.export(plan, source, tmp_path / "target")
    assert len(most) == len(list(target.glob("*.safetensors"))) > 3
    assert max(most.values()) > 1, "nothing was watched"
    assert not alive


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left")])
def test_a_failure_half_way_leaves_nothing(
    error: BaseException, plan: sw.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = saved(ROWS["llama"], tmp_path / "source", SMALL)
    before = contents(source)
    written: list[Path] = []

    def failing(tensors: dict[str, Tensor], path: Path, metadata: Any) -> None:
        written.append(path)
        if len(written) == 2:
            path.write_bytes(b"half of it")
            raise error
        save_file(tensors, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", failing)
        expected = sw.UserError if isinstance(error, OSError) else type(error)
        with pytest.raises(expected, match="No space left" if isinstance(error, OSError) else None):
            sw.export(plan, source, tmp_path / "target")
    assert len(written) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert contents(source) == before
    sw.export(plan, source, tmp_path / "target")
    assert len(stock(tmp_path / "target").model.layers) == 2


def test_killed_half_way(plan: sw.Plan, tmp_path: Path) -> None:
    """A run that is killed leaves no target; the next one clears up after it and ends well."""
    source = saved(ROWS["llama"], tmp_path / "source", SMALL)
    plan.save(tmp_path / "plan.json")
    code = """
import os, signal, sys
import skipwise as sw
from skipwise.exporting import checkpoint
write, calls = checkpoint.save_file, []
def killing(*arguments):
    calls.append(1)
    write(*arguments)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save_file = killing
sw.export(sw.Plan.load(sys.argv[1]), sys.argv[2], sys.argv[3])
"""
    arguments = [str(tmp_path / "plan.json"), str(source), str(tmp_path / "target")]
    ended = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert ended.returncode == -9, ended.stderr
    assert not (tmp_path / "target").exists()
    assert len(list(tmp_path.glob(f"{PARTIAL}*"))) == 1
    sw.export(plan, source, tmp_path / "target")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json", "source", "target"]
    assert len(stock(tmp_path / "target").model.layers) == 2


def test_the_whole_model_is_what_transforms_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are those of the loaded source's parameters, whatever the checkpoint calls them."""
    source = official(LLADA, llada_shapes, "model.", tmp_path / "source", SMALL)
    model, _ = sw.load(str(source))
    plan, seen = plan_for(model, {"model.layers": [1]}), []

    def doubled(name: str, tensor: Tensor) -> Tensor:
        seen.append(name)
        assert torch.equal(model.get_parameter(name), tensor)
        return tensor * 2 if name == "model.layers.2.mlp.up_proj.weight" else tensor

    monkeypatch.setattr(bake, "_merging", lambda *_: doubled)
    exported, _ = sw.load(str(sw.export(plan, source, tmp_path / "target")))
    assert set(seen) == {name for name, _ in model.named_parameters() if ".layers.1." not in name}
    changed = exported.model.layers[1].mlp.up_proj.weight
    assert torch.equal(changed, 2 * model.model.layers[2].mlp.up_proj.weight)


def test_files_beside_the_weights(llama: Path, plan: sw.Plan, tmp_path: Path) -> None:
    """Tokenizer, templates, licences come along; code, pickles, other weights and logs do not."""
    came = {"tokenizer.json": "{}", "merges.txt": "a b", "chat_template.jinja": "x", "LICENSE": "y", "NOTICE.md": "z"}
    came |= {"additional_chat_templates/tool.jinja": "t"}
    stayed = ["modeling.py", "pytorch_model.bin", "consolidated.pth", "pytorch_model.bin.index.json", "train.jsonl"]
    stayed += ["LICENSE.pkl", "notice.py", "old/params.json"]
    for name, text in (came | dict.fromkeys(stayed, "no")).items():
        (llama / name).parent.mkdir(exist_ok=True)
        (llama / name).write_text(text)
    (llama / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": "code.T"}, "padding_side": "left"}')
    edit(llama / "config.json", lambda config: config.update(auto_map={"AutoModel": "modeling.Llama"}))
    target = sw.export(plan, llama, tmp_path / "target")
    files = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    written = {"config.json", "model.safetensors", "README.md", "skipwise-plan.json"}
    assert files == written | came.keys() | {"tokenizer_config.json", "generation_config.json"}
    assert all((target / name).read_text() == text for name, text in came.items())
    assert json.loads((target / "tokenizer_config.json").read_text()) == {"padding_side": "left"}
    assert "auto_map" not in json.loads((target / "config.json").read_text())
    assert "Python code of its own" in (target / "README.md").read_text()
    assert sw.Plan.load(target / "skipwise-plan.json") == plan


def snippet(card: str) -> str:
    return card.split("```python\n")[1].split("```")[0]


def test_card(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a hub's cache: the card names its base and keeps its licence; what it says of loading runs."""
    commit = "0" * 40
    cached = tmp_path / "hub" / "models--org--name"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    (cached / "snapshots").mkdir()
    (llama / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en]\nwidget: x\n---\n# Base\n")
    llama.rename(cached / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    made_by = sw.plan.Provenance(method="similarity", settings={"skip": 2}, scores={"cosine": [0.5]})
    plan = plan_for(ROWS["llama"](), {"model.layers": [1, 2]}).model_copy(update={"made_by": made_by})
    target = sw.export(plan, "org/name", tmp_path / "small")
    card = (target / "README.md").read_text()
    assert metadata_load(target / "README.md") == {
        "base_model": "org/name",
        "library_name": "transformers",
        "license": "apache-2.0",
        "language": ["en"],
        "tags": ["skipwise", "depth-pruning"],
    }
    assert "[org/name](https://huggingface.co/org/name) without 2 of the 4 blocks of `model.layers`" in card
    assert "| `model.layers` | 4 | 1, 2 | 2 |" in card
    assert "saves 50.00% of block FLOPs" in card
    assert 'Method: similarity. Settings: `{"skip": 2}`.' in card
    assert str(tmp_path) not in card
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(snippet(card).rpartition("\ntokenizer")[0], names)  # this toy has no tokenizer
    assert len(names["model"].model.layers) == 2


def test_embedded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = sw.load("tiny-dllm")
    target = sw.export(plan_for(model, {"model.layers": [3, 4]}), "tiny-dllm", tmp_path / "small")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(snippet((target / "README.md").read_text()), names)
    assert len(names["model"].model.layers) == 22
    assert names["tokenizer"]("s31=")["input_ids"]
    assert "base_model" not in metadata_load(target / "README.md")


def test_pipeline_exports_its_transformer(tmp_path: Path) -> None:
    source = tmp_path / "pipe"
    saved(ROWS["sana"], source / "transformer", SMALL)
    (source / "model_index.json").write_text(json.dumps({"_class_name": "SanaPipeline"}))
    (source / "vae").mkdir()
    (source / "LICENSE.md").write_text("terms")
    (source / "README.md").write_text("---\nlicense: other\nlicense_name: terms\n---\n# Pipe\n")
    target = sw.export(plan_for(ROWS["sana"](), {"transformer_blocks": [1]}), source, tmp_path / "small")
    assert len(stock(target).transformer_blocks) == 3
    assert not (target / "vae").exists()
    assert not (target / "model_index.json").exists()
    assert (target / "LICENSE.md").read_text() == "terms"
    assert metadata_load(target / "README.md").items() >= {"license": "other", "library_name": "diffusers"}.items()
    assert (target / "diffusion_pytorch_model.safetensors.index.json").exists()
    card = (target / "README.md").read_text()
    assert "the transformer alone of a SanaPipeline" in card
    assert "pipe without 1 of the 4 blocks" in card
    assert 'diffusers.SanaPipeline.from_pretrained("SOURCE", transformer=model)' in card


def fails(plan: sw.Plan, source: Path, message: str) -> None:
    """One line, and no target nor anything half-written beside the source."""
    before = set(source.parent.iterdir())
    with pytest.raises(sw.UserError, match=message) as caught:
        sw.export(plan, source, source.parent / "refused")
    assert "\n" not in str(caught.value)
    assert set(source.parent.iterdir()) == before


def test_plans_that_no_checkpoint_can_hold(llama: Path, plan: sw.Plan) -> None:
    shape = plan.model
    phases = (Phase(until=0.5, skip={"model.layers": (1,)}), Phase(until=1.0))
    fails(sw.Plan(model=shape, phases=phases), llama, "has phases.*export a static plan")
    fails(sw.Plan(model=shape, phases=(Phase(model="light"),)), llama, "runs another model, 'light'")
    fails(sw.Plan.static(shape, {}), llama, "skips no block")
    fails(sw.Plan.static(shape, {"model.layers": range(4)}), llama, "skips all 4 blocks of model.layers")
    fails(plan_for(ROWS["qwen2"](), {"model.layers": [1]}), llama, "made for a model with architecture")


@pytest.mark.parametrize(
    ("name", "skipped", "message"),
    [
        ("chroma", {"transformer_blocks": [1]}, "blocks of transformer_blocks depend on their number"),
        ("dit", {"transformer_blocks": [1]}, "blocks of transformer_blocks depend on their number"),
        ("diffusion_gemma", {"model.decoder.layers": [1]}, "share weights or a cache with model.encoder"),
        (
            "sd3",
            {"transformer_blocks": [3]},
            r"transformer_blocks\.2 would have context_pre_only True instead of False",
        ),
        ("modernbert", {"model.layers": [0]}, r"attn_norm would have class 'Identity' instead of 'LayerNorm'"),
        ("lumina2", {"noise_refiner": [1]}, "no number in its config.json sets the length of noise_refiner to 2"),
    ],
)
def test_models_that_no_config_describes(name: str, skipped: Any, message: str, tmp_path: Path) -> None:
    source = saved(ROWS[name], tmp_path / "source")
    fails(plan_for(ROWS[name](), skipped), source, message)


def test_blocks_that_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors or caches of one block that another one needs."""
    source = saved(ROWS["llama"], tmp_path / "source")
    plan = plan_for(ROWS["llama"](), {"model.layers": [1]})
    edit(source / "config.json", lambda config: config.update(num_kv_shared_layers=2))
    fails(plan, source, "its blocks share keys and values .num_kv_shared_layers is 2")
    edit(source / "config.json", lambda config: config.update(num_kv_shared_layers=0))
    build = bake.build_skeleton

    def sharing(config: dict[str, Any], name: str) -> nn.Module:
        model: Any = build(config, name)
        model.model.layers[2].mlp.up_proj.weight = model.model.layers[1].mlp.up_proj.weight
        return model

    monkeypatch.setattr(bake, "build_skeleton", sharing)
    fails(plan, source, "layers.2.mlp.up_proj.weight is the same tensor as model.layers.1.mlp.up_proj.weight")


def lacks_a_shard(at: Path) -> None:
    next(at.glob("*-00002-of-*.safetensors")).unlink()


def lacks_a_key(at: Path) -> None:
    edit(at / "model.safetensors.index.json", lambda index: index["weight_map"].pop("model.norm.weight"))
    for path in at.glob("*.safetensors"):
        weights = load_file(path)
        if weights.pop("model.norm.weight", None) is not None:
            save_file(weights, path)


def lists_a_key_too_many(at: Path) -> None:
    edit(
        at / "model.safetensors.index.json",
        lambda index: index["weight_map"].update({"x.weight": next(iter(index["weight_map"].values()))}),
    )


def another_width(at: Path) -> None:
    edit(at / "config.json", lambda config: config.update(intermediate_size=56))


def cut_short(at: Path) -> None:
    path = next(at.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-10])


def no_json(at: Path) -> None:
    (at / "model.safetensors.index.json").write_text("{")


def another_name(at: Path) -> None:
    for path in at.glob("model*"):
        path.rename(at / f"fp16.{path.name}")


def only_pickle(at: Path) -> None:
    for path in at.glob("model*"):
        path.unlink()
    torch.save({}, at / "pytorch_model.bin")


def quantised(at: Path) -> None:
    edit(at / "config.json", lambda config: config.update(quantization_config={"quant_method": "fp8"}))


def adapted(at: Path) -> None:
    (at / "adapter_config.json").write_text("{}")


BROKEN: list[tuple[Callable[[Path], None], str]] = [
    (lacks_a_shard, r"lacks 1 of the \d+ shards that its index lists, such as model-00002"),
    (lacks_a_key, "checkpoint lacks model.norm.weight; is its config.json"),
    (lists_a_key_too_many, "lacks x.weight, which the index says it has"),
    (another_width, "does not fit its config.json"),
    (cut_short, "damaged or cut short"),
    (no_json, "cannot be read as an index"),
    (another_name, "has neither model.safetensors or diffusion_pytorch_model.safetensors nor their index"),
    (only_pickle, r"only as pickle \(pytorch_model.bin\)"),
    (quantised, "The source is quantised"),
    (adapted, "has an adapter beside its weights"),
]


@pytest.mark.parametrize(("damage", "message"), BROKEN)
def test_broken_sources(damage: Callable[[Path], None], message: str, plan: sw.Plan, tmp_path: Path) -> None:
    source = saved(ROWS["llama"], tmp_path / "source", SMALL)
    damage(source)
    fails(plan, source, message)


def test_sources_that_are_no_folder_of_safetensors(plan: sw.Plan, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    fails(plan, tmp_path / "m.gguf", "is a GGUF file; export its safetensors original")
    fails(plan, tmp_path / "absent", "Unknown model")


def test_a_full_disk_is_seen_before_anything_is_written(
    llama: Path, plan: sw.Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(llama)._replace(free=folder.SPARE + 10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(checkpoint, "save_file", lambda *_: pytest.fail("written"))
    fails(plan, llama, r"GB left and the export needs")


def test_targets_that_hold_something(llama: Path, plan: sw.Plan, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    sw.export(plan, llama, target)  # empty is as good as absent
    before = contents(target)
    for taken in (target, llama, llama / "config.json"):
        with pytest.raises(sw.UserError, match="is there already"):
            sw.export(plan, llama, taken)
    assert contents(target) == before
    with pytest.raises(sw.UserError, match="Cannot write in"):
        sw.export(plan, llama, llama / "config.json" / "below")


def test_a_model_without_inputs_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`example=` is for architectures that skipwise finds no inputs for, as everywhere."""
    source = saved(ROWS["sana"], tmp_path / "source")
    inputs, plan = example(ROWS["sana"]()), plan_for(ROWS["sana"](), {"transformer_blocks": [1]})
    monkeypatch.setattr(examples.signature, "_known", {})
    monkeypatch.setattr(examples.signature, "_ways", lambda model: iter(()))
    fails(plan, source, "take other inputs as `example`")
    assert len(stock(sw.export(plan, source, tmp_path / "target", inputs)).transformer_blocks) == 3


def test_command_line(
    llama: Path, plan: sw.Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan.save(tmp_path / "plan.json")

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["skipwise", "export", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as ended:
            return int(ended.code or 0)
        return 0

    assert run(tmp_path / "plan.json", llama, tmp_path / "target") == 0
    assert "skip model.layers: 1, 2; written to" in capsys.readouterr().out
    assert json.loads((tmp_path / "target" / "config.json").read_text())["num_hidden_layers"] == 2
    assert run(tmp_path / "plan.json", llama, tmp_path / "target") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "is there already and holds something" in error
    assert run(tmp_path / "none.json", llama, tmp_path / "other") == 2
    assert run(tmp_path / "plan.json", "llada-8b", tmp_path / "other") == 2
    assert not (tmp_path / "other").exists()
    assert os.listdir(tmp_path / "target")


def test_an_adapter_is_merged_and_stand_ins_are_refused(tmp_path: Path) -> None:
    """A healed plan's export is the model under that plan, bit for bit; what no checkpoint can hold is refused."""
    model, tokenizer = sw.load("tiny-dllm")
    calibration = Calibration.of(model, tokenizer, calibration_texts(tokenizer, 32))
    plan = Plan.static(find_contract(model).shape, {"model.layers": [5, 9]})
    healed = heal(plan, calibration, tmp_path / "healed.json", HealSettings(steps=2))
    exported, _ = sw.load(str(sw.export(healed, "tiny-dllm", tmp_path / "small")))
    ids = torch.tensor([tokenizer("s3141592=1123459")["input_ids"]])
    with torch.no_grad():
        with sw.skip(model, healed):
            expected = model(ids).logits
        assert torch.equal(exported(ids).logits, expected)
        with sw.skip(model, plan):
            assert not torch.equal(model(ids).logits, expected)
    assert "LoRA" in (tmp_path / "small" / "README.md").read_text()
    linear = fit_stand_ins(plan, calibration, "linear", epochs=1)
    with pytest.raises(sw.UserError, match="leave a linear stand-in behind, for which a standard"):
        sw.export(linear, "tiny-dllm", tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
