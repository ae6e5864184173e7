"""What the native modules ask of an official config.json before they translate it: every key has a meaning, or is
refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from skipwise.errors import UserError

# The masked diffusion language models that have a native module, for messages.
TAKEN = "LLaDA (8B Base and Instruct, 1.5), Dream (Dream-Coder, DiffuCoder) and MDLM"

# model_type -> what it is: published diffusion language models without a native module. An entry that ends in "-" is
# the beginning of a model_type.
RELATIVES = {
    "llada2_moe": "LLaDA2, a mixture of experts that is decoded block by block",
    "llada_moe": "LLaDA-MoE, a mixture of experts",
    "sdar": "SDAR, which is decoded block by block",
    "sdar_moe": "SDAR, a mixture of experts that is decoded block by block",
    "Fast_dLLM_Qwen": "Fast-dLLM v2, which is decoded block by block",
    "a2d-": "an autoregressive model turned into a diffusion model by the dLLM project",
}

# Keys of every config.json that no forward depends on: names of classes and files, versions, what a call returns, and
# settings of transformers' own `generate`, which the samplers here do not read.
BOOKKEEPING = (
    frozenset(PreTrainedConfig().to_dict())
    | frozenset(GenerationConfig().to_dict())
    | {
        "auto_map",
        "name_or_path",
        "use_cache",
        "torchscript",
        "tokenizer_class",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_commit_hash",
    }
)

# Keys that the config of any family carries on as they are: how the weights are stored.
STORAGE = ("dtype", "torch_dtype", "quantization_config")


@dataclass(frozen=True)
class Layout:
    """The keys of a family's official config.json.

    family: as messages call it; architectures: the official classes of this shape. needed: keys without which nothing
    can be built; used: the others that are translated. only: key -> the one value that is implemented; a missing key
    or None is taken as that value. idle: keys that mean nothing to a forward as long as `only` holds. not_taken: key ->
    why any value of it is refused.
    """

    family: str
    architectures: tuple[str, ...]
    needed: tuple[str, ...]
    used: tuple[str, ...]
    only: Mapping[str, Any] = field(default_factory=dict)
    idle: tuple[str, ...] = ()
    not_taken: Mapping[str, str] = field(default_factory=dict)

    def check(self, official: Mapping[str, Any]) -> dict[str, Any]:
        """The keys of STORAGE that the config has. Raises UserError for the first key that is in the way."""
        self.check_architecture(official)
        for key, value in official.items():
            if value is None:
                continue
            if key in self.not_taken:
                raise UserError(f"{self.family} config has {key}={value!r}, {self.not_taken[key]}")
            if key in self.only and value != self.only[key]:
                raise UserError(
                    f"{self.family} config has {key}={value!r}; skipwise implements only {key}={self.only[key]!r}."
                )
        missing = [key for key in self.needed if official.get(key) is None]
        if missing:
            raise UserError(
                f"{self.family} config lacks {', '.join(missing)}; is this an official {self.family} config.json?"
            )
        self._check_known(official)
        return {key: official[key] for key in STORAGE if official.get(key) is not None}

    def check_architecture(self, official: Mapping[str, Any]) -> None:
        """Raise UserError for an architecture of another shape under the same model_type."""
        other = [name for name in official.get("architectures") or () if name not in self.architectures]
        if other:
            experts = official.get("num_experts")
            what = f"{other[0]}, a mixture of {experts} experts" if experts else other[0]
            raise UserError(
                f"The config's model_type is {self.family}'s, but its architecture is {what}; skipwise implements "
                f"{', '.join(self.architectures)}: of masked diffusion language models {TAKEN}."
            )

    def _check_known(self, official: Mapping[str, Any]) -> None:
        known = {*self.needed, *self.used, *self.only, *self.idle, *STORAGE, *BOOKKEEPING}
        for key, value in official.items():
            if key not in known and value is not None:
                raise UserError(
                    f"{self.family} config has {key}={value!r}, a key that skipwise does not know; take it out of "
                    "config.json if the model does not depend on it."
                )


def relative(model_type: object) -> str | None:
    """What a published diffusion language model without a native module is; None for any other model_type."""
    for name, what in RELATIVES.items():
        if model_type == name or (name.endswith("-") and str(model_type).startswith(name)):
            return what
    return None
