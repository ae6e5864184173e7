"""A plan and a config.json made to fit another engine, where that changes nothing for transformers."""

from typing import Any

from torch import nn

from skipwise.errors import UserError, unknown
from skipwise.exporting.config import Build, Config, resolved_config
from skipwise.exporting.engines import ENGINES, Reading, additions, title, wrongs
from skipwise.exporting.keeping import Kept, kept_of
from skipwise.plan import Plan, Provenance


def check_engine(engine: str | None, nearest: bool) -> None:
    """Raise UserError for a name that is no engine's, and for the nearest plan where no engine is named."""
    if engine is None and nearest:
        raise UserError("The nearest plan is one that an engine can run; name the engine too (--for mlx-lm).")
    if engine is not None and engine not in ENGINES:
        raise unknown("engine", engine, ENGINES)


def fitting_plan(engine: str, plan: Plan, model: nn.Module, nearest: bool) -> Plan:
    """The plan, or with `nearest` the nearest plan that leaves the kinds of layers where the engine expects them.

    model: the source's skeleton. Raises UserError, with the nearest plan, when this one moves them and nearest is off.
    """
    whole = resolved_config(model)
    pattern = ENGINES[engine].readings.get(whole.get("model_type", ""), Reading()).pattern
    if pattern is None:
        return plan
    (kept,) = kept_of(plan)
    kinds = pattern.kinds(whole)
    left = {pattern.key: [whole[pattern.key][number] for number in kept.blocks]}
    if pattern.describes(left | pattern.setting(left)):
        return plan
    chosen = pattern.nearest(kinds, kept.blocks)
    problem = (
        f"{title(engine)} takes {pattern.key} of {whole['model_type']} by position, and without blocks "
        f"{_skipped(kept)} the kinds do not follow its rule"
    )
    if chosen is None:
        raise UserError(f"{problem}, nor do they without any other {kept.length - len(kept.blocks)}; skip fewer.")
    moved = Kept(kept.stack, kept.length, tuple(chosen))
    if not nearest:
        raise UserError(f"{problem}; the nearest plan that does skips {_skipped(moved)} (--nearest takes it).")
    if plan.adapter is not None:
        raise UserError(f"{problem}, and its adapter is for these blocks; heal one that skips {_skipped(moved)}.")
    return _moved(plan, moved, engine)


def _skipped(kept: Kept) -> str:
    return ", ".join(str(number) for number in range(kept.length) if number not in kept.blocks)


def _moved(plan: Plan, kept: Kept, engine: str) -> Plan:
    """The plan that keeps these blocks instead, with a word on what it was."""
    made: Provenance = plan.made_by
    was = {stack: list(numbers) for stack, numbers in plan.phases[0].skip.items() if numbers}
    settings: dict[str, Any] = made.settings | {"moved for": title(engine), "skipped before": was}
    skip = {kept.stack: tuple(number for number in range(kept.length) if number not in kept.blocks)}
    moved = Plan.static(plan.model, skip)
    return moved.model_copy(update={"made_by": made.model_copy(update={"settings": settings})})


def config_for(engine: str, config: Config, model: nn.Module, build: Build) -> Config:
    """The config.json of an export with what the engine needs in it.

    model: the export's skeleton. Raises UserError when the engine would not run it, or when what it needs changes what
    transformers reads.
    """
    known = resolved_config(model)
    for key, value in additions(engine, known | config).items():
        config = config | {key: value}
    found = resolved_config(build(config))
    changed = [key for key, value in known.items() if found.get(key) != value]
    if changed:
        raise UserError(
            f"What {title(engine)} needs in config.json changes {changed[0]} for transformers; export without --for."
        )
    problems = wrongs(engine, known | config)
    if problems:
        raise UserError(
            f"{title(engine)} {problems[0]} ({config.get('model_type', 'this family')}); leave out --for {engine} to "
            "export for transformers alone, or skip other blocks."
        )
    return config
