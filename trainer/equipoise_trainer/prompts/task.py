"""Prompts that need several skills, and a small policy that learns them by GRPO.

Shape legend: N prompts, L steps of the longest answer, S skills, A choices at each step, B prompts of a batch, G
completions of each.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

CHOICES = 6
"""A."""
HEAD_START = 7.0
"""How much higher the logit of the right choice is where a skill is known at the start: a success rate of .99."""
KNOWN = 0.6
"""Share of the skills that are known at the start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is learned.

    Attributes:
        about: in words.
        prompts: N.
        skills: S.
        longest: L; answers have 1 to L steps.
        solved: share of the prompts that need known skills alone: they nearly always succeed.
        unsolvable: share of the prompts whose key is wrong: they never succeed.
        unseen: whether success is measured on prompts that are not trained on; else on the solvable training prompts.
    """

    about: str
    prompts: int = 2000
    skills: int
    longest: int
    solved: float = 0.4
    unsolvable: float
    unseen: bool


JOBS: Final[Mapping[str, Job]] = {
    "rare": Job(about="each skill in few prompts", skills=1500, longest=4, unsolvable=0.3, unseen=False),
    "live": Job(about="none solved, none unsolvable", skills=400, longest=6, solved=0.0, unsolvable=0.0, unseen=True),
    "shared": Job(about="skills that many prompts share", skills=400, longest=6, unsolvable=0.4, unseen=True),
}
"""By name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """Prompts: an answer is a chain of choices, one for each skill that it needs, and right if all of them are.

    Attributes:
        skills: which skill each step needs, int64 [N, L].
        needed: whether a step is part of the answer, bool [N, L].
        solvable: whether the key is right, bool [N].
    """

    skills: Tensor
    needed: Tensor
    solvable: Tensor

    @classmethod
    def drawn(cls, job: Job, count: int, *, unsolvable: float, random: np.random.Generator) -> Self:
        """Prompts of all lengths; some skills are asked for more often than others."""
        often = 1.0 / np.arange(1, job.skills + 1) ** 0.7
        lengths = random.integers(1, job.longest + 1, count)
        return cls(
            skills=torch.from_numpy(random.choice(job.skills, (count, job.longest), p=often / often.sum())),
            needed=torch.from_numpy(np.arange(job.longest) < lengths[:, None]),
            solvable=torch.from_numpy(random.random(count) >= unsolvable),
        )

    def __len__(self) -> int:
        """N."""
        return len(self.skills)


class Policy(nn.Module):
    """A softmax over the choices of each skill, [S, A], of which the first is right; prompts share skills.

    Args:
        skills: S.
        random: makes the first logits.
    """

    def __init__(self, skills: int, random: np.random.Generator) -> None:
        super().__init__()
        logits = random.normal(size=(skills, CHOICES))
        self.known: NDArray[np.int64] = np.flatnonzero(random.random(skills) < KNOWN)
        """Skills that are known at the start."""
        logits[self.known, 0] += HEAD_START
        self.logits = nn.Parameter(torch.from_numpy(logits))

    def success(self, prompts: Prompts) -> Tensor:
        """The probability of a right answer to each prompt, exact: float64 [N]."""
        right = self.logits.detach().softmax(dim=1)[:, 0][prompts.skills]
        return torch.where(prompts.needed, right, 1.0).prod(dim=1) * prompts.solvable

    def answers(self, prompts: Prompts, ids: NDArray[np.int64], *, group: int, random: torch.Generator) -> Tensor:
        """Completions of a batch, choices [B, G, L]."""
        chances = self.logits.detach().softmax(dim=1)[prompts.skills[ids]]
        drawn = torch.multinomial(chances.flatten(0, 1), group, replacement=True, generator=random)
        return drawn.view(*chances.shape[:2], group).transpose(1, 2)

    def loss(self, prompts: Prompts, ids: NDArray[np.int64], answers: Tensor, rewards: Tensor) -> Tensor:
        """GRPO's, on policy: minus the mean of advantage times log-probability of the answer.

        Advantages are rewards less their group's mean, over its standard deviation (Shao et al. 2024, arXiv
        2402.03300).
        """
        advantages = (rewards - rewards.mean(dim=1, keepdim=True)) / (rewards.std(dim=1, keepdim=True) + 1e-4)
        choices = self.logits.log_softmax(dim=1)[prompts.skills[ids]]  # [B, L, A]
        chosen = choices.gather(2, answers.transpose(1, 2)).transpose(1, 2)
        return -(advantages * (chosen * prompts.needed[ids][:, None, :]).sum(dim=2)).mean()


def rewards_of(prompts: Prompts, ids: NDArray[np.int64], answers: Tensor) -> Tensor:
    """1 for a right answer, else 0: float64 [B, G]."""
    right = ((answers == 0) | ~prompts.needed[ids][:, None, :]).all(dim=2)
    return (right & prompts.solvable[ids][:, None]).double()


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A job with its prompts and the policy at the start, all from one seed.

    Attributes:
        train: what is trained on.
        judged: what success is measured on, all of it solvable.
        policy: at the start; train a copy.
    """

    train: Prompts
    judged: Prompts
    policy: Policy

    @classmethod
    def of(cls, job: Job, *, seed: int) -> Self:
        """The task of a seed."""
        random = np.random.default_rng(seed)
        policy = Policy(job.skills, random)
        train = Prompts.drawn(job, job.prompts, unsolvable=job.unsolvable, random=random)
        solved = np.flatnonzero(random.random(job.prompts) < job.solved)
        train.skills[solved] = torch.from_numpy(random.choice(policy.known, (len(solved), job.longest)))
        if job.unseen:
            judged = Prompts.drawn(job, job.prompts, unsolvable=0.0, random=random)
        else:
            kept = train.solvable
            judged = Prompts(skills=train.skills[kept], needed=train.needed[kept], solvable=kept[kept])
        return cls(train=train, judged=judged, policy=policy)
