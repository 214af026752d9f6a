"""An independent formula: each example alone, tokenised by hand, by a forward and backward pass of its own."""

from typing import Any

import torch
from torch import Tensor

from tests.client.torch.trl.jobs import (
    SPECIAL,
    WORDS,
)


def relative_error(found: Any, expected: Any) -> float:
    found, expected = torch.as_tensor(found).double(), torch.as_tensor(expected).double()
    return float((found - expected).norm() / expected.norm())


def ids_of(text: str) -> list[int]:
    words = [*SPECIAL, *(f"w{i}" for i in range(WORDS))]
    return [words.index(word) for word in text.split()]


def spelt(example: dict[str, Any]) -> tuple[list[int], list[bool]]:
    """Tokens of an example and which are predicted by default."""
    if "text" in example:
        tokens = [*ids_of(example["text"]), 3]
        return tokens, [True] * len(tokens)
    if "messages" in example:
        tokens, answers = [], []
        for message in example["messages"]:
            asks = message["role"] == "user"
            said = [4 if asks else 5, *ids_of(message["content"]), *([] if asks else [3])]
            tokens += said
            answers += [not asks and place > 0 for place in range(len(said))]
        return tokens, answers
    prompt, answer = example["prompt"], example["completion"]
    if isinstance(prompt, str):
        asked, said = ids_of(prompt), [*ids_of(answer), 3]
    else:
        asked = [4, *ids_of(prompt[0]["content"]), 5]
        said = [*ids_of(answer[0]["content"]), 3]
    return asked + said, [False] * len(asked) + [True] * len(said)


def token_mean(model: Any, tokens: list[int], predicted: list[bool], *, dft: bool = False) -> Tensor:
    logits = model(input_ids=torch.tensor([tokens])).logits[0, :-1]
    logp = logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    losses = -logp * logp.exp().detach() if dft else -logp
    chosen = torch.tensor(predicted[1:])
    return losses[chosen].mean()


def gradients(model: Any, loss: Tensor) -> Tensor:
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    pairs = zip(found, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs]).double()


def contributions_of(model: Any, train: list[Tensor], target: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Contributions and losses of some examples, by functions that give their losses."""
    direction = torch.stack([gradients(model, loss()) for loss in target]).mean(0)  # type: ignore[operator]
    losses = [loss() for loss in train]  # type: ignore[operator]
    return torch.stack([gradients(model, loss) @ direction for loss in losses]), torch.stack(losses).detach()


def margin(model: Any, pair: dict[str, str]) -> Tensor:
    """How much likelier the chosen answer is than the rejected one, nats."""
    logps = []
    for answer in (pair["chosen"], pair["rejected"]):
        asked, said = ids_of(pair["prompt"]), [*ids_of(answer), 3]
        tokens = asked + said
        logps.append(-token_mean(model, tokens, [False] * len(asked) + [True] * len(said)) * len(said))
    return logps[0] - logps[1]
