"""The class that a config names, and the model without weights that it describes."""

from typing import Any

import torch
import transformers
from torch import nn

from skipwise.errors import UserError, require
from skipwise.models import dream, llada, mdlm

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
        return model_class, {"config": config_class.from_dict(config)}
    if kind not in transformers.CONFIG_MAPPING:
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
        built = settings.get("config") or transformers.CONFIG_MAPPING[config["model_type"]].from_dict(config)
        auto = model_class is transformers.AutoModelForCausalLM
        return (model_class.from_config(built) if auto else model_class._from_config(built)).eval()
