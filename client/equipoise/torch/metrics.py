"""What there is to see of a policy while a job trains under it; nothing here waits for the network."""

import logging
from collections.abc import Mapping
from threading import Thread
from time import monotonic
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipoise.errors import EquipoiseError
from equipoise.policies import PolicyStatus
from equipoise.torch.capture import Contributions
from equipoise.torch.processes import rank
from equipoise.wire import StepFields

logger = logging.getLogger("equipoise")

ASK_SECONDS = 2.0
"""How often the server is asked how the policy stands, at most, seconds."""


class Metrics:
    """Numbers by name, all beginning with `policy/`.

    | name | what | of |
    |---|---|---|
    | `mean_weight` | mean weight of the rows | newest step |
    | `rows_weighted` | share of the rows with a weight other than 1 | newest step |
    | `rows_scored` | share of the rows whose contribution is known | newest step |
    | `target_loss`, `guard_loss` | mean losses on target A and guard B, nats | newest measurement |
    | `sim` | mean over deviation of contributions, the Learning Law's evidence | the policy |
    | `plain_sim` | the same of plain contributions, where others are sent | newest refresh or step |
    | `effective_ratio` | effective examples as a share of all; 1 is uniform | the policy |
    | `examples_scored` | share of the examples that were ever scored | the policy |
    | `positive_share` | share of rows with a positive contribution | the policy's newest step |
    | `guard_strength` | how far the guard pulls weights to uniform, 0 to 1 | the policy |
    | `guard_trials_won`, `guard_trials_lost` | trials of the weights against uniform ones | the policy |
    | `unanswered` | steps that wait for their answer: more and more while the server is lost | this client |
    | `fallbacks`, `dropped` | answers given without the server, and steps of which it will never know | this client |
    | `share/NAME`, `mixture_version`, `mixture_fallbacks` | see `Mixture.metrics` | its newest draws |
    | `batches_discarded` | batches of which nothing was sent | this process |
    | `steps_left_out` | steps that were unlike the one surveyed | this process |
    | `identity_checks`, `identity_gaps` | steps on which Σ s·c and ⟨V, gradient⟩ were compared, and differed | same |
    | `unusable_losses` | target and guard losses that were not finite | same |

    Args:
        contributions: how they are found.
        sampled: whether examples are drawn by weight, so that losses have none.

    Attributes:
        known: whether the weight of any row of the first step was known when it began; None before.
    """

    def __init__(self, contributions: Contributions[Any], *, sampled: bool) -> None:
        self.known: bool | None = None
        self._contributions = contributions
        self._sampled = sampled
        self._newest: dict[str, float] = {}
        self._steps = 0
        self._status: PolicyStatus | None = None
        self._asked = -ASK_SECONDS
        self._asking = False

    def note(self, client: Any, fields: StepFields, weights: NDArray[np.float32]) -> None:
        """A step was sent, whose rows were trained under these weights, [B]."""
        if not self._sampled:
            self._newest["mean_weight"] = float(weights.mean())
            self._newest["rows_weighted"] = float((weights != 1).mean())
        if "scored" in fields:
            self._newest["rows_scored"] = float(np.asarray(fields["scored"]).mean())
        self.note_target(fields)
        self._steps += 1
        first = self._steps == 1 and rank() == 0
        if first and not self._sampled and self.known is False and "weights_for" not in fields:
            self._note_first_pass(client)
        self._ask(client)

    def note_target(self, fields: StepFields) -> None:
        """Losses on target A and guard B were measured, if they are among what is sent."""
        for name in ("target_loss", "guard_loss"):
            if name in fields:
                self._newest[name] = fields[name]

    def note_plain(self, contributions: NDArray[np.float64], weights: NDArray[np.float32]) -> None:
        """What plain contributions were, [B], where others were sent: their mean under the weights over the deviation.

        Args:
            contributions: NaN where they are not known.
            weights: of the same rows.
        """
        counted = np.isfinite(contributions) & (weights > 0)
        if counted.sum() > 1 and np.ptp(contributions[counted]) > 0:
            known = contributions[counted]
            mean = float(np.average(known, weights=weights[counted].astype(np.float64)))
            deviation = float(np.sqrt(np.square(known - mean).sum() / (len(known) - 1)))
            self._newest["plain_sim"] = mean / deviation

    def values(self, client: Any) -> dict[str, float]:
        """All that is known now."""
        found = {**self._newest, **self._of_policy(), **self._of_client(client), **self._of_capture()}
        return {f"policy/{name}": float(value) for name, value in found.items()}

    def line(self, client: Any) -> str:
        """One line for people."""
        values = self.values(client)
        parts = [f"{_name(client)}: step {self._steps}"]
        guarded = "policy/guard_loss" in values or (self._status is not None and self._status.guard_loss is not None)
        if not guarded:
            parts.append("no guard data, so that nobody knows whether the weights help")
        elif "policy/guard_strength" in values:
            won, lost = values["policy/guard_trials_won"], values["policy/guard_trials_lost"]
            served = "uniform ones are" if values["policy/guard_strength"] == 1 else "they are"
            parts.append(f"its weights won {won:.0f} of {won + lost:.0f} guard trials and {served} served")
        for name, text in _LINE.items():
            if f"policy/{name}" in values:
                parts.append(text.format(values[f"policy/{name}"]))
        return ", ".join(parts)

    def _of_policy(self) -> Mapping[str, float]:
        status = self._status
        if status is None:
            return {}
        found = {
            "sim": status.sim,
            "effective_ratio": status.effective_examples / max(1, status.spec.num_examples),
            "examples_scored": status.scored_examples / max(1, status.spec.num_examples),
            "positive_share": status.positive_share,
            "guard_strength": status.guard_strength,
            "guard_trials_won": status.guard_trials_won,
            "guard_trials_lost": status.guard_trials_lost,
        }
        return {name: value for name, value in found.items() if value is not None}

    def _of_client(self, client: Any) -> Mapping[str, float]:
        stats = getattr(client, "stats", None)
        if stats is None:
            return {}
        return {"unanswered": stats.unacked, "fallbacks": stats.fallbacks, "dropped": stats.dropped}

    def _of_capture(self) -> Mapping[str, float]:
        found: dict[str, float] = {"unusable_losses": self._contributions.direction.unusable}
        coverage = getattr(self._contributions, "coverage", None)
        if coverage is not None:
            found |= {
                "steps_left_out": coverage.left_out,
                "identity_checks": coverage.watched,
                "identity_gaps": coverage.gaps,
            }
        return found

    def _note_first_pass(self, client: Any) -> None:
        """True of every rule: a weight is known once an answer has told it."""
        logger.warning(
            "%s: nothing is weighted in the first pass over the data: the answer to an example's first visit tells the "
            "weight of its second, and until then it counts 1; train for several epochs, or let steps tell what comes "
            "next (`upcoming`, `look_ahead`), or call client.preload() beforehand where the policy has learnt already",
            _name(client),
        )

    def _ask(self, client: Any) -> None:
        """Asks in the background how the policy stands; the first process alone."""
        now = monotonic()
        if self._asking or now - self._asked < ASK_SECONDS or rank() != 0 or not hasattr(client, "status"):
            return
        self._asking, self._asked = True, now
        Thread(target=self._answer, args=(client,), name="equipoise-status", daemon=True).start()

    def _answer(self, client: Any) -> None:
        try:
            before, self._status = self._status, client.status()
            if before is not None and _trials(before) != _trials(self._status):
                logger.info("%s", self.line(client))
        except EquipoiseError as error:  # lost, closed or not there yet: there will be another time
            logger.debug("no status: %s", error)
        finally:
            self._asking = False


def _name(client: Any) -> str:
    return str(getattr(client, "policy", "policy"))


def _trials(status: PolicyStatus) -> tuple[int, int]:
    return status.guard_trials_won, status.guard_trials_lost


_LINE = {
    "sim": "SIM {:.3g}",
    "effective_ratio": "{:.0%} effective examples",
    "rows_weighted": "{:.0%} of the rows weighted",
    "target_loss": "target loss {:.4g}",
    "guard_loss": "guard loss {:.4g}",
}
