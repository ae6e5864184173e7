"""The model inside of what other libraries wrap around it: torch.compile, DataParallel, peft, FSDP and the like."""

from collections.abc import Callable
from typing import Any

from torch import nn

from skipwise.errors import UserError

# class of a wrapper -> how to get at what it wraps
WRAPPERS: dict[str, Callable[[Any], nn.Module]] = {
    "OptimizedModule": lambda wrapper: wrapper._orig_mod,  # torch.compile
    "DataParallel": lambda wrapper: wrapper.module,
    "DistributedDataParallel": lambda wrapper: wrapper.module,
    "DeepSpeedEngine": lambda wrapper: wrapper.module,
    "PeftModel": lambda wrapper: _of_peft(wrapper),
    "PeftMixedModel": lambda wrapper: wrapper.base_model.model,
    "CheckpointWrapper": lambda wrapper: wrapper._checkpoint_wrapped_module,
    "AveragedModel": lambda wrapper: wrapper.module,
}
SHARDED = "FSDPModule"  # fully_shard makes a class of this and of the model's own


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside of all wrappers, the model itself where there is none.

    Whatever a plan changes in it, the wrapper sees. Raises UserError for FullyShardedDataParallel, which flattens the
    blocks' parameters, and for peft's prompts, which are no part of the model inside.
    """
    while True:
        kinds = {cls.__name__ for cls in type(model).__mro__}
        if "FullyShardedDataParallel" in kinds:
            raise UserError(
                "FullyShardedDataParallel flattens the parameters of the blocks inside; shard the model with "
                "torch.distributed.fsdp.fully_shard, or plan it before it is wrapped."
            )
        kind = next((name for name in WRAPPERS if name in kinds), None)
        if kind is None:
            return model
        model = WRAPPERS[kind](model)


def _of_peft(wrapper: Any) -> nn.Module:
    config = wrapper.active_peft_config
    if config.is_prompt_learning:
        raise UserError(
            f"The adapter is of kind {config.peft_type.value}, which puts a prompt before the model and is no part of "
            "its blocks; plan wrapper.get_base_model() without it, or use a LoRA."
        )
    return wrapper.base_model.model


def class_of(module: nn.Module) -> type[nn.Module]:
    """The module's class as it was written: without what `fully_shard` and a plan in force mix in."""
    return next(cls for cls in type(module).__mro__ if issubclass(cls, nn.Module) and not _is_mixed(cls))


def _is_mixed(cls: type) -> bool:
    return "mixed_in" in vars(cls) or SHARDED in (ancestor.__name__ for ancestor in cls.__mro__)


def block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The outermost lists of two or more modules with parameters, by dotted path."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(outer + ".") for outer in found)
        if (
            isinstance(module, nn.ModuleList)
            and len(module) > 1
            and not inside
            and any(True for _ in module.parameters())
        ):
            found[name] = module
    return found
