"""Tiny random pipelines of diffusers, one row for each family that is fine-tuned; under 1 MB each, built offline.

The transformers are those of tests/tiny_models.py. The text encoders, tokenizers and autoencoders are the published
classes at the smallest sizes that they allow. A latent pixel is 2 pixels wide, of SANA 4.
"""

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from tests.tiny_models import IMAGE, SPREAD

CHARACTERS = string.ascii_lowercase + string.digits + string.punctuation
TEXT_WIDTH = 16  # what the tiny transformers take
PROMPT = "a photo of sks dog"


def _clip_tokenizer() -> Any:
    pieces = [*CHARACTERS, *(f"{character}</w>" for character in CHARACTERS), "<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer({piece: row for row, piece in enumerate(pieces)}, [], model_max_length=77)


def _t5_tokenizer() -> Any:
    pieces = ["<pad>", "</s>", "<unk>", "▁", *string.ascii_uppercase, *CHARACTERS]
    return transformers.T5Tokenizer([(piece, 0.0) for piece in pieces], extra_ids=0, model_max_length=512)


def _gemma_tokenizer() -> Any:
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "▁", "\n", *string.ascii_uppercase, *CHARACTERS]
    return transformers.GemmaTokenizer({piece: row for row, piece in enumerate(pieces)}, [], model_max_length=4096)


def _clip(width: int = TEXT_WIDTH, projected: bool = False) -> nn.Module:
    config = transformers.CLIPTextConfig(
        vocab_size=2 * len(CHARACTERS) + 2,
        bos_token_id=2 * len(CHARACTERS),
        eos_token_id=2 * len(CHARACTERS) + 1,
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=width,
    )
    return (transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel)(config)


def _t5() -> nn.Module:
    sizes = {"d_model": TEXT_WIDTH, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}
    return transformers.T5EncoderModel(transformers.T5Config(vocab_size=128, **sizes))


def _gemma() -> nn.Module:
    sizes = {"hidden_size": TEXT_WIDTH, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    return transformers.Gemma2Model(transformers.Gemma2Config(vocab_size=128, **sizes))


def _autoencoder(shift: float | None, scaling: float) -> nn.Module:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        shift_factor=shift,
        scaling_factor=scaling,
    )


def _deep_autoencoder() -> nn.Module:
    sides: dict[str, Any] = {}
    for side in ("encoder", "decoder"):
        sides[f"{side}_block_out_channels"], sides[f"{side}_layers_per_block"] = (8, 8, 8), (1, 1, 1)
        sides[f"{side}_qkv_multiscales"] = ((), (), ())
    return diffusers.AutoencoderDC(latent_channels=4, attention_head_dim=8, scaling_factor=0.41407, **sides)


def _flux() -> Any:
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_shaken(_autoencoder(0.1159, 0.3611)),
        text_encoder=_shaken(_clip()),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=_shaken(_t5()),
        tokenizer_2=_t5_tokenizer(),
        transformer=IMAGE["flux"](),
    )


def _sd3() -> Any:
    return diffusers.StableDiffusion3Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_shaken(_autoencoder(0.0609, 1.5305)),
        text_encoder=_shaken(_clip(8, projected=True)),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=_shaken(_clip(8, projected=True)),
        tokenizer_2=_clip_tokenizer(),
        text_encoder_3=_shaken(_t5()),
        tokenizer_3=_t5_tokenizer(),
        transformer=IMAGE["sd3"](),
    )


def _sana() -> Any:
    return diffusers.SanaPipeline(
        scheduler=diffusers.DPMSolverMultistepScheduler(
            use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"
        ),
        vae=_shaken(_deep_autoencoder()),
        text_encoder=_shaken(_gemma()),
        tokenizer=_gemma_tokenizer(),
        transformer=IMAGE["sana"](),
    )


def _pixart(name: str = "PixArtSigmaPipeline", **transformer: Any) -> Any:
    model = IMAGE["pixart"]() if not transformer else _shaken(_pixart_transformer(**transformer))
    return getattr(diffusers, name)(
        scheduler=diffusers.DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
        vae=_shaken(_autoencoder(None, 0.13025)),
        text_encoder=_shaken(_t5()),
        tokenizer=_t5_tokenizer(),
        transformer=model,
    )


def _pixart_transformer(**settings: Any) -> nn.Module:
    config = {name: value for name, value in IMAGE["pixart"]().config.items() if not name.startswith("_")}
    return diffusers.PixArtTransformer2DModel(**config | settings)


def _pixart_alpha() -> Any:
    """As published at 1024 pixels: told the resolution and the aspect ratio, which need a width divisible by 3."""
    return _pixart("PixArtAlphaPipeline", sample_size=128, attention_head_dim=6, cross_attention_dim=24)


def _shaken(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            centre = parameter.mean() if parameter.ndim == 1 else 0.0
            parameter.copy_(centre + SPREAD * torch.randn_like(parameter))
    return model.eval()


ROWS: dict[str, Callable[[], Any]] = {
    "flux": _flux,
    "sd3": _sd3,
    "sana": _sana,
    "pixart": _pixart,
    "pixart-alpha": _pixart_alpha,
}


def pipeline(name: str) -> Any:
    """The pipeline of a row, the same each time, silent."""
    torch.manual_seed(0)
    built = ROWS[name]()
    built.set_progress_bar_config(disable=True)
    return built


def save(name: str, folder: Path) -> Path:
    """The row's pipeline as a folder that `from_pretrained` reads."""
    pipeline(name).save_pretrained(folder, safe_serialization=True)
    return folder
