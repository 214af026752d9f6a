"""Prompts that need several skills, and a small policy that learns them by GRPO.

Shape legend: N prompts, L steps of the longest answer, S skills, A choices at each step, B prompts of a batch, G
completions of each.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

SKILLS, CHOICES, LONGEST = 240, 6, 8
KNOWN = 0.5
"""Share of the skills that the policy begins with."""
UNSOLVABLE = 0.15
"""Share of the training prompts whose key is wrong: no completion ever succeeds."""
HEAD_START = 7.0
"""How much higher the logit of the right choice is where a skill is known at the start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """Prompts: an answer is a chain of choices, one for each skill that it needs, and right if all of them are.

    Attributes:
        skills: which skill each step needs, int64 [N, L].
        needed: whether a step is part of the answer, bool [N, L]; answers have 1 to L steps.
        solvable: whether the key is right, bool [N].
    """

    skills: Tensor
    needed: Tensor
    solvable: Tensor

    @classmethod
    def drawn(cls, count: int, *, unsolvable: float, random: np.random.Generator) -> Self:
        """Prompts of all lengths; some skills are asked for far more often than others."""
        rarity = 1.0 / np.arange(1, SKILLS + 1) ** 0.7
        skills = random.choice(SKILLS, (count, LONGEST), p=rarity / rarity.sum())
        lengths = random.integers(1, LONGEST + 1, count)
        return cls(
            skills=torch.from_numpy(skills),
            needed=torch.from_numpy(np.arange(LONGEST) < lengths[:, None]),
            solvable=torch.from_numpy(random.random(count) >= unsolvable),
        )

    def __len__(self) -> int:
        """N."""
        return len(self.skills)


class Policy(nn.Module):
    """A softmax over the choices of each skill, [S, A]; choice 0 is right. Prompts share skills, so they help each other.

    Args:
        random: which skills are known at the start.
    """

    def __init__(self, random: np.random.Generator) -> None:
        super().__init__()
        logits = torch.from_numpy(random.normal(size=(SKILLS, CHOICES)))
        logits[torch.from_numpy(random.random(SKILLS) < KNOWN), 0] += HEAD_START
        self.logits = nn.Parameter(logits)

    def success(self, prompts: Prompts) -> Tensor:
        """The probability of a right answer to each prompt, exact: [N]."""
        right = self.logits.detach().softmax(dim=1)[:, 0][prompts.skills]
        return torch.where(prompts.needed, right, 1.0).prod(dim=1) * prompts.solvable

    def answers(self, prompts: Prompts, ids: NDArray[np.int64], *, group: int, random: torch.Generator) -> Tensor:
        """Completions of a batch, choices [B, G, L]."""
        chances = self.logits.detach().softmax(dim=1)[prompts.skills[ids]]
        drawn = torch.multinomial(chances.flatten(0, 1), group, replacement=True, generator=random)
        return drawn.view(len(ids), LONGEST, group).transpose(1, 2)

    def loss(self, prompts: Prompts, ids: NDArray[np.int64], answers: Tensor, rewards: Tensor) -> Tensor:
        """GRPO's, on policy: minus the mean over prompts of advantage times log-probability of the answer.

        Advantages are rewards less their group's mean, over its standard deviation (Shao et al. 2024, arXiv 2402.03300).
        """
        advantages = (rewards - rewards.mean(dim=1, keepdim=True)) / (rewards.std(dim=1, keepdim=True) + 1e-4)
        chosen = self.logits.log_softmax(dim=1)[prompts.skills[ids]].transpose(1, 2)
        steps = chosen.gather(1, answers) if False else _picked(chosen, answers)
        summed = (steps * prompts.needed[ids][:, None, :]).sum(dim=2)
        return -(advantages * summed).mean()


def rewards_of(prompts: Prompts, ids: NDArray[np.int64], answers: Tensor) -> Tensor:
    """1 for a right answer, else 0: float64 [B, G]."""
    right = ((answers == 0) | ~prompts.needed[ids][:, None, :]).all(dim=2)
    return (right & prompts.solvable[ids][:, None]).double()


def _picked(chosen: Tensor, answers: Tensor) -> Tensor:
    """Log-probabilities [B, G, L] of choices [B, G, L], from those of all, [B, A, L]."""
    return chosen.gather(1, answers)
