"""The config.json of the smaller model, found by trial and proved by building it.

Nothing here knows a config by name. Whichever number sets a stack's length is the one to lower. The result is held
against the only definition of what a plan means, the source model under `skip`: the model that the new config builds
must have the same modules, with the same settings and the same shapes, block by block.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from torch import nn

from skipwise.blocks import module_list
from skipwise.errors import UserError
from skipwise.exporting.keeping import Kept, kept_of
from skipwise.exporting.sameness import DEPTHS, Difference, compare
from skipwise.plan import Plan

Config = dict[str, Any]
Build = Callable[[Config], nn.Module]
ROUNDINGS = 4  # how far, in last digits, a tuned number may be from where it is looked for
Place = tuple[tuple[str, ...], str]  # the path to a section of a config, and a key in it


@dataclass(frozen=True)
class Smaller:
    """A smaller model: its config.json, the model on the meta device, and whether it is certain to be the source under
    the plan, or must still be proved by running both.
    """

    config: Config
    twin: nn.Module
    certain: bool


def cut_config(config: Config, model: nn.Module, plan: Plan, build: Build) -> Smaller:
    """The config of the smaller model, and what it builds.

    config: of the source; model: its skeleton. Raises UserError when no config describes the kept blocks exactly: the
    architecture then makes a block by its number, in a way that its config cannot undo.
    """
    # nothing may point to the repository's own code, which is not carried over
    smaller = {key: value for key, value in config.items() if key != "auto_map"}
    try:
        return _cut(smaller, {}, model, plan, build)
    except UserError:  # the config may leave per-layer lists to its class, which makes them from the number of layers
        return _cut(smaller, resolved_config(model), model, plan, build)


def _cut(config: Config, defaults: Config, model: nn.Module, plan: Plan, build: Build) -> Smaller:
    for kept in kept_of(plan):
        config = _shorten(config, defaults, model, kept, plan, build)
    twin = build(config)
    compared = compare(model, twin, plan)
    if compared.difference is None:
        return Smaller(config, twin, compared.certain)
    tuned = _tune(config, defaults, compared.difference, model, plan, build)
    if tuned is None:
        raise compared.difference.refusal(plan)
    return tuned


def _tune(
    config: Config, defaults: Config, difference: Difference, model: nn.Module, plan: Plan, build: Build
) -> Smaller | None:
    """The smaller model with another number in its config, where blocks are made with one that depends on how many
    there are (MiniCPM3 divides its `scale_depth` by the root), so that theirs is exactly the source's.
    """
    found, wanted = difference.found, difference.wanted
    if not (isinstance(found, float) and isinstance(wanted, float) and found * wanted > 0):
        return None
    for (path, key), value in {**dict(_numbers(defaults)), **dict(_numbers(config))}.items():
        for candidate in _nearest(value * wanted / found):
            changed = copy.deepcopy(config)
            _section(changed, path)[key] = candidate
            try:
                twin = build(changed)
            except Exception:  # as in _shorten
                break
            compared = compare(model, twin, plan)
            if compared.difference is None:
                return Smaller(changed, twin, certain=False)
            if not _is_near(compared.difference, difference):
                break
    return None


def _numbers(config: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[Place, float]]:
    """All numbers that are no counts, and their places."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _numbers(value, (*path, key))
        elif isinstance(value, float) and value:
            yield (path, key), value


def _nearest(value: float) -> Iterator[float]:
    """The value, and those next to it, by rounding of which the one that is sought may be another."""
    yield value
    above = below = value
    for _ in range(ROUNDINGS):
        above, below = math.nextafter(above, math.inf), math.nextafter(below, -math.inf)
        yield from (above, below)


def _is_near(found: Difference, sought: Difference) -> bool:
    """Whether a try differs from what is sought by rounding alone."""
    same = (found.module, found.key) == (sought.module, sought.key)
    return same and isinstance(found.found, float) and math.isclose(found.found, sought.wanted, rel_tol=1e-12)


def resolved_config(model: nn.Module) -> Config:
    """The model's config with all that its file leaves out."""
    config: Any = model.config
    return config.to_dict() if hasattr(config, "to_dict") else dict(config)


def _shorten(config: Config, defaults: Config, model: nn.Module, kept: Kept, plan: Plan, build: Build) -> Config:
    """The config with one stack cut: by the first number that makes this stack shorter and no other too short."""
    before, final = _lengths(build(config), plan), dict(plan.model.stacks)
    final |= {each.stack: len(each.blocks) for each in kept_of(plan)}
    if before[kept.stack] == final[kept.stack]:  # shortened with another one: a number may set the length of two
        return config
    places = dict.fromkeys([*_depths(config, kept.length), *_depths(resolved_config(model), kept.length)])
    # what is about single layers may be about those of another stack that is as long (LED's windows)
    for (path, key), cuts in product(places, (True, False)):
        candidate = _lowered(config, defaults, kept, path, key, cuts)
        try:
            found = _lengths(build(candidate), plan)
        except Exception:  # configs check themselves, each in its own way: this number is another one
            continue
        if found[kept.stack] == final[kept.stack] and all(found[name] in (before[name], final[name]) for name in found):
            return _without_old_depth(candidate, kept, path)
    raise UserError(
        f"{plan.model.architecture} cannot be exported: no number in its config.json sets the length of {kept.stack} "
        f"to {len(kept.blocks)} and no other; use the plan with `skip` instead."
    )


def _lengths(model: nn.Module, plan: Plan) -> dict[str, int]:
    return {name: len(module_list(model, name)) for name in plan.model.stacks}


def _depths(config: Mapping[str, Any], length: int, path: tuple[str, ...] = ()) -> Iterator[Place]:
    """The places of all numbers that may be this stack's length, and of lists whose lengths may be it (Nemotron-H)."""
    for key, value in config.items():
        named = any(word in str(key) for word in ("layer", "block", "depth"))
        if isinstance(value, dict):
            yield from _depths(value, length, (*path, key))
        elif named and ((type(value) is int and value == length) or (isinstance(value, list) and len(value) == length)):
            yield path, key


def _lowered(config: Config, defaults: Config, kept: Kept, path: tuple[str, ...], key: str, cuts: bool) -> Config:
    """The config with this number lowered and, with `cuts`, all in its section that is about single blocks cut."""
    candidate = copy.deepcopy(config)
    section = _section(candidate, path)
    if not cuts:
        section |= {} if isinstance(section.get(key), list) else {key: len(kept.blocks)}
        return candidate
    made = {name: value for name, value in _section(defaults, path).items() if isinstance(value, list | tuple)}
    made = {name: value for name, value in made.items() if "layer" in name and not name.startswith("_")}
    section |= {name: kept.of(name, value) for name, value in (made | section).items()}
    if not isinstance(section.get(key), list):  # a list is cut already
        section[key] = len(kept.blocks)
    return candidate


def _without_old_depth(config: Config, kept: Kept, path: tuple[str, ...]) -> Config:
    """The config with the stack's length right under every name; diffusers' names are those of different stacks."""
    section = _section(config, path)
    if "_class_name" not in config:
        section |= {name: len(kept.blocks) for name in DEPTHS if section.get(name) == kept.length}
    return config


def _section(config: Config, path: tuple[str, ...]) -> Config:
    for key in path:
        config = config.setdefault(key, {})
    return config
