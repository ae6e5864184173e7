"""What of paper 3 holds at this scale, and what is ours beyond it: each claim's verdict follows from the numbers."""

from p3_results import BLOCKSKIP, LAST, LORA, Found, gain
from pages import UNTESTED, Verdict, shown, verdict

from skipwise.sizes import GIB

FLUX = "flux.1-dev"
WHOLE, HALF, THIRTY = "LoRA on all blocks", "half, patches", "30%, patches"
PAPER = (0.46, 0.65)  # of memory saved


def claims(found: Found) -> list[Verdict]:
    """Every claim of the paper."""
    large = "DINO, CLIP-I and CLIP-T of DreamBooth subjects on FLUX and SANA are on par with LoRA"
    return [
        _baseline(found),
        _saving(found),
        _measured(found),
        _on_par(found),
        _vital(found),
        _patches(found),
        (large, UNTESTED, "needs the official weights, photographs and a GPU"),
    ]


def beyond(found: Found) -> list[Verdict]:
    """Ours."""
    return [_small_card(found), _ours(found), _streamed(found), _last(found), _stale(found)]


def saved(found: Found, variant: str, model: str = FLUX) -> float:
    """Share of memory that a variant saves against LoRA on all blocks, estimated."""
    rows = found.memory["models"][model]
    return 1 - rows[variant]["peak_bytes"] / rows[WHOLE]["peak_bytes"]


def measured(found: Found, name: str) -> float:
    """The same on tiny-dit, measured."""
    return 1 - found.way(name).peak / found.way(LORA).peak


def peak(found: Found, variant: str, model: str = FLUX) -> float:
    """GiB of a training step, estimated."""
    return found.memory["models"][model][variant]["peak_bytes"] / GIB


def _baseline(found: Found) -> Verdict:
    whole = peak(found, WHOLE)
    return verdict("LoRA of FLUX at 512 px takes about 30 GiB", abs(whole - 30) < 1.5, f"estimated {whole:.2f} GiB")


def _saving(found: Found) -> Verdict:
    values = {model: saved(found, HALF, model) for model in found.memory["models"]}
    evidence = ", ".join(f"{model} {value:.1%}" for model, value in values.items())
    return verdict(
        "Half the blocks and half the picture's side save 46 to 65% of LoRA's memory",
        all(PAPER[0] <= value for value in values.values()),
        f"estimated: {evidence}",
    )


def _measured(found: Found) -> Verdict:
    value = measured(found, BLOCKSKIP)
    return verdict(
        "The same on tiny-dit, measured: at least 46%", value >= PAPER[0], f"{value:.1%} of a step's tensors"
    )


def _on_par(found: Found) -> Verdict:
    lora, ours = found.way(LORA), found.way(BLOCKSKIP)
    within = ours.similarity.value >= lora.similarity.low
    evidence = (
        f"{shown(ours.similarity)} against {shown(lora.similarity)}, paired difference {shown(gain(ours, lora))}; "
        f"prompt fidelity {shown(ours.fidelity)} against {shown(lora.fidelity)}"
    )
    return verdict("BlockSkip's subject similarity is within the interval of LoRA's, or above", within, evidence)


def _vital(found: Found) -> Verdict:
    vital = found.way(BLOCKSKIP)
    others = [found.way(name) for name in ("middle blocks", "last half, exact", "blocks by the paper's rule")]
    gains = [(other.name, gain(vital, other)) for other in others]
    evidence = f"{vital.trained}; over " + ", ".join(f"{name} {shown(value)}" for name, value in gains)
    return verdict(
        "Blocks that masking finds vital are better to train than others", all(g.low > 0 for _, g in gains), evidence
    )


def _patches(found: Found) -> Verdict:
    grown = found.way(BLOCKSKIP)
    gains = [(name, gain(grown, found.way(name))) for name in ("whole pictures, made small", "small crops alone")]
    evidence = "over " + ", ".join(f"{name} {shown(value)}" for name, value in gains)
    return verdict(
        "Crops that grow with the noise are better than crops of one size", all(g.low > 0 for _, g in gains), evidence
    )


def _small_card(found: Found) -> Verdict:
    training, making = peak(found, THIRTY), found.memory["models"][FLUX][THIRTY]["making"]["total"] / GIB
    evidence = f"estimated {training:.2f} GiB ({saved(found, THIRTY):.1%} less), making of residuals {making:.2f} GiB"
    return verdict("FLUX.1-dev at 512 px fits 6 GiB with 30% of the blocks", max(training, making) <= 6, evidence)


def _ours(found: Found) -> Verdict:
    """Early blocks stored, no late ones, whole pictures: exact, on half of the blocks."""
    lora, ours = found.way(LORA), found.way(LAST + ", checkpointing")
    holds = ours.similarity.value >= lora.similarity.low and measured(found, ours.name) >= PAPER[0]
    evidence = (
        f"similarity {shown(ours.similarity)} against {shown(lora.similarity)}, in pairs {shown(gain(ours, lora))}, "
        f"with {measured(found, ours.name):.1%} less memory (without checkpointing {measured(found, LAST):.1%}); "
        f"on FLUX {peak(found, 'last half, checkpointing'):.2f} GiB (estimated)"
    )
    return verdict(
        "The last half of the blocks, whole pictures, checkpointed: as good as LoRA at 46% less memory", holds, evidence
    )


def _streamed(found: Found) -> Verdict:
    exact, paper = found.way("late blocks streamed"), found.way(BLOCKSKIP)
    better = gain(exact, paper)
    cost = peak(found, "half, patches, late streamed") - peak(found, HALF)
    evidence = f"similarity {shown(better)} above stored residuals; on FLUX {cost:.2f} GiB more (estimated)"
    return verdict("Late blocks streamed, exact, personalise better than stored residuals", better.low > 0, evidence)


def _last(found: Found) -> Verdict:
    last, streamed = found.way("last half, exact"), found.way("late blocks streamed")
    evidence = (
        f"similarity {shown(last.similarity)} against {shown(streamed.similarity)} with vital blocks and late ones "
        f"streamed; on FLUX {peak(found, 'last half, patches'):.2f} GiB (estimated)"
    )
    return verdict(
        "Training the last half, exact without any late block, personalises as well",
        last.similarity.value >= streamed.similarity.low,
        evidence,
    )


def _stale(found: Found) -> Verdict:
    fresh, stale, exact = (found.way(name) for name in ("residuals refreshed", BLOCKSKIP, "late blocks streamed"))
    evidence = (
        f"refreshing at every step brings {shown(gain(fresh, stale))}; passing gradients too "
        f"{shown(gain(exact, fresh))} on top"
    )
    holds = gain(fresh, stale).low <= 0
    return verdict("Staleness is not what stored residuals lose by, the missing gradient is", holds, evidence)
