"""Block numbers that come from outside of a model mean the whole model's, whatever a plan leaves out.

The oracle is a model in which a bare identity stands in the place of every skipped block: no block has another number.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import skipwise as sw
from skipwise.errors import UserError
from skipwise.examples import example_inputs
from skipwise.numbering import find_numbering
from skipwise.plan import ModelShape, Plan
from tests.tiny_models import IMAGE, LANGUAGE

# stack -> the arguments of a block that are its streams, in the order in which it returns them
STREAMS = {
    "flux": {
        "transformer_blocks": ("encoder_hidden_states", "hidden_states"),
        "single_transformer_blocks": ("encoder_hidden_states", "hidden_states"),
    },
    "sd3": {"transformer_blocks": ("encoder_hidden_states", "hidden_states")},
    "qwen_image": {"transformer_blocks": ("encoder_hidden_states", "hidden_states")},
    "sana": {"transformer_blocks": ("hidden_states",)},
    "z_image": {"layers": ("x",)},
}


class Identity(nn.Module):
    def __init__(self, block: nn.Module, streams: tuple[str, ...]):
        super().__init__()
        self.__dict__["block"] = block
        self.streams = streams

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        names = list(type(self.block).forward.__code__.co_varnames)[1:]
        given = dict(zip(names, args, strict=False)) | kwargs
        found = tuple(given[name] for name in self.streams)
        return found if len(found) > 1 else found[0]


@contextmanager
def identities(model: nn.Module, row: str, skipped: dict[str, list[int]]) -> Iterator[None]:
    kept = {name: getattr(model, name) for name in skipped}
    for name, numbers in skipped.items():
        blocks = [Identity(b, STREAMS[row][name]) if i in numbers else b for i, b in enumerate(kept[name])]
        setattr(model, name, nn.ModuleList(blocks))
    yield
    for name, blocks in kept.items():
        setattr(model, name, blocks)


def output(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        found = model(**inputs)[0]
    return found[0] if isinstance(found, list) else found


def flux_residuals(inputs: dict[str, Any], blocks: dict[str, int]) -> dict[str, Any]:
    image = inputs["hidden_states"].shape[1]
    return {
        "controlnet_block_samples": [noise(1, image, 32, seed=i) for i in range(blocks["transformer_blocks"])],
        "controlnet_single_block_samples": [
            noise(1, image, 32, seed=9 + i) for i in range(blocks["single_transformer_blocks"])
        ],
    }


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def residuals(name: str) -> Callable[[dict[str, Any], dict[str, int]], dict[str, Any]]:
    """A ControlNet's residuals (1, 16 image tokens, width) for every block of the only stack."""
    return lambda inputs, blocks: {name: [noise(1, 16, 32, seed=i) for i in range(next(iter(blocks.values())))]}


# row -> what a caller may give by block number
GIVEN: dict[str, tuple[str, Callable[[dict[str, Any], dict[str, int]], dict[str, Any]]]] = {
    "flux": ("flux", flux_residuals),
    "sd3, ControlNet": ("sd3", residuals("block_controlnet_hidden_states")),
    "sd3, skip_layers": ("sd3", lambda inputs, blocks: {"skip_layers": [3]}),
    "qwen_image": ("qwen_image", residuals("controlnet_block_samples")),
}


@pytest.mark.parametrize("case", GIVEN)
def test_what_a_caller_gives_by_number_reaches_that_block(case: str) -> None:
    row, make = GIVEN[case]
    model = IMAGE[row]()
    inputs = example_inputs(model)
    given = make(inputs, {name: len(getattr(model, name)) for name in STREAMS[row]})
    skipped = {name: [1] for name in STREAMS[row]}
    with identities(model, row, skipped):
        plain, expected = output(model, inputs), output(model, inputs | given)
    assert not torch.equal(plain, expected), "what is given changes nothing: the test says nothing"
    with sw.skip(model, skipped):
        assert torch.equal(output(model, inputs | given), expected)
        assert torch.equal(output(model, inputs), plain)
        assert all(len(getattr(model, name)) == len(getattr(model, name)._modules) - 1 for name in skipped)


def test_a_call_that_fails_puts_the_places_back() -> None:
    model = IMAGE["sd3"]()
    inputs = example_inputs(model)
    with sw.skip(model, [1]):
        plain = output(model, inputs)
        with pytest.raises(TypeError):
            model(**inputs, skip_layers=3)
        assert torch.equal(output(model, inputs), plain)


def test_deepstack_features_of_a_vision_tower() -> None:
    """Qwen3-VL adds the n-th feature of its vision tower behind language block n."""
    config = transformers.Qwen3VLTextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.models.qwen3_vl.modeling_qwen3_vl.Qwen3VLTextModel(config).eval()
    ids, where = torch.arange(3, 9)[None], torch.tensor([[False, True, True, False, False, False]])
    features = {"visual_pos_masks": where, "deepstack_visual_embeds": [noise(2, 32, seed=i) for i in range(3)]}
    with sw.skip(model, [1]), torch.no_grad():
        found = model(ids, use_cache=False, **features).last_hidden_state
    kept, model.layers[1].forward = model.layers[1].forward, lambda hidden_states, *_, **__: hidden_states
    with torch.no_grad():
        expected = model(ids, use_cache=False, **features).last_hidden_state
    model.layers[1].forward = kept
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("name", "attribute", "always", "argument"),
    [
        ("FluxTransformer2DModel", "single_transformer_blocks", False, "controlnet_single_block_samples"),
        ("ZImageTransformer2DModel", "layers", False, "controlnet_block_samples"),
        ("LTX2VideoTransformer3DModel", "transformer_blocks", False, "spatio_temporal_guidance_blocks"),
        ("WanTransformer3DModel", "blocks", False, None),
    ],
)
def test_what_a_forward_does_with_its_count(name: str, attribute: str, always: bool, argument: str | None) -> None:
    owner = object.__new__(getattr(diffusers, name))
    nn.Module.__init__(owner)
    found = find_numbering(owner, attribute, ())
    assert found.always == always
    assert (argument in found.arguments) if argument else not found.arguments


@pytest.mark.parametrize(("layers", "always"), [([0, 2], True), ([], False), ([9], False), (None, False)])
def test_numbers_that_the_owner_names(layers: list[int] | None, always: bool) -> None:
    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.named = nn.ModuleList(nn.Linear(2, 2) for _ in range(4)), layers

        def forward(self, x: Tensor) -> Tensor:
            for number, block in enumerate(self.blocks):
                if number in self.named:
                    x = x + 1
                x = block(x)
            return x

    assert find_numbering(Owner(), "blocks", ()).always == always


def test_an_adapter_that_is_loaded_while_a_plan_is_in_force() -> None:
    """Its names are the whole model's, and so are the blocks that get it."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    tuned = peft.get_peft_model(LANGUAGE["llama"](), config)
    ids = torch.arange(3, 9)[None]
    weights = peft.get_peft_model_state_dict(tuned)
    model = LANGUAGE["llama"]()
    with sw.skip(model, [1]), torch.no_grad():
        inside = peft.get_peft_model(model, config)
        peft.set_peft_model_state_dict(inside, weights)
        under = inside(ids).logits
    with torch.no_grad():
        assert torch.equal(inside(ids).logits, tuned(ids).logits)
        with sw.skip(tuned, [1]):
            assert torch.equal(under, tuned(ids).logits)


def test_names_and_weights_are_the_whole_models() -> None:
    model = IMAGE["flux"]()
    names, processors = list(model.state_dict()), list(model.attn_processors)
    with sw.skip(model, {"transformer_blocks": [0], "single_transformer_blocks": [1, 2]}):
        assert list(model.state_dict()) == names
        assert list(model.attn_processors) == processors


def test_a_model_is_not_saved_while_blocks_are_out(tmp_path: Path) -> None:
    model = LANGUAGE["llama"]()
    with sw.skip(model, [1]), pytest.raises(UserError, match="leave the `with` first"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    model.save_pretrained(tmp_path / "saved")


def test_layers_skipped_by_number_in_between_are_refused() -> None:
    model = IMAGE["flux"]()
    inputs = example_inputs(model)
    config = diffusers.LayerSkipConfig(indices=[1], fqn="transformer_blocks", skip_attention=False, skip_ff=True)
    with sw.skip(model, {"transformer_blocks": [0]}):
        diffusers.hooks.apply_layer_skip(model, config)
        with pytest.raises(UserError, match="by number"):
            output(model, inputs)


def test_a_cache_of_the_whole_model_is_refused() -> None:
    model = LANGUAGE["llama"]()
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        past = model(ids, use_cache=True).past_key_values
        with sw.skip(model, [1]):
            with pytest.raises(UserError, match="past_key_values holds 4 layers"):
                model(ids[:, :1], past_key_values=past)
            inside = model(ids, use_cache=True).past_key_values
            model(ids[:, :1], past_key_values=inside)


SHAPE = ModelShape(architecture="A", stacks={"blocks": 8}, hidden_size=4)
TWO = ModelShape(architecture="A", stacks={"blocks": 8, "singles": 9}, hidden_size=4)


@pytest.mark.parametrize("numbers", [[3, 4], (4, 3), {3, 4}, range(3, 5), torch.tensor([3, 4]), [3, 3, 4]])
def test_plans_by_number(numbers: Any) -> None:
    expected = Plan.static(SHAPE, {"blocks": [3, 4]})
    assert Plan.of(SHAPE, numbers) == Plan.of(SHAPE, {"blocks": numbers}) == Plan.of(SHAPE, expected) == expected


@pytest.mark.parametrize(
    ("shape", "numbers", "message"),
    [
        (TWO, [3], "which stack"),
        (SHAPE, {"block": [3]}, "Did you mean 'blocks'"),
        (SHAPE, [8], "blocks 0 to 7"),
        (SHAPE, [-1], "blocks 0 to 7"),
        (SHAPE, [1.5], "whole numbers"),
        (SHAPE, [True], "numbers of those to skip"),
        (SHAPE, "3,4", "is text"),
        (SHAPE, 3, "whole numbers"),
        (SHAPE, [None], "whole numbers"),
        (SHAPE, torch.tensor([False, True]), "numbers of those to skip"),
        (SHAPE, (flag for flag in (True, False)), "numbers of those to skip"),
    ],
)
def test_numbers_that_cannot_be(shape: ModelShape, numbers: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        Plan.of(shape, numbers)
    assert "\n" not in str(error.value)


def test_hints_that_the_config_gives_to_blocks_by_number_are_refused() -> None:
    """Wan VACE's own blocks make a hint each, for those blocks of the other stack that the config names."""
    model = diffusers.WanVACETransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=32, num_layers=4, vace_layers=[0, 2], vace_in_channels=8,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 4, 1, 4, 4),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 5, 16),
        "control_hidden_states": torch.randn(1, 8, 1, 4, 4),
    }
    with pytest.raises(UserError, match=r"vace_blocks: its blocks also return something"):
        sw.find_contract(model, inputs)
