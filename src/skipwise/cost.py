"""FLOPs, bytes and memory of a model under a plan. Never allocates a weight: works on a model on the meta device.

FLOPs follow from formulas, evaluated on the shapes of one forward: a matrix product of (rows, inner) by (inner,
columns) costs 2 * rows * inner * columns; attention 2 * queries * keys * (key width + value width) for every head and
example, masked or not; a convolution 2 * outputs * inputs per output. Everything else is not counted, as in the papers
and in torch's own counter, against which the tests hold this one. Tokens are taken to meet
experts evenly, each token as many as it is routed to. A quantised layer costs the FLOPs of the plain one, and the bytes
that are stored.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from skipwise.blocks import Contract, find_contract, module_list
from skipwise.errors import unknown
from skipwise.examples import Size, example_inputs, on_meta, run_example, shapes_only
from skipwise.models import head_of
from skipwise.plan import Phase, Plan
from skipwise.quantised import Stored, bytes_of
from skipwise.skipping import whole
from skipwise.twins import meta_twin
from skipwise.wrapping import unwrap


@dataclass
class Price:
    """What a part of a model costs in one forward.

    flops: all counted FLOPs, of which attention_flops are score and value products (they grow with length squared);
    weight_bytes: parameters, as they are stored; activation_bytes: what its matrix products and attentions write.
    """

    flops: int = 0
    attention_flops: int = 0
    weight_bytes: int = 0
    activation_bytes: int = 0

    def __add__(self, other: "Price") -> "Price":
        return Price(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Price)))


Skip = Mapping[str, Collection[int]]  # stack -> block numbers


@dataclass(frozen=True)
class Prices:
    """The price of every block and of all that is outside of the blocks, at one input size; of each stack, also the
    price of a linear map in the place of a block. head: the part of `outside` that makes logits of states, of a model
    that can make them at some positions alone (`skipwise.models.head_of`); nothing of others.
    """

    blocks: Mapping[str, tuple[Price, ...]]
    outside: Price
    linear: Mapping[str, Price] = field(default_factory=dict)
    size: Size | None = None
    head: Price = field(default_factory=Price)

    def of_blocks(self, skip: Skip | None = None, linear: Skip | None = None) -> Price:
        """All blocks but the skipped ones, and the linear maps that those in `linear` leave behind."""
        skip = skip or {}
        kept = [p for name, row in self.blocks.items() for i, p in enumerate(row) if i not in skip.get(name, ())]
        maps = [self.linear[name] for name, numbers in (linear or {}).items() for _ in numbers]
        return sum(kept + maps, Price())

    def per_row(self, rows: int) -> "Prices":
        """These prices, which are of a forward of several examples, for one of them. Weights are what they were."""

        def part(price: Price) -> Price:
            return replace(
                price,
                flops=price.flops // rows,
                attention_flops=price.attention_flops // rows,
                activation_bytes=price.activation_bytes // rows,
            )

        blocks = {name: tuple(map(part, row)) for name, row in self.blocks.items()}
        linear = {name: part(p) for name, p in self.linear.items()}
        return Prices(blocks, part(self.outside), linear, self.size, part(self.head))

    def at(self, tokens: int, other: "Prices") -> "Prices":
        """The prices of so many tokens, from these and those of another number: what is attention grows with the
        square of the tokens, all else evenly. Weights are what they were.
        """
        if self.size is None or other.size is None:
            raise ValueError("prices without a size cannot be scaled")
        here, there = self.size.tokens, other.size.tokens

        def part(low: Price, high: Price) -> Price:
            attention = low.attention_flops * tokens**2 // here**2
            rest, more = low.flops - low.attention_flops, high.flops - high.attention_flops
            flops = attention + rest + (more - rest) * (tokens - here) // (there - here)
            written = low.activation_bytes
            written += (high.activation_bytes - written) * (tokens - here) // (there - here)
            return replace(low, flops=flops, attention_flops=attention, activation_bytes=written)

        blocks = {name: tuple(map(part, row, other.blocks[name])) for name, row in self.blocks.items()}
        linear = {name: part(p, other.linear[name]) for name, p in self.linear.items()}
        outside, head = part(self.outside, other.outside), part(self.head, other.head)
        return Prices(blocks, outside, linear, replace(self.size, tokens=tokens), head)

    def forward(self, skip: Skip | None = None, linear: Skip | None = None) -> Price:
        """One forward with these blocks skipped."""
        return self.of_blocks(skip, linear) + self.outside


@dataclass(frozen=True)
class Cost:
    """A model under a plan, per denoising step on average over the trajectory, and what the plan saves.

    saved_block_flops: fraction of the FLOPs of the blocks (the papers' count); saved_head_flops: fraction when the
    rest of the model, mainly the language-model head, is counted too but attention products are not (paper 1's second
    figure); saved_all_in_flops: fraction of everything, attention at this input size included.
    weight_bytes: what must be held; activation_bytes: written in the costliest phase.
    """

    block_flops: float
    all_in_flops: float
    weight_bytes: int
    activation_bytes: int
    saved_block_flops: float
    saved_head_flops: float
    saved_all_in_flops: float


def estimate(
    model: nn.Module,
    plan: Plan | None = None,
    size: Size | None = None,
    others: Mapping[str, nn.Module] | None = None,
    example: Mapping[str, Any] | None = None,
) -> Cost:
    """Price a model under a plan. `others` are the models that phases name, `size` how large the forward is.

    Raises UserError when the plan was made for another model or names a model that `others` lacks.
    """
    contract = find_contract(model, example)
    if plan is not None:
        plan.check_model(contract.shape)
    prices = price_blocks(model, size, contract, example)
    named = {name: price_blocks(other, size) for name, other in (others or {}).items()}
    return cost_of(prices, plan, named)


def cost_of(prices: Prices, plan: Plan | None, others: Mapping[str, Prices] | None = None) -> Cost:
    """`estimate` from prices that are already known; arithmetic only."""
    whole_blocks, whole = prices.of_blocks(), prices.forward()
    block = head = all_in = begun = 0.0
    activation = 0
    resident: dict[str | None, tuple[dict[str, tuple[int, ...]], Prices]] = {}
    maps = 0
    for phase in plan.phases if plan else (Phase(),):
        source = prices if phase.model is None else _other(others or {}, phase.model)
        part, begun = phase.until - begun, phase.until
        linear = phase.skip if phase.stand_in == "linear" else {}
        blocks, forward = source.of_blocks(phase.skip, linear), source.forward(phase.skip, linear)
        maps += blocks.weight_bytes - source.of_blocks(phase.skip).weight_bytes
        block += part * blocks.flops
        head += part * (forward.flops - forward.attention_flops)
        all_in += part * forward.flops
        activation = max(activation, forward.activation_bytes)
        resident[phase.model] = _needed(resident.get(phase.model), phase.skip), source
    return Cost(
        block_flops=block,
        all_in_flops=all_in,
        weight_bytes=maps + sum(source.forward(never).weight_bytes for never, source in resident.values()),
        activation_bytes=activation,
        saved_block_flops=1 - block / whole_blocks.flops,
        saved_head_flops=1 - head / (whole.flops - whole.attention_flops),
        saved_all_in_flops=1 - all_in / whole.flops,
    )


def _other(others: Mapping[str, Prices], name: str) -> Prices:
    if name not in others:
        raise unknown("model in a plan's phase", name, others)
    return others[name]


def _needed(before: tuple[dict, Prices] | None, skip: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Blocks that no phase so far has run: skipped before and skipped now."""
    if before is None:
        return dict(skip)
    return {name: tuple(set(numbers) & set(skip.get(name, ()))) for name, numbers in before[0].items()}


HEAD = ("", 0)  # owner of what the head takes; no stack has this name

_known: WeakKeyDictionary[nn.Module, dict[Size, Prices]] = WeakKeyDictionary()


def price_blocks(
    model: nn.Module,
    size: Size | None = None,
    contract: Contract | None = None,
    example: Mapping[str, Any] | None = None,
) -> Prices:
    """Price every block of a model by one forward on shapes alone; the model itself is neither run nor changed.

    Prices are remembered for each model and size."""
    model, size = unwrap(model), size or Size()
    known = _known.setdefault(model, {})
    if example is not None or size not in known:
        with whole(model):
            prices = _price(model, size, contract or find_contract(model, example), example)
        if example is not None:
            return prices
        known[size] = prices
    return known[size]


def _price(model: nn.Module, size: Size, contract: Contract, example: Mapping[str, Any] | None) -> Prices:
    twin = meta_twin(model)
    owners = {
        block: (name, i)
        for name, stack in contract.stacks.items()
        for path in (name, *stack.coupled)
        for i, block in enumerate(module_list(twin, path))
    }
    head = head_of(twin)
    if head is not None:
        owners[head] = HEAD
    meter = Meter()
    inputs = example_inputs(twin, size, device="meta") if example is None else on_meta(twin, example)
    streams: dict[str, Tensor] = {}
    with _attributing(meter, owners), _watching(twin, contract, streams), shapes_only(), meter:
        run_example(twin, inputs)
    _add_weights(meter, twin, owners)
    blocks = {
        name: tuple(meter.prices.get((name, i), Price()) for i in range(stack.length))
        for name, stack in contract.stacks.items()
    }
    # what looks at pictures alone does not run on text, and costs nothing then
    linear = {name: _linear_map(streams[name]) if name in streams else Price() for name in blocks}
    outside, made = meter.prices.get(None, Price()), meter.prices.get(HEAD, Price())
    return Prices(blocks, outside + made, linear, size, made)


def _linear_map(stream: Tensor) -> Price:
    """A map of a stream (..., width) onto itself (`skipwise.stand_ins.Linear`)."""
    width, size = stream.shape[-1], stream.element_size()
    return Price(2 * stream.numel() * width, 0, (width + 1) * width * size, stream.numel() * size)


@contextmanager
def _watching(model: nn.Module, contract: Contract, streams: dict[str, Tensor]) -> Iterator[None]:
    """Note the first stream that comes out of each stack's first block."""

    def note(name: str, output: int | None, result: Any) -> None:
        streams[name] = result if output is None else result[output]

    handles = [
        module_list(model, name)[0].register_forward_hook(
            lambda module, args, result, name=name, output=stack.streams[0].output: note(name, output, result)
        )
        for name, stack in contract.stacks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _attributing(meter: "Meter", owners: Mapping[nn.Module, tuple[str, int]]) -> Iterator[None]:
    """Charge what runs inside a block to that block."""
    handles = []
    for block, owner in owners.items():
        handles.append(block.register_forward_pre_hook(lambda *_, owner=owner: meter.enter(owner)))
        handles.append(block.register_forward_hook(lambda *_: meter.enter(None)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add_weights(meter: "Meter", model: nn.Module, owners: Mapping[nn.Module, tuple[str, int]]) -> None:
    """Charge every parameter once: to the first block that holds it, or to the head, or to the outside."""
    seen: set[int] = set()

    def charge(whole: nn.Module, owner: tuple[str, int] | None) -> None:
        for module in whole.modules():
            new = [p for p in module.parameters(recurse=False) if id(p) not in seen]
            seen.update(map(id, new))
            if new:
                packed = {id(module.weight): module.stored} if isinstance(module, Stored) else {}
                size = sum(packed.get(id(p)) or bytes_of(p) for p in new)
                meter.prices.setdefault(owner, Price()).weight_bytes += size

    for block, owner in owners.items():
        charge(block, owner)
    charge(model, None)


def _matmul(out: Tensor, a: Tensor, *_: Any, **__: Any) -> int:
    return 2 * out.numel() * a.shape[-1]


def _addmm(out: Tensor, bias: Tensor, *factors: Any, **named: Any) -> int:
    first = next(x for x in (*factors, named.get("mat1"), named.get("batch1")) if isinstance(x, Tensor))
    return 2 * out.numel() * first.shape[-1]


def _convolution(out: Tensor, x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return 2 * out.numel() * math.prod(weight.shape[1:])


def _einsum(out: Tensor, equation: str, *operands: Any, **__: Any) -> int:
    tensors = operands[0] if isinstance(operands[0], tuple | list) else operands
    if len(tensors) < 2:  # a permutation
        return 0
    terms = zip(equation.replace(" ", "").split("->")[0].split(","), tensors, strict=True)
    sizes = {
        letter: n for term, tensor in terms for letter, n in zip(_letters(term, tensor), tensor.shape, strict=True)
    }
    return 2 * math.prod(sizes.values())


def _letters(term: str, tensor: Tensor) -> str:
    """One letter for each dimension; those that an ellipsis stands for are counted from the right, as torch does."""
    before, dots, behind = term.partition("...")
    left = tensor.ndim - len(before) - len(behind)
    return before + "0123456789"[:left][::-1] + behind if dots else term


def _attention(out: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    # (..., heads, queries, key width), (..., key heads, keys, key width), (..., key heads, keys, value width)
    return 2 * query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])


# function name -> FLOPs from its output and arguments
FORMULAS: dict[str, Callable[..., int]] = {
    "linear": _matmul,
    "matmul": _matmul,
    "__matmul__": _matmul,
    "mm": _matmul,
    "bmm": _matmul,
    "addmm": _addmm,
    "baddbmm": _addmm,
    "_grouped_mm": _matmul,
    "grouped_mm": _matmul,
    "conv1d": _convolution,
    "conv2d": _convolution,
    "conv3d": _convolution,
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
}


@dataclass
class Meter(TorchFunctionMode):
    """Adds up the FLOPs and written bytes of every priced function, by the owner that is current."""

    prices: dict[tuple[str, int] | None, Price] = field(default_factory=dict)
    owner: tuple[str, int] | None = None

    def __post_init__(self) -> None:
        super().__init__()

    def enter(self, owner: tuple[str, int] | None) -> None:
        """Charge what follows to this owner; None is everything outside of the blocks."""
        self.owner = owner

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function and charge it."""
        out = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "")
        if name in FORMULAS:
            flops = FORMULAS[name](out, *args, **(kwargs or {}))
            price = self.prices.setdefault(self.owner, Price())
            price.flops += flops
            price.attention_flops += flops if name == "scaled_dot_product_attention" else 0
            price.activation_bytes += out.numel() * out.element_size()
        return out
