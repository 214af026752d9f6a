"""Prompts for reinforcement learning: drawn by a policy, which learns from how often their completions succeed."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import Trainer

from equipoise.client import PolicyClient
from equipoise.errors import InvalidRequestError, UnavailableError
from equipoise.results import Source
from equipoise.torch.draws import Draws, Sampling
from equipoise.torch.processes import rank, same_everywhere
from equipoise.transformers.data import ID

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object

Success: TypeAlias = Callable[[Tensor], Tensor]
"""From rewards, float [completions, reward functions], NaN where a function gave None, to which completions succeeded:
bool [completions]."""

RULES = ("learnability", "uniform")
"""Rules of policies that take outcomes."""
FLUSH_S = 5.0
"""How long the end of a training waits for the last outcomes to arrive, seconds."""


@dataclass(frozen=True, slots=True)
class PromptTraining:
    """What a trainer needs to draw its prompts by a policy.

    Attributes:
        client: the client of a policy with rule `learnability`, and as many examples as there are prompts; with
            `uniform` prompts are drawn alike, for comparison. In a job of several processes each has its own.
        success: the smallest reward of a completion that succeeded, where its reward is TRL's, the sum over reward
            functions of weight times reward; or a function, for more than that. A completion to which all reward
            functions gave None was no attempt.
        timeout: longest wait for a draw, seconds; then it is uniform, and so are the next ones, without a wait, until
            the server answers. Draws are asked for one batch ahead.
    """

    client: PolicyClient
    success: float | Success = 0.5
    timeout: float = 1.0


class PromptSampler(Sampler[int]):
    """TRL's `RepeatSampler`, with prompts drawn by weight: in all processes the same, one draw for each batch.

    A batch has different prompts, each `repeats` times in a row, and comes `rounds` times. The first process draws, one
    batch ahead, and tells the others; where the server does not answer in time a batch is drawn uniformly, and training
    goes on: once it did not answer nobody waits, until it does. An epoch is as long as TRL's.

    Args:
        client: a `PolicyClient`; that of the first process is used.
        num_prompts: how many there are; ids are their places.
        batch: prompts in a batch, over all processes.
        repeats: completions of each prompt, `num_generations`.
        rounds: how often a batch comes.
        seed: equal seeds draw equal prompts from equal weights.
        timeout: longest wait for a draw, seconds.

    Raises:
        InvalidRequestError: a batch has more prompts than there are, or the policy has another number of examples.
    """

    def __init__(
        self,
        client: Sampling,
        num_prompts: int,
        *,
        batch: int,
        repeats: int,
        rounds: int = 1,
        seed: int = 0,
        timeout: float = 1.0,
    ) -> None:
        if not 1 <= batch <= num_prompts:
            rule = f"a batch must have 1 to {num_prompts} prompts, as many as there are in the dataset"
            raise InvalidRequestError(field="batch", value=batch, rule=rule)
        self._batches = num_prompts // batch
        self._size = batch
        self._repeats, self._rounds = repeats, rounds
        self._draws = Draws(client, num_prompts, seed=seed, timeout=timeout, distinct=True)
        self._draws.check()
        self._number = 0

    def __len__(self) -> int:
        """Rows in an epoch, over all processes."""
        return self._batches * self._size * self._repeats * self._rounds

    def __iter__(self) -> Iterator[int]:
        """An epoch."""
        for _ in range(self._batches):
            prompts = self._draw()
            for _ in range(self._rounds):
                for prompt in prompts:
                    for _ in range(self._repeats):
                        yield prompt

    @property
    def fallbacks(self) -> int:
        """How many batches this process drew uniformly because the server did not answer."""
        return self._draws.fallbacks

    def _draw(self) -> list[int]:
        number, self._number = self._number, self._number + 1
        self._draws.begin(rank=0, size=self._size)
        drawn: list[int] = same_everywhere(self._draws.take(number).tolist() if rank() == 0 else None)
        return drawn


class PromptMixin(_Base):
    """Makes TRL's `GRPOTrainer` or `RLOOTrainer` draw its prompts by a policy: `class Mine(PromptMixin, GRPOTrainer)`.

    Each batch of prompts is drawn by weight, and of each prompt the policy is told how many completions succeeded. What
    is generated and how it is learned from stays TRL's own, so do not weigh anything again. Nothing waits for the
    network: outcomes are sent in the background, prompts asked for one batch ahead, and without a server prompts are
    drawn uniformly. A prompt's id is its place in the training dataset, which must have a length. Evaluation is as
    ever.

    `frac_reward_zero_std`, which TRL logs, says what share of the groups taught nothing; `policy/uniform_draws` is how
    many batches had to be drawn without the server. A training that is resumed goes on with the policy as it stands.

    Example:
        >>> class PromptGRPOTrainer(PromptMixin, GRPOTrainer): ...
        >>> client = PolicyClient("localhost:50051", policy="maths", num_examples=len(prompts), rule="learnability")
        >>> PromptGRPOTrainer(model, correct, train_dataset=prompts, policy=PromptTraining(client)).train()

    Args:
        policy: the policy, and what a success is.
    """

    train_dataset: Any
    reward_weights: Tensor
    num_generations: int
    num_iterations: int

    def __init__(self, *args: Any, policy: PromptTraining, **kwargs: Any) -> None:
        self._prompts = policy
        self._prompt_sampler: PromptSampler | None = None
        self._prompt_ids: list[int] = []
        super().__init__(*args, **kwargs)
        if not (hasattr(self.train_dataset, "__len__") and hasattr(self.train_dataset, "add_column")):
            rule = "must be a Dataset with a length: its prompts are drawn by their places"
            raise InvalidRequestError(field="train_dataset", value=type(self.train_dataset).__name__, rule=rule)
        self.train_dataset = self.train_dataset.add_column(ID, list(range(len(self.train_dataset))))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`."""
        try:
            return super().train(*args, **kwargs)
        finally:
            if rank() == 0:
                self._prompts.client.flush(FLUSH_S)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As in `Trainer`."""
        if self._prompt_sampler is not None and "loss" in logs:
            logs = logs | {"policy/uniform_draws": float(self._prompt_sampler.fallbacks)}
        super().log(logs, *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = self._signature_columns
        if columns is not None and ID not in columns:
            self._signature_columns = [*columns, ID]

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        arguments: Any = self.args
        if rank() == 0:
            _begin(self._prompts.client)
        self._prompt_sampler = PromptSampler(
            self._prompts.client,
            len(self.train_dataset if dataset is None else dataset),
            batch=arguments.generation_batch_size // self.num_generations,
            repeats=self.num_generations,
            rounds=self.num_iterations * arguments.steps_per_generation,
            seed=arguments.seed,
            timeout=self._prompts.timeout,
        )
        return self._prompt_sampler

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Any:
        """Takes the ids out of the rows: reward functions and environments see the dataset's own columns."""
        self._prompt_ids = [row[ID] for row in inputs if ID in row]
        rows = [{name: value for name, value in row.items() if name != ID} for row in inputs]
        return super()._generate_and_score_completions(rows)  # type: ignore[misc]

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's rewards of all processes, [completions, reward functions]; what they say of prompts is sent."""
        rewards = super()._calculate_rewards(*args, **kwargs)  # type: ignore[misc]
        model: Any = self.model
        if model.training:
            here = torch.tensor(self._prompt_ids, dtype=torch.int64, device=rewards.device)
            ids: Any = self.accelerator.gather(here)
            if self.accelerator.is_main_process:
                self._tell(ids.cpu(), rewards.detach().cpu())
        return rewards

    def _tell(self, ids: Tensor, rewards: Tensor) -> None:
        """Sends successes and attempts of each prompt: ids [completions], rewards [completions, reward functions]."""
        tried = ~rewards.isnan().all(dim=1)
        if not tried.any():
            return
        won = self._succeeded(rewards)[tried].numpy()
        prompts, places = np.unique(ids[tried].numpy(), return_inverse=True)
        self._prompts.client.submit(
            prompts,
            successes=np.bincount(places, weights=won).astype(np.int64),
            attempts=np.bincount(places),
            step=self.state.global_step,
            omit_weights=True,
        )

    def _succeeded(self, rewards: Tensor) -> Tensor:
        """Which completions succeeded, bool [completions]."""
        success = self._prompts.success
        if not callable(success):
            return (rewards * self.reward_weights.cpu()).nansum(dim=1) >= success
        told = success(rewards)
        if not (isinstance(told, Tensor) and told.dtype == torch.bool and told.shape == rewards.shape[:1]):
            what = f"{told.dtype} {list(told.shape)}" if isinstance(told, Tensor) else type(told).__name__
            rule = f"must give a bool tensor [{len(rewards)}], one for each completion"
            raise InvalidRequestError(field="success", value=what, rule=rule)
        return told.cpu()


def _begin(client: PolicyClient) -> None:
    """Makes the policy, for there is nothing to draw from before; without a server it is made by the first outcomes.

    Raises:
        InvalidRequestError: its rule does not take outcomes.
    """
    try:
        if client.read([0]).source is not Source.SERVED:
            return
        rule = client.status().spec.rule
    except UnavailableError:
        return
    if rule not in RULES:
        said = f"must be {' or '.join(RULES)}, which take how often completions succeed"
        raise InvalidRequestError(field="rule", value=rule, rule=said)
