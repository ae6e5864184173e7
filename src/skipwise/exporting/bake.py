"""`export`: bake a static plan into a smaller checkpoint of the same architecture.

The model is never loaded: its skeleton says what a plan means, and the weights are carried over shard by shard. Skipped
blocks' tensors are left behind, later blocks renumbered, the config shortened. The target is whole or absent.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from skipwise.adapters import merged_tensors
from skipwise.blocks import Contract, find_contract
from skipwise.cost import estimate
from skipwise.errors import UserError
from skipwise.exporting.card import PLAN_FILE, Export, write_card
from skipwise.exporting.checkpoint import Checkpoint, Move, Transform, read_checkpoint, rewrite
from skipwise.exporting.config import Build, Config, cut_config, resolved_config
from skipwise.exporting.engine_files import check_file, has_file, write_file
from skipwise.exporting.fitting import check_engine, config_for, fitting_plan
from skipwise.exporting.folder import check_absent, copy_files, whole_or_absent
from skipwise.exporting.keeping import kept_of
from skipwise.exporting.keys import key_reader, plan_moves
from skipwise.exporting.proof import prove
from skipwise.files import write_atomically
from skipwise.loading import NATIVE, Source, build_skeleton, check_weights, find, readable_errors
from skipwise.plan import Plan


def export(
    plan: Plan,
    source: str | Path,
    target: str | Path,
    example: Mapping[str, Any] | None = None,
    *,
    engine: str | None = None,
    nearest: bool = False,
) -> Path:
    """Write the source model without the blocks that the plan skips to the folder `target`, and return its path.

    source: what `load` takes: an embedded name, a folder of safetensors or a hub id; of a diffusers pipeline its
    transformer is exported. A plan's adapter is merged into the weights. Logits are, bit for bit, those of the source
    under `skip(model, plan)`. Memory holds one shard at a time, and the weights that an
    adapter changes. example: keyword arguments of one forward, for a model
    that skipwise has no inputs for. Of blocks that depend on their number none but the last can be left out; both
    models are then loaded and run, and must be the same.
    engine: another one that the export is for (docs/engines.md): "mlx-lm", "ctranslate2", "llama.cpp", "onnx" or
    "openvino". What it needs is added, for the last three a file beside the weights (the last two load the export whole
    to trace it). nearest: take the nearest plan when the engine takes kinds of layers by position and the plan moves
    them, instead of refusing.
    Raises UserError, and leaves no target, for a plan that is not static or of another model, for a model whose config
    cannot describe the kept blocks, for an engine that would give other logits, for weights that are incomplete or
    pickled, and for a target that holds something.
    """
    _check_exportable(plan)
    check_engine(engine, nearest)
    target = Path(target).expanduser()
    check_absent(target)
    found = find(str(source), weights=False)
    if found.gguf:
        raise UserError(f"{source} is a GGUF file; export its safetensors original, then convert the export.")
    config = found.config
    with readable_errors(found):
        build: Build = lambda config: build_skeleton(config, found.name)  # noqa: E731
        skeleton = _skeleton(config, plan, build, example)
        if engine is not None:
            plan = fitting_plan(engine, plan, skeleton, nearest)
        cut = cut_config(config, skeleton, plan, build)
        smaller, twin = cut.config, cut.twin
        if engine is not None:
            smaller = config_for(engine, smaller, twin, build)
            check_file(engine, resolved_config(twin), found.folder)
        found = replace(find(str(source)), name=str(source))
        _check_weights(found)
        checkpoint = read_checkpoint(found.folder, found.name)
        mapping = NATIVE[config["model_type"]][2] if config.get("model_type") in NATIVE else None
        moves = plan_moves(checkpoint, skeleton, twin, kept_of(plan), mapping)
        merging = _merging(plan, checkpoint, skeleton, mapping)
    before, after = _sizes(checkpoint, moves)
    saved = estimate(skeleton, plan, example=example).saved_block_flops
    card = write_card(Export(plan, found, smaller, resolved_config(twin) | smaller, saved, before, after), target.name)
    with whole_or_absent(target, after * (1 + has_file(engine))) as folder:
        copy_files(found, folder)
        rewrite(checkpoint, moves, folder, merging)
        write_atomically(folder / "config.json", json.dumps(smaller, indent=2) + "\n")
        write_atomically(folder / "README.md", card)
        plan.save(folder / PLAN_FILE)
        write_file(engine, folder, resolved_config(twin))
        if not cut.certain or _numbered(skeleton, plan):
            prove(found.name, folder, plan, example)
    return target


def _merging(plan: Plan, checkpoint: Checkpoint, model: nn.Module, mapping: Mapping[str, str] | None) -> Transform:
    """The tensor of the whole source model's parameter, as it is written: with what the plan's adapter adds."""
    folder = plan.adapter_folder()
    if folder is None:
        return lambda name, tensor: tensor
    read = key_reader(model, mapping)
    loaded = {key: read(key) for key in checkpoint.entries}
    keys = {each.name: key for key, each in loaded.items() if not each.converted}
    ties = _tied(model)
    keys |= {tied: keys[name] for name in list(keys) for tied in ties.get(name, ())}

    def original(name: str) -> Tensor:
        if name not in keys:
            raise UserError(
                f"The plan's adapter changes {name}, which the source stores in other pieces; use the plan with "
                "`skip`, or merge the adapter into the source first."
            )
        with safe_open(checkpoint.folder / checkpoint.file_of(keys[name]), "pt") as shard:
            tensor: Tensor = shard.get_tensor(keys[name])
        return tensor

    changed = merged_tensors(model, folder, original)
    for name in changed:
        if any(tied not in changed or not changed[tied].equal(changed[name]) for tied in ties.get(name, ())):
            raise UserError(
                f"The plan's adapter changes {name} but not {ties[name][0]}, and the source stores both as one tensor; "
                "use the plan with `skip`."
            )
    return lambda name, tensor: changed.get(name, tensor)


def _tied(model: nn.Module) -> dict[str, list[str]]:
    """Name of a parameter -> its other names."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {
        name: [other for other in group if other != name] for group in names.values() for name in group if group[1:]
    }


def _check_exportable(plan: Plan) -> None:
    """Raise UserError for a plan that no checkpoint can hold."""
    if not plan.is_static:
        raise UserError("This plan has phases, and a checkpoint is the same at every step; export a static plan.")
    phase = plan.phases[0]
    if phase.model is not None:
        raise UserError(f"This plan runs another model, {phase.model!r}; export that model itself.")
    if phase.stand_in is not None:
        raise UserError(
            f"This plan's skipped blocks leave a {phase.stand_in} stand-in behind, for which a standard checkpoint has "
            "no place; use it with `skip`, or heal the plan instead (`skipwise heal`) and export that."
        )
    if not any(phase.skip.values()):
        raise UserError(
            "This plan skips no block: the export would be the source itself. Make one with `skipwise plan`."
        )
    for kept in kept_of(plan):
        if not kept.blocks:
            raise UserError(
                f"This plan skips all {kept.length} blocks of {kept.stack}; at least one must be left to export."
            )


def _skeleton(config: Config, plan: Plan, build: Build, example: Mapping[str, Any] | None) -> nn.Module:
    """The source without weights, checked against the plan."""
    skeleton = build(config)
    contract = find_contract(skeleton, example)
    plan.check_model(contract.shape)
    _check_source(config, skeleton, contract, plan)
    return skeleton


def _check_source(config: Config, model: nn.Module, contract: Contract, plan: Plan) -> None:
    """Raise UserError for a model whose blocks cannot be left out of a file."""
    if "quantization_config" in config:
        raise UserError("The source is quantised; export the original checkpoint, then quantise the export.")
    for kept in kept_of(plan):
        stack = contract.stacks[kept.stack]
        why = None
        if stack.coupled:
            why = f"share weights or a cache with {', '.join(stack.coupled)}", "use the plan with `skip` instead"
        elif stack.in_place and not kept.is_first:
            why = "depend on their number", "leave out none but the last, or use the plan with `skip`"
        if why is not None:
            raise UserError(
                f"{contract.architecture} cannot be exported: the blocks of {kept.stack} {why[0]}, so that a "
                f"checkpoint without some of them is another model; {why[1]}."
            )
    sharing = _shared_between_blocks(model, plan) or _shares_caches(resolved_config(model))
    if sharing:
        raise UserError(f"{contract.architecture} cannot be exported: {sharing}; use the plan with `skip` instead.")


def _numbered(model: nn.Module, plan: Plan) -> bool:
    """Whether the plan is of blocks that depend on their number, of which it leaves out the last ones."""
    stacks = find_contract(model).stacks
    return any(stacks[kept.stack].in_place for kept in kept_of(plan))


def _shared_between_blocks(model: nn.Module, plan: Plan) -> str | None:
    """A parameter of a skipped block, by its first name, that something outside of it holds too, and would lose."""
    skipped = [f"{kept.stack}.{number}." for kept in kept_of(plan) for number in kept.skipped]
    holders: dict[int, str] = {}  # id of a parameter -> its first name
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = holders.setdefault(id(parameter), name)
        if any(other.startswith(block) and not name.startswith(block) for block in skipped):
            return f"{name} is the same tensor as {other}"
    return None


def _shares_caches(config: Config) -> str | None:
    """Later blocks that read the keys and values of earlier ones (Gemma3n) are known by their config alone."""
    for key, value in config.items():
        if isinstance(value, dict) and (found := _shares_caches(value)):
            return found
        if "kv_shared" in str(key) and value:
            return f"its blocks share keys and values ({key} is {value!r})"
    return None


def _check_weights(source: Source) -> None:
    check_weights(source)
    if (source.folder / "adapter_config.json").exists():
        raise UserError(f"{source.name} has an adapter beside its weights; merge it into them first.")


def _sizes(checkpoint: Checkpoint, moves: Mapping[str, Move]) -> tuple[int, int]:
    """Bytes of the weights before and after."""
    entries = checkpoint.entries
    return sum(entry.size for entry in entries.values()), sum(move.size(entries[key]) for key, move in moves.items())
