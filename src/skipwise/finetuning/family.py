"""What a fine-tuning asks of a family of models; `skipwise.finetuning.families` has those that there are.

A family knows how its pipeline encodes prompts and pictures, what one forward of its transformer takes and gives, and
what it learns to predict. It copies no forward: it calls the pipeline's own functions. Losses and densities are those
of diffusers' training scripts by default. The noise level t is 0 for the clean latents and 1 for noise.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from skipwise.errors import UserError, require
from skipwise.finetuning.patches import Place
from skipwise.prompts import token_positions

Text = dict[str, Tensor]  # arguments of the transformer that come from the prompt, each (prompts, ...)

# what a pipeline's call hands on to its encode_prompt: as set there, so that training reads prompts as generation does
PROMPT_SETTINGS = ("max_sequence_length", "clean_caption", "complex_human_instruction")


class Family:
    """One family: a model that predicts the velocity noise - latents of latents (1 - t) * latents + t * noise.

    scheduler: the config of the pipeline's scheduler. scale: pixels a latent pixel. pipeline: the class name of the
    pipeline, by default the family's first.
    """

    name: ClassVar[str]
    transformer: ClassVar[str]  # class names of diffusers
    pipelines: ClassVar[tuple[str, ...]]
    text: ClassVar[Mapping[str, int]]  # argument of the transformer -> which result of encode_prompt
    default_shift: ClassVar[float] = 1.0
    default_scale: ClassVar[int] = 8
    guidance: float | None = None  # that a distilled model is told in training; diffusers' scripts' default
    can_place: ClassVar[bool] = False  # whether a crop can keep its place in the picture
    latents_a_channel: ClassVar[int] = 1  # latent pixels that the transformer takes together
    optional: ClassVar[tuple[str, ...]] = ("image_encoder", "feature_extractor")  # components that may be null
    clip_tokens: ClassVar[int] = 0  # of CLIP, which come first in the text stream
    lowers_prompts: ClassVar[bool] = False  # before they are tokenized

    def __init__(
        self, scheduler: Mapping[str, Any] | None = None, scale: int | None = None, pipeline: str | None = None
    ):
        scheduler = scheduler or {}
        self.scale = scale or self.default_scale
        self.pipeline = pipeline or self.pipelines[0]
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

    def call_default(self, name: str) -> Any:
        """What the pipeline's call takes for an argument when nothing is said."""
        pipeline = getattr(require("diffusers", "image"), self.pipeline)
        return inspect.signature(pipeline.__call__).parameters[name].default

    def text_length(self, tokens: int | None = None) -> int:
        """Positions of the text stream. tokens: of the longest text encoder, by default what the pipeline pads to."""
        return self.clip_tokens + (tokens or self.call_default("max_sequence_length"))

    def subject_positions(self, pipeline: Any, prompt: str, token: str, length: int | None = None) -> tuple[int, ...]:
        """Where the subject's token is in the text stream that the pipeline makes of the prompt.

        length: tokens of the longest text encoder, by default what the pipeline generates with. Raises UserError when
        the token is not there or is cut off.
        """
        text = prompt.lower() if self.lowers_prompts else prompt
        settings: dict[str, Any] = {"max_length": length or self.call_default("max_sequence_length")}
        return token_positions(self._tokenizer(pipeline), text, token, **settings, **self._prefix())

    def _tokenizer(self, pipeline: Any) -> Any:
        return pipeline.tokenizer

    def _prefix(self) -> dict[str, Any]:
        return {}

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
        level = over(t, latents)
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
        config: Any = transformer.config
        most = multiple * (getattr(config, "pos_embed_max_size", None) or resolution)
        if resolution > most:
            raise UserError(f"Resolution {resolution} is more than this {self.name} has positions for; take {most}.")

    def check_transformer(self, transformer: nn.Module, latent_channels: int | None = None) -> None:
        """Raise UserError unless the transformer takes the latents of the autoencoder, the prompt and nothing else."""
        config: Any = transformer.config
        if type(transformer).__name__ != self.transformer:
            raise UserError(
                f"The transformer is a {type(transformer).__name__}, but {self.pipeline} denoises with a "
                f"{self.transformer}; give the pipeline as it was published."
            )
        wanted = (latent_channels or 0) * self.latents_a_channel
        if wanted and config.in_channels != wanted:
            raise UserError(
                f"This transformer takes {config.in_channels} input channels, where {self.name} makes {wanted} of its "
                f"autoencoder's {latent_channels}: it also takes pictures or masks, as FLUX Fill, Canny and Depth do. "
                "Give a text-to-image pipeline."
            )

    def takes_guidance(self, transformer: nn.Module) -> bool:
        """Whether the model is told a guidance scale in training."""
        return False


def _dtype(model: nn.Module) -> torch.dtype:
    """Of the base weights: adapters, which come later, may be held more precisely."""
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())


def over(t: Tensor, latents: Tensor) -> Tensor:
    """t (batch,), to be multiplied with latents (batch, ...)."""
    return t.to(latents).reshape(-1, *[1] * (latents.ndim - 1))
