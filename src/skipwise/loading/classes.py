"""The class that a config names, and the model without weights that it describes."""

from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from skipwise.errors import UserError, require
from skipwise.models import dream, llada, mdlm
from skipwise.models.official import TAKEN, relative

# config.json model_type -> (model class, config class, key mapping)
NATIVE: dict[str, tuple[Any, Any, dict[str, str]]] = {
    "llada": (llada.LLaDAModelLM, llada.LLaDAConfig, llada.KEY_MAPPING),
    "Dream": (dream.DreamModel, dream.DreamConfig, dream.KEY_MAPPING),
    "mdlm": (mdlm.MDLM, mdlm.MDLMConfig, mdlm.KEY_MAPPING),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def recipe(config: dict[str, Any], name: str) -> tuple[Any, dict[str, Any]]:
    """The class that a config names, and what its from_pretrained needs besides the folder."""
    kind = config.get("model_type")
    if "_class_name" in config:
        diffusers = require("diffusers", "image")
        if not hasattr(diffusers, config["_class_name"]):
            raise UserError(f"{name} is a {config['_class_name']}, which the installed diffusers does not know.")
        return getattr(diffusers, config["_class_name"]), {}
    if kind in NATIVE:
        model_class, config_class, _ = NATIVE[kind]
        try:
            return model_class, {"config": config_class.from_dict(config)}
        except (TypeError, ValueError, StrictDataclassError) as error:  # a UserError is a ValueError
            raise UserError(f"{name}: {' '.join(str(error).split())}") from error
    if kind not in transformers.CONFIG_MAPPING:
        if what := relative(kind):
            raise UserError(
                f"{name} is {what} (model_type {kind!r}), which skipwise does not implement; of masked diffusion "
                f"language models it takes {TAKEN}. The repository's own code is never run."
            )
        raise UserError(
            f"{name} has model_type {kind!r}, which neither skipwise nor the installed transformers knows. "
            "The repository's own code is never run; a newer transformers may know it."
        )
    architecture = (config.get("architectures") or ["AutoModelForCausalLM"])[0]
    return getattr(transformers, architecture, transformers.AutoModelForCausalLM), {}


def build_skeleton(config: dict[str, Any], name: str) -> nn.Module:
    """The model that the dictionary of a config.json describes, on the meta device. name: for error messages."""
    model_class, settings = recipe(config, name)
    with torch.device("meta"):
        if "_class_name" in config:
            return model_class.from_config(config).eval()
        built = settings.get("config") or _from_dict(config)
        auto = model_class is transformers.AutoModelForCausalLM
        return (model_class.from_config(built) if auto else model_class._from_config(built)).eval()


def _from_dict(config: dict[str, Any]) -> Any:
    """The config object of a config.json, in which transformers writes an infinity as {"__float__": "Infinity"}."""
    config_class = transformers.CONFIG_MAPPING[config["model_type"]]
    return config_class.from_dict(config_class._decode_special_floats(config))
