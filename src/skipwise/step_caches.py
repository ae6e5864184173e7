"""Other libraries' caches over denoising steps, while blocks are taken out of a model and put back.

A cache hangs on single blocks: on the first, the last, on every attention. Blocks that are taken out under it would
leave it waiting for them. So it is switched off before, and on again after, with the same settings and nothing stored:
what then runs is the model without those blocks, with that cache on.
"""

import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from skipwise.errors import UserError

CACHE_DIT = "_is_cached"  # what cache-dit writes on a transformer that it has changed
# caches that hang on parts of blocks, and do not mind which block is the first
ON_ATTENTION = ("FasterCacheConfig", "PyramidAttentionBroadcastConfig", "TaylorSeerCacheConfig", "TextKVCacheConfig")


def is_cached(model: nn.Module) -> bool:
    """Whether a cache of diffusers (`enable_cache`) is on."""
    return bool(getattr(model, "is_cache_enabled", False))


@contextmanager
def cache_off(model: Any) -> Iterator[None]:
    """The model without the cache of diffusers that is on, which begins anew afterwards, in the same context."""
    if not is_cached(model):
        yield
        return
    config, context = model._cache_config, _context(model)
    model.disable_cache()
    try:
        yield
    finally:
        _enable(model, config, context)


@contextmanager
def cache_back(model: Any) -> Iterator[None]:
    """The cache of diffusers that is on now is on again when the `with` fails, which must have put the blocks back."""
    config, context = getattr(model, "_cache_config", None), _context(model) if is_cached(model) else None
    try:
        yield
    except BaseException:
        if config is not None and not is_cached(model):
            _enable(model, config, context)
        raise


def _enable(model: Any, config: Any, context: Any) -> None:
    """Switch the cache on, in the context that it was in."""
    try:
        model.enable_cache(config)
    except (ValueError, IndexError, KeyError) as error:  # the blocks that are left are none that it can hang on
        model._cache_config = None
        raise UserError(
            f"{type(config).__name__} cannot be switched on for the blocks that the plan leaves ({error}); call "
            "disable_cache() first, or use another plan."
        ) from error
    if context is not None:
        importlib.import_module("diffusers.hooks.hooks")._set_cache_context(model, context)


def _context(model: nn.Module) -> Any:
    """The context that a `cache_context` around this has set, or None."""
    managers = (
        state
        for module in model.modules()
        if "_diffusers_hook" in module.__dict__
        for hook in module._diffusers_hook.hooks.values()  # type: ignore[union-attr,operator]
        for state in vars(hook).values()
        if type(state).__name__ == "StateManager"
    )
    return next((state._context for state in managers if state._context is not None), None)


def check_caches(model: nn.Module, static: bool) -> None:
    """Raise UserError for a cache that blocks cannot be taken out under.

    static: whether the same blocks are out at every step; a cache's store means nothing for other blocks.
    """
    if getattr(model, CACHE_DIT, False):
        then = "enter the plan, then call cache_dit.enable_cache" if static else "or use a plan without phases"
        raise UserError(
            f"cache-dit is on, and runs the blocks that were there when it was switched on; call "
            f"cache_dit.disable_cache, {then}."
        )
    if is_cached(model) and not static:
        raise UserError(
            f"{type(model._cache_config).__name__} stores what the blocks of one phase gave, and the plan changes them "
            "from phase to phase; call disable_cache() first, or use a static plan."
        )


def check_places(model: nn.Module) -> None:
    """Raise UserError for a cache that hangs on whole blocks, where skipped blocks keep their places in the list."""
    if is_cached(model) and (name := type(model._cache_config).__name__) not in ON_ATTENTION:
        raise UserError(
            f"{name} hangs on whole blocks, and this model's skipped blocks keep their places, as it counts its "
            f"blocks; call disable_cache() first, or use one of {', '.join(ON_ATTENTION)}."
        )


def end_cache_dit(model: nn.Module) -> None:
    """Switch off a cache-dit that was switched on while blocks were out: it would go on without them."""
    if getattr(model, CACHE_DIT, False):
        importlib.import_module("cache_dit").disable_cache(model)
        warnings.warn(
            "cache-dit was switched on for the blocks that the plan left, and is off now; switch it on again.",
            stacklevel=2,
        )
