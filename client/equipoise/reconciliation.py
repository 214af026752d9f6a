"""What a server holds of a trainer, brought together with what the trainer remembers."""

from collections.abc import Callable
from dataclasses import dataclass

from equipoise.stats import Stats
from equipoise.v1 import policy_pb2 as pb
from equipoise.view import PolicyView
from equipoise.window import Window


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What a trainer remembers.

    Attributes:
        policy: name of the policy, for messages.
        view: what is known of it.
        window: steps that are not durable.
        stats: counters.
        complain: told of what does not go together, and when, before anything of the window is let go.
    """

    policy: str
    view: PolicyView
    window: Window
    stats: Stats
    complain: Callable[[str, float], None]

    def reconcile(self, opened: pb.OpenResponse, *, last_sequence: int, was_lost: bool, now: float) -> None:
        """Numbers the window so that it follows what the server holds.

        Args:
            opened: the server's answer to an opening.
            last_sequence: of the trainer's newest step, as it remembers.
            was_lost: whether the policy is known to have been lost, so that this one is another.
            now: seconds.
        """
        view, window, last = self.view, self.window, opened.last_sequence
        if view.uid != opened.uid:
            if view.uid or was_lost:
                self.stats.lost += view.durable_sequence
                self.complain(f"{self.policy} is another incarnation of the policy now", now)
            view.become(opened.uid)
            window.renumber(last)
        elif last > last_sequence:
            text = f"{self.policy} is {last - last_sequence} steps ahead of what this trainer remembers"
            self.complain(f"{text}: to resume an old checkpoint, fork or import a policy", now)
            self.stats.unacked -= window.drop(through=last_sequence)
            window.renumber(last)
        elif last + 1 < window.first_sequence:
            missing = window.first_sequence - 1 - last
            self.stats.lost += missing
            self.complain(f"{self.policy} has lost {missing} steps of this trainer that it had acknowledged", now)
            window.renumber(last)
        self.observe(opened.epoch, opened.version, now)

    def observe(self, epoch: int, version: int, now: float) -> None:
        """Holds the server to its promise that (epoch, version) never goes back."""
        seen = self.view.seen
        if not self.view.observe(epoch, version):
            self.stats.regressions += 1
            self.complain(f"{self.policy} went back from (epoch, version) {seen} to {(epoch, version)}", now)
