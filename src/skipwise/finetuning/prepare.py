"""What is computed once before a fine-tuning: text embeddings and the latents of every draw's crop.

Afterwards text encoders and autoencoder leave memory. Text is encoded on the CPU, where a T5 of 9 GiB is in nobody's
way; for the few prompts of a fine-tuning that is a matter of seconds.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as tensor_bytes
from torch import Tensor

from skipwise.errors import UserError
from skipwise.files import write_bytes_atomically
from skipwise.finetuning.draws import Draw
from skipwise.finetuning.families import family_of
from skipwise.finetuning.family import Family, Text
from skipwise.finetuning.memory.encoders import components, scale_of
from skipwise.finetuning.pipelines import components_of, load_pipeline, nulls_of, read_index, scheduler_config
from skipwise.finetuning.residuals import DrawKey
from skipwise.loading import load_skeleton

Progress = Callable[[str, int, int, str], None]  # what, done, total, more to say
TEXT = ("text_encoder", "tokenizer", "image_encoder", "feature_extractor")  # beginnings of components' names


@dataclass(frozen=True)
class Prepared:
    """texts: prompt -> the transformer's text arguments, one row; latents: a draw's digest -> (channels, h, w)."""

    texts: Mapping[str, Text]
    latents: Mapping[str, Tensor]

    def save(self, path: Path, of: Mapping[str, Any]) -> Path:
        """One safetensors file, whole or not at all. of: what it was made with, in plain values."""
        prompts = list(self.texts)
        tensors = {f"latents/{digest}": tensor.contiguous() for digest, tensor in self.latents.items()}
        for number, prompt in enumerate(prompts):
            tensors |= {f"text/{number}/{name}": t.contiguous() for name, t in self.texts[prompt].items()}
        facts = {"prompts": json.dumps(prompts), "of": json.dumps(of, sort_keys=True)}
        return write_bytes_atomically(path, tensor_bytes(tensors, facts))

    @classmethod
    def load(cls, path: Path, of: Mapping[str, Any]) -> "Prepared | None":
        """What was saved, or None for what was made with anything else. Raises UserError for a damaged file."""
        texts: dict[str, Text] = {}
        latents: dict[str, Tensor] = {}
        try:
            with safe_open(path, framework="pt") as file:
                if file.metadata()["of"] != json.dumps(of, sort_keys=True):
                    return None
                prompts = json.loads(file.metadata()["prompts"])
                for key in file.keys():  # noqa: SIM118 (no mapping)
                    kind, _, rest = key.partition("/")
                    if kind == "latents":
                        latents[rest] = file.get_tensor(key)
                    else:
                        number, _, name = rest.partition("/")
                        texts.setdefault(prompts[int(number)], {})[name] = file.get_tensor(key)
        except (SafetensorError, OSError, KeyError, ValueError, IndexError) as error:
            raise UserError(f"{path} cannot be read ({error}); delete it, and it is made anew.") from error
        return cls(texts, latents)

    def covers(self, draws: Iterable[Draw]) -> bool:
        """Whether nothing of these draws is lacking."""
        return all(DrawKey.of(draw).digest in self.latents and draw.example.prompt in self.texts for draw in draws)


def prepare(
    name: str,
    family: Family,
    draws: Sequence[Draw],
    resolution: int,
    *,
    dtype: str,
    device: str,
    max_length: int | None = None,
    on_progress: Progress | None = None,
) -> Prepared:
    """Encode the prompts, then the crops, of all draws with the pipeline `name`; at no time are both encoders loaded.

    resolution: pixels that crops are resized to, before the autoencoder. dtype: of the encoders. max_length: tokens.
    """
    tell = on_progress or (lambda *_: None)
    texts = _encode_prompts(name, family, list(dict.fromkeys(d.example.prompt for d in draws)), dtype, max_length)
    pipeline = load_pipeline(name, dtype=dtype, leave_out=_components(name, "transformer", *TEXT))
    pipeline.vae.to(device)
    latents: dict[str, Tensor] = {}
    for done, draw in enumerate(draws):
        latents[DrawKey.of(draw).digest] = family.encode_pixels(pipeline, draw.crop(resolution)[None])[0].cpu()
        tell("encode crops", done + 1, len(draws), "")
    return Prepared(texts, latents)


def _encode_prompts(
    name: str, family: Family, prompts: Sequence[str], dtype: str, max_length: int | None
) -> dict[str, Text]:
    pipeline = load_pipeline(name, dtype=dtype, leave_out=_components(name, "transformer", "vae"))
    if "text_encoder_3" in nulls_of(read_index(name)):  # SD3 asks its transformer how wide the zeros are
        vars(pipeline)["transformer"] = SimpleNamespace(config=load_skeleton(name).config)
    texts = {}
    for prompt in prompts:
        encoded = family.encode_prompts(pipeline, [prompt], max_length)
        texts[prompt] = {argument: tensor.cpu() for argument, tensor in encoded.items()}
    return texts


def load_family(name: str) -> Family:
    """The family of a pipeline, from its configs alone."""
    found, vae = family_of(read_index(name)), components(name).get("vae")
    return type(found)(scheduler_config(name), scale_of(vae.skeleton()) if vae else None, found.pipeline)


def _components(name: str, *beginnings: str) -> list[str]:
    """The pipeline's components whose names begin so."""
    return [key for key in components_of(read_index(name)) if key.startswith(beginnings)]
