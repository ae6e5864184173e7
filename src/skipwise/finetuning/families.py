"""What differs between FLUX, SD3, SANA and PixArt when they are fine-tuned, read off diffusers' pipelines.

A family knows how its pipeline encodes prompts and pictures, what one forward of its transformer takes and gives, and
what it learns to predict. It copies no forward: it calls the pipeline's own functions. Losses and densities are those
of diffusers' training scripts by default. The noise level t is 0 for the clean latents and 1 for noise.

    FLUX    velocity   t uniform                            place: rotary ids, kept or begun anew
    SD3     velocity   t logit-normal, scheduler's shift    place: none; the model cuts the centre of its table
    SANA    velocity   t uniform                            place: none; the model has no positions
    PixArt  noise      t uniform over the 1000 DDPM steps   place: none; the model stretches its table over any crop
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from skipwise.errors import UserError, require, unknown
from skipwise.finetuning.patches import Place

Text = dict[str, Tensor]  # arguments of the transformer that come from the prompt, each (prompts, ...)

# what a pipeline's call hands on to its encode_prompt: as set there, so that training reads prompts as generation does
PROMPT_SETTINGS = ("max_sequence_length", "clean_caption", "complex_human_instruction")


class Family:
    """One family: a model that predicts the velocity noise - latents of latents (1 - t) * latents + t * noise.

    scheduler: the config of the pipeline's scheduler. scale: pixels a latent pixel.
    """

    name: ClassVar[str]
    transformer: ClassVar[str]  # class names of diffusers
    pipelines: ClassVar[tuple[str, ...]]
    text: ClassVar[Mapping[str, int]]  # argument of the transformer -> which result of encode_prompt
    default_shift: ClassVar[float] = 1.0
    default_scale: ClassVar[int] = 8
    guidance: float | None = None  # that a distilled model is told in training; diffusers' scripts' default
    can_place: ClassVar[bool] = False  # whether a crop can keep its place in the picture

    def __init__(self, scheduler: Mapping[str, Any] | None = None, scale: int | None = None):
        scheduler = scheduler or {}
        self.scale = scale or self.default_scale
        self.steps = int(scheduler.get("num_train_timesteps", 1000))
        dynamic = scheduler.get("use_dynamic_shifting", False)  # by resolution, in generation only
        self.shift = 1.0 if dynamic else float(scheduler.get("shift", self.default_shift))

    # --- what is computed once -------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_prompts(self, pipeline: Any, prompts: Sequence[str], max_length: int | None = None) -> Text:
        """The text arguments, one row a prompt, on the pipeline's device and in its text encoders' dtype.

        max_length: tokens of the longest text encoder, by default what the pipeline generates with.
        """
        call, encode = (inspect.signature(f).parameters for f in (pipeline.__call__, pipeline.encode_prompt))
        settings = {name: call[name].default for name in PROMPT_SETTINGS if name in call and name in encode}
        settings |= {name: None for name in ("prompt_2", "prompt_3") if name in encode}
        if "do_classifier_free_guidance" in encode:
            settings["do_classifier_free_guidance"] = False
        if max_length is not None:
            settings["max_sequence_length"] = max_length
        results = pipeline.encode_prompt(list(prompts), **settings)
        return {argument: results[place] for argument, place in self.text.items()}

    @torch.no_grad()
    def encode_pixels(self, pipeline: Any, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Pixels (batch, 3, height, width) in [-1, 1] -> float32 latents, normalised as the pipeline's decoding undoes.

        Without a generator the mode of the autoencoder's distribution, otherwise a sample of it.
        """
        vae = pipeline.vae
        encoded = vae.encode(pixels.to(vae.device, vae.dtype))
        if not hasattr(encoded, "latent_dist"):  # deterministic autoencoders
            latents = encoded.latent
        elif generator is None:
            latents = encoded.latent_dist.mode()
        else:
            latents = encoded.latent_dist.sample(generator)
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        return (latents.float() - shift) * vae.config.scaling_factor

    # --- the objective ---------------------------------------------------------------------------------------------

    def sample_t(self, batch: int, generator: torch.Generator) -> Tensor:
        """(batch,) noise levels in (0, 1), on the generator's device, drawn as diffusers' training script does."""
        u = self._density(batch, generator)
        return self.shift * u / (1 + (self.shift - 1) * u)

    def _density(self, batch: int, generator: torch.Generator) -> Tensor:
        return torch.rand(batch, generator=generator, device=generator.device)

    def weight(self, t: Tensor) -> Tensor:
        """(batch,) weight of each draw in the loss."""
        return torch.ones_like(t)

    def noisy(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The latents at noise levels t (batch,), shaped as they are."""
        level = _over(t, latents)
        return (1 - level) * latents + level * noise

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the model shall predict, shaped as the latents."""
        return noise - latents

    def loss(self, prediction: Tensor, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """(batch,) weighted mean squared errors, in float32."""
        error = prediction.float() - self.target(latents, noise, t).float()
        return self.weight(t).to(error) * error.square().flatten(1).mean(1)

    # --- one forward -----------------------------------------------------------------------------------------------

    def inputs(
        self, transformer: nn.Module, noisy: Tensor, t: Tensor, text: Text, place: Place | None = None
    ) -> dict[str, Any]:
        """Keyword arguments of one forward: latents (batch, channels, height, width), t (batch,), a text row each.

        place: where the crop lies in its picture, the same for the whole batch; None begins anew at the corner. Floats
        take the transformer's dtype, all go where the latents are. Raises UserError where a place cannot be told.
        """
        if place is not None and not self.can_place:
            raise UserError(f"{self.name} cannot be told where a crop lies in its picture; use place 'restart'.")
        dtype = _dtype(transformer)
        tensors = {"hidden_states": noisy, **text}
        moved = {
            name: tensor.to(noisy.device, dtype if tensor.is_floating_point() else None)
            for name, tensor in tensors.items()
        }
        return moved | {"timestep": self.timestep(t).to(noisy.device)}

    def timestep(self, t: Tensor) -> Tensor:
        """The noise level as the transformer is told it."""
        return t * self.steps

    def prediction(self, output: Any, latents: Tensor) -> Tensor:
        """What a forward put out, without a learned variance, shaped as the latents."""
        sample = output[0]
        return sample.chunk(2, dim=1)[0] if sample.shape[1] == 2 * latents.shape[1] else sample

    def multiple(self, transformer: nn.Module) -> int:
        """Sides of pictures in pixels must be multiples of this."""
        config: Any = transformer.config
        return self.scale * int(config.patch_size)

    def check_resolution(self, transformer: nn.Module, resolution: int) -> None:
        """Raise UserError for a training resolution, in pixels, that is no multiple of what a token spans."""
        multiple = self.multiple(transformer)
        if resolution < multiple or resolution % multiple:
            near = max(round(resolution / multiple), 1) * multiple
            raise UserError(
                f"Resolution {resolution} does not suit {self.name}; take a multiple of {multiple}: {near}."
            )


class Flux(Family):
    """FLUX.1: a token is 2 x 2 latent pixels, packed by the pipeline; rotary positions; guidance is an input."""

    name = "FLUX"
    transformer = "FluxTransformer2DModel"
    pipelines = ("FluxPipeline",)
    text: ClassVar = {"encoder_hidden_states": 0, "pooled_projections": 1}
    guidance = 3.5
    can_place = True

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
        config: Any = transformer.config
        if config.guidance_embeds:
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


class SD3(Family):
    """Stable Diffusion 3 and 3.5."""

    name = "SD3"
    transformer = "SD3Transformer2DModel"
    pipelines = ("StableDiffusion3Pipeline",)
    text: ClassVar = {"encoder_hidden_states": 0, "pooled_projections": 2}
    default_shift = 3.0

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

    def __init__(self, scheduler: Mapping[str, Any] | None = None, scale: int | None = None):
        super().__init__(scheduler, scale)
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
        signal = _over(self.signal.to(t.device)[self.timestep(t)], latents)
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
            return family(getattr(scheduler, "config", None), getattr(source, "vae_scale_factor", None))
    raise unknown("pipeline for fine-tuning", names[0], (name for family in FAMILIES for name in family.pipelines))


def _class_names(source: Any) -> list[str]:
    if isinstance(source, str):
        return [source]
    if isinstance(source, Mapping):
        return [str(source.get("_class_name"))]
    return [cls.__name__ for cls in type(source).__mro__]


def _dtype(model: nn.Module) -> torch.dtype:
    """Of the base weights: adapters, which come later, may be held more precisely."""
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())


def _over(t: Tensor, latents: Tensor) -> Tensor:
    """t (batch,), to be multiplied with latents (batch, ...)."""
    return t.to(latents).reshape(-1, *[1] * (latents.ndim - 1))
