"""The laws of skipping, over every covered model: skipped is removed, nothing is empty, everything comes back."""

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import skipwise as sw
from skipwise.blocks import find_contract
from skipwise.kept import PassThrough
from skipwise.plan import Phase, Plan
from skipwise.skipping import skip, whole
from tests.deleted import deleted
from tests.tiny_models import IMAGE, LANGUAGE, REFUSED, ROWS, VIDEO, example, output

CAUSAL = ["llama", "mistral", "qwen2", "qwen3", "gemma3", "smollm3", "gpt2", "gpt_neox"]


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    return {}


@pytest.fixture(params=ROWS)
def model(request: pytest.FixtureRequest, models: dict[str, nn.Module]) -> nn.Module:
    """Each row's model, built once: law 2 is what makes sharing it safe."""
    if request.param not in models:
        models[request.param] = ROWS[request.param]()
    return models[request.param]


def static(model: nn.Module, skip: dict[str, list[int]]) -> Plan:
    return Plan.static(find_contract(model).shape, skip)


def skip_sets(model: nn.Module, stack: str) -> list[set[int]]:
    """The first block, one inside, several, and the last, but where no model without the last one can be built:

    SD3's last block has a shape of its own, and DiffusionGemma's config insists on full attention in the last layer.
    """
    n = find_contract(model).stacks[stack].length
    sets = [{0}, {1}, {0, n - 2}]
    return sets if type(model).__name__.startswith(("SD3", "DiffusionGemma")) else [*sets, {n - 1}]


def test_every_row_has_its_stacks() -> None:
    assert len(LANGUAGE) >= 12
    assert len(IMAGE | VIDEO) >= 16


def test_skipped_is_removed(model: nn.Module) -> None:
    """Law 1, bit for bit, every stack."""
    inputs = example(model)
    whole = output(model, inputs)
    for stack in find_contract(model).stacks:
        for numbers in skip_sets(model, stack):
            expected = output(deleted(model, stack, numbers), inputs)
            with skip(model, static(model, {stack: sorted(numbers)})):
                actual = output(model, inputs)
            assert torch.equal(actual, expected), f"{stack} without {numbers}"
            assert not torch.equal(actual, whole), f"{stack} without {numbers} changes nothing: the law is not tested"


def test_all_stacks_at_once(model: nn.Module) -> None:
    """Law 1 for a plan over several stacks."""
    inputs = example(model)
    expected = model
    for stack in find_contract(model).stacks:
        expected = deleted(expected, stack, {1})
    plan = static(model, {stack: [1] for stack in find_contract(model).stacks})
    with skip(model, plan):
        assert torch.equal(output(model, inputs), output(expected, inputs))


def snapshot(model: nn.Module) -> list[Any]:
    """All that a plan could leave changed: modules and their attributes, hooks, parameters, the config."""
    state: list[Any] = []
    for name, module in model.named_modules():
        plain = {k: v for k, v in vars(module).items() if isinstance(v, int | float | str | bool | tuple)}
        hooks = {k: len(v) for k, v in vars(module).items() if "hooks" in k and isinstance(v, dict)}
        state.append((name, id(module), list(module._modules), plain, hooks, "forward" in vars(module)))
    state.append([(name, id(p), p.detach().clone()) for name, p in model.named_parameters()])
    state.append(copy.deepcopy(model.config.to_dict() if hasattr(model.config, "to_dict") else dict(model.config)))
    return state


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def test_empty_plan_is_the_untouched_model(model: nn.Module) -> None:
    """Law 2."""
    inputs = example(model)
    before, expected = snapshot(model), output(model, inputs)
    with skip(model, static(model, {})):
        assert same(snapshot(model), before)
        assert torch.equal(output(model, inputs), expected)


def test_everything_comes_back(model: nn.Module) -> None:
    """Law 2: after the `with`, after an exception in it, and when nested."""
    inputs = example(model)
    stack = find_contract(model).main_stack
    one, two = static(model, {stack: [0]}), static(model, {stack: [1]})
    before, expected = snapshot(model), output(model, inputs)
    with skip(model, one):
        assert not same(snapshot(model), before)
    assert same(snapshot(model), before)
    with pytest.raises(RuntimeError, match="in the middle"), skip(model, one), skip(model, two):
        raise RuntimeError("in the middle")
    assert same(snapshot(model), before)
    assert torch.equal(output(model, inputs), expected)


def test_nested_plans_add_up(model: nn.Module) -> None:
    """Block numbers mean the whole model's, inside another plan too; leaving the inner one restores the outer."""
    inputs = example(model)
    stack = find_contract(model).main_stack
    with skip(model, static(model, {stack: [0, 2]})):
        both = output(model, inputs)
    with skip(model, static(model, {stack: [0]})):
        outer = output(model, inputs)
        with skip(model, static(model, {stack: [2]})):
            assert torch.equal(output(model, inputs), both)
        assert torch.equal(output(model, inputs), outer)


def test_plans_put_aside_stay_aside(model: nn.Module) -> None:
    """`whole` inside of `whole`, and a plan inside of it: each leaves what it found."""
    inputs = example(model)
    stack = find_contract(model).main_stack
    before, expected = snapshot(model), output(model, inputs)
    with skip(model, static(model, {stack: [1]})):
        cut = output(model, inputs)
        with whole(model):
            with whole(model):
                assert torch.equal(output(model, inputs), expected)
            with skip(model, static(model, {stack: [1]})):
                assert torch.equal(output(model, inputs), cut)
            assert torch.equal(output(model, inputs), expected)
        assert torch.equal(output(model, inputs), cut)
    assert same(snapshot(model), before)


def test_all_blocks_skipped(model: nn.Module) -> None:
    """Law 3: what enters the first block comes out behind the last, in every stack."""
    inputs = example(model)
    contract = find_contract(model)
    lengths = {name: stack.length for name, stack in contract.stacks.items()}
    plan = static(model, {name: list(range(length)) for name, length in lengths.items()})
    bare = copy.deepcopy(model)
    for stack in contract.stacks.values():
        for path in (stack.name, *stack.coupled):
            for block in bare.get_submodule(path):
                block.forward = identity(block, stack)
    with skip(model, plan):
        assert torch.equal(output(model, inputs), output(bare, inputs))


def identity(block: nn.Module, stack: Any) -> Any:
    """A forward, written out by hand, that returns the streams in their places."""
    import inspect

    signature = inspect.signature(block.forward)

    def forward(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs).arguments
        if stack.returns is None:
            return arguments[stack.streams[0].argument]
        result: list[Any] = [None] * stack.returns
        for stream in stack.streams:
            result[stream.output] = arguments[stream.argument]
        return tuple(result)

    return forward


def test_all_blocks_skipped_is_head_of_norm_of_embedding() -> None:
    """Law 3, spelled out for models whose ends have names."""
    ids = torch.arange(8)[None]
    llama, gpt2 = ROWS["llama"](), ROWS["gpt2"]()
    with torch.no_grad():
        expected = llama.lm_head(llama.model.norm(llama.model.embed_tokens(ids)))
        with skip(llama, static(llama, {"model.layers": [0, 1, 2, 3]})):
            assert torch.equal(llama(ids).logits, expected)
        embedded = gpt2.transformer.wte(ids) + gpt2.transformer.wpe(torch.arange(8)[None])
        with skip(gpt2, static(gpt2, {"transformer.h": [0, 1, 2, 3]})):
            assert torch.equal(gpt2(ids).logits, gpt2.lm_head(gpt2.transformer.ln_f(embedded)))


def test_a_skipped_block_costs_nothing(model: nn.Module) -> None:
    """Law 4: the block is gone, or a bare pass-through stands in its place; no hook is left anywhere."""
    for name, stack in find_contract(model).stacks.items():
        before = snapshot(model)
        with skip(model, static(model, {name: [1]})):
            blocks = model.get_submodule(name)
            stand_ins = [block for block in blocks if isinstance(block, PassThrough)]
            assert len(blocks) - len(stand_ins) == stack.length - 1
            assert len(stand_ins) == (1 if stack.in_place else 0)
            hooks = [
                v for m in model.modules() for k, v in vars(m).items() if "hooks" in k and isinstance(v, dict) and v
            ]
            assert len(hooks) == sum(bool(n) for row in before[:-2] for n in row[4].values())
            assert not any("forward" in vars(block) for block in blocks)


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("numbers", [[0], [1], [0, 1, 2]])
def test_cache_works_under_a_plan(name: str, numbers: list[int], models: dict[str, nn.Module]) -> None:
    """`generate` with a KV cache equals the deleted model, token for token, with and without its cache."""
    model = models.setdefault(name, ROWS[name]())
    stack = find_contract(model).main_stack
    short = deleted(model, stack, set(numbers))
    ids = torch.arange(3, 13).view(2, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    settings: dict[str, Any] = dict(
        attention_mask=mask, max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    expected = short.generate(ids, use_cache=True, **settings)
    with skip(model, static(model, {stack: numbers})):
        assert torch.equal(model.generate(ids, use_cache=True, **settings), expected)
    assert torch.equal(short.generate(ids, use_cache=False, **settings), expected)


def test_caches_are_built_for_the_blocks_that_are_left() -> None:
    """Head widths (DiffusionGemma overrides them by layer number) and windows are those of the kept blocks."""
    model = ROWS["diffusion_gemma"]()
    config, kept = model.config.text_config, [0, 2, 3, 5]
    whole = [(config.per_layer_config[i].head_dim, config.layer_types[i]) for i in range(6)]
    assert len(set(whole)) == 2
    with skip(model, static(model, {"model.decoder.layers": [1, 4]})):
        left = [(config.per_layer_config[i].head_dim, config.layer_types[i]) for i in range(4)]
        assert left == [whole[i] for i in kept]
        layers = transformers.DynamicCache(config=config).layers
        windows = [getattr(layer, "sliding_window", None) for layer in layers]
        assert windows == [4 if kind == "sliding_attention" else None for _, kind in left]
    assert [(config.per_layer_config[i].head_dim, config.layer_types[i]) for i in range(6)] == whole


@pytest.mark.parametrize("name", ["flux", "chroma", "sd3", "wan"])
def test_under_gradient_checkpointing(name: str) -> None:
    """diffusers passes arguments by position there; the streams are bound by signature."""
    model = ROWS[name]()
    inputs = example(model)
    model.enable_gradient_checkpointing()
    model.train()
    stack = find_contract(model).main_stack
    assert find_contract(model).stacks == find_contract(ROWS[name]()).stacks
    expected = output(deleted(model, stack, {1}), inputs)
    with skip(model, static(model, {stack: [1]})):
        model(**inputs)[0].sum().backward()
        assert torch.equal(output(model, inputs), expected)


def test_phases_switch_the_skip_set() -> None:
    model = ROWS["llada"]()
    inputs = example(model)
    phases = (Phase(until=0.5, skip={"model.layers": (1,)}), Phase(until=1.0, skip={"model.layers": (0, 2)}))
    plan = Plan(model=find_contract(model).shape, phases=phases)
    whole = output(model, inputs)
    early, late = (output(deleted(model, "model.layers", numbers), inputs) for numbers in ({1}, {0, 2}))
    with skip(model, plan) as skipping:
        assert torch.equal(output(model, inputs), early)
        skipping.at(0.5)
        assert torch.equal(output(model, inputs), late)
        skipping.at(0.49)
        assert torch.equal(output(model, inputs), early)
    assert torch.equal(output(model, inputs), whole)


@pytest.mark.parametrize("name", REFUSED)
def test_long_skips_are_refused_with_the_reason(name: str) -> None:
    with pytest.raises(sw.UserError, match=r"block 4 also takes the output of block 1 as `skip`"):
        find_contract(REFUSED[name]())


def test_a_plan_for_another_model_is_refused() -> None:
    llama, gemma = ROWS["llama"](), ROWS["gemma3"]()
    with (
        pytest.raises(sw.UserError, match="architecture 'LlamaForCausalLM', but the model has 'Gemma3ForCausalLM'"),
        skip(gemma, static(llama, {"model.layers": [1]})),
    ):
        pass


def test_a_failing_edit_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception while blocks are being taken out leaves the model whole."""
    from skipwise import cuts

    model = ROWS["gemma3"]()
    before = snapshot(model)

    def broken(*_: Any) -> None:
        raise RuntimeError("no config today")

    monkeypatch.setattr(cuts, "_shorten", broken)
    with pytest.raises(RuntimeError, match="no config"), skip(model, static(model, {"model.layers": [0, 2]})):
        pass
    assert same(snapshot(model), before)
