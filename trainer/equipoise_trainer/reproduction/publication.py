"""From the runs in a folder to the page, the pictures and the numbers."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from equipoise_trainer.provenance import machine, versions
from equipoise_trainer.reproduction.claims import Claim, perceptron_claims, scaling_claims, times, transformer_claim
from equipoise_trainer.reproduction.figures import save_curves, save_law, save_scaling, save_zeros
from equipoise_trainer.reproduction.findings import Findings, find, online_cost, search_cost
from equipoise_trainer.reproduction.page import Section, write_page
from equipoise_trainer.reproduction.runs import FinishedRun, finished
from equipoise_trainer.reproduction.scaling import Interval, ScalingFound
from equipoise_trainer.reproduction.studies import LN2, STUDIES

TITLES: Mapping[str, str] = {name: study.title for name, study in STUDIES.items()}

LEAD = (
    "The experiments of Gu et al., arXiv 2402.17759, with a policy γ[T, N] that is moved by the adjoint of whole "
    "training runs. Losses are in nats. An acceleration is T over the first step at which a run is as low as uniform "
    "training is at step T; it is given on the target examples, which the search sees, and on unseen ones. Beside each "
    "stands uniform training with steps of the same length (norm-matched). The search costs what it costs: a policy "
    "found this way is an upper bound, not a method."
)

RUN_HEADINGS = (
    "study",
    "seed",
    "rows",
    "× target",
    "× unseen",
    "matched, target",
    "matched, unseen",
    "area target",
    "area unseen",
    "end unseen: uniform, matched, policy",
    "CR, ln|V|/nats",
    "CR, log2|V|/nats",
    "SIM",
    "SIM, adjoint",
    "effective, mean (least)",
)

ONLINE_HEADINGS = (
    "study",
    "seed",
    "online × target",
    "online × unseen",
    "cost of its step",
    "× unseen at its cost",
    "end unseen: uniform, online, near-optimal",
    "cost of the search, plain runs",
    "seconds per policy epoch",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """Where it lies, and its table."""

    page: Path
    data: Path
    claims: tuple[Claim, ...]


def publish(directory: Path) -> Publication:
    """Makes the page of all finished runs in `directory`: `index.html`, `findings.json` and PNGs."""
    runs = load_runs(directory / "perceptron")
    found = {name: [find(run, reference_nats=LN2) for run in seeds] for name, seeds in runs.items()}
    texts = load_runs(directory / "lm")
    text_found = {
        name: [find(run, reference_nats=float(run.study["reference_nats"])) for run in seeds]
        for name, seeds in texts.items()
    }
    scaling = _scaling({**load_runs(directory / "scaling"), **texts})
    claims = [
        *perceptron_claims(found),
        transformer_claim([each for seeds in text_found.values() for each in seeds]),
        *scaling_claims(scaling),
    ]
    sections = [
        *_perceptron_sections(runs, found, directory),
        *_transformer_sections(texts, text_found, directory),
        *_scaling_sections(scaling, directory),
    ]
    write_page(directory / "index.html", claims=claims, sections=[*sections, _about()], lead=LEAD)
    document = {
        "machine": machine(),
        "versions": versions(),
        "claims": [asdict(claim) for claim in claims],
        "perceptron": _by_seed(found),
        "lm": _by_seed(text_found),
        "scaling": {each.name: _fit_json(each) for each in scaling},
    }
    data = directory / "findings.json"
    data.write_text(json.dumps(document, ensure_ascii=False, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return Publication(page=directory / "index.html", data=data, claims=tuple(claims))


def load_runs(directory: Path) -> dict[str, list[FinishedRun]]:
    """Finished runs by study, in the order of `STUDIES` and then by name, by seed."""
    order = {name: place for place, name in enumerate(STUDIES)}
    folders = sorted(
        (each for each in directory.glob("*") if each.is_dir()), key=lambda f: (order.get(f.name, 99), f.name)
    )
    found: dict[str, list[FinishedRun]] = {}
    for folder in folders:
        seeds = [FinishedRun.load(each) for each in folder.glob("seed-*") if finished(each)]
        if seeds:
            found[folder.name] = sorted(seeds, key=lambda run: run.seed)
    return found


def _perceptron_sections(
    runs: Mapping[str, Sequence[FinishedRun]], found: Mapping[str, Sequence[Findings]], directory: Path
) -> list[Section]:
    if not runs:
        return []
    pictures = {name: directory / f"perceptron-{name}.png" for name in ("curves", "law", "zeros")}
    save_curves(runs, TITLES, reference_nats=LN2, path=pictures["curves"])
    save_law(runs, TITLES, reference_nats=LN2, path=pictures["law"])
    save_zeros(runs, TITLES, reference_nats=LN2, path=pictures["zeros"])
    rows = _run_rows(runs, found)
    online = [
        _online_row(name, run, each)
        for name, seeds in runs.items()
        for run, each in zip(seeds, found[name], strict=True)
        if run.online is not None and each.online is not None
    ]
    settings = [_settings(run) for seeds in runs.values() for run in seeds[:1]]
    return [
        Section(
            title="Perceptron: every seed",
            text=(
                "Areas are mean losses over θ_1 … θ_T, uniform → final policy. CR is the compression ratio on target; "
                "the second column is in the units that the paper's Figure 4b seems to mix.",
                *settings,
            ),
            headings=RUN_HEADINGS,
            rows=rows,
            pictures=(pictures["curves"],),
        ),
        Section(title="The Learning Law", pictures=(pictures["law"],)),
        Section(title="Which examples get no weight", pictures=(pictures["zeros"],)),
        Section(
            title="What one run with an online policy reaches",
            text=(
                "Rule ema_sign of the same server, decay 0.99, same data, η and steps, no search. Its steps cost more "
                "(contributions and the target gradient), in products with features; the last columns give what the "
                "search costs.",
            ),
            headings=ONLINE_HEADINGS,
            rows=tuple(online),
        ),
    ]


def _transformer_sections(
    runs: Mapping[str, Sequence[FinishedRun]], found: Mapping[str, Sequence[Findings]], directory: Path
) -> list[Section]:
    if not runs:
        return []
    pictures = {name: directory / f"lm-{name}.png" for name in ("curves", "law", "zeros")}
    nats = {name: float(seeds[0].study["reference_nats"]) for name, seeds in runs.items()}
    save_curves(runs, {}, reference_nats=min(nats.values()), path=pictures["curves"])
    save_law(runs, {}, reference_nats=min(nats.values()), path=pictures["law"])
    save_zeros(runs, {}, reference_nats=min(nats.values()), path=pictures["zeros"])
    settings = [", ".join(f"{key} {value}" for key, value in seeds[0].study.items()) for seeds in runs.values()]
    return [
        Section(
            title="Transformer",
            text=tuple(settings),
            headings=RUN_HEADINGS,
            rows=_run_rows(runs, found),
            pictures=tuple(pictures.values()),
        )
    ]


def _scaling(runs: Mapping[str, Sequence[FinishedRun]]) -> list[ScalingFound]:
    return [
        ScalingFound.of(name, [(run.uniform.test_loss, run.final.test_loss) for run in seeds])
        for name, seeds in sorted(runs.items(), key=lambda item: int(item[1][0].study["steps"]))
    ]


def _scaling_sections(found: Sequence[ScalingFound], directory: Path) -> list[Section]:
    if not found:
        return []
    picture = directory / "scaling.png"
    save_scaling(found, path=picture)
    rows = [
        (
            f"{each.name}{'' if fit is each.fit else ', other L0'}",
            f"{fit.floor:.3f}",
            str(fit.start),
            f"{fit.uniform.scale:.3g} → {fit.optimal.scale:.3g}",
            f"{fit.uniform.exponent:.4f} → {fit.optimal.exponent:.4f}",
            f"{-100 * fit.scale_change:+.1f} %",
            f"{100 * fit.exponent_change:+.1f} %",
            f"{fit.uniform.r_squared:.4f}, {fit.optimal.r_squared:.4f}",
            f"{fit.acceleration:.2f}",
            times(each.measured),
        )
        for each in found
        for fit in (each.fit, *each.others)
    ]
    return [
        Section(
            title="Scaling law",
            text=(
                "L(t) = L0 + (B/t)^β on unseen examples, mean over seeds, one L0 for both policies, L0 and t0 by the "
                "highest r². The lines below each fit repeat it with other L0: B and β change, the acceleration does "
                "not.",
            ),
            headings=("runs", "L0", "t0", "B", "β", "change of B", "change of β", "r²", "× by Eq. 9", "× measured"),
            rows=tuple(rows),
            pictures=(picture,),
        )
    ]


def _by_seed(found: Mapping[str, Sequence[Findings]]) -> dict[str, Any]:
    return {name: [_plain(asdict(each)) for each in seeds] for name, seeds in found.items()}


def _fit_json(found: ScalingFound) -> dict[str, Any]:
    return {
        "steps": found.steps,
        "measured": found.measured,
        "fit": _plain(asdict(found.fit)),
        "other_floors": [_plain(asdict(each)) for each in found.others],
        "bootstrap": {
            "scale_change": asdict(Interval.of([each.scale_change for each in found.samples])),
            "exponent_change": asdict(Interval.of([each.exponent_change for each in found.samples])),
            "acceleration": asdict(Interval.of([each.acceleration for each in found.samples])),
        },
    }


def _run_rows(
    runs: Mapping[str, Sequence[FinishedRun]], found: Mapping[str, Sequence[Findings]]
) -> tuple[tuple[str, ...], ...]:
    return tuple(
        _run_row(name, run, each) for name, seeds in runs.items() for run, each in zip(seeds, found[name], strict=True)
    )


def _run_row(name: str, run: FinishedRun, each: Findings) -> tuple[str, ...]:
    mean, least = each.effective_share
    return (
        name,
        str(each.seed),
        run.rows,
        times(each.accelerations[0]),
        times(each.accelerations[1]),
        times(each.matched[0]),
        times(each.matched[1]),
        _change(each.areas[0], each.final_areas[0]),
        _change(each.areas[1], each.final_areas[1]),
        f"{each.ends[1]:.3f}, {each.matched_ends[1]:.3f}, {each.final_ends[1]:.3f}",
        f"{each.compression[0]:.2f} → {each.compression[1]:.2f}",
        f"{each.compression[0] / LN2:.2f} → {each.compression[1] / LN2:.2f}",
        _change(*each.sim),
        f"{each.adjoint_sim[0]:.2f} → {each.adjoint_sim[1]:.2f}",
        f"{100 * mean:.0f} % ({100 * least:.0f} %)",
    )


def _online_row(name: str, run: FinishedRun, each: Findings) -> tuple[str, ...]:
    assert run.online is not None, "the caller looks"
    assert each.online is not None, "the caller looks"
    cost, unseen = online_cost(run), each.online[1]
    seconds = f"{np.median(run.epoch_seconds):.2f}" if run.epoch_seconds else "–"
    return (
        name,
        str(run.seed),
        times(each.online[0]),
        times(unseen),
        f"{cost:.2f}",
        times(None if unseen is None else unseen / cost),
        f"{each.ends[1]:.3f}, {run.online.test_loss[-1]:.3f}, {each.final_ends[1]:.3f}",
        f"{search_cost(run):.0f}",
        f"{seconds} ({run.rows})",
    )


def _settings(run: FinishedRun) -> str:
    study = run.study
    return (
        f"{study['name']}: data {study['dataset']}, M = {study['target_size']}, {100 * study['flipped']:g} % flipped, "
        f"T = {study['steps']}, η = {study['learning_rate']:g}, ε = {study['step_size']:g} falling to 0 over "
        f"{study['policy_epochs']} policy epochs, rows {run.rows}."
    )


def _about() -> Section:
    where = machine()
    packages = ", ".join(f"{name} {number}" for name, number in versions().items() if number)
    return Section(
        title="How this was made",
        text=(
            "equipoise reproduce perceptron, lm and scaling write into one folder and make this page from all that is "
            "in it; findings.json holds the numbers.",
            f"{where['system']}, {where['processor']}, {where['cores']} cores, Python {where['python']}; {packages}.",
        ),
    )


def _change(before: float, after: float) -> str:
    return f"{before:.3f} → {after:.3f}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
