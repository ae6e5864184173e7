"""`bench`: every way to decode a model in turns, beside what the machine reaches at most."""

from collections.abc import Callable

from skipwise.benchmarking.ceiling import measure_ceiling
from skipwise.benchmarking.machine import machine
from skipwise.benchmarking.memory import memory_is
from skipwise.benchmarking.modes import modes
from skipwise.benchmarking.result import BenchResult
from skipwise.benchmarking.subject import Subject
from skipwise.benchmarking.timing import in_turns
from skipwise.benchmarking.work import BenchSettings, prepare_work
from skipwise.plan import Plan
from skipwise.sampling import Generated

Tell = Callable[[str, int, int], None]  # what is done, how much of it, of how much


def bench(
    subject: Subject,
    plan: Plan | None = None,
    settings: BenchSettings | None = None,
    on_progress: Tell | None = None,
) -> BenchResult:
    """Time exact decoding and every approximation that applies, without and with `plan`, in turns.

    Each mode first runs once on its own, for its peak memory and its tokens, then once in each round; before them all,
    exact decoding runs over a few tokens, so that what the libraries set up is in nobody's figures.
    Raises UserError for lengths that the model was not made for, and as `generate` does.
    """
    settings = settings or BenchSettings()
    tell = on_progress or (lambda *at: None)
    work = prepare_work(subject, plan, settings)
    tell("ceiling", 0, 1)
    ceiling = measure_ceiling(subject.device, subject.dtype)
    tell("ceiling", 1, 1)
    chosen = modes(subject.model, work.family, plan, settings.threshold, settings.compile)
    work.warm_up(chosen[0])
    first = {}
    for number, mode in enumerate(chosen):
        tell("first runs", number, len(chosen))
        first[mode.name] = work.first(mode)
    tell("first runs", len(chosen), len(chosen))
    calls: dict[str, Callable[[], Generated]] = {}
    for mode in chosen:
        calls |= work.calls(mode)
    seconds = in_turns(
        calls,
        settings.rounds,
        measure=lambda call: call().stats.seconds,
        on_round=lambda number: tell("rounds", number, settings.rounds),
    )
    tell("rounds", settings.rounds, settings.rounds)
    rows = [work.row(mode, first[mode.name], first[chosen[0].name], seconds, ceiling) for mode in chosen]
    return BenchResult(
        memory_is=memory_is(subject.device),
        rounds=settings.rounds,
        machine=machine(subject.device),
        ceiling=ceiling,
        workload=work.describe(settings),
        rows=tuple(rows),
    )
