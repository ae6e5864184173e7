"""What is never reached in a model's code, because a switch of this very model is off.

A forward may do something for one block alone `if self.conv is not None`. Of a model that has no such part nothing
comes of it. A switch is what only `__init__` sets: whatever other methods, or users, may turn on later is none.
"""

import ast
import dis
import inspect
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from torch import nn

from skipwise.wrapping import class_of

Switch = tuple[str, bool]  # an expression, and what it must be for the code to be reached
CHANGING = frozenset({"training", "gradient_checkpointing"})  # set from outside
PLAIN = (bool, int, float, str, type(None))


def switches(node: ast.AST, parents: Mapping[ast.AST, ast.AST]) -> Iterator[Switch]:
    """All conditions under which the code at `node` does anything. parents: of every node of its method."""
    while node in parents:
        child, node = node, parents[node]
        if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.And):
            yield from ((ast.unparse(other), True) for other in node.values if other is not child)
        elif isinstance(node, ast.IfExp) and child is not node.test:
            yield ast.unparse(node.test), child is node.body
        elif isinstance(node, ast.If) and child is not node.test:
            yield ast.unparse(node.test), child in node.body


def is_off(owner: nn.Module, switch: Switch) -> bool:
    """Whether the condition can never hold for this owner, as far as can be told."""
    text, wanted = switch
    truth = _truth(owner, ast.parse(text, mode="eval").body)
    return truth is not None and truth != wanted


def _truth(owner: nn.Module, node: ast.expr) -> bool | None:
    """Whether an expression is true; None where that cannot be told beforehand."""
    if isinstance(node, ast.BoolOp):
        truths = [_truth(owner, value) for value in node.values]
        decides = isinstance(node.op, ast.Or)  # one such value is enough
        return decides if decides in truths else None if None in truths else not decides
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        truth = _truth(owner, node.operand)
        return None if truth is None else not truth
    if isinstance(node, ast.Compare):
        return _is_none(owner, node)
    known, value = _value(owner, node)
    return bool(value) if known and isinstance(value, PLAIN) else None


def _is_none(owner: nn.Module, node: ast.Compare) -> bool | None:
    """Of `self.part is None` and `self.part is not None`."""
    operator, (other, *_) = node.ops[0], node.comparators
    known, value = _value(owner, node.left)
    if not known or not isinstance(operator, ast.Is | ast.IsNot) or ast.unparse(other) != "None":
        return None
    return (value is None) == isinstance(operator, ast.Is)


def _value(owner: nn.Module, node: ast.expr) -> tuple[bool, Any]:
    """(whether it is known, value) of `self.part.of.it`."""
    names = ast.unparse(node).split(".")
    if names[0] != "self" or not all(name.isidentifier() for name in names) or len(names) < 2:
        return False, None
    if names[1] in CHANGING or names[1] in _set_later(class_of(owner)):  # type: ignore[arg-type]
        return False, None
    value: Any = owner
    for name in names[1:]:
        if not hasattr(value, name):
            return False, None
        value = getattr(value, name)
    return True, value


@cache
def _set_later(cls: type) -> frozenset[str]:
    """The attributes that methods other than `__init__` set."""
    methods = [value for part in cls.__mro__ for name, value in vars(part).items() if name != "__init__"]
    functions = [inspect.unwrap(value) for value in methods if inspect.isfunction(value)]
    stored = (step for function in functions for step in dis.get_instructions(function) if step.opname == "STORE_ATTR")
    return frozenset(str(step.argval) for step in stored)
