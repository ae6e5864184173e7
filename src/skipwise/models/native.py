"""What a native masked diffusion model is to the rest of the package, and what makes it a model of transformers.

Importing a native class registers it with transformers' auto classes (`registered`), as `import skipwise.models`,
`import skipwise.loading` and `skipwise.load` do; `import skipwise` alone registers nothing and stays quick. From then
on `AutoConfig`, `AutoModel`, `AutoModelForCausalLM` and `AutoModelForMaskedLM` read "llada", "Dream" and "mdlm" without
remote code, and they do so even under trust_remote_code=True: transformers prefers what was registered.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from skipwise.errors import UserError
from skipwise.models.official import Layout

Model = TypeVar("Model")


class MaskedDiffusion:
    """Mix in before a `PreTrainedModel`: the facts that samplers, caches, likelihoods and searches ask for.

    They are attributes of the class, so that a wrapped or a user's own model can have them too; what is asked of a
    model without them is the value here.

    is_masked_diffusion: the model predicts what is masked, from both sides. family: the sampler that it is decoded with
    unless another is asked for, a key of `skipwise.sampling.FAMILIES`. shift: how far before a position the state is
    that predicts it; with a shift, nothing predicts a text's first token. block_length: how many tokens a sampler that
    goes block by block decodes before it begins the next ones, unless told; None is all. takes_cache: `forward` takes
    past_key_values, and position_ids of what runs. predicts_mask: the mask's own logit means something; False leaves it
    out of every distribution (MDLM's SUBS). commits_by_confidence: its own sampler fills the masks first that the model
    is most confident of; False fills them at random times. takes_sigma: `forward` wants to be told the noise level.

    Where it has them, its states are what the head makes logits of: `states(input_ids, attention_mask, where)`, `head`,
    and `spared(rows, keys)`, see `skipwise.models.bidirectional`.
    """

    is_masked_diffusion: ClassVar[bool] = True
    family: ClassVar[str] = "llada"
    shift: ClassVar[int] = 0
    block_length: ClassVar[int | None] = None
    takes_cache: ClassVar[bool] = False
    predicts_mask: ClassVar[bool] = True
    commits_by_confidence: ClassVar[bool] = True
    takes_sigma: bool = False

    # regular expression over the keys of an official checkpoint -> key of this module, as transformers' key_mapping
    official_keys: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As every transformers model; official checkpoints are read as well as those of `save_pretrained`."""
        kwargs.setdefault("key_mapping", dict(cls.official_keys) or None)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)  # type: ignore[misc]

    def save_pretrained(
        self, save_directory: Any, *args: Any, save_original_format: bool = False, **kwargs: Any
    ) -> Any:
        """As every transformers model: a folder that `from_pretrained`, the auto classes and `skipwise.load` read.

        The config and the tensors have this module's own names. save_original_format: tensors that were read from an
        official checkpoint get their official names back, beside the same config.
        """
        return super().save_pretrained(  # type: ignore[misc]
            save_directory, *args, save_original_format=save_original_format, **kwargs
        )

    def generate(self: Any, inputs: Any = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """Decode with the sampler of this model's family: `skipwise.generate` by the arguments of transformers.

        See `skipwise.sampling.as_transformers.generate` for what it takes and returns.
        """
        # imported here, as samplers are built on models
        from skipwise.sampling.as_transformers import generate

        return generate(self, inputs, generation_config, **kwargs)


def fact(model: nn.Module, name: str) -> Any:
    """What a model says about itself: an attribute of `MaskedDiffusion`, whose own value is that of a silent model."""
    return getattr(model, name, getattr(MaskedDiffusion, name))


class OfficialConfig:
    """Mix in before a `PreTrainedConfig`: `from_dict` also takes the dictionary of an official config.json.

    layout: the keys of that.
    """

    layout: ClassVar[Layout]
    only: ClassVar[
        Mapping[str, Any]
    ] = {}  # the one value that is implemented, of keys that have a place in this config

    @classmethod
    def is_official(cls, config: Mapping[str, Any]) -> bool:
        """Whether these are the keys of an official config.json rather than this class's own."""
        raise NotImplementedError

    @classmethod
    def from_official(cls, official: dict[str, Any]) -> Any:
        """The config that an official config.json describes."""
        raise NotImplementedError

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As every config of transformers. Raises UserError for what this module does not implement."""
        cls.layout.check_architecture(config_dict)
        if cls.is_official(config_dict):
            official = cls.from_official(config_dict)
            if not kwargs:
                return official
            config_dict = official.to_dict()
        for key, value in cls.only.items():
            if config_dict.get(key) not in (value, None):
                raise UserError(f"{cls.__name__} has {key}={config_dict[key]!r}; skipwise implements only {value!r}.")
        return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]


def registered(model: type[Model]) -> type[Model]:
    """The class, which transformers' auto classes know from now on, by its config's model_type."""
    config: Any = model.config_class  # type: ignore[attr-defined]
    AutoConfig.register(config.model_type, config, exist_ok=True)
    for auto in (AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM):
        auto.register(config, model, exist_ok=True)
    return model
