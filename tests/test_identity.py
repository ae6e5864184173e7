"""What a result was made of: every part counts, what is not a part does not, and a difference is named."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import skipwise as sw
from skipwise.errors import UserError
from skipwise.identity import check_same, identity, tokenizer_identity, weights_identity
from skipwise.plan import Plan
from tests.tiny_models import ROWS


def test_every_part_counts() -> None:
    """One bit of one weight, another dtype, other stand-ins, another word or setting is another thing."""
    model, (_, tokenizer) = ROWS["llama"](), sw.load("tiny-dllm")
    shape = sw.find_contract(model).shape
    plan = Plan.static(shape, {"model.layers": [1]})
    width = model.config.hidden_size
    fitted = [plan.with_stand_ins("constant", {"0/model.layers/1": torch.full((width,), v)}) for v in (0.0, 1.0)]
    told = {
        "plain": identity(model, plan, tokenizer, {"steps": 4}),
        "other plan": identity(model, Plan.static(shape, {"model.layers": [0]}), tokenizer, {"steps": 4}),
        "stand-ins": identity(model, fitted[0], tokenizer, {"steps": 4}),
        "other stand-ins": identity(model, fitted[1], tokenizer, {"steps": 4}),
        "other settings": identity(model, plan, tokenizer, {"steps": 5}),
        "no tokenizer": identity(model, plan, None, {"steps": 4}),
        "another model beside it": identity(model, plan, tokenizer, {"steps": 4}, {"light": ROWS["qwen2"]()}),
    }
    kinds = [str(parts) for parts in told.values()]
    assert len(set(kinds)) == len(kinds)
    assert identity(model, plan.named("by another name"), tokenizer, {"steps": 4}) == told["plain"]


def test_one_bit_of_a_weight_counts() -> None:
    model = ROWS["llama"]()
    before = weights_identity(model)
    assert before.startswith("tensors:")
    assert weights_identity(copy.deepcopy(model)) == before
    for weight in (model.model.norm.weight, model.lm_head.weight):
        bits = weight.data.view(torch.int32).view(-1)
        bits[-1] ^= 1
        assert weights_identity(model) != before
        bits[-1] ^= 1
    first = model.model.layers[0].self_attn.q_proj.weight.data
    first[[0, 1]] = first[[1, 0]]  # the same numbers in other places
    assert weights_identity(model) != before
    first[[0, 1]] = first[[1, 0]]
    assert weights_identity(model) == before
    assert weights_identity(model.to(torch.bfloat16)) != before


def test_weights_that_are_not_here_are_known_by_their_files(tmp_path: Path) -> None:
    ROWS["llama"]().save_pretrained(tmp_path)
    with torch.device("meta"):
        hollow = ROWS["llama"]()
    hollow.name_or_path = str(tmp_path)
    before = weights_identity(hollow)
    assert before.startswith("files:")
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes() + b" ")
    assert weights_identity(hollow) != before


def test_another_word_or_template_is_another_tokenizer() -> None:
    _, tokenizer = sw.load("tiny-dllm")
    before = tokenizer_identity(tokenizer)
    assert tokenizer_identity(copy.deepcopy(tokenizer)) == before
    tokenizer.chat_template = "{{ messages }}"
    assert tokenizer_identity(tokenizer) != before


def test_a_difference_is_named() -> None:
    before: dict[str, Any] = {"model": "a", "settings": {"steps": 4, "rank": 8}}
    check_same(before, {"model": "a", "settings": {"rank": 8, "steps": 4}}, "It", "begin anew")
    now = {"model": "b", "settings": {"steps": 5, "rank": 8}, "plan": "c"}
    with pytest.raises(UserError, match=r"^It differs in model, plan, settings\.steps; begin anew\.$"):
        check_same(before, now, "It", "begin anew")


def test_what_a_call_leaves_in_a_tokenizer_is_no_part_of_it() -> None:
    _, tokenizer = sw.load("tiny-dllm")
    before = tokenizer_identity(tokenizer)
    tokenizer(["a1", "a1+1="], padding=True, truncation=True, max_length=4)
    assert tokenizer_identity(tokenizer) == before


def test_adapters_count_by_what_they_are_told() -> None:
    """The scale of a LoRA, and whether it is on, are no tensors."""
    import peft

    told = []
    for alpha in (1, 400):
        torch.manual_seed(0)
        wrapped = peft.get_peft_model(ROWS["llama"](), peft.LoraConfig(lora_alpha=alpha, target_modules=["q_proj"]))
        told.append(weights_identity(wrapped))
        with wrapped.disable_adapter():
            told.append(weights_identity(wrapped))
    assert len(set(told)) >= 3


def test_scales_of_quantised_weights_count() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    told = []
    for scale in (1, 4):
        torch.manual_seed(0)
        layer = bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4")
        layer.weight = bitsandbytes.nn.Params4bit(scale * torch.randn(64, 64), requires_grad=False, quant_type="nf4")
        told.append(weights_identity(layer.to("cpu")))
    assert told[0] != told[1]


@pytest.mark.parametrize("config", [None, {1: "a", (2, 3): {"b"}}, {"dtype": torch.float16, "bytes": b"x"}])
def test_odd_configs_are_told(config: Any) -> None:
    layer = torch.nn.Linear(2, 2)
    layer.config = config
    assert weights_identity(layer) == weights_identity(copy.deepcopy(layer))
