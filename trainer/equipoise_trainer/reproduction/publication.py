"""From the runs in a folder to the page, the pictures and the numbers."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from equipoise_trainer.provenance import machine, versions
from equipoise_trainer.reproduction.claims import Claim, perceptron_claims, scaling_claims, times, transformer_claim
from equipoise_trainer.reproduction.figures import Runs, save_curves, save_law, save_zeros
from equipoise_trainer.reproduction.page import Section, write_page
from equipoise_trainer.reproduction.runs import FinishedRun, finished
from equipoise_trainer.reproduction.scaling import Interval, ScalingFound
from equipoise_trainer.reproduction.scaling_figure import save_scaling
from equipoise_trainer.reproduction.studies import LN2, STUDIES
from equipoise_trainer.reproduction.tables import (
    ONLINE_HEADINGS,
    SEED_HEADINGS,
    STUDY_HEADINGS,
    Found,
    found_in,
    online_rows,
    seed_rows,
    settings_of,
    study_rows,
)

TITLES: Mapping[str, str] = {name: study.title for name, study in STUDIES.items()}

LEAD = (
    "The experiments of Gu et al., arXiv 2402.17759, with a policy γ[T, N] that is moved by the adjoint of whole "
    "training runs. Losses are in nats. An acceleration is T over the first step at which a run is as low as uniform "
    "training is at step T; it is given on the target examples, which the search sees, and on unseen ones. Beside each "
    "stands uniform training with steps of the same length (norm-matched). The search costs what it costs: a policy "
    "found this way is an upper bound, not a method."
)

OVER_SEEDS = (
    "Medians over seeds with the least and the most in brackets; – is never, and counts as the slowest. Losses at the "
    "end are means with their standard deviation over seeds (n − 1). Largest rise: of the area on "
    "target between two measured policy epochs, over all seeds. Over its last steps the loss of a "
    "near-optimal run bends: what they do counts in few of the losses that the search lowers, so that their rows have "
    "hardly moved."
)

EVERY_SEED = (
    "Areas are mean losses over θ_1 … θ_T, uniform → final policy. CR is the compression ratio on target; the second "
    "column is in the units that the paper's Figure 4b seems to mix."
)

ONE_RUN = (
    "Rule ema_sign of the same server, decay 0.99, same data, η and steps, no search. Its steps cost more "
    "(contributions and the target gradient), in passes over the examples; the last columns give what the search costs."
)

LAW_STUDY = "paper-4096"
"""Whose SIM_t is shown over the steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """Where it lies, and its table."""

    page: Path
    data: Path
    claims: tuple[Claim, ...]


def publish(directory: Path) -> Publication:
    """Makes the page of all finished runs in `directory`: `index.html`, `findings.json` and PNGs."""
    runs, texts = load_runs(directory / "perceptron"), load_runs(directory / "lm")
    found, text_found = found_in(runs, reference_nats=LN2), found_in(texts)
    named = {f"transformer {name}": seeds for name, seeds in texts.items()}
    scaling = _scaling({**load_runs(directory / "scaling"), **named})
    claims = [
        *perceptron_claims({name: [each for _, each in seeds] for name, seeds in found.items()}),
        transformer_claim([each for seeds in text_found.values() for _, each in seeds]),
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


def _perceptron_sections(runs: Runs, found: Found, directory: Path) -> list[Section]:
    if not runs:
        return []
    pictures = {name: directory / f"perceptron-{name}.png" for name in ("curves", "law", "zeros")}
    save_curves(runs, TITLES, reference_nats=LN2, path=pictures["curves"])
    shown = LAW_STUDY if LAW_STUDY in runs else next(iter(runs))
    save_law(runs, TITLES, reference_nats=LN2, shown=shown, path=pictures["law"])
    save_zeros(runs, TITLES, reference_nats=LN2, wrong="flipped", path=pictures["zeros"])
    return [
        Section(
            title="Perceptron: over seeds",
            text=(OVER_SEEDS, *(settings_of(seeds[0]) for seeds in runs.values())),
            headings=STUDY_HEADINGS,
            rows=study_rows(found),
            pictures=(pictures["curves"],),
        ),
        Section(title="Perceptron: the Learning Law", pictures=(pictures["law"],)),
        Section(title="Perceptron: which examples get no weight", pictures=(pictures["zeros"],)),
        Section(title="Perceptron: every seed", text=(EVERY_SEED,), headings=SEED_HEADINGS, rows=seed_rows(found)),
        *_online_sections("Perceptron", found),
    ]


def _transformer_sections(runs: Runs, found: Found, directory: Path) -> list[Section]:
    if not runs:
        return []
    pictures = {name: directory / f"lm-{name}.png" for name in ("curves", "law", "zeros")}
    titles = {name: f"Transformer, preset {name}" for name in runs}
    nats = min(float(seeds[0].study["reference_nats"]) for seeds in runs.values())
    save_curves(runs, titles, reference_nats=nats, path=pictures["curves"])
    save_law(runs, titles, reference_nats=nats, shown=next(iter(runs)), path=pictures["law"])
    save_zeros(runs, titles, reference_nats=nats, wrong="perturbed", path=pictures["zeros"])
    return [
        Section(
            title="Transformer",
            text=tuple(settings_of(run) for seeds in runs.values() for run in seeds),
            headings=SEED_HEADINGS,
            rows=seed_rows(found),
            pictures=tuple(pictures.values()),
        ),
        *_online_sections("Transformer", found),
    ]


def _online_sections(what: str, found: Found) -> list[Section]:
    rows = online_rows(found)
    title = f"{what}: what one run with an online policy reaches"
    return [Section(title=title, text=(ONE_RUN,), headings=ONLINE_HEADINGS, rows=rows)] if rows else []


def _scaling(runs: Runs) -> list[ScalingFound]:
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
                "highest r². The lines below each fit repeat it with other L0: B and β change, and the acceleration "
                "hardly where r² stays high.",
            ),
            headings=("runs", "L0", "t0", "B", "β", "change of B", "change of β", "r²", "× by Eq. 9", "× measured"),
            rows=tuple(rows),
            pictures=(picture,),
        )
    ]


def _by_seed(found: Found) -> dict[str, Any]:
    return {name: [_plain(asdict(each)) for _, each in seeds] for name, seeds in found.items()}


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


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
