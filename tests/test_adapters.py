"""Adapters of every kind that peft has: merged, they are what peft runs unmerged; or one line says why not."""

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import skipwise as sw
from skipwise import adapters
from skipwise.adapters import merged
from skipwise.blocks import find_contract
from skipwise.plan import Plan
from tests.tiny_models import LANGUAGE, ROWS, example, output

IDS = torch.tensor([[5, 6, 7, 8, 1, 2, 3]])
SOME = ["q_proj", "v_proj"]


def lora(**settings: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": SOME} | settings)


PLAIN = {
    "some layers": lora(),
    "all layers": lora(target_modules="all-linear"),
    "rslora": lora(use_rslora=True),
    "gaussian": lora(init_lora_weights="gaussian"),
}
KINDS: dict[str, Any] = PLAIN | {
    "alpha_pattern": lora(alpha_pattern={"q_proj": 16}),
    "rank_pattern": lora(rank_pattern={"q_proj": 8}),
    "lora_bias": lora(target_modules=["q_proj"], lora_bias=True),
    "bias": lora(bias="all"),
    "dora": lora(use_dora=True),
    "pissa": lora(init_lora_weights="pissa"),
    "olora": lora(init_lora_weights="olora"),
    "modules_to_save": lora(modules_to_save=["norm", "lm_head"]),
    "tied modules_to_save": lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "trainable tokens": lora(trainable_token_indices=[5, 6]),
    "embedding": lora(target_modules=["embed_tokens", "lm_head"]),
    "one layer": lora(layers_to_transform=[1]),
    "exclude_modules": lora(exclude_modules=r".*layers\.0.*"),
    "target_parameters": lora(target_modules=[], target_parameters=["mlp.gate_proj.weight"]),
    "IA3": peft.IA3Config(target_modules=SOME, feedforward_modules=[]),
    "LoHa": peft.LoHaConfig(r=4, target_modules=SOME),
    "LoKr": peft.LoKrConfig(r=4, target_modules=SOME),
    "OFT": peft.OFTConfig(oft_block_size=4, target_modules=SOME),
    "VeRA": peft.VeraConfig(r=4, target_modules=SOME),
    "VB-LoRA": peft.VBLoRAConfig(r=4, num_vectors=16, vector_length=8, target_modules=SOME),
    "LayerNorm": peft.LNTuningConfig(target_modules=["norm"]),
}
UNMERGEABLE = {
    "prompt": (peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "no change of weights"),
    "activated": (lora(task_type="CAUSAL_LM", alora_invocation_tokens=[7]), "aLoRA does not support"),
}


def tuned(model: nn.Module, config: Any, folder: Path) -> nn.Module:
    """A copy of the model with an adapter of random numbers, which is also written to the folder."""
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(copy.deepcopy(model), copy.deepcopy(config)).eval()
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    wrapped.save_pretrained(folder)
    return wrapped


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def edited(folder: Path, config: dict[str, Any] | None = None, **tensors: Tensor | None) -> Path:
    """The folder with other fields and tensors; None takes a tensor out."""
    path, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
    save_file({k: v for k, v in (load_file(weights) | tensors).items() if v is not None}, weights)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_what_peft_runs(kind: str, tmp_path: Path) -> None:
    model = LANGUAGE["qwen2"]()
    objects = {name: id(p) for name, p in model.named_parameters()}
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected, before = logits(tuned(model, KINDS[kind], tmp_path / "adapter")), logits(model)
    state = torch.get_rng_state()
    with merged(model, tmp_path / "adapter"):
        found = logits(model)
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(before, expected, atol=1e-2)
    assert {name: id(p) for name, p in model.named_parameters()} == objects
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_ones_need_no_peft(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The short way gives the same bits."""
    model = LANGUAGE["qwen2"]()
    tuned(model, PLAIN[kind], tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(adapters, "_plain_lora", lambda *_: None)
        with merged(model, tmp_path):
            expected = logits(model)
    monkeypatch.setitem(sys.modules, "peft", None)
    with merged(model, tmp_path):
        assert torch.equal(logits(model), expected)
    with (
        pytest.raises(sw.UserError, match=r"needs peft.*skipwise\[heal\]"),
        merged(model, edited(tmp_path, {"alpha_pattern": {"q_proj": 2}})),
    ):
        pass


@pytest.mark.parametrize("row", ["gpt2", "flux", "sd3", "llada"])
@pytest.mark.parametrize("dora", [False, True])
def test_other_models(row: str, dora: bool, tmp_path: Path) -> None:
    """Conv1D, which holds its weight the other way round, a native model and diffusers' models."""
    model = ROWS[row]()
    inputs = example(model)
    targets = {"gpt2": ["c_attn"], "llada": SOME}.get(row, ["to_q", "to_v"])
    wrapped = tuned(model, lora(target_modules=targets, use_dora=dora, fan_in_fan_out=row == "gpt2"), tmp_path)
    before, expected = output(model, inputs), output(wrapped.base_model.model, inputs)
    with merged(model, tmp_path):
        assert torch.allclose(output(model, inputs), expected, atol=1e-4)
    assert torch.equal(output(model, inputs), before)
    assert not torch.allclose(before, expected, atol=1e-3)


@pytest.mark.parametrize("dora", [False, True])
def test_numbers_are_the_whole_models(dora: bool, tmp_path: Path) -> None:
    """Under a plan and in its export, block 2's adapter is on what was block 2; the export has the same bits."""
    model = LANGUAGE["qwen2"]()
    model.save_pretrained(tmp_path / "source")
    wrapped = tuned(model, lora(use_dora=dora), tmp_path / "adapter").merge_and_unload()
    plan = Plan.static(find_contract(model).shape, {"model.layers": [1]})
    with sw.skip(wrapped, plan):
        expected = logits(wrapped)
    with sw.skip(model, plan.with_adapter(tmp_path / "adapter")):
        found = logits(model)
    assert torch.allclose(found, expected, atol=1e-5)
    exported, _ = sw.load(str(sw.export(plan.with_adapter(tmp_path / "adapter"), tmp_path / "source", tmp_path / "t")))
    assert torch.equal(logits(exported), found)


def test_a_tied_weight_cannot_be_exported_alone(tmp_path: Path) -> None:
    model = LANGUAGE["gemma3"]()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "source")
    tuned(model, lora(target_modules=["lm_head"]), tmp_path / "adapter")
    plan = Plan.static(find_contract(model).shape, {"model.layers": [1]}).with_adapter(tmp_path / "adapter")
    with pytest.raises(sw.UserError, match=r"changes lm_head.weight but not model.embed_tokens.weight"):
        sw.export(plan, tmp_path / "source", tmp_path / "target")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("kind", UNMERGEABLE)
def test_what_is_no_change_of_weights_is_refused(kind: str, tmp_path: Path) -> None:
    model = LANGUAGE["qwen2"]()
    config, why = UNMERGEABLE[kind]
    tuned(model, config, tmp_path)
    with pytest.raises(sw.UserError, match=why), merged(model, tmp_path):
        pass


def test_every_key_and_field_is_used_or_refused(tmp_path: Path) -> None:
    model = LANGUAGE["qwen2"]()
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    extra = {key.replace("layers.0", "layers.9"): torch.ones(4, 32)}
    wrong: list[tuple[Callable[[Path], Path], str]] = [
        (lambda at: edited(at, **extra), r"unknown key model\.layers\.9\.self_attn\.q_proj"),
        (lambda at: edited(at, {"use_dora": True}, **extra), r"unknown key model\.layers\.9\.self_attn\.q_proj"),
        (lambda at: edited(at, **{key: None}), r"lacks model\.layers\.0\.self_attn\.q_proj\.lora_A"),
        (lambda at: edited(at, **{key: torch.ones(2, 32)}), r"size mismatch.*layers\.0\.self_attn\.q_proj"),
        (lambda at: edited(at, {"target_modules": ["q_proj"]}), r"unknown key model\.layers\.0\.self_attn\.v_proj"),
        (lambda at: edited(at, {"use_magic": 3}), "use_magic=3, which the installed peft"),
        (lambda at: edited(at, {"peft_type": "MAGIC"}), "peft_type='MAGIC', which the installed peft"),
    ]
    before = logits(model)
    for number, (change, why) in enumerate(wrong):
        tuned(model, lora(), tmp_path / str(number))
        with pytest.raises(sw.UserError, match=why) as caught, merged(model, change(tmp_path / str(number))):
            pass
        assert "\n" not in str(caught.value)
    assert torch.equal(logits(model), before)
    edited(tmp_path / "0", {"use_magic": None}, **dict.fromkeys(extra))
    with merged(model, tmp_path / "0"):
        assert not torch.equal(logits(model), before)


def test_a_plan_takes_no_adapter_of_another_layout(tmp_path: Path) -> None:
    plan = Plan.static(find_contract(LANGUAGE["qwen2"]()).shape, {"model.layers": [1]})
    save_file({"transformer.x.lora_A.weight": torch.ones(1)}, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(sw.UserError, match="holds no adapter as peft writes it"):
        plan.with_adapter(tmp_path)


def offload(how: str, model: nn.Module, folder: Path) -> None:
    device = torch.device("cpu")
    if how == "accelerate, CPU":
        accelerate.cpu_offload(model, execution_device=device)
    elif how == "accelerate, disk":
        accelerate.disk_offload(model, str(folder / "offloaded"), execution_device=device)
    elif how == "accelerate, by block":
        places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu"}
        accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(folder / "offloaded"))
    elif how == "diffusers, groups":
        from diffusers.hooks import apply_group_offloading

        apply_group_offloading(model, device, offload_type="leaf_level")
    else:
        from diffusers.hooks import apply_layerwise_casting

        apply_layerwise_casting(model, torch.float8_e4m3fn, torch.float32)


@pytest.mark.parametrize(
    "how", ["accelerate, CPU", "accelerate, disk", "accelerate, by block", "diffusers, groups", "diffusers, casting"]
)
@pytest.mark.parametrize("config", [lora(), lora(use_dora=True)], ids=["plain", "dora"])
def test_offloaded_weights_are_refused(how: str, config: Any, tmp_path: Path) -> None:
    """Who brings weights in and out does not see a new one in a module."""
    model = LANGUAGE["qwen2"]()
    tuned(model, config, tmp_path)
    offload(how, model, tmp_path)
    before = logits(model)
    with pytest.raises(sw.UserError, match=r"while it is offloaded|which is quantised"), merged(model, tmp_path):
        pass
    assert torch.equal(logits(model), before)


def test_an_adapter_that_touches_nothing_offloaded_is_merged(tmp_path: Path) -> None:
    model = LANGUAGE["qwen2"]()
    expected = logits(tuned(model, lora(layers_to_transform=[0]), tmp_path))
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{number}": "disk" for number in (1, 2, 3)} | {"model.rotary_emb": "cpu"}
    accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path / "offloaded"))
    with merged(model, tmp_path):
        assert torch.allclose(logits(model), expected, atol=1e-5)


def test_a_model_that_moves_meanwhile_is_put_back_whole(tmp_path: Path) -> None:
    model = LANGUAGE["qwen2"]()
    tuned(model, lora(), tmp_path)
    expected = logits(copy.deepcopy(model).to(torch.bfloat16))
    with merged(model, tmp_path):
        model.to(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(model), expected)


def test_sums_are_rounded_once(tmp_path: Path) -> None:
    model = LANGUAGE["qwen2"]()
    wrapped = tuned(model, lora(use_dora=True), tmp_path)
    precise = wrapped.merge_and_unload().model.layers[0].self_attn.q_proj.weight
    half = copy.deepcopy(model).to(torch.bfloat16)
    again = tuned(half.float(), lora(use_dora=True), tmp_path / "half").merge_and_unload()
    with merged(half.to(torch.bfloat16), tmp_path / "half"):
        found = half.model.layers[0].self_attn.q_proj.weight
    assert torch.equal(found, again.model.layers[0].self_attn.q_proj.weight.to(torch.bfloat16))
    assert not torch.equal(found.float(), precise)
