"""Quantised checkpoints: loaded by transformers' and diffusers' own quantisers and priced as stored, or one line."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import skipwise as sw
from skipwise.adapters import merged
from skipwise.blocks import find_contract
from skipwise.cost import estimate
from skipwise.loading import load_skeleton
from skipwise.models.llada import official_state_dict
from skipwise.plan import Plan
from tests.tiny_models import IMAGE, LANGUAGE, example, output

bitsandbytes = pytest.importorskip("bitsandbytes")

IDS = torch.tensor([[5, 6, 7, 8, 1, 2, 3]])
QUANTISERS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4, scales quantised too": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
    "int8, some left": {"load_in_8bit": True, "llm_int8_skip_modules": ["q_proj", "lm_head"]},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As wide as bitsandbytes' kernels for CPUs need."""
    folder = tmp_path_factory.mktemp("plain")
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "vocab_size": 96}
    config = transformers.Qwen2Config(**shape, num_attention_heads=2, num_key_value_heads=2)
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def counted(model: nn.Module) -> int:
    """Bytes of all tensors that are needed to run it, as bitsandbytes holds them."""
    total = 0
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            total += parameter.numel() * parameter.element_size()
        if isinstance(module, bitsandbytes.nn.Linear8bitLt):
            total += 4 * module.out_features
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            state = module.weight.quant_state
            tensors = [state.absmax, state.code]
            tensors += [state.state2.absmax, state.state2.code] if state.nested else []
            tensors += [] if state.offset is None else [state.offset]
            total += sum(tensor.nbytes for tensor in tensors)
    return total


@pytest.mark.parametrize("kind", QUANTISERS)
def test_a_language_model(kind: str, plain: Path, tmp_path: Path) -> None:
    """Quantised as it is read, saved, read again and under a plan: as transformers has it."""
    config = transformers.BitsAndBytesConfig(**QUANTISERS[kind])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(plain, quantization_config=config)
    ours, _ = sw.load(str(plain), quantization_config=config)
    ours.save_pretrained(tmp_path)  # before it runs: on a CPU that rounds its scales
    expected = logits(theirs)
    assert torch.equal(logits(ours), expected)
    again, _ = sw.load(str(tmp_path))
    assert torch.equal(logits(again), expected)
    plan = Plan.static(find_contract(again).shape, {"model.layers": [1]})
    with sw.skip(again, plan):
        cut = logits(again)
    del theirs.model.layers[1]
    assert torch.equal(cut, logits(theirs))
    assert torch.equal(logits(again), expected)


@pytest.mark.parametrize("kind", QUANTISERS)
def test_the_price_is_of_what_is_stored(kind: str, plain: Path, tmp_path: Path) -> None:
    """FLOPs and activations of the plain model, bytes of the tensors; the same from the config alone."""
    config = transformers.BitsAndBytesConfig(**QUANTISERS[kind])
    model, _ = sw.load(str(plain), quantization_config=config)
    original = sw.load(str(plain))[0]
    model.save_pretrained(tmp_path)
    next(tmp_path.glob("*.safetensors")).unlink()
    assert estimate(load_skeleton(str(tmp_path))).weight_bytes == counted(model)
    logits(model)  # on a CPU weights are packed anew for its kernels
    plan = Plan.static(find_contract(model).shape, {"model.layers": [1, 3]})
    before = logits(model)
    found, expected = estimate(model, plan), estimate(original, plan)
    assert torch.equal(logits(model), before)
    gone = sum(counted(model.model.layers[number]) for number in (1, 3))
    assert found.weight_bytes == counted(model) - gone < expected.weight_bytes / 1.4
    for name in ("all_in_flops", "block_flops", "activation_bytes", "saved_all_in_flops", "saved_head_flops"):
        assert getattr(found, name) == getattr(expected, name)


def test_a_packed_transformer_by_its_config_alone(tmp_path: Path) -> None:
    """NF4 by hand: half a byte a weight, a float32 scale for each 64, the table of 16."""
    model = IMAGE["flux"]()
    said = {"quant_method": "bitsandbytes", "load_in_4bit": True, "llm_int8_skip_modules": ["proj_out", "x_embedder"]}
    (tmp_path / "config.json").write_text(
        json.dumps(json.loads(model.to_json_string()) | {"quantization_config": said})
    )
    found, whole = estimate(load_skeleton(str(tmp_path), dtype="bfloat16")), estimate(copy.deepcopy(model).bfloat16())
    kept = {name for name, _ in model.named_modules() if {"proj_out", "x_embedder"} & set(name.split("."))}
    packed = [m.weight.numel() for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in kept]
    saved = sum(2 * count - (-(-count // 2) + 4 * -(-count // 64) + 64) for count in packed)
    assert found.all_in_flops == whole.all_in_flops
    assert found.weight_bytes == whole.weight_bytes - saved


LAYOUTS = {  # of a linear layer with 256 inputs and 128 outputs
    "gptq": ({"bits": 4, "group_size": 128}, 128 * 256 // 2 + 2 * 128 // 2 + 2 * 2 * 128 + 4 * 256),
    "awq": ({"bits": 4, "group_size": 64}, 128 * 256 // 2 + 4 * 128 // 2 + 4 * 2 * 128),
    "torchao": ({"quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}}, 128 * 256 + 128 * 5),
    "quanto": ({"weights": "int8"}, 128 * 256 + 128 * 2 + 4),
    "fp8": ({"weight_block_size": [128, 128]}, 128 * 256 + 2 * 4),
}


@pytest.mark.parametrize("method", LAYOUTS)
def test_layouts(method: str) -> None:
    from skipwise.quantised import LAYOUTS as KNOWN

    config, expected = LAYOUTS[method]
    assert KNOWN[method](128, 256, {"quant_method": method} | config) == expected


def test_an_unknown_layout_is_not_guessed(plain: Path, tmp_path: Path) -> None:
    config = json.loads((plain / "config.json").read_text()) | {"quantization_config": {"quant_method": "magic"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(sw.UserError, match="quantised by magic holds is not known without its weights"):
        load_skeleton(str(tmp_path))


@pytest.mark.parametrize("how", ["accelerate", "groups", "casting"])
def test_the_price_of_an_offloaded_model(how: str) -> None:
    """Hooks take no part; a byte an element is a byte."""
    import accelerate
    from diffusers.hooks import apply_group_offloading, apply_layerwise_casting

    model, device = IMAGE["flux"](), torch.device("cpu")
    whole, inputs = estimate(copy.deepcopy(model)), example(model)
    expected = output(model, inputs)
    if how == "accelerate":
        accelerate.cpu_offload(model, execution_device=device)
    elif how == "groups":
        apply_group_offloading(model, device, offload_type="leaf_level")
    else:
        apply_layerwise_casting(model, torch.float8_e4m3fn, torch.float32)
    found = estimate(model)
    assert found.all_in_flops == whole.all_in_flops
    assert found.weight_bytes == sum(p.numel() * p.element_size() for p in model.parameters())
    assert (output(model, inputs) - expected).norm() <= (0.2 if how == "casting" else 0) * expected.norm()


def gptq(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices of blocks as GPTQ packs them into int32, with zeros."""
    packed: dict[str, Tensor] = {}
    for key, value in weights.items():
        stem = key.removesuffix(".weight")
        if value.ndim < 2 or "blocks" not in key:
            packed[key] = value.contiguous()
            continue
        packed[f"{stem}.qweight"] = torch.zeros(value.shape[1] // 8, value.shape[0], dtype=torch.int32)
        packed[f"{stem}.scales"] = torch.ones(1, value.shape[0])
    return packed


def test_a_missing_library_is_named(plain: Path, tmp_path: Path) -> None:
    said = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    llada = LANGUAGE["llada"]()
    for name, weights, config in (
        ("qwen2", load_file(plain / "model.safetensors"), json.loads((plain / "config.json").read_text())),
        ("llada", gptq(official_state_dict(llada)), llada.config.to_official()),
    ):
        (tmp_path / name).mkdir()
        save_file(weights, tmp_path / name / "model.safetensors", {"format": "pt"})
        (tmp_path / name / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
        with pytest.raises(sw.UserError, match=r"is quantised \(gptq, 4 bits\) and cannot be .*pip install") as caught:
            sw.load(str(tmp_path / name))
        assert "\n" not in str(caught.value)


def test_what_is_quantised_is_not_quantised_again(plain: Path, tmp_path: Path) -> None:
    model, _ = sw.load(str(plain), quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True))
    model.save_pretrained(tmp_path)
    with pytest.raises(sw.UserError, match=r"is quantised already \(bitsandbytes, 8 bits\)"):
        sw.load(str(tmp_path), quantization_config=transformers.QuantoConfig(weights="int8"))


def test_no_adapter_is_merged_into_quantised_weights(plain: Path, tmp_path: Path) -> None:
    model, _ = sw.load(str(plain))
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    for kind in QUANTISERS:
        config = transformers.BitsAndBytesConfig(**QUANTISERS[kind])
        packed, _ = sw.load(str(plain), quantization_config=config)
        before = logits(packed)
        with (
            pytest.raises(sw.UserError, match=r"cannot be merged exactly into model\.layers"),
            merged(packed, tmp_path),
        ):
            pass
        assert torch.equal(logits(packed), before)


def test_fine_tuning_refuses_it_before_anything_is_priced(
    tmp_path: Path, skipwise: Callable[..., tuple[int, str, str]]
) -> None:
    from tests.tiny_pipelines import save

    save("flux", tmp_path / "flux")
    path = tmp_path / "flux" / "transformer" / "config.json"
    said = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": said}))
    (tmp_path / "dog").mkdir()
    runs = (["--dry-run"], ["--images", tmp_path / "dog", "--prompt", "a sks dog", "-o", tmp_path / "out"])
    errors = [skipwise("finetune", tmp_path / "flux", "--resolution", 32, *more) for more in runs]
    assert errors[0][0] == 2
    assert "is quantised (bitsandbytes, 4 bits), and fine-tuning a quantised model is not supported" in errors[0][2]
    assert not (tmp_path / "out").exists()
