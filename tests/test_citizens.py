"""Native models are models of transformers: saved and read back by every way, and decoded by `model.generate`."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BitsAndBytesConfig,
    GenerationConfig,
    pipeline,
)

import skipwise as sw
from skipwise.loading import find
from skipwise.models import MDLM, Dream, LLaDA, MaskedDiffusion, fact
from skipwise.models.dream import DreamConfig
from skipwise.models.llada import LLaDAConfig, official_state_dict
from skipwise.models.random import random_model
from tests.test_native_models import LLADA, MODELS, random_weights, write
from tests.tiny_models import ROWS

EMBEDDED = {"llada": "tiny-dllm", "dream": "tiny-ar2dllm", "mdlm": "tiny-text"}
CLASSES = {"llada": LLaDA, "dream": Dream, "mdlm": MDLM}
IDS = torch.randint(3, 20, (2, 9), generator=torch.Generator().manual_seed(1))
WAYS: dict[str, Callable[[Any, Path], Any]] = {
    "its class": lambda model, folder: type(model).from_pretrained(folder),
    "AutoModel": lambda model, folder: AutoModel.from_pretrained(folder),
    "AutoModelForCausalLM": lambda model, folder: AutoModelForCausalLM.from_pretrained(folder),
    "AutoModelForMaskedLM": lambda model, folder: AutoModelForMaskedLM.from_pretrained(folder),
    "load": lambda model, folder: sw.load(str(folder))[0],
}


def told(config: Any) -> dict[str, Any]:
    """All that a config says but where it was read from."""
    return config.to_dict() | {"_name_or_path": ""}


def same(model: Any, other: Any) -> None:
    """Equal in class, config, weights and logits, bit for bit."""
    assert type(model) is type(other)
    assert told(model.config) == told(other.config)
    weights = [each.state_dict() for each in (model, other)]
    assert weights[0].keys() == weights[1].keys()
    assert all(value.dtype == weights[1][key].dtype for key, value in weights[0].items())
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, other(IDS).logits)


def keys_of(folder: Path) -> set[str]:
    keys: set[str] = set()
    for shard in folder.glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            keys |= set(file.keys())
    return keys


@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize("name", EMBEDDED)
def test_saved_and_read_back_is_the_same(name: str, original: bool, tmp_path: Path) -> None:
    model, _ = sw.load(EMBEDDED[name])
    model.save_pretrained(tmp_path, max_shard_size="150KB", save_original_format=original)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    official = name == "llada" and original
    assert keys_of(tmp_path) == (set(official_state_dict(model)) if official else set(model.state_dict()))
    for way in WAYS.values():
        same(model, way(model, tmp_path))
    prompt = {"input_ids": IDS[:, :5], "gen_length": 4}
    again, _ = sw.load(str(tmp_path))
    assert torch.equal(sw.generate(again, **prompt).sequences, sw.generate(model, **prompt).sequences)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_of_an_official_checkpoint(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Once more saved, it is still the same; the official folder, too, is read by every way."""
    config, shapes, _, prefix = MODELS[name]
    official = write(tmp_path / "official", config, random_weights(shapes()), prefix)
    model, _ = sw.load(str(official), dtype=dtype)
    for number in range(2):
        model.save_pretrained(tmp_path / str(number))
        again, _ = sw.load(str(tmp_path / str(number)))
        same(model, again)
        model = again
    plain, _ = sw.load(str(official))
    same(plain, AutoModel.from_pretrained(official))
    assert told(AutoConfig.from_pretrained(official)) == told(type(plain.config).from_official(config))


def test_a_tied_head_stays_tied(tmp_path: Path) -> None:
    config = LLaDAConfig.from_official(LLADA | {"weight_tying": True})
    for model in (random_model(LLaDA, config), random_model(Dream, DreamConfig(**_small(), tie_word_embeddings=True))):
        folder = tmp_path / type(model).__name__
        model.save_pretrained(folder, max_shard_size="5KB")
        assert "lm_head.weight" not in keys_of(folder)
        for way in WAYS.values():
            again = way(model, folder)
            assert again.lm_head.weight is again.model.embed_tokens.weight
            same(model, again)


def _small() -> dict[str, Any]:
    return {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "mask_token_id": 7,
        "initializer_range": 0.3,
    }


def test_what_the_config_says_besides_is_kept(tmp_path: Path) -> None:
    """Scaled rotary positions, dropout, biases and a user's own key are no part of the official config."""
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    config = LLaDAConfig(**_small(), rope_parameters=rope, attention_bias=True, attention_dropout=0.1, note="mine")
    model = random_model(LLaDA, config)
    model.save_pretrained(tmp_path)
    again, _ = sw.load(str(tmp_path))
    same(model, again)
    assert again.config.note == "mine"


def test_sliding_windows_are_refused_in_either_layout(tmp_path: Path) -> None:
    DreamConfig(**_small(), rope_parameters={"rope_type": "default", "rope_theta": 1e4}).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(stored | {"use_sliding_window": True}))
    with pytest.raises(sw.UserError, match="use_sliding_window=True; skipwise implements only False"):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", CLASSES)
def test_every_fact_has_one_home(name: str) -> None:
    """Each attribute of the base class is one of its documented facts, and a silent model has its value."""
    facts = ("family", "shift", "block_length", "takes_cache", "predicts_mask", "commits_by_confidence", "takes_sigma")
    assert all(f"{key}:" in str(MaskedDiffusion.__doc__) for key in facts)
    silent: Any = SimpleNamespace()
    assert [fact(silent, key) for key in facts] == ["llada", 0, None, False, True, True, False]
    model, _ = sw.load(EMBEDDED[name])
    assert [fact(model, key) for key in facts] == {
        "llada": ["llada", 0, None, True, True, True, False],
        "dream": ["dream", 1, None, True, True, True, False],
        "mdlm": ["mdlm", 0, None, True, False, False, False],
    }[name]


def test_a_model_brings_its_block_length(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ROWS["llada"]()
    prompt = {"input_ids": IDS[:1, :5], "gen_length": 8}
    blocks = sw.generate(model, **prompt, block_length=2).sequences
    whole = sw.generate(model, **prompt).sequences
    assert not torch.equal(blocks, whole)
    monkeypatch.setattr(type(model), "block_length", 2)
    assert torch.equal(sw.generate(model, **prompt).sequences, blocks)
    assert torch.equal(sw.generate(model, **prompt, block_length=8).sequences, whole)


class Listener:
    def __init__(self) -> None:
        self.heard: list[list[Any]] = []
        self.ended = False

    def put(self, tokens: Tensor) -> None:
        assert not self.ended
        self.heard.append(tokens.tolist())

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("name", EMBEDDED)
def test_generate_is_ours(name: str, tmp_path: Path) -> None:
    model, _ = sw.load(EMBEDDED[name])
    ids, mask = torch.cat([torch.zeros(1, 2, dtype=torch.long), IDS[:1]], 1), torch.tensor([[0] * 2 + [1] * 9])
    want = sw.generate(model, ids, attention_mask=mask, gen_length=7).sequences
    prompt = {"input_ids": ids, "attention_mask": mask}
    assert torch.equal(model.generate(**prompt, max_new_tokens=7), want)
    assert torch.equal(model.generate(ids.int(), attention_mask=mask.bool(), max_length=18), want)
    assert torch.equal(model.generate(**prompt, generation_config=GenerationConfig(max_new_tokens=7)), want)
    idle = {"num_beams": 1, "top_k": 0, "use_cache": True, "pad_token_id": 0, "synced_gpus": False}
    found = model.generate(**prompt, max_new_tokens=7, return_dict_in_generate=True, **idle)
    assert torch.equal(found.sequences, want)
    model.generation_config.update(do_sample=True, temperature=0.7, num_beams=3, max_new_tokens=7)
    model.save_pretrained(tmp_path)  # what a generation_config.json says of autoregressive decoding is not read
    assert torch.equal(sw.load(str(tmp_path))[0].generate(**prompt), want)
    with pytest.raises(sw.UserError, match=r"takes no num_beams=4; it takes max_new_tokens, .* and its sampler's"):
        model.generate(**prompt, num_beams=4)
    with pytest.raises(sw.UserError, match="takes no num_beams=4"):
        model.generate(**prompt, generation_config=GenerationConfig(num_beams=4))
    with pytest.raises(sw.UserError, match="max_length=5 is less than the prompt's 11"):
        model.generate(**prompt, max_length=5)
    with pytest.raises(sw.UserError, match="takes prompts as input_ids, once"):
        model.generate(max_new_tokens=7)


def test_generate_under_a_plan_and_with_the_samplers_settings() -> None:
    model, _ = sw.load("tiny-dllm")
    plan = sw.Plan.static(sw.find_contract(model).shape, {"model.layers": [5, 9]})
    settings: dict[str, Any] = {"temperature": 0.8, "seed": 3, "block_length": 4, "plan": plan}
    want = sw.generate(model, IDS, gen_length=8, **settings).sequences
    assert torch.equal(model.generate(IDS, max_new_tokens=8, do_sample=True, **settings), want)
    with sw.skip(model, plan):
        del settings["plan"]
        assert torch.equal(model.generate(IDS, max_new_tokens=8, **settings), want)


@pytest.mark.parametrize(
    ("name", "asked", "meant"),
    [
        ("llada", {"do_sample": True}, {"temperature": 1.0}),
        ("llada", {"do_sample": False}, {"temperature": 0.0}),
        ("dream", {"do_sample": True, "temperature": 0.5, "top_p": 0.9}, {"temperature": 0.5, "top_p": 0.9}),
        ("mdlm", {"do_sample": True, "temperature": 1.0}, {}),
        ("llada", {"temperature": 0.5, "do_sample": False}, "do_sample=False and temperature=0.5 contradict"),
        ("llada", {"top_k": 5}, "takes no top_k=5"),
        ("mdlm", {"do_sample": False}, "the mdlm sampler always draws"),
        ("mdlm", {"temperature": 0.5}, "takes no temperature=0.5"),
        ("llada", {"eos_token_id": [2, 3]}, "ends a text at one token"),
        ("llada", {"num_return_sequences": 2}, "takes no num_return_sequences=2"),
    ],
)
def test_how_tokens_are_drawn(name: str, asked: dict[str, Any], meant: Any) -> None:
    model = ROWS[name]()
    prompt = torch.arange(8, 14)[None]
    if isinstance(meant, str):
        with pytest.raises(sw.UserError, match=meant) as caught:
            model.generate(prompt, max_new_tokens=8, **asked)
        assert "\n" not in str(caught.value)
        return
    want = sw.generate(model, prompt, gen_length=8, **meant).sequences
    assert torch.equal(model.generate(prompt, max_new_tokens=8, **asked), want)


@pytest.mark.parametrize(
    ("name", "settings"), [("tiny-dllm", {"block_length": 4}), ("tiny-ar2dllm", {}), ("tiny-text", {"seed": 2})]
)
def test_a_streamer_hears_what_is_final(name: str, settings: dict[str, Any]) -> None:
    model, _ = sw.load(name)
    listener, steps = Listener(), []
    prompt = IDS[:1]
    found = model.generate(prompt, max_new_tokens=8, streamer=listener, on_step=steps.append, **settings)
    assert listener.heard[0] == prompt.tolist()
    assert [token for tokens in listener.heard[1:] for token in tokens] == found[0, 9:].tolist()
    assert len(listener.heard) > 2, "not all at the end"
    assert listener.ended
    assert steps
    with pytest.raises(sw.UserError, match="A streamer follows one text and input_ids hold 2"):
        model.generate(IDS, max_new_tokens=8, streamer=Listener())


def test_a_streamer_of_masks_in_the_prompt_hears_them_filled() -> None:
    model, _ = sw.load("tiny-dllm")
    prompt, listener = IDS[:1].clone(), Listener()
    prompt[0, 4] = model.config.mask_token_id
    found = model.generate(prompt, max_new_tokens=4, streamer=listener)
    assert listener.heard == [found[:, :9].tolist(), found[0, 9:].tolist()]


@pytest.mark.parametrize("name", EMBEDDED)
def test_a_pipeline_of_transformers(name: str) -> None:
    model, tokenizer = sw.load(EMBEDDED[name])
    prompt = "The people of" if name == "mdlm" else "s3141592="
    made = pipeline("text-generation", model=model, tokenizer=tokenizer)(
        prompt, max_new_tokens=7, do_sample=True, temperature=1.0, return_full_text=False
    )
    ids = tokenizer(prompt, return_tensors="pt")
    warm = {} if name == "mdlm" else {"temperature": 1.0}
    found = sw.generate(model, **ids, gen_length=7, **warm).sequences[0, ids["input_ids"].shape[1] :]
    assert made[0]["generated_text"] == tokenizer.decode(found, skip_special_tokens=True)


def test_autoregressive_models_keep_transformers_own_generate() -> None:
    model, _ = sw.load("tiny-ar")
    own = model.generate(IDS[:1], max_new_tokens=4, do_sample=False)
    assert torch.equal(sw.generate(model, IDS[:1], max_new_tokens=4).sequences, own)
    assert model.generate(IDS[:1], max_new_tokens=4, num_beams=2).shape == (1, 13)


def test_prompts_as_people_have_them() -> None:
    model, tokenizer = sw.load("tiny-dllm")
    inputs = tokenizer(["s3141592=", "a1+2="], return_tensors="pt", padding=True)
    want = sw.generate(model, **inputs, gen_length=5).sequences
    types = torch.zeros_like(inputs["input_ids"])
    assert torch.equal(sw.generate(model, **inputs, token_type_ids=types, max_new_tokens=5).sequences, want)
    ragged = tokenizer(["s3141592=", "a1+2="])["input_ids"]
    assert len({len(row) for row in ragged}) == 2
    assert torch.equal(sw.generate(model, ragged, gen_length=5).sequences, want)
    for dtype in (torch.int32, torch.uint8):
        ids = inputs["input_ids"].to(dtype)
        assert torch.equal(
            sw.generate(model, ids, attention_mask=inputs["attention_mask"], gen_length=5).sequences, want
        )
    ar, _ = sw.load("tiny-ar")
    assert torch.equal(
        sw.generate(ar, ragged, max_new_tokens=5).sequences, sw.generate(ar, **inputs, gen_length=5).sequences
    )


@pytest.mark.parametrize("name", [*EMBEDDED, "llama"])
def test_linears_that_torch_quantises_as_it_runs(name: str) -> None:
    """The tokens are those that the model says, the FLOPs those of the plain layers, under a plan too."""
    model = ROWS[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would rather have torchao
        quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})
    contract = sw.find_contract(quantised)
    plan = sw.Plan.static(contract.shape, {contract.main_stack: [1]})
    for given in (None, plan):
        found, plain = (
            sw.generate(each, IDS, gen_length=4, plan=given, stop_at_eos=False) for each in (quantised, model)
        )
        assert found.stats.all_in_flops == plain.stats.all_in_flops
    if name == "mdlm":  # which draws
        return
    new = getattr(model.config, "mask_token_id", None)
    ids = IDS if new is None else torch.cat([IDS, torch.full((2, 1), new)], 1)
    with torch.no_grad():
        logits = quantised(ids).logits[:, -1]
    if new is not None:
        logits[:, new] = -torch.inf
    assert torch.equal(sw.generate(quantised, IDS, gen_length=1).sequences[:, -1], logits.argmax(-1))


@pytest.mark.parametrize("name", ["llada", "mdlm"])
def test_weights_of_eight_bits(name: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    plain = ROWS[name]()
    plain.save_pretrained(tmp_path)
    quantised, _ = sw.load(str(tmp_path), quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    assert any(parameter.dtype == torch.int8 for parameter in quantised.parameters())
    with torch.no_grad():
        error = (quantised(IDS).logits - plain(IDS).logits).norm() / plain(IDS).logits.norm()
    assert 0 < error < 0.1
    assert torch.equal(quantised.generate(IDS, max_new_tokens=4)[:, :9], IDS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_ids": {"input_ids": [[3]]}}, r"hand them over by name: generate\(model, \*\*inputs\)"),
        ({"input_ids": [[3.5]]}, "token ids are integers"),
        ({"input_ids": [["a"]]}, "are no rows of numbers"),
        ({"input_ids": [3, 4]}, "hold no prompts"),
        ({"input_ids": [[3, 99]]}, "Token 99 is not in the vocabulary of 22"),
        ({"input_ids": [[3, -1]]}, "Token -1 is not in the vocabulary"),
        ({"input_ids": [[3, 4]], "token_type_ids": [[0, 1]]}, "token_type_ids are not all 0"),
        ({"input_ids": [[3, 4]], "attention_mask": [[1]]}, r"attention_mask is \(1, 1\)"),
        ({"input_ids": [[3, 4]], "gen_length": 3, "max_new_tokens": 4}, "are the same; give one of them"),
        ({"input_ids": [[3, 4]], "compat": "sdar"}, "compat='sdar' is unknown; use 'llada'"),
    ],
)
def test_prompts_that_are_none(given: dict[str, Any], message: str) -> None:
    model, _ = sw.load("tiny-dllm")
    with pytest.raises(sw.UserError, match=message) as caught:
        sw.generate(model, **given)
    assert "\n" not in str(caught.value)


def test_lists_of_unequal_length_need_a_token_to_pad_with() -> None:
    model, _ = sw.load("tiny-dllm")
    model.config.pad_token_id = model.config.eos_token_id = None
    with pytest.raises(sw.UserError, match="no pad_token_id; pad them yourself"):
        sw.generate(model, [[3, 4], [3]], gen_length=2)


def test_the_embedded_folders_are_official(tmp_path: Path) -> None:
    """What the zoo writes is read without skipwise's loader, too."""
    for name in EMBEDDED.values():
        same(sw.load(name)[0], AutoModel.from_pretrained(find(name).folder))
