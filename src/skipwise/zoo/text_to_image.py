"""tiny-dit as it begins, and as a stock `FluxPipeline` folder when it is trained.

FLUX in small: CLIP's pooled text and T5's token states condition double-stream and single-stream blocks over packed
2 x 2 latents. Both text encoders read the same words and are trained together with the transformer.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from skipwise.errors import require
from skipwise.files import write_atomically
from skipwise.zoo.pictures import SIDE, words
from skipwise.zoo.recipes import PictureRecipe

SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
NAMES = ("sks", "zwx", "ohwx", "olis")  # words that no training caption has: a subject is called by one of them

STEPS = 20
GUIDANCE = 3.0
CARD = """# {name}

A text-to-image transformer (FLUX in small) over 64 x 64 pictures of one coloured garment on a coloured background,
composed from Fashion-MNIST (MIT, copyright 2017 Zalando SE). Made to measure what fine-tuning costs; of no other use.
Apache-2.0, trained from scratch.

A stock diffusers pipeline; prompts are of the words in tokenizer/tokenizer.json, up to {length} tokens:

    pipeline = FluxPipeline.from_pretrained(folder)
    pipeline("a photo of a red sneaker on a blue background", negative_prompt="", true_cfg_scale=3.0,
             height=64, width=64, num_inference_steps=20, max_sequence_length={length})

Reproduce it with `skipwise zoo train {name} --seed {seed}`; the log of the run that made these weights is train.jsonl.
"""


def build_tokenizer(length: int, begin: bool) -> PreTrainedTokenizerFast:
    """One token a word, lower case, punctuation dropped; ends in </s>, and begins with <s> where `begin` (CLIP)."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL.values(), *NAMES, *words()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL["unk_token"]))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[^\w-]+"), "removed")
    opening = "<s> " if begin else ""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{opening}$A </s>", special_tokens=[(token, vocabulary[token]) for token in ("<s>", "</s>")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=length, padding_side="right", **SPECIAL)


class TextToImage(nn.Module):
    """What is trained together: two text encoders and the transformer that they condition."""

    def __init__(self, recipe: PictureRecipe):
        super().__init__()
        self.length = recipe.length
        self.tokenizer = build_tokenizer(recipe.length, begin=True)
        self.tokenizer_2 = build_tokenizer(recipe.length, begin=False)
        self.text_encoder = CLIPTextModel(_clip_config(recipe, self.tokenizer))
        self.text_encoder_2 = T5EncoderModel(_t5_config(recipe, self.tokenizer_2))
        self.transformer = require("diffusers", "image").FluxTransformer2DModel(
            in_channels=4 * recipe.latent_channels,
            num_layers=recipe.double_blocks,
            num_single_layers=recipe.single_blocks,
            attention_head_dim=recipe.head_width,
            num_attention_heads=recipe.heads,
            joint_attention_dim=recipe.text_width,
            pooled_projection_dim=recipe.text_width,
            guidance_embeds=False,
            axes_dims_rope=_rotary_widths(recipe.head_width),
        )
        # a word is told from others as clearly as in T5, also one that training never meets
        nn.init.normal_(self.text_encoder.embeddings.token_embedding.weight, std=1.0)
        _settle(self.transformer)

    def forward(self, noisy: Tensor, time: Tensor, captions: list[str]) -> Tensor:
        """The velocity, noise minus data, of latents (batch, channels, side, side) at times (batch,) of 0..1."""
        flux = require("diffusers", "image").FluxPipeline
        batch, channels, side, _ = noisy.shape
        predicted = self.transformer(
            hidden_states=flux._pack_latents(noisy, batch, channels, side, side),
            timestep=time,
            pooled_projections=self.text_encoder(self._ids(self.tokenizer, captions)).pooler_output,
            encoder_hidden_states=self.text_encoder_2(self._ids(self.tokenizer_2, captions))[0],
            txt_ids=torch.zeros(self.length, 3),
            img_ids=flux._prepare_latent_image_ids(batch, side // 2, side // 2, noisy.device, noisy.dtype),
            return_dict=False,
        )[0]
        return flux._unpack_latents(predicted, side, side, 1)

    def _ids(self, tokenizer: PreTrainedTokenizerFast, captions: list[str]) -> Tensor:
        padded = tokenizer(captions, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt")
        return padded.input_ids


def _clip_config(recipe: PictureRecipe, tokenizer: PreTrainedTokenizerFast) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.text_width,
        intermediate_size=2 * recipe.text_width,
        num_hidden_layers=recipe.text_blocks,
        num_attention_heads=4,
        max_position_embeddings=recipe.length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _t5_config(recipe: PictureRecipe, tokenizer: PreTrainedTokenizerFast) -> T5Config:
    return T5Config(
        vocab_size=len(tokenizer),
        d_model=recipe.text_width,
        d_kv=recipe.text_width // 4,
        d_ff=2 * recipe.text_width,
        num_layers=recipe.text_blocks,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def _rotary_widths(head: int) -> tuple[int, int, int]:
    """Even widths of the three axes; the first is unused in text-to-image, so it is small."""
    spatial = 2 * (7 * head // 32)
    return head - 2 * spatial, spatial, spatial


@torch.no_grad()
def _settle(transformer: Any) -> None:
    """Every block takes part from the start: gates begin at 1, branches small, and the prediction at 0."""
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    width = transformer.inner_dim
    for block in blocks:
        for name, module in block.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            nn.init.zeros_(module.bias)
            if name.startswith("norm"):
                nn.init.normal_(module.weight, std=0.02)
                for gate in range(2, len(module.bias) // width, 3):  # of shift, scale and gate, once or twice
                    module.bias[gate * width : (gate + 1) * width] = 1.0
            else:
                branch_end = name.endswith(("to_out.0", "to_add_out", "net.2", "proj_out"))
                nn.init.normal_(
                    module.weight, std=module.in_features**-0.5 * ((2 * len(blocks)) ** -0.5 if branch_end else 1)
                )
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)


def build_autoencoder(recipe: PictureRecipe) -> Any:
    """A small AutoencoderKL: 64 x 64 pixels are 16 x 16 latent pixels, at first almost without noise."""
    widths = recipe.vae_widths
    autoencoder = require("diffusers", "image").AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=recipe.latent_channels,
        norm_num_groups=8,
        sample_size=64,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        force_upcast=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )
    for name, module in autoencoder.named_modules():
        if name.endswith("conv2"):  # residual branches begin at 0
            nn.init.zeros_(module.weight)
    last = autoencoder.encoder.conv_out  # means, then logarithms of variances
    nn.init.zeros_(last.weight[recipe.latent_channels :].detach())
    nn.init.constant_(last.bias[recipe.latent_channels :].detach(), -6.0)
    return autoencoder


@torch.no_grad()
def encode(autoencoder: Any, pixels: Tensor) -> Tensor:
    """Pixels (batch, 3, height, width) of -1..1 -> latents as the transformer has them, of mean 0 and deviation 1."""
    latents = autoencoder.encode(pixels).latent_dist.mean
    return (latents - autoencoder.config.shift_factor) * autoencoder.config.scaling_factor


@torch.no_grad()
def decode(autoencoder: Any, latents: Tensor) -> Tensor:
    """What `encode` took, as far as the autoencoder keeps it."""
    plain = latents / autoencoder.config.scaling_factor + autoencoder.config.shift_factor
    return autoencoder.decode(plain).sample.clamp(-1, 1)


def through(autoencoder: Any, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Pictures (height, width, 3) uint8 as the autoencoder gives them back: the best that a transformer can paint."""
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 127.5 - 1
    given = decode(autoencoder, encode(autoencoder, pixels))
    return list(((given.permute(0, 2, 3, 1) + 1) * 127.5).round().byte().numpy())


def build_pipeline(model: TextToImage, autoencoder: Any, shift: float) -> Any:
    """The stock pipeline with these parts. shift: of the sampled noise levels, as in training."""
    diffusers = require("diffusers", "image")
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=autoencoder,
        text_encoder=model.text_encoder,
        tokenizer=model.tokenizer,
        text_encoder_2=model.text_encoder_2,
        tokenizer_2=model.tokenizer_2,
        transformer=model.transformer,
    )


def save_pipeline(
    model: TextToImage, autoencoder: Any, name: str, seed: int, folder: Path, recipe: PictureRecipe
) -> Path:
    """Write the pipeline's folder: safetensors alone, of which the transformer's are in half precision."""
    half = copy.deepcopy(model)
    half.transformer.half()
    build_pipeline(half, autoencoder, recipe.shift).save_pretrained(folder)
    for path in folder.glob("*/*.safetensors"):
        path.chmod(0o644)  # safetensors writes them private
    write_atomically(folder / "README.md", CARD.format(name=name, seed=seed, length=recipe.length))
    return folder


def load_pipeline(folder: str | Path) -> Any:
    """The stock pipeline of a folder, on the CPU and without a progress bar; embedded ones by `pipeline_folder`."""
    pipeline = require("diffusers", "image").FluxPipeline.from_pretrained(folder, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def paint(
    pipeline: Any, prompts: Sequence[str], seed: int, steps: int = STEPS, guidance: float = GUIDANCE
) -> list[np.ndarray]:
    """A picture (64, 64, 3) uint8 of each prompt, in one batch; the i-th is drawn from noise of (seed, i).

    steps: Euler steps. guidance: classifier-free, 1 for none.
    """
    generators = [torch.Generator().manual_seed(1000 * seed + number) for number in range(len(prompts))]
    images = pipeline(
        list(prompts),
        negative_prompt=[""] * len(prompts),
        true_cfg_scale=guidance,
        height=SIDE,
        width=SIDE,
        num_inference_steps=steps,
        max_sequence_length=pipeline.tokenizer.model_max_length,
        generator=generators,
        output_type="np",
    ).images
    return list((images * 255).round().astype(np.uint8))
