"""The model card of an exported checkpoint: what was left out, why, and how to load what is left."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, metadata_load
from yaml import YAMLError

from skipwise.exporting.config import Config
from skipwise.exporting.engines import ENGINES, title, verdict
from skipwise.exporting.keeping import kept_of
from skipwise.files import read_json
from skipwise.loading import NATIVE, Source
from skipwise.plan import Plan

PLAN_FILE = "skipwise-plan.json"
# what a derived model's card inherits from the card of its base
INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")


@dataclass(frozen=True)
class Export:
    """What the card tells of: the plan, where the weights came from, and what is left of them.

    resolved: the config with what config.json leaves to the class; saved: fraction of block FLOPs; before, after: bytes
    of weights.
    """

    plan: Plan
    source: Source
    config: Config
    resolved: Config
    saved: float
    before: int
    after: int


def _what_was_changed(plan: Plan) -> str:
    if plan.adapter is None:
        return "Nothing was put in their place and nothing was trained: the other weights are unchanged."
    return (
        "A LoRA adapter, trained so that what is left predicts what the whole model does, is merged into the other "
        "weights."
    )


def write_card(export: Export, name: str) -> str:
    """The text of README.md. name: of the exported folder."""
    base, pipeline = _base(export.source), _pipeline(export.source)
    parts = [
        f"---\n{_front_matter(export).to_yaml()}\n---",
        f"# {name}",
        f"{base} without {_what_is_skipped(export.plan)}. {_what_was_changed(export.plan)} Block numbers count from 0 "
        "in the source.",
        _table(export.plan),
        f"This saves {export.saved:.2%} of block FLOPs (a count by formula, not a measured speed-up) and "
        f"{1 - export.after / export.before:.2%} of the weights ({export.after / 1e9:.3g} of {export.before / 1e9:.3g} "
        "GB are left). What it costs in quality is not measured here.",
    ]
    if pipeline:
        parts.append(
            f"This folder is the transformer alone of a {pipeline}; take the rest of the pipeline from the source."
        )
    if "auto_map" in export.source.config:
        parts.append(
            "The source comes with Python code of its own, which was not copied and is not needed as below. A runtime "
            "that needs it finds it in the source, with the `auto_map` of its config.json."
        )
    parts += [
        f"## How the plan was made\n{_provenance(export.plan)} The whole plan is in `{PLAN_FILE}`.",
        f"## How to load it\n```python\n{_loading(export, name, pipeline)}\n```",
        f"## In other engines\n{_engines(export.resolved)}",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(export: Export) -> ModelCardData:
    hub = export.source.name if _is_hub_id(export.source) else None
    library = "diffusers" if "_class_name" in export.config else "transformers"
    library = "skipwise" if export.config.get("model_type") in NATIVE else library
    card = _card_data((pipeline_root(export.source) or export.source.folder) / "README.md")
    inherited: dict[str, Any] = {key: card[key] for key in INHERITED if key in card}
    return ModelCardData(base_model=hub, library_name=library, tags=["skipwise", "depth-pruning"], **inherited)


def _card_data(path: Path) -> dict[str, Any]:
    """The front matter of a card; empty where there is none that can be read."""
    try:
        return metadata_load(path) or {}
    except (OSError, ValueError, YAMLError):
        return {}


def _is_hub_id(source: Source) -> bool:
    return source.name.count("/") == 1 and not Path(source.name).expanduser().exists()


def _base(source: Source) -> str:
    """The source's name; of a folder its last part only, for a card is public and paths are not."""
    if _is_hub_id(source):
        return f"[{source.name}](https://huggingface.co/{source.name})"
    return Path(source.name).expanduser().resolve().name


def pipeline_root(source: Source) -> Path | None:
    """The folder of the diffusers pipeline that the source is the transformer of."""
    root = source.folder.parent
    return root if source.folder.name == "transformer" and (root / "model_index.json").exists() else None


def _pipeline(source: Source) -> str | None:
    """The class of that pipeline."""
    root = pipeline_root(source)
    if root is None:
        return None
    return read_json(root / "model_index.json").get("_class_name", "DiffusionPipeline")


def _what_is_skipped(plan: Plan) -> str:
    parts = []
    for kept in kept_of(plan):
        skipped = kept.length - len(kept.blocks)
        parts.append(f"{skipped} of the {kept.length} blocks of `{kept.stack}`")
    return " and ".join(parts)


def _table(plan: Plan) -> str:
    rows = ["| blocks | in the source | left out | here |", "|---|---|---|---|"]
    for kept in kept_of(plan):
        skipped = ", ".join(str(i) for i in range(kept.length) if i not in kept.blocks)
        rows.append(f"| `{kept.stack}` | {kept.length} | {skipped} | {len(kept.blocks)} |")
    return "\n".join(rows)


def _provenance(plan: Plan) -> str:
    made = plan.made_by
    facts = {"settings": made.settings, "calibration": made.calibration, "versions": made.versions}
    told = "".join(f" {what.capitalize()}: `{json.dumps(value)}`." for what, value in facts.items() if value)
    return f"Method: {made.method}.{told}"


def _loading(export: Export, name: str, pipeline: str | None) -> str:
    config = export.config
    if config.get("model_type") in NATIVE:
        return f'import skipwise\n\nmodel, tokenizer = skipwise.load("{name}")'
    kind = config.get("_class_name") or (config.get("architectures") or ["AutoModelForCausalLM"])[0]
    library = "diffusers" if "_class_name" in config else "transformers"
    code = f'import {library}\n\nmodel = {library}.{kind}.from_pretrained("{name}")'
    if pipeline:
        base = export.source.name if _is_hub_id(export.source) else "SOURCE"
        code += f'\npipeline = diffusers.{pipeline}.from_pretrained("{base}", transformer=model)'
    elif library == "transformers":
        code += f'\ntokenizer = transformers.AutoTokenizer.from_pretrained("{name}")'
    return code


def _engines(config: Config) -> str:
    """What other engines make of a checkpoint of this config, as far as that was measured."""
    lines = [f"- {title(engine)}: {verdict(engine, config)}" for engine in ENGINES]
    return (
        "As measured with tiny random models of the family, against transformers' own logits; other versions may do "
        "otherwise.\n" + "\n".join(lines)
    )
