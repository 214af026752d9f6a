"""The paper's claims beside what was found: what it says, what we found, and whether that is the same."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import numpy as np

from equipoise_trainer.reproduction.findings import Findings, median
from equipoise_trainer.reproduction.scaling import Interval, ScalingFound

Verdict: TypeAlias = Literal["yes", "partly", "no", "not run"]
"""Whether a claim was reproduced."""

Found: TypeAlias = Mapping[str, Sequence[Findings]]
"""Findings by study, by seed."""

PAPER_PERCEPTRON: Final = 5.50
PAPER_TRANSFORMER: Final = 2.41
FEW: Final = 10.0
"""From here on an acceleration is told with one digit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One line of the table.

    Attributes:
        what: the claim.
        paper: what the paper has.
        ours: what was found.
        verdict: whether it was reproduced.
        why: what the verdict rests on, or why it is not reached.
    """

    what: str
    paper: str
    ours: str
    verdict: Verdict
    why: str


def perceptron_claims(found: Found) -> list[Claim]:
    """The claims about the perceptron, from the studies that were run."""
    return [
        _acceleration(
            found,
            "paper-512",
            what="Perceptron: acceleration, the paper's protocol (clean labels, M = 512)",
            why="512 target examples are overfitted: what is gained on them is not gained on unseen ones. The paper "
            "says that its metrics are on unseen data. Its data generator is not published.",
        ),
        _acceleration(
            found,
            "paper-4096",
            what="Perceptron: acceleration, clean labels, M = 4096",
            why="With clean labels nearly every example is useful. Uniform steps of the same length (norm-matched) are "
            "about as fast on unseen data: here the policy gains by longer steps.",
        ),
        _acceleration(
            found,
            "noisy-512",
            what="Perceptron: acceleration, noisy margins as in the paper's code, M = 512",
            why="The released code has options for noisy training labels that the text does not mention. With them "
            "uniform training stops improving early, so that whatever takes longer steps is there sooner, norm-matched "
            "uniform too. What only the policy does is to go on to a much lower loss.",
        ),
        _acceleration(
            found,
            "noisy-4096",
            what="Perceptron: acceleration, noisy margins, M = 4096",
            why="As with M = 512, and the target is not overfitted: the policy is as fast on unseen examples.",
        ),
        _area(found),
        _compression(found),
        _sim(found),
        _nonpositive(found),
        _learned(found),
        _redundant(found),
        _flips(found),
    ]


def transformer_claim(runs: Sequence[Findings]) -> Claim:
    """The claim about the transformer."""
    what = "Transformer: acceleration, the paper's model family and noise"
    paper = f"×{PAPER_TRANSFORMER:.2f}"
    if not runs:
        return Claim(what=what, paper=paper, ours="–", verdict="not run", why="")
    target, test = (median([run.accelerations[split] for run in runs]) for split in (0, 1))
    matched = [median([run.matched[split] for run in runs]) for split in (0, 1)]
    rises = [run.area_rises for run in runs]
    verdict: Verdict = "no"
    if test is not None and test >= max(PAPER_TRANSFORMER, matched[1] or 0.0):
        verdict = "yes"
    elif target is not None and target >= PAPER_TRANSFORMER:
        verdict = "partly"
    return Claim(
        what=what,
        paper=paper,
        ours=f"{faster(target)} on target ({each(runs, lambda run: run.accelerations[0])}), {faster(test)} unseen "
        f"({each(runs, lambda run: run.accelerations[1])}); norm-matched uniform {faster(matched[0])} and "
        f"{faster(matched[1])}; area on target {_mean(runs, lambda run: run.areas[0]):.3f} → "
        f"{_mean(runs, lambda run: run.final_areas[0]):.3f} nats, measured epochs at which it rose: {max(rises)}; SIM "
        f"{_mean(runs, lambda run: run.sim[0]):.2f} → {_mean(runs, lambda run: run.sim[1]):.2f}",
        verdict=verdict,
        why="The model and the corpus are far smaller than the paper's, and T is shorter. Half of the training "
        "sequences are noise that a policy can leave out.",
    )


def scaling_claims(found: Sequence[ScalingFound]) -> list[Claim]:
    """The claims about the scaling law: only the acceleration and the sign of the change of β count."""
    what = "Scaling law L0 + (B/t)^β: B falls and β rises"
    paper = "B −96.6 %, β +21.2 % (text and Figure 11); −93.7 %, +16.7 % (Table 1); −93.7 %, +18.7 % (Table 2)"
    why = (
        "The paper's own three places differ. In brackets: the middle 90 % of bootstrap samples over seeds and "
        "windows. With another L0 the same curves give another β at nearly the same r²; what a fit determines is the "
        "acceleration (Eq. 9)."
    )
    if not found:
        return [Claim(what=what, paper=paper, ours="–", verdict="not run", why=why)]
    lines = []
    for each_found in found:
        fit, samples = each_found.fit, each_found.samples
        scale = Interval.of([-100 * sample.scale_change for sample in samples])
        exponent = Interval.of([100 * sample.exponent_change for sample in samples])
        eq9 = Interval.of([sample.acceleration for sample in samples])
        lines.append(
            f"{each_found.name}: B {-100 * fit.scale_change:+.1f} % ({scale:+.1f}), "
            f"β {100 * fit.exponent_change:+.1f} % ({exponent:+.1f}), "
            f"Eq. 9 ×{fit.acceleration:.2f} ({eq9:.2f}), measured {faster(each_found.measured)}"
        )
    sooner = [sample.acceleration > 1 for each_found in found for sample in each_found.samples]
    steeper = [sample.exponent_change > 0 for each_found in found for sample in each_found.samples]
    verdict: Verdict = "no"
    if np.mean(sooner) >= 0.95:
        verdict = "yes" if np.mean(steeper) >= 0.95 else "partly"
    return [Claim(what=what, paper=paper, ours="; ".join(lines), verdict=verdict, why=why)]


def _acceleration(found: Found, name: str, *, what: str, why: str) -> Claim:
    runs = found.get(name)
    paper = f"×{PAPER_PERCEPTRON:.2f}"
    if not runs:
        return Claim(what=what, paper=paper, ours="–", verdict="not run", why="")
    target, test = (median([run.accelerations[split] for run in runs]) for split in (0, 1))
    matched = [median([run.matched[split] for run in runs]) for split in (0, 1)]
    ours = (
        f"{faster(target)} on target ({each(runs, lambda run: run.accelerations[0])}), {faster(test)} unseen "
        f"({each(runs, lambda run: run.accelerations[1])}); norm-matched "
        f"uniform {faster(matched[0])} and {faster(matched[1])}; loss at the end, unseen: uniform "
        f"{_mean(runs, lambda run: run.ends[1]):.3f}, norm-matched {_mean(runs, lambda run: run.matched_ends[1]):.3f}, "
        f"policy {_mean(runs, lambda run: run.final_ends[1]):.3f}"
    )
    verdict: Verdict = "no"
    if test is not None and test >= max(PAPER_PERCEPTRON, matched[1] or 0.0):
        verdict = "yes"
    elif target is not None and target >= PAPER_PERCEPTRON:
        verdict = "partly"
    return Claim(what=what, paper=paper, ours=ours, verdict=verdict, why=why)


def _area(found: Found) -> Claim:
    rows = [(name, runs) for name, runs in found.items() if runs]
    ours = "; ".join(
        f"{name} {_mean(runs, lambda run: run.areas[0]):.3f} → {_mean(runs, lambda run: run.final_areas[0]):.3f} "
        f"({_rises(runs)})"
        for name, runs in rows
    )
    every = [run for _, runs in rows for run in runs]
    lower = all(run.final_areas[0] < run.areas[0] for run in every)
    steadily = all(run.area_rises == 0 for run in every)
    return Claim(
        what="The policy search lowers the area under the target-loss curve, nats, over policy epochs",
        paper="falls (Eq. 6 is a descent)",
        ours=ours or "–",
        verdict="not run" if not rows else "yes" if lower and steadily else "partly" if lower else "no",
        why="At the measured policy epochs; rises: in the worst seed. The first moves are the largest: at full ε they "
        "overshoot, so that in some studies the step grows to ε over ten policy epochs (see the settings below).",
    )


def _rises(runs: Sequence[Findings]) -> str:
    most = max(run.area_rises for run in runs)
    largest = max(run.largest_rise for run in runs)
    return f"rises: {most}, of up to {100 * largest:.1f} %" if most else "never rose"


def _compression(found: Found) -> Claim:
    what = "The policy search raises the compression ratio (T·log|V| / Σ loss, on target)"
    rows = [(name, runs) for name, runs in found.items() if runs]
    ours = "; ".join(
        f"{name} {_mean(runs, lambda run: run.compression[0]):.2f} → {_mean(runs, lambda run: run.compression[1]):.2f}"
        for name, runs in rows
    )
    risen = all(run.compression[1] > run.compression[0] for _, runs in rows for run in runs)
    return Claim(
        what=what,
        paper="4 → above 6 (Figure 4a; reading its axis, in consistent units)",
        ours=ours or "–",
        verdict="not run" if not rows else "yes" if risen else "partly",
        why="Base-free: ln|V| over nats, or log2|V| over bits. Where losses in nats meet log2|V|, as Figure 4b seems "
        f"to have it, multiply by {math.log2(math.e):.2f}.",
    )


def _sim(found: Found) -> Claim:
    runs = found.get("paper-4096")
    what = "The Learning Law: contributions become alike (SIM rises with the compression ratio)"
    if not runs:
        return Claim(what=what, paper="SIM_t rises, 0 to 0.75", ours="–", verdict="not run", why="")
    ratio = min(run.sim_ratio for run in runs)
    rank = min(run.spearman for run in runs)
    effective = min(run.effective_share[0] for run in runs)
    ours = (
        f"paper-4096: SIM {_mean(runs, lambda run: run.sim[0]):.3f} → {_mean(runs, lambda run: run.sim[1]):.3f} "
        f"(at least ×{ratio:.1f} in every seed), with the adjoint {_mean(runs, lambda run: run.adjoint_sim[0]):.2f} → "
        f"{_mean(runs, lambda run: run.adjoint_sim[1]):.2f}; Spearman with the compression ratio at least {rank:.3f}; "
        f"effective examples {100 * effective:.0f} % of N or more"
    )
    good = ratio >= 3 and rank >= 0.9 and effective > 0.01
    return Claim(
        what=what,
        paper="SIM_t rises, 0 to 0.75",
        ours=ours,
        verdict="yes" if good else "partly",
        why="A policy of one example would have a perfect SIM; effective examples rule that out. Goals: SIM ×3, "
        "Spearman 0.9, effective examples above 1 % of N.",
    )


def _nonpositive(found: Found) -> Claim:
    rows = [(name, runs) for name, runs in found.items() if runs]
    ours = "; ".join(f"{name} {100 * _mean(runs, lambda run: run.zero_nonpositive):.0f} %" for name, runs in rows)
    best = max((_mean(runs, lambda run: run.zero_nonpositive) for _, runs in rows), default=0.0)
    return Claim(
        what="Examples with CT ≤ 0 get no weight: share of zero weights among them, mean over steps (Figure 8)",
        paper="tends to 100 %",
        ours=ours or "–",
        verdict="not run" if not rows else "yes" if best >= 0.9 else "partly" if best >= 0.3 else "no",
        why="The share rises with the compression ratio; our searches end before the limit that the paper draws.",
    )


def _learned(found: Found) -> Claim:
    rows = [
        (name, runs) for name, runs in found.items() if runs and math.isfinite(_mean(runs, lambda r: r.learned_low))
    ]
    ours = "; ".join(
        f"{name} {100 * _mean(runs, lambda run: run.learned_low):.0f} % (others "
        f"{100 * _mean(runs, lambda run: run.unlearned_low):.0f} %)"
        for name, runs in rows
    )
    # Where most weights are low, low ones of learned examples say nothing about being learned.
    told = [_mean(runs, lambda r: r.learned_low) for _, runs in rows if _mean(runs, _low_excess) > 0]
    best = max(told, default=0.0)
    return Claim(
        what="Perfectly learned examples (loss below 1e-6) get little: share below 0.2 times the largest (Figure 9)",
        paper="above 90 %",
        ours=ours or "–",
        verdict="not run" if not rows else "yes" if best >= 0.9 else "partly" if best >= 0.5 else "no",
        why="A learned example's gradient, and so its contribution, vanishes: its weight falls only by what the "
        "projection takes from every example alike, which needs more policy epochs than were run.",
    )


def _low_excess(run: Findings) -> float:
    return run.learned_low - run.unlearned_low


def _redundant(found: Found) -> Claim:
    rows = [(name, runs) for name, runs in found.items() if runs]
    ours = "; ".join(f"{name} {100 * _mean(runs, lambda run: run.zero_positive):.0f} %" for name, runs in rows)
    planted = found.get("planted-4096")
    if planted:
        ours += (
            f". Planted: {100 * _mean(planted, lambda run: run.group_zero):.0f} % of duplicates with CT > 0 get zero, "
            f"and 8 equal examples together weigh {_mean(planted, lambda run: run.group_weight):.1f} times a plain one"
        )
    some = any(_mean(runs, lambda run: run.zero_positive) > 0.01 for _, runs in rows)
    return Claim(
        what="Redundant examples get no weight although CT > 0 (Figure 10)",
        paper="some weights are zero",
        ours=ours or "–",
        verdict="not run" if not rows else "yes" if some else "no",
        why="4096 examples of 128 dimensions are all linearly dependent. Duplicates that always count alike would "
        "weigh 8.0 together.",
    )


def _flips(found: Found) -> Claim:
    names = [name for name in ("flips-512", "flips-4096") if found.get(name)]
    ours = "; ".join(
        f"{name}: zero weights flipped {100 * _mean(found[name], lambda run: run.zero_flipped):.0f} %, clean "
        f"{100 * _mean(found[name], lambda run: run.zero_clean):.0f} %, AUROC of the mean weight "
        f"{_mean(found[name], lambda run: run.auroc):.3f} ({', '.join(f'{run.auroc:.3f}' for run in found[name])})"
        for name in names
    )
    good = [
        _mean(found[name], lambda run: run.zero_flipped) >= 2 * _mean(found[name], lambda run: run.zero_clean)
        and _mean(found[name], lambda run: run.auroc) >= 0.85
        for name in names
    ]
    return Claim(
        what="Wrong labels are found: 20 % flipped",
        paper="(not in the paper)",
        ours=ours or "–",
        verdict="not run" if not names else "yes" if all(good) else "partly" if any(good) else "no",
        why="Goals: zero weights at least twice as often on flipped examples, AUROC 0.85.",
    )


def times(value: float | None) -> str:
    """An acceleration; – where it was never reached. A large one is T over few steps and has few digits."""
    return "–" if value is None else f"{value:.2f}" if value < FEW else f"{value:.1f}"


def faster(value: float | None) -> str:
    """An acceleration within a sentence."""
    return "never" if value is None else f"×{times(value)}"


def each(runs: Sequence[Findings], pick: Callable[[Findings], float | None]) -> str:
    """An acceleration of every seed."""
    return ", ".join(times(pick(run)) for run in runs)


def _mean(runs: Sequence[Findings], pick: Callable[[Findings], float]) -> float:
    return float(np.mean([pick(run) for run in runs]))
