"""Whether a model's own code counts its blocks, and what it does with the count.

A forward that loops over its blocks with a counter may use it to pick something for the block: an entry of a list that
the caller gives (a ControlNet's residuals), a number in the config, a table. With blocks removed such a counter would
pick what belongs to another block. This reads the loops in the source of the class that holds the list.
"""

import ast
import inspect
import itertools
import textwrap
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import nn

from skipwise.switches import Switch, is_off, switches
from skipwise.wrapping import class_of

Origins = Mapping[str, frozenset[str]]
Parents = Mapping[ast.AST, ast.AST]
OWN = "self."  # what the owner itself holds begins so
CONFIG = frozenset({"config's lists"})  # the counter picks from these, and from nothing else


@dataclass(frozen=True)
class Numbering:
    """always: the counter picks things at every call. arguments: it picks from these arguments of the owner's forward,
    which are optional; without them nothing minds a block's number. counts_config: it picks from the config's lists.
    carried: those of the arguments that the forward also returns, as XLNet does its memories, for the next call.
    """

    always: bool = False
    arguments: frozenset[str] = field(default_factory=frozenset)
    counts_config: bool = False
    carried: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True)
class Use:
    """A use of a counter. known: the optional arguments of the forward that it picks from; empty for anything else.
    switches: what must hold for it.
    """

    known: frozenset[str]
    switches: tuple[Switch, ...] = ()


def find_numbering(owner: nn.Module, attribute: str, per_layer: Collection[str]) -> Numbering:
    """How the class of `owner` uses the numbers of the blocks in its list `attribute`.

    per_layer: names of the config's settings that are cut with the blocks, so that a count by them is right.
    A class that says `counts_what_runs = True` counts the blocks that run, and is taken at its word. What is behind a
    switch that is off in this model is no use.
    """
    if getattr(owner, "counts_what_runs", False):
        return Numbering()
    found = _uses(class_of(owner), attribute, tuple(sorted(per_layer)))  # type: ignore[arg-type]
    uses = [use.known for use in found if not any(is_off(owner, switch) for switch in use.switches)]
    compared = {name for use in uses for name in use if name.startswith(OWN)}
    always = frozenset() in uses or any(_names_a_block(owner, attribute, name) for name in compared)
    arguments = frozenset[str]().union(*uses) - CONFIG - compared
    carried = arguments & _returned(class_of(owner), attribute) if arguments else frozenset[str]()  # type: ignore[arg-type]
    return Numbering(always, arguments, CONFIG in uses, carried)


def _names_a_block(owner: nn.Module, attribute: str, name: str) -> bool:
    """Whether what a forward compares its count with, `self.first_shared`, is the number of a block, or has some; or
    whether what it looks up by its count, `self.kinds[]`, is not the same for all.
    """
    value: Any = owner
    for part in name.removesuffix("[]").split(".")[1:]:
        value = getattr(value, part, 0)
    if name.endswith("[]"):
        return not isinstance(value, list | tuple) or any(entry != value[0] for entry in value)
    values = value if isinstance(value, list | tuple) else [value]
    return any(number in range(len(getattr(owner, attribute))) for number in values)


@cache
def _uses(cls: type, attribute: str, per_layer: tuple[str, ...]) -> tuple[Use, ...]:
    """Every use of a counter."""
    found: list[Use] = []
    for method in _methods(cls, attribute):
        optional = _optional(method) if method.name == "forward" else frozenset()
        origins = _origins(method)
        parents = {child: node for node in ast.walk(method) for child in ast.iter_child_nodes(node)}
        as_given = {name for name in optional if _is_as_given(method, name, parents)}
        loops = [node for node in ast.walk(method) if isinstance(node, ast.For) and _mentions(node.iter, attribute)]
        for loop in loops:
            for node, known in _picked(loop, attribute, per_layer, origins, parents):
                conditions = tuple(switches(node, parents))
                given = frozenset(name for name in as_given if _needs(name) in conditions)
                own = known == CONFIG or any(name.startswith(OWN) for name in known)
                found.append(Use(known if own or known <= optional else given, conditions))
    return tuple(found)


@cache
def _returned(cls: type, attribute: str) -> frozenset[str]:
    """The names under which the forward returns something."""
    forwards = [method for method in _methods(cls, attribute) if method.name == "forward"]
    results = [node.value for method in forwards for node in ast.walk(method) if isinstance(node, ast.Return)]
    calls = [result for result in results if isinstance(result, ast.Call)]
    return frozenset(keyword.arg for call in calls for keyword in call.keywords if keyword.arg)


def _methods(cls: type, attribute: str) -> Iterator[ast.FunctionDef]:
    """The methods that use the list, of the class that defines the forward and of those below it; of code without a
    source, none.
    """
    below = itertools.takewhile(lambda ancestor: "forward" not in vars(ancestor), cls.__mro__)
    depth = len(list(below)) + 1
    methods = {name: value for ancestor in reversed(cls.__mro__[:depth]) for name, value in vars(ancestor).items()}
    for name, value in methods.items():
        function = inspect.unwrap(value) if inspect.isfunction(value) else None
        if name == "__init__" or function is None or attribute not in function.__code__.co_names:
            continue
        try:
            yield ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]  # type: ignore[misc]
        except (OSError, SyntaxError):
            continue


def _optional(method: ast.FunctionDef) -> frozenset[str]:
    """The arguments whose default is None."""
    positional = method.args.posonlyargs + method.args.args
    pairs = [*zip(reversed(positional), reversed(method.args.defaults), strict=False)]
    pairs += [
        (arg, default) for arg, default in zip(method.args.kwonlyargs, method.args.kw_defaults, strict=True) if default
    ]
    return frozenset(arg.arg for arg, default in pairs if isinstance(default, ast.Constant) and default.value is None)


def _needs(argument: str) -> Switch:
    return f"{argument} is not None", True


def _is_as_given(method: ast.FunctionDef, argument: str, parents: Parents) -> bool:
    """Whether an argument that was not given stays None all through the method."""
    nodes = [node for node in ast.walk(method) if isinstance(node, ast.Name) and node.id == argument]
    made = [node for node in nodes if isinstance(node.ctx, ast.Store)]
    return all(_needs(argument) in switches(node, parents) for node in made)


def _origins(method: ast.FunctionDef) -> Origins:
    """Local name -> the arguments that it was made from."""
    origins = {arg.arg: frozenset({arg.arg}) for arg in (*method.args.args[1:], *method.args.kwonlyargs)}
    arguments = set(origins)
    for node in ast.walk(method):
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name) and target.id not in arguments:
                    origins[target.id] = origins.get(target.id, frozenset()) | _known(node.value, origins)
    return origins


def _mentions(iterated: ast.expr, attribute: str) -> bool:
    """Whether a loop goes over `self.<attribute>`, counted, beside other things, or by number."""
    return any(
        isinstance(node, ast.Attribute)
        and node.attr == attribute
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
        for node in ast.walk(iterated)
    )


def _picked(
    loop: ast.For, attribute: str, per_layer: Collection[str], origins: Origins, parents: Parents
) -> Iterator[tuple[ast.AST, frozenset[str]]]:
    """Each use of the loop's counter, or of what runs beside the blocks, and what it was made from."""
    call = loop.iter
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
        return
    beside = call.args[0] if call.func.id == "enumerate" else call
    if isinstance(beside, ast.Call) and isinstance(beside.func, ast.Name) and beside.func.id == "zip":
        yield from ((loop, _known(other, origins)) for other in beside.args if not _mentions(other, attribute))
    if call.func.id in ("enumerate", "range"):
        counter = loop.target.elts[0] if isinstance(loop.target, ast.Tuple) else loop.target
        if isinstance(counter, ast.Name):
            for name in _names(loop, counter.id):
                yield from ((name, known) for known in _use(parents.get(name), parents, attribute, per_layer, origins))


def _names(loop: ast.For, counter: str) -> Iterator[ast.Name]:
    """Where the counter is used in the loop."""
    nodes = (node for part in loop.body for node in ast.walk(part))
    return (node for node in nodes if isinstance(node, ast.Name) and node.id == counter)


def _use(
    node: ast.AST | None,
    parents: Parents,
    attribute: str,
    per_layer: Collection[str],
    origins: Origins,
) -> Iterator[frozenset[str]]:
    """What the smallest expression around a use of the counter that knows any argument was made from."""
    known: frozenset[str] = frozenset()
    while isinstance(node, ast.expr) and not known:
        other = _other_side(node)
        if other is not None:
            owner, name = ast.unparse(other.value), other.attr
            if name in per_layer and owner.endswith("config"):
                yield CONFIG
                return
            if name == attribute and owner == "self":  # the block itself
                return
            if owner.startswith("self"):
                yield frozenset({f"{owner}.{name}" + ("[]" if isinstance(node, ast.Subscript) else "")})
                return
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called.startswith("logger."):
                return
            known = _known(node.func, origins)  # who is called with a number minds it
            break
        known = _known(node, origins)
        node = parents.get(node)
    yield known


def _other_side(node: ast.expr) -> ast.Attribute | None:
    """The attribute that a count looks something up in, or is compared with."""
    other = None
    if isinstance(node, ast.Subscript):
        other = node.value
    elif isinstance(node, ast.Compare) and len(node.comparators) == 1 and isinstance(node.left, ast.Name):
        other = node.comparators[0] if isinstance(node.ops[0], ast.Eq | ast.In) else None
    return other if isinstance(other, ast.Attribute) else None


def _known(node: ast.AST, origins: Origins) -> frozenset[str]:
    """The arguments that the names in an expression were made from."""
    names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    return frozenset().union(*(origins.get(name, frozenset()) for name in names))
