"""A run's part of the trainer's checkpoint, and going on from it: from the newest one, or from an older one."""

import logging
import re
import secrets
from collections.abc import Mapping
from typing import Any

from equipoise.client import PolicyClient
from equipoise.errors import EquipoiseError, PolicyNotFoundError, UnavailableError
from equipoise.policies import PolicyStatus
from equipoise.torch.direction import TargetDirection
from equipoise.torch.mixture import Mixture
from equipoise.torch.processes import barrier, rank, same_everywhere
from equipoise.torch.sampler import WeightedSampler

logger = logging.getLogger("equipoise")

_NAME_LENGTH = 90
"""Leaves room for the suffix within the 128 characters of a name."""
_RESUMED = re.compile(r"\.from-\d+-[0-9a-f]{8}$")


def run_state(
    client: PolicyClient,
    *,
    direction: TargetDirection | None = None,
    sampler: WeightedSampler | Mixture | None = None,
    trained: int | None = None,
    keep: int | None = 3,
) -> dict[str, Any]:
    """What belongs into the trainer's checkpoint beside model and optimizer.

    Waits for the answers to submitted steps, and forks the policy on the server, since a policy does not roll back: the
    fork is what it was at this step. When the server is lost the checkpoint is made without one. In a job of several
    processes all call this, each for its own checkpoint; the first one forks.

    Example:
        >>> state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        >>> torch.save(state | {"policy": run_state(client, direction=direction, sampler=sampler)}, path)

    Args:
        client: the client of the run.
        direction: its target direction, which is refreshed at the next step, here as in a run that resumes from this
            checkpoint: no vectors are stored. None: a resumed run begins with a refresh, and this one goes on as it is.
        sampler: its sampler, or mixture.
        trained: as in `WeightedSampler.state_dict`, or `Mixture.state_dict`.
        keep: how many forks of this run stay on the server, the newest; None: all.

    Returns:
        Strings, numbers, bytes and tensors: `torch.load` takes them with `weights_only=True`.
    """
    answered = client.flush()
    barrier()  # what is forked holds the steps of all processes
    snapshot = same_everywhere(_fork(client, keep) if answered and rank() == 0 else None)
    return {
        "rank": rank(),
        "policy": client.policy,
        "snapshot": snapshot,
        "client": client.state_dict(),
        "direction": None if direction is None else direction.state_dict(),
        "sampler": None if sampler is None else sampler.state_dict(trained=trained),
    }


def resume_run(
    client: PolicyClient,
    state: Mapping[str, Any],
    *,
    direction: TargetDirection | None = None,
    sampler: WeightedSampler | Mixture | None = None,
) -> PolicyClient:
    """Goes on from a checkpoint, before the first step.

    A policy that has not moved since goes on as it is, and nothing is applied twice. One that has moved, by steps that
    this job is about to make again, is left alone: the run goes on with a new policy, forked from that of the
    checkpoint and named after it.

    Example:
        >>> client = resume_run(client, checkpoint["policy"], direction=direction, sampler=sampler)

    Args:
        client: a client of the run's policy, not used yet.
        state: what `run_state` gave to this process; that of the first process will do for the others, unless models
            are sharded or steps were not answered.
        direction: the target direction of the resumed run.
        sampler: its sampler.

    Returns:
        The client to go on with: the given one, or one of the new policy.
    """
    if direction is not None and state["direction"] is not None:
        direction.load_state_dict(state["direction"])
    own = state["rank"] == rank()  # some trainers keep the checkpoint of the first process alone
    if sampler is not None and state["sampler"] is not None:
        sampler.load_state_dict(state["sampler"], own=own)
    policy = same_everywhere(_policy_to_use(client, state) if rank() == 0 else None)
    if policy != state["policy"]:
        logger.warning("%s has moved since the checkpoint: going on with its fork %s", state["policy"], policy)
    resumed = client if policy == client.policy else client.for_policy(policy)
    if own and policy == state["policy"]:
        resumed.load_state_dict(state["client"])
    _know_weights(resumed)
    if sampler is not None:
        sampler.client = resumed
    return resumed


def _fork(client: PolicyClient, keep: int | None) -> dict[str, Any] | None:
    """Forks the policy; None: the server does not."""
    try:
        status = client.status()
        prefix = f"{client.policy[:_NAME_LENGTH]}.at-"
        name = client.admin.fork(client.policy, f"{prefix}{status.version}").spec.name
        if keep is not None:
            forks = [policy.spec.name for policy in client.admin.list_policies(prefix)]
            for old in sorted(forks, key=lambda fork: (len(fork), fork))[: max(0, len(forks) - keep)]:
                client.admin.delete(old)
    except EquipoiseError as error:  # lost, no room for a fork, not allowed to: no reason to lose the checkpoint
        logger.warning("%s: the checkpoint is made without a fork of the policy (%s)", client.policy, error)
        return None
    return {"name": name, "uid": status.uid, "version": status.version}


def _policy_to_use(client: PolicyClient, state: Mapping[str, Any]) -> str:
    """The policy of the checkpoint if it stands where it stood, else a new fork of what it was."""
    policy: str = state["policy"]
    snapshot: Mapping[str, Any] | None = state["snapshot"]
    try:
        now = _status(client, policy)
        if snapshot is None or (now is not None and (now.uid, now.version) == (snapshot["uid"], snapshot["version"])):
            return policy
        root = _RESUMED.sub("", policy)[:_NAME_LENGTH]
        name = f"{root}.from-{snapshot['version']}-{secrets.token_hex(4)}"
        return client.admin.fork(snapshot["name"], name).spec.name
    except (UnavailableError, PolicyNotFoundError) as error:
        logger.warning("%s: resumed without what the policy was at the checkpoint (%s)", policy, error)
        return policy


def _know_weights(client: PolicyClient) -> None:
    """Else every example would count 1 until its second visit."""
    try:
        client.preload()
    except (UnavailableError, PolicyNotFoundError) as error:
        logger.warning("%s: resumed without the weights of the policy (%s)", client.policy, error)


def _status(client: PolicyClient, policy: str) -> PolicyStatus | None:
    try:
        return client.admin.get(policy)
    except PolicyNotFoundError:
        return None
