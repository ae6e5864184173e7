"""What differs between FLUX, SD3, SANA and PixArt when they are fine-tuned, read off diffusers' pipelines.

FLUX    velocity   t uniform                            place: rotary ids, kept or begun anew
SD3     velocity   t logit-normal, scheduler's shift    place: none; the model cuts the centre of its table
SANA    velocity   t uniform                            place: none; the model has no positions
PixArt  noise      t uniform over the 1000 DDPM steps   place: none; the model stretches its table over any crop
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from skipwise.errors import UserError, require, unknown
from skipwise.finetuning.family import Family, Text, over
from skipwise.finetuning.patches import Place
from skipwise.prompts import token_positions


class Flux(Family):
    """FLUX.1: a token is 2 x 2 latent pixels, packed by the pipeline; rotary positions; guidance is an input."""

    name = "FLUX"
    transformer = "FluxTransformer2DModel"
    pipelines = ("FluxPipeline",)
    text: ClassVar = {"encoder_hidden_states": 0, "pooled_projections": 1}
    guidance = 3.5
    can_place = True
    latents_a_channel = 4

    def inputs(
        self, transformer: nn.Module, noisy: Tensor, t: Tensor, text: Text, place: Place | None = None
    ) -> dict[str, Any]:
        """As of every family, with the positions (tokens, 3) of text and image."""
        kwargs = super().inputs(transformer, noisy, t, text, place)
        batch, channels, height, width = noisy.shape
        pack = require("diffusers", "image").FluxPipeline
        kwargs["hidden_states"] = pack._pack_latents(kwargs["hidden_states"], batch, channels, height, width)
        ids = pack._prepare_latent_image_ids(batch, height // 2, width // 2, noisy.device, torch.float32)
        if place is not None:
            ids = ids * place.step + ids.new_tensor([0, place.top, place.left])
        kwargs["img_ids"] = ids
        kwargs["txt_ids"] = ids.new_zeros(kwargs["encoder_hidden_states"].shape[1], 3)
        if self.takes_guidance(transformer):
            kwargs["guidance"] = ids.new_full((batch,), self.guidance)
        return kwargs

    def timestep(self, t: Tensor) -> Tensor:
        """The model multiplies by 1000 itself."""
        return t

    def prediction(self, output: Any, latents: Tensor) -> Tensor:
        """Unpacked."""
        pack = require("diffusers", "image").FluxPipeline
        return pack._unpack_latents(output[0], *latents.shape[-2:], 1)

    def multiple(self, transformer: nn.Module) -> int:
        """Of the packing; the config's patch size is 1."""
        return 2 * self.scale

    def takes_guidance(self, transformer: nn.Module) -> bool:
        """FLUX.1-dev does, schnell does not."""
        config: Any = transformer.config
        return bool(config.guidance_embeds)

    def _tokenizer(self, pipeline: Any) -> Any:
        return pipeline.tokenizer_2


class SD3(Family):
    """Stable Diffusion 3 and 3.5."""

    name = "SD3"
    transformer = "SD3Transformer2DModel"
    pipelines = ("StableDiffusion3Pipeline",)
    text: ClassVar = {"encoder_hidden_states": 0, "pooled_projections": 2}
    default_shift = 3.0
    optional = (*Family.optional, "text_encoder_3", "tokenizer_3")  # T5: zeros stand in for it
    clip_tokens = 77

    def subject_positions(self, pipeline: Any, prompt: str, token: str, length: int | None = None) -> tuple[int, ...]:
        """In both parts of the stream: that of CLIP and, if the pipeline has it, that of T5."""
        clip = token_positions(pipeline.tokenizer, prompt, token, max_length=self.clip_tokens)
        if pipeline.tokenizer_3 is None:
            return clip
        length = length or self.call_default("max_sequence_length")
        return clip + token_positions(pipeline.tokenizer_3, prompt, token, max_length=length, offset=self.clip_tokens)

    def _density(self, batch: int, generator: torch.Generator) -> Tensor:
        return torch.randn(batch, generator=generator, device=generator.device).sigmoid()

    def weight(self, t: Tensor) -> Tensor:
        """t^2: the script's default is the error of the clean latents, noisy - t * velocity."""
        return t.square()


class Sana(Family):
    """SANA 1.0 and 1.5. Their scheduler's `flow_shift` is of generation; diffusers' script trains without."""

    name = "SANA"
    transformer = "SanaTransformer2DModel"
    pipelines = ("SanaPipeline",)
    text: ClassVar = {"encoder_hidden_states": 0, "encoder_attention_mask": 1}
    default_scale = 32
    lowers_prompts = True

    def check_transformer(self, transformer: nn.Module, latent_channels: int | None = None) -> None:
        """As of every family; SANA-Sprint's, which is told a guidance scale, is refused."""
        super().check_transformer(transformer, latent_channels)
        config: Any = transformer.config
        if config.get("guidance_embeds"):
            raise UserError("This is SANA-Sprint, distilled for few steps, which the training would undo; give SANA.")

    def _prefix(self) -> dict[str, Any]:
        return {"prefix": "\n".join(self.call_default("complex_human_instruction"))}

    def inputs(
        self, transformer: nn.Module, noisy: Tensor, t: Tensor, text: Text, place: Place | None = None
    ) -> dict[str, Any]:
        """As of every family, with the config's own scale of time."""
        kwargs = super().inputs(transformer, noisy, t, text, place)
        config: Any = transformer.config
        return kwargs | {"timestep": kwargs["timestep"] * config.timestep_scale}


class PixArt(Family):
    """PixArt-alpha and -Sigma: a DDPM in 1000 steps that predicts the noise; step i stands at t = (i + 1/2) / 1000.

    The variance that it predicts as well is left as it is, without a loss.
    """

    name = "PixArt"
    transformer = "PixArtTransformer2DModel"
    pipelines = ("PixArtSigmaPipeline", "PixArtAlphaPipeline")
    text: ClassVar = {"encoder_hidden_states": 0, "encoder_attention_mask": 1}
    lowers_prompts = True

    def __init__(
        self, scheduler: Mapping[str, Any] | None = None, scale: int | None = None, pipeline: str | None = None
    ):
        super().__init__(scheduler, scale, pipeline)
        # beta 0.0001 to 0.02, linear, unless the pipeline says otherwise
        ddpm = require("diffusers", "image").DDPMScheduler.from_config(dict(scheduler or {}))
        if ddpm.config.prediction_type != "epsilon":
            raise UserError(f"PixArt predicts the noise, not {ddpm.config.prediction_type!r}; use another scheduler.")
        self.signal: Tensor = ddpm.alphas_cumprod  # (steps,)

    def sample_t(self, batch: int, generator: torch.Generator) -> Tensor:
        """Uniform over the steps."""
        return (self.timestep(self._density(batch, generator)) + 0.5) / self.steps

    def timestep(self, t: Tensor) -> Tensor:
        """(batch,) the DDPM step, an integer."""
        return (t * self.steps).long().clamp(0, self.steps - 1)

    def noisy(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """sqrt(a) * latents + sqrt(1 - a) * noise, with the step's share of signal a."""
        signal = over(self.signal.to(t.device)[self.timestep(t)], latents)
        return signal.sqrt() * latents + (1 - signal).sqrt() * noise

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The noise."""
        return noise

    def inputs(
        self, transformer: nn.Module, noisy: Tensor, t: Tensor, text: Text, place: Place | None = None
    ) -> dict[str, Any]:
        """As of every family; models that are told the picture's size are told the crop's, in pixels."""
        kwargs = super().inputs(transformer, noisy, t, text, place)
        conditions: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
        if transformer.use_additional_conditions:
            height, width = (side * self.scale for side in noisy.shape[-2:])
            rows = kwargs["hidden_states"].new_ones(len(noisy), 1)
            conditions = {
                "resolution": rows * rows.new_tensor([height, width]),
                "aspect_ratio": rows * (height / width),
            }
        return kwargs | {"added_cond_kwargs": conditions}


FAMILIES: tuple[type[Family], ...] = (Flux, SD3, Sana, PixArt)


def family_of(source: Any) -> Family:
    """The family of a loaded pipeline, which brings its scheduler's settings; others get those that are usual.

    source: a diffusers pipeline or transformer, the dictionary of a model_index.json or of a transformer's config.json,
    or a class name. Raises UserError, with the list, for all others.
    """
    names = _class_names(source)
    for family in FAMILIES:
        if {family.transformer, *family.pipelines} & set(names):
            scheduler = getattr(source, "scheduler", None)
            pipeline = next((name for name in family.pipelines if name in names), None)
            return family(getattr(scheduler, "config", None), getattr(source, "vae_scale_factor", None), pipeline)
    raise unknown("pipeline for fine-tuning", names[0], (name for family in FAMILIES for name in family.pipelines))


def _class_names(source: Any) -> list[str]:
    if isinstance(source, str):
        return [source]
    if isinstance(source, Mapping):
        return [str(source.get("_class_name"))]
    return [cls.__name__ for cls in type(source).__mro__]
