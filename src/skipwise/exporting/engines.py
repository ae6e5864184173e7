"""What other engines make of a checkpoint of which blocks were cut, family by family, as it was measured.

Measured with tiny random models as transformers 5.23 saves them, whole and cut, against transformers' own logits. What
is not in the table was not measured. docs/engines.md tells how, and what was seen.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from skipwise.exporting.patterns import Pattern

Config = dict[str, Any]


@dataclass(frozen=True)
class Reading:
    """What an engine takes from a family's config.json, and what not.

    pattern: the rule by which it takes the kinds of layers from their positions, None where it reads the config's list;
    rope_on_top: whether it looks for rope_theta and rope_scaling on top of config.json alone, where transformers 5
    does not write them; scalings: types of rope_scaling that it computes otherwise; windows: whether it applies sliding
    windows; both_kinds: whether it fails unless layers with full attention and with windows are left; needs: keys that
    transformers 5 does not write and without which it does not load; refused: why it cannot run this family at all.
    """

    pattern: Pattern | None = None
    rope_on_top: bool = False
    scalings: tuple[str, ...] = ()
    windows: bool = True
    both_kinds: bool = False
    needs: tuple[str, ...] = ()
    refused: str = ""


@dataclass(frozen=True)
class Engine:
    """An engine, the versions that were measured, and its readings by the config's model_type.

    others: what is said of a family that is not in the table.
    """

    versions: str
    readings: Mapping[str, Reading]
    others: str = "not measured for this family"


FULL = Pattern("layer_types", "full_attention", 6, "sliding_window_pattern")
TOP = Reading(rope_on_top=True)
TOP_NO_WINDOWS = Reading(rope_on_top=True, windows=False)
NO_CONVERSION = Reading(refused="has no conversion for this family")

ENGINES: Mapping[str, Engine] = {
    "mlx-lm": Engine(
        "0.32.2",
        {
            **dict.fromkeys(("llama", "olmo2", "gemma", "cohere", "mixtral", "granite", "falcon_h1", "smollm3"), TOP),
            **dict.fromkeys(("mistral", "qwen2", "gemma2", "phi3", "starcoder2"), TOP_NO_WINDOWS),
            **dict.fromkeys(("olmo3", "afmoe"), Reading(rope_on_top=True, both_kinds=True)),
            "qwen3": Reading(windows=False),
            "ministral3": Reading(),
            "gemma3_text": Reading(FULL, rope_on_top=True),
            "cohere2": Reading(Pattern("layer_types", "full_attention", 4, "sliding_window_pattern"), rope_on_top=True),
            "gpt2": Reading(needs=("n_ctx",)),
            "gpt_neox": Reading(needs=("rotary_emb_base", "rotary_pct")),
            "qwen3_moe": Reading(needs=("num_experts",)),
            "lfm2": Reading(needs=("block_dim",)),
            "glm4": Reading(needs=("partial_rotary_factor",)),
            "exaone4": Reading(needs=("rope_scaling",)),
            "gpt_oss": Reading(refused="does not load the weights under the names that transformers 5 gives them"),
            "jamba": Reading(refused="weighs the chosen experts otherwise than transformers, whole or cut"),
            "granitemoehybrid": Reading(refused="does not know transformers 5's names of its kinds of layers"),
            "qwen3_next": Reading(refused="does not load it as transformers 5 saves it"),
            "llama4_text": Reading(refused="does not load it as transformers 5 saves it"),
        },
    ),
    "ctranslate2": Engine(
        "4.8.5",
        {
            "llama": Reading(scalings=("llama3",)),
            "mistral": Reading(windows=False),
            "qwen2": Reading(windows=False),
            "qwen3": Reading(windows=False),
            "gpt2": Reading(),
            "gemma": Reading(refused="takes a rope_theta of 10000, whatever the config says"),
            "gemma2": Reading(refused="gives other logits from the first token on, whole or cut"),
            "gemma3_text": Reading(refused="takes rope bases of its own, whatever the config says"),
            "phi3": Reading(refused="fails to convert it from transformers 5 (KeyError: 'type')"),
            "gpt_neox": Reading(refused="fails to convert it from transformers 5 (AttributeError: rotary_pct)"),
            **dict.fromkeys(("cohere", "cohere2", "starcoder2", "smollm3", "olmo3", "mixtral"), NO_CONVERSION),
        },
    ),
    "llama.cpp": Engine(
        "through node-llama-cpp 3.22.1, files by gguf 0.19",
        {
            "llama": Reading(),
            "qwen2": Reading(windows=False),
            "mistral": Reading(windows=False),
            # kinds of layers are read from a list of booleans in the file, which we write
            "gemma3_text": Reading(),
            "gemma2": Reading(),
            "smollm3": Reading(Pattern("no_rope_layers", 0, 4)),
        },
    ),
    "onnx": Engine(
        "torch 2.13, onnxruntime 1.32",
        {"llama": Reading(), "gemma3_text": Reading()},
        others="not measured for this family; the file is what torch.onnx exports of the model",
    ),
    "openvino": Engine(
        "2026.4.1",
        {"llama": Reading(), "gemma3_text": Reading()},
        others="not measured for this family; it reads what torch.export makes of the model",
    ),
}


def title(engine: str) -> str:
    """The engine's name with the versions that were measured."""
    versions = ENGINES[engine].versions
    return f"{engine} {versions}" if versions[0].isdigit() else f"{engine} ({versions})"


def wrongs(engine: str, config: Config) -> list[str]:
    """Why the engine would not run a checkpoint of this config.json, or would give other logits; [] when neither."""
    reading = ENGINES[engine].readings.get(config.get("model_type", ""))
    if reading is None:
        return []
    if reading.refused:
        return [reading.refused]
    found = [f"finds no {key} in config.json and does not load it" for key in reading.needs if key not in config]
    kinds = set(config.get("layer_types") or ())
    if reading.both_kinds and len(kinds) == 1:
        found.append(f"fails unless layers of both kinds are left, and here all are {kinds.pop()}")
    if reading.pattern and not reading.pattern.describes(config):
        found.append(f"takes {reading.pattern.key} by position, and these layers do not follow its rule")
    ropes = _ropes(config)
    scaling = next((rope.get("rope_type") for rope in ropes.values()), None)
    if scaling in reading.scalings:
        found.append(f"computes rope scaling of type {scaling} otherwise")
    if reading.rope_on_top and ropes and "rope_theta" not in config:
        found.append("takes rope_theta from the top of config.json alone, where transformers 5 does not write it")
    return found


def limits(engine: str, config: Config) -> list[str]:
    """Within which bounds the engine's logits are transformers' own."""
    reading = ENGINES[engine].readings.get(config.get("model_type", ""), Reading())
    window = config.get("sliding_window")
    if reading.windows or not isinstance(window, int) or config.get("use_sliding_window") is False:
        return []
    return [f"right for texts of up to {window} tokens: it does not apply sliding windows as this config asks for them"]


def verdict(engine: str, config: Config) -> str:
    """One sentence for the model card on what the engine makes of this checkpoint."""
    known = ENGINES[engine]
    if config.get("model_type") not in known.readings:
        return f"{known.others}."
    told = wrongs(engine, config) or limits(engine, config) or ["the logits are transformers' own"]
    return f"{'; '.join(told)}."


def additions(engine: str, config: Config) -> Config:
    """What to add to config.json so that the engine finds what transformers 5 writes elsewhere."""
    reading = ENGINES[engine].readings.get(config.get("model_type", ""), Reading())
    more = _rope_on_top(config) if reading.rope_on_top else {}
    if reading.pattern:
        more |= reading.pattern.setting(config)
    return {key: value for key, value in more.items() if config.get(key) != value}


def _ropes(config: Config) -> dict[str, Any]:
    """rope_parameters by kind of layer; the kind "" where one is for all layers."""
    parameters = config.get("rope_parameters") or {}
    by_kind = {kind: value for kind, value in parameters.items() if isinstance(value, dict)}
    return by_kind or ({"": parameters} if parameters else {})


def _rope_on_top(config: Config) -> Config:
    """rope_theta, and where there are such rope_local_base_freq and rope_scaling, as configs had them before."""
    ropes = _ropes(config)
    full, sliding = (ropes.get(kind, ropes.get("")) for kind in ("full_attention", "sliding_attention"))
    main = full or sliding
    if not main or "rope_theta" not in main:
        return {}
    more: Config = {"rope_theta": main["rope_theta"]}
    if sliding and "sliding_attention" in ropes:  # also where both are equal: engines have a default of their own
        more["rope_local_base_freq"] = sliding["rope_theta"]
    if main.get("rope_type", "default") != "default":
        more["rope_scaling"] = {key: value for key, value in main.items() if key != "rope_theta"}
    return more
