"""What the golden vectors ask: policies, and the requests of one trainer."""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

Request: TypeAlias = dict[str, Any]

N = 12
"""Examples of most cases."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A case before it has answers; see vectors/README.md for the names."""

    rule: str
    name: str
    about: str
    requests: list[Request]
    settings: dict[str, float | bool] = field(default_factory=dict)
    num_examples: int = N
    reference_nats: float = 0.0


class Trainer:
    """Makes the requests of a trainer from a seed: the same on every machine and with every version of Python."""

    def __init__(self, seed: int, *, num_examples: int = N) -> None:
        self._random = random.Random(seed)
        self._num_examples = num_examples

    def uniform(self, low: float, high: float) -> float:
        """A number in [low, high] with three decimals."""
        return round(low + (high - low) * self._random.random(), 3)

    def ids(self, count: int, *, repeats: bool = False) -> list[int]:
        """Ids in random order, distinct unless `repeats`."""
        if repeats:
            return [int(self._random.random() * self._num_examples) for _ in range(count)]
        return sorted(range(self._num_examples), key=lambda _: self._random.random())[:count]

    def contribution(self, example: int) -> float:
        """Examples lean: some are good, some bad. Never close to 0, where a sign would hang on a rounding."""
        value = self.uniform(-1.0, 1.0) + 0.8 * math.copysign(1.0, math.sin(2.0 * example + 1.0))
        return round(value + math.copysign(0.05, value), 3)

    def step(self, count: int = 5, *, repeats: bool = False, scale: float = 1.0, losses: bool = False) -> Request:
        """A step with contributions, and losses where asked for."""
        ids = self.ids(count, repeats=repeats)
        request: Request = {"example_ids": ids}
        request["contributions"] = [round(scale * self.contribution(example), 3) for example in ids]
        if losses:
            request["losses"] = [self.uniform(0.1, 4.0) for _ in ids]
        return request

    def losses(self, count: int = 5, *, reference: bool = False) -> Request:
        """A step with losses, and reference losses where asked for."""
        ids = self.ids(count)
        request: Request = {"example_ids": ids, "losses": [self.uniform(0.1, 4.0) for _ in ids]}
        if reference:
            request["reference_losses"] = [self.uniform(0.1, 4.0) for _ in ids]
        return request

    def outcomes(self, count: int = 5) -> Request:
        """A step with successes of attempts; examples of higher ids succeed more often."""
        ids = self.ids(count)
        attempts = [1 + int(16 * self._random.random()) for _ in ids]
        pairs = zip(ids, attempts, strict=True)
        successes = [sum(self._random.random() * (N - 1) < example for _ in range(tried)) for example, tried in pairs]
        return {"example_ids": ids, "successes": successes, "attempts": attempts}

    def row(self, t: int, *, scale: float) -> Request:
        """A step that moves row t of a trajectory."""
        contributions = [round(scale * self.contribution(example), 6) for example in range(self._num_examples)]
        return {"step": t, "all_examples": True, "contributions": contributions}


def asked() -> Iterator[Asked]:
    """All cases; a rule's first one has its defaults and whatever a request may bring."""
    for rule in ("uniform", "ema_sign", "ema_relu", "exponentiated_gradient", "projected_gradient", "boltzmann"):
        yield from _from_contributions(rule)
    yield from _own()
    yield from _penalised()
    yield from _from_losses()
    yield from _sources()
    yield from _strata()
    yield from _outcomes()
    yield from _trajectories()


def _from_contributions(rule: str) -> Iterator[Asked]:
    yield Asked(
        rule=rule,
        name="defaults",
        about="default settings, every kind of request",
        reference_nats=2.5,
        requests=_every_kind(),
    )
    trainer = Trainer(2)
    yield Asked(
        rule=rule,
        name="scales",
        about="contributions that grow a thousandfold, also all zero at first: the running mean square follows",
        requests=[
            {"example_ids": [0, 1], "contributions": [0.0, 0.0]},
            *(trainer.step(scale=10.0**power) for power in (-2, -1, 0, 1, 1, 1)),
        ],
    )
    trainer = Trainer(3)
    # Slowly down under the weights, then faster in a trial of uniform ones, which win; up again, until the weights win.
    falls = [0.01] * 8 + [0.1] * 4 + [-0.02] * 10 + [0.15] * 16
    guard_losses = [round(3.0 - sum(falls[:turn]), 3) for turn in range(len(falls))]
    yield Asked(
        rule=rule,
        name="guard",
        about="guard losses: the served weights turn to uniform and back",
        requests=[trainer.step() | {"guard_loss": loss} for loss in guard_losses],
    )


def _every_kind() -> list[Request]:
    """Reads, repeated ids, unscored rows, all examples, other ids' weights, no weights, sketches, losses alone."""
    trainer = Trainer(1)
    unscored = trainer.step(5)
    unscored["contributions"][2] = None
    unscored["scored"] = [1, 1, 0, 1, 0]
    repeated = trainer.step(6, repeats=True)
    repeated["example_ids"][3] = repeated["example_ids"][0]
    repeated["scored"] = [1, 0, 1, 1, 1, 1]
    everything = trainer.step(N)
    everything["all_examples"] = bool(everything.pop("example_ids"))
    sketch = {
        "example_ids": trainer.ids(3),
        "sketch_type": "SKETCH_TYPE_FLOAT32",
        "gradient_sketches": [trainer.uniform(-1, 1) for _ in range(3 * 5)],
        "target_sketch": [trainer.uniform(-1, 1) for _ in range(5)],
    }
    half = {
        "example_ids": trainer.ids(2),
        "sketch_type": "SKETCH_TYPE_FLOAT16",
        "gradient_sketches": [0.5, -0.25, 1.5, 2.0, 0.125, -1.0],
        "target_sketch": [1.0, -2.0, 0.5],
    }
    return [
        {"sequence": 0, "example_ids": [3, 3, 1]},
        trainer.step() | {"target_loss": 1.5},
        trainer.step() | {"target_loss": 1.25, "step": 7},
        unscored,
        repeated,
        everything,
        trainer.step(4) | {"weights_for": [0, 5, 5, N - 1]},
        trainer.step(4) | {"omit_weights": True},
        sketch,
        half,
        {"target_loss": 1.125},
        {"sequence": 0, "all_examples": True},
    ]


def _own() -> Iterator[Asked]:
    """Settings of single rules, at other values than the defaults."""
    several: list[tuple[str, str, dict[str, float | bool]]] = [
        ("ema_sign", "no-floor", {"threshold": 0.3, "floor": 0.0, "ema_decay": 0.5, "rms_decay": 0.0}),
        ("ema_relu", "saturated", {"saturation": 0.5, "floor": 0.1, "ema_decay": 0.0, "rms_decay": 0.9999}),
        ("exponentiated_gradient", "fast", {"learning_rate": 1.0, "decay": 0.0, "floor": 0.0001}),
        ("exponentiated_gradient", "own-unit", {"learning_rate": 0.2, "unit": 3.0}),
        ("projected_gradient", "narrow", {"step_size": 2.0, "floor": 0.2, "cap": 2.0}),
        ("projected_gradient", "zeros", {"step_size": 1.0, "cap": 3.0}),
        ("boltzmann", "cold", {"temperature": 0.05, "rms_decay": 0.5}),
    ]
    for seed, (rule, name, settings) in enumerate(several, start=10):
        trainer = Trainer(seed)
        about = "other settings than the defaults"
        requests = [trainer.step(6) for _ in range(10)]
        yield Asked(rule=rule, name=name, about=about, settings=settings, requests=requests)


def _penalised() -> Iterator[Asked]:
    for rule, settings in (("ema_sign", {"loss_penalty": 1.5}), ("ema_relu", {"loss_penalty": 0.5, "rms_decay": 0.8})):
        trainer = Trainer(20)
        yield Asked(
            rule=rule,
            name="loss-penalty",
            about="losses take from contributions; a step without them is refused and consumes its sequence",
            settings=settings,
            requests=[*(trainer.step(losses=True) for _ in range(6)), trainer.step(), trainer.step(losses=True)],
        )


def _from_losses() -> Iterator[Asked]:
    for name, settings in (
        ("defaults", {}),
        ("shifted", {"threshold": -0.2, "saturation": 0.3, "floor": 0.05, "ema_decay": 0.7}),
    ):
        trainer = Trainer(30)
        yield Asked(
            rule="rho",
            name=name,
            about="reducible losses; a step without reference losses is refused and consumes its sequence",
            settings=settings,
            requests=[
                *(trainer.losses(6, reference=True) for _ in range(8)),
                trainer.losses(),
                trainer.losses(3, reference=True),
            ],
        )
    for name, settings in (("defaults", {}), ("burn-in", {"temperature": 0.3, "burn_in": 3.0})):
        trainer = Trainer(31)
        equal = {"example_ids": [0, 1, 2], "losses": [0.5, 0.5, 0.5]}
        repeated = {"example_ids": [4, 4, 4, 7], "losses": [1.0, 2.0, 3.0, 0.5]}
        yield Asked(
            rule="loss_linear_upper",
            name=name,
            about="losses alone; equal ones, and rows that repeat an id",
            settings=settings,
            requests=[*(trainer.losses(6) for _ in range(5)), equal, repeated],
        )


def _sources() -> Iterator[Asked]:
    several: list[tuple[str, str, dict[str, float | bool]]] = [
        ("group_softmax", "defaults", {}),
        ("group_softmax", "cold", {"loss_decay": 0.5, "temperature": 0.3, "floor": 0.2}),
        ("exp3", "defaults", {}),
        ("exp3", "cold", {"reward_decay": 0.5, "temperature": 0.2, "floor": 0.3}),
        ("group_dro", "defaults", {}),
        ("group_dro", "adjusted", {"learning_rate": 0.3, "adjustment": 2.0, "floor": 0.1}),
        ("excess_loss", "defaults", {}),
        ("excess_loss", "slow", {"learning_rate": 0.05, "floor": 0.05}),
    ]
    for rule, name, settings in several:
        trainer, reference = Trainer(70), rule == "excess_loss"
        repeated, everything, elsewhere = (trainer.losses(count, reference=reference) for count in (5, N, 4))
        repeated["example_ids"][3] = repeated["example_ids"][0]
        repeated["scored"] = [1, 0, 1, 1, 1]
        everything["all_examples"] = bool(everything.pop("example_ids"))
        yield Asked(
            rule=rule,
            name=name,
            about="losses of sources, some of which come late; a step without losses is refused",
            settings=settings,
            requests=[
                *(trainer.losses(4, reference=reference) for _ in range(4)),
                repeated,
                trainer.step(),
                everything,
                *(trainer.losses(6, reference=reference) for _ in range(25 if rule == "exp3" else 3)),
                elsewhere | {"weights_for": [0, 5, 5, N - 1]},
                {"target_loss": 1.5},
                {"sequence": 0, "all_examples": True},
            ],
        )


def _strata() -> Iterator[Asked]:
    small: dict[str, float | bool] = {"strata": 3.0, "window": 24.0, "memory": 24.0, "min_count": 3.0, "soft": False}
    for name, about, settings in (
        ("defaults", "losses and contributions under default settings: too few yet to act on", {}),
        ("evidence", "strata that help and that do not", small),
        ("soft", "weights that rise smoothly", {**small, "soft": True, "floor": 0.1, "loss_decay": 0.5}),
        (
            "groups",
            "two groups; groups that are absent, too high or not one an example are refused",
            {**small, "groups": 2.0},
        ),
    ):
        trainer = Trainer(50)
        grouped = "groups" in settings
        requests = [_stratum_step(trainer, grouped=grouped) for _ in range(12)]
        sparse = _stratum_step(trainer, grouped=grouped)
        sparse["measured"] = [1, 0, 0, 1, 0, 1]
        sparse["contributions"][1] = None
        alone = _stratum_step(trainer, grouped=grouped)
        losses, contributions = (
            {key: value for key, value in alone.items() if key != left_out} for left_out in ("contributions", "losses")
        )
        contributions.pop("groups", None)
        repeated = _stratum_step(trainer, grouped=grouped)
        repeated["example_ids"][3] = repeated["example_ids"][0]
        if grouped:
            repeated["groups"][3] = repeated["groups"][0]
        requests += [sparse, losses, contributions, repeated, {"target_loss": 1.5}]
        if grouped:
            without, high, mixed = (_stratum_step(trainer, grouped=True) for _ in range(3))
            del without["groups"]
            high["groups"][2] = 2
            mixed["example_ids"][1], mixed["groups"][:2] = mixed["example_ids"][0], [0, 1]
            requests += [without, high, mixed]
        requests.append({"sequence": 0, "all_examples": True})
        yield Asked(rule="strata", name=name, about=about, settings=settings, requests=requests)
    for name, about, settings in (
        ("target", "losses of the target, also too few at first", {}),
        (
            "target_groups",
            "the same of two groups, each with its own or with all; a target group that is too high is refused",
            {"groups": 2.0},
        ),
    ):
        trainer = Trainer(54)
        told = {**small, "min_target_losses": 8.0, "target_memory": 24.0, **settings}
        requests = []
        for turn in range(12):
            request = _stratum_step(trainer, grouped="groups" in settings)
            if turn % 2 == 0:
                request["target_losses"] = [trainer.uniform(0.1, 2.5) for _ in range(5)]
                if settings and turn % 4:
                    request["target_groups"] = [0, 1, 0, 1, 1]
            requests.append(request)
        if settings:
            high = {"target_losses": [1.0, 2.0], "target_groups": [0, 2]}
            requests.append(_stratum_step(trainer, grouped=True) | high)
        requests.append({"sequence": 0, "all_examples": True})
        yield Asked(rule="strata", name=name, about=about, settings=told, requests=requests)
    trainer = Trainer(53)
    requests = [_stratum_step(trainer, grouped=False) for _ in range(20)]
    requests[10]["contributions"][2] = -1e6
    yield Asked(
        rule="strata",
        name="spike",
        about="one enormous contribution, which moves the running mean square no further than the rule lets it",
        settings=small,
        requests=requests,
    )


def _stratum_step(trainer: Trainer, *, grouped: bool) -> Request:
    """Examples with high losses harm, and their losses are never alike."""
    ids = trainer.ids(6)
    request: Request = {
        "example_ids": ids,
        "losses": [round(0.3 * example + trainer.uniform(0.1, 1.0), 3) for example in ids],
        "contributions": [round(1.0 - 0.3 * example + trainer.uniform(-0.5, 0.5), 3) for example in ids],
    }
    return request | {"groups": [example % 2 for example in ids]} if grouped else request


def _outcomes() -> Iterator[Asked]:
    for name, about, settings in (
        ("defaults", "successes of attempts under default settings, every kind of request", {}),
        (
            "greedy",
            "no exploration, a high floor, no memory",
            {"exploration": 0.0, "floor": 0.3, "decay": 0.0},
        ),
        ("patient", "half of the weight by age, and a long memory", {"exploration": 0.5, "decay": 0.95, "prior": 2.0}),
    ):
        trainer = Trainer(60)
        unscored, repeated, everything, elsewhere, silent = (trainer.outcomes(count) for count in (5, 6, N, 4, 4))
        unscored["scored"] = [1, 1, 0, 1, 0]
        unscored["attempts"][2] = 0
        repeated["example_ids"][3] = repeated["example_ids"][0]
        everything["all_examples"] = bool(everything.pop("example_ids"))
        yield Asked(
            rule="learnability",
            name=name,
            about=f"{about}; a step without outcomes is refused",
            settings=settings,
            requests=[
                {"sequence": 0, "all_examples": True},
                *(trainer.outcomes() for _ in range(8)),
                unscored,
                repeated,
                everything,
                elsewhere | {"weights_for": [0, 5, 5, N - 1]},
                silent | {"omit_weights": True},
                trainer.outcomes() | {"losses": [1.0] * 5, "target_loss": 1.5},
                {"target_loss": 1.25},
                trainer.step(),
                trainer.outcomes(),
                {"sequence": 0, "all_examples": True},
            ],
        )


def _trajectories() -> Iterator[Asked]:
    for name, settings in (
        ("defaults", {"rows": 3.0, "learning_rate": 0.02}),
        ("decay", {"rows": 3.0, "learning_rate": 0.05, "policy_epochs": 2.0}),
    ):
        trainer = Trainer(40)
        yield Asked(
            rule="trajectory",
            name=name,
            about="rows of a run that is replayed; a step that leaves out an example is refused",
            settings=settings,
            requests=[
                *(trainer.row(t, scale=1.0) | {"target_loss": 1.0} for t in (0, 1, 2, 2, 1, 0, 0, 1)),
                {"step": 1, **trainer.step(5)},
                {"sequence": 0, "step": 1, "all_examples": True},
            ],
        )
