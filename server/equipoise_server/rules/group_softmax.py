"""`group_softmax`: sources by how high their losses are."""

from dataclasses import dataclass

from equipoise_server.rules.ema import moving_average
from equipoise_server.rules.settings import MAX_DECAY, MIN_FLOOR, RuleSettings, number
from equipoise_server.rules.sources import Nats, SourceRule


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSoftmaxSettings(RuleSettings):
    """Settings of `group_softmax`."""

    loss_decay: float = number(0.9, low=0.0, high=MAX_DECAY)
    """Decay per visit of a source's smoothed loss."""

    temperature: float = number(1.0, low=0.01, high=1e3)
    """τ, nats: two sources whose losses differ by it differ by e in weight. High is uniform, low is the highest loss
    alone."""

    floor: float = number(0.05, low=MIN_FLOOR, high=1.0)
    """ε, smallest weight: a source must come now and then, or nobody knows how high its loss is by now."""


def group_softmax(settings: GroupSoftmaxSettings) -> SourceRule:
    """w = (1-ε)·K·softmax(l/τ) + ε, l the smoothed losses of the K sources seen so far.

    What is not learned yet gets more, what is learned less. Losses of different sources are compared as they are: one
    that is noise has a high loss for ever, see `excess_loss`.
    """
    return SourceRule(
        settings,
        scale=Nats(rule="group_softmax"),
        advance=moving_average(settings.loss_decay),
        rate=1.0 / settings.temperature,
        floor=settings.floor,
        statistic="loss",
    )
