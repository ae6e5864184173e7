"""Example inputs of diffusers' transformers, from their signatures and configs."""

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from skipwise.blocks import find_contract
from skipwise.cli import main
from skipwise.cost import price_blocks
from skipwise.errors import UserError
from skipwise.examples import ROWS, Size, example_inputs
from skipwise.loading import build_skeleton
from tests.survey.shrinking_diffusers import tiny_settings
from tests.tiny_models import IMAGE, REFUSED, VIDEO

SIZE = Size(image=10, text=9, frames=3, batch=2)

# what the published configs' classes are given at this size, as their stock pipelines give it: shapes by name
GIVEN: dict[str, dict[str, Any]] = {
    "flux": {
        "hidden_states": (2, 25, 16),
        "encoder_hidden_states": (2, 9, 16),
        "timestep": (2,),
        "guidance": (2,),
        "pooled_projections": (2, 16),
        "img_ids": (25, 3),
        "txt_ids": (9, 3),
    },
    "flux2": {
        "hidden_states": (2, 25, 16),
        "encoder_hidden_states": (2, 9, 16),
        "timestep": (2,),
        "guidance": (2,),
        "img_ids": (25, 4),
        "txt_ids": (9, 4),
    },
    "sd3": {
        "hidden_states": (2, 4, 10, 10),
        "encoder_hidden_states": (2, 9, 16),
        "timestep": (2,),
        "pooled_projections": (2, 16),
    },
    "sana": {"hidden_states": (2, 4, 10, 10), "encoder_hidden_states": (2, 9, 16), "timestep": (2,)},
    "pixart": {"hidden_states": (2, 4, 10, 10), "encoder_hidden_states": (2, 9, 16), "timestep": (2,)},
    "dit": {"hidden_states": (2, 4, 10, 10), "timestep": (2,), "class_labels": (2,)},
    "qwen_image": {
        "hidden_states": (2, 25, 16),
        "encoder_hidden_states": (2, 9, 16),
        "timestep": (2,),
        "img_shapes": [[(1, 5, 5)], [(1, 5, 5)]],
    },
    "cogview4": {
        "hidden_states": (2, 4, 10, 10),
        "encoder_hidden_states": (2, 9, 16),
        "timestep": (2,),
        "original_size": (2, 2),
        "target_size": (2, 2),
        "crop_coords": (2, 2),
    },
    "lumina2": {
        "hidden_states": (2, 4, 10, 10),
        "encoder_hidden_states": (2, 9, 16),
        "timestep": (2,),
        "encoder_attention_mask": (2, 9),
    },
    "wan": {"hidden_states": (2, 4, 3, 10, 10), "encoder_hidden_states": (2, 9, 16), "timestep": (2,)},
    "hunyuan_video": {
        "hidden_states": (2, 4, 3, 10, 10),
        "encoder_hidden_states": (2, 9, 16),
        "encoder_attention_mask": (2, 9),
        "pooled_projections": (2, 16),
        "timestep": (2,),
        "guidance": (2,),
    },
    "ltx": {
        "hidden_states": (2, 300, 4),
        "encoder_hidden_states": (2, 9, 16),
        "encoder_attention_mask": (2, 9),
        "num_frames": 3,
        "height": 10,
        "width": 10,
        "timestep": (2,),
    },
    "cogvideox": {
        "hidden_states": (2, 3, 4, 10, 10),
        "encoder_hidden_states": (2, 9, 16),
        "timestep": (2,),
        "image_rotary_emb": [(75, 8), (75, 8)],
    },
}


def shapes(inputs: dict[str, Any]) -> dict[str, Any]:
    def of(value: Any) -> Any:
        if isinstance(value, Tensor):
            return tuple(value.shape)
        tensors = isinstance(value, list | tuple) and isinstance(value[0], Tensor)
        return [tuple(each.shape) for each in value] if tensors else value

    return {name: of(value) for name, value in inputs.items()}


@pytest.mark.parametrize("name", GIVEN)
def test_what_models_are_given(name: str) -> None:
    model = (IMAGE | VIDEO)[name]()
    assert shapes(example_inputs(model, SIZE)) == GIVEN[name]
    with torch.no_grad():
        model(**example_inputs(model, SIZE))


def test_a_model_in_the_real_size_is_given_the_same_as_a_toy() -> None:
    skeleton = build_skeleton({"_class_name": "LongCatImageTransformer2DModel", "num_layers": 2}, "LongCat")
    given = shapes(example_inputs(skeleton, Size(image=64, text=100)))
    assert given["hidden_states"] == (1, 32 * 32, 64)
    assert given["encoder_hidden_states"] == (1, 100, 3584)
    assert "guidance" not in given


# one for each way to lay latents out, and for each thing that is found by trying
WAYS = [
    "AceStepTransformer1DModel",
    "AnyFlowTransformer3DModel",
    "EasyAnimateTransformer3DModel",
    "ErnieImageTransformer2DModel",
    "GlmImageTransformer2DModel",
    "HunyuanVideo15Transformer3DModel",
    "Kandinsky5Transformer3DModel",
    "Krea2Transformer2DModel",
    "LTX2VideoTransformer3DModel",
    "StableAudioDiTModel",
]


@pytest.mark.parametrize("name", WAYS)
def test_classes_without_a_row_can_be_priced(name: str) -> None:
    """Inputs, contract and prices are had from the class and its config alone, and twice as much text costs more."""
    assert name not in ROWS
    with torch.device("meta"):
        model: nn.Module = getattr(diffusers, name)(**tiny_settings(getattr(diffusers, name))).eval()
    assert find_contract(model).stacks
    assert all(parameter.is_meta for parameter in model.parameters())
    small, large = (price_blocks(model, Size(text=text)).forward().flops for text in (5, 10))
    assert 0 < small < large


@pytest.mark.parametrize("name", ["flux", "wan", "cogvideox"])
def test_inputs_are_deterministic_and_making_them_leaves_no_trace(name: str) -> None:
    model = (IMAGE | VIDEO)[name]()
    before = {key: (id(value), value.clone()) for key, value in model.state_dict(keep_vars=True).items()}
    state = torch.get_rng_state()
    first, second = example_inputs(model, SIZE), example_inputs(model, SIZE)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(first[key], second[key]) for key in first if isinstance(first[key], Tensor))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    for key, value in model.state_dict(keep_vars=True).items():
        assert before[key][0] == id(value)
        assert torch.equal(before[key][1], value)


def test_a_subclass_takes_what_its_parent_takes() -> None:
    class Mine(diffusers.FluxTransformer2DModel):
        pass

    model = IMAGE["flux"]()
    model.__class__ = Mine
    assert shapes(example_inputs(model, SIZE)) == GIVEN["flux"]


REFUSED_CONFIG = {"_class_name": "AnyFlowFARTransformer3DModel", "num_layers": 2}


def test_what_cannot_be_tried_out_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"its forward's argument `chunk_partition` is cannot be told") as refusal:
        example_inputs(build_skeleton(REFUSED_CONFIG, "far"))
    assert "\n" not in str(refusal.value)
    assert "`example`" in str(refusal.value)
    with pytest.raises(UserError, match="takes no `input_ids`, and it is no diffusers model"):
        example_inputs(nn.Linear(2, 2))


def test_a_model_that_does_not_run_on_its_example_is_refused_in_one_line() -> None:
    with pytest.raises(
        UserError, match=r"FluxTransformer2DModel cannot be tried out: it does not run on hidden_states"
    ):
        find_contract(IMAGE["flux"](), {"hidden_states": torch.zeros(1, 4, 16)})


def test_the_command_line_speaks_to_its_user(tmp_path: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    (tmp_path / "config.json").write_text(json.dumps(REFUSED_CONFIG))
    monkeypatch.setattr("sys.argv", ["skipwise", "inspect", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "the command line cannot be given any" in capsys.readouterr().err


def test_refused_stacks_still_have_inputs() -> None:
    given = shapes(example_inputs(REFUSED["hunyuan_dit"](), SIZE))
    assert given["encoder_hidden_states"] == (2, 4, 16)
    assert given["encoder_hidden_states_t5"] == (2, 5, 16)
