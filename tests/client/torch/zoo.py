"""Models and losses of every kind, and what becomes of each: right, or refused with a line to paste that is right.

python -m tests.client.torch.zoo    # writes the table of MODELS.md
"""

import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.utils import prune

COUNT = 6
WORDS = 11
JVP = "JvpContributions(model, direction)"
TABLE = Path(__file__).with_name("MODELS.md")

Losses: TypeAlias = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Case:
    """A model, its losses and a batch.

    Attributes:
        build: makes the model.
        batch: makes a batch.
        losses: from model and batch to the loss of each example.
        count: number of examples.
        refused: part of the message that refuses it; empty: contributions by hooks are right.
        how: how it is seen through, for the table.
        options: of GhostContributions.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[], Any]
    losses: Losses
    count: int = COUNT
    refused: str = ""
    how: str = "formulas"
    options: dict[str, Any] = field(default_factory=dict)


def squares(model: Any, x: Any) -> Tensor:
    """A loss in which every output element matters in another way."""
    y = model(x)
    y = (y[0] if isinstance(y, tuple) else y).flatten(1)
    return ((y - torch.linspace(-1, 1, y.shape[1], dtype=y.dtype)) ** 2).mean(1)


def vectors(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(COUNT, *shape, dtype=torch.float64)


def indices(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(WORDS, shape)


class Attention(nn.Module):
    """Multi-head attention and a head."""

    def __init__(self, *, frozen: bool = False) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)
        if frozen:
            self.attention.in_proj_weight.requires_grad_(False)
            self.attention.in_proj_bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.attention(x, x, x, need_weights=False)[0])
        return y


def biases_only() -> nn.Module:
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), nn.Linear(8, 3))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("bias" in name and "in_proj" not in name)
    return model


def mlp(change: Callable[[Any], Any] = lambda module: module) -> nn.Sequential:
    return nn.Sequential(change(nn.Linear(5, 4)), nn.Tanh(), nn.Linear(4, 3))


def pruned(module: nn.Linear) -> nn.Linear:
    prune.random_unstructured(module, "weight", 0.5)  # type: ignore[no-untyped-call]
    return module


def equation(model: Any, x: Tensor) -> Tensor:
    """How far a differential equation is from holding."""
    x = x.detach().requires_grad_()
    y = model(x)
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return (slope.sum(1) - y[:, 0]) ** 2


def hooked(hook: Callable[[Any, Any, Tensor], Tensor]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = mlp()
        model[0].register_forward_hook(hook)
        return model

    return build


def patched() -> nn.Module:
    model = mlp()
    model[0].forward = types.MethodType(lambda self, x: 3 * F.linear(x, self.weight, self.bias), model[0])
    return model


class Functional(nn.Module):
    """The weight of a module that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.a(x)), self.b.weight, self.b.bias)


class TiedByFunction(nn.Module):
    """A head that is the embedding's weight, used by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear = nn.Embedding(WORDS, 8), nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.linear(self.table(ids))), self.table.weight)


class Spectral(nn.Module):
    """Complex weights between real numbers, as of Fourier neural operators."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(5, 5, dtype=torch.complex128)), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.fft.ifft(torch.fft.fft(x) @ self.weight).real)
        return y

    def double(self) -> Self:
        self.head.double()
        return self


class Counting(nn.Module):
    """What it gives depends on how often it was called in training, and it remembers what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.calls = nn.Parameter(torch.randn(5, 3)), 0
        self.seen: list[float] = []
        self.average = torch.zeros(3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        y = (x @ self.weight) / (1 + self.calls) + self.average
        if self.training:
            self.calls += 1
            self.average += y.detach().mean(0)
            self.seen.append(float(y.detach().sum()))
        return y


class SharedInside(nn.Module):
    """Parent and child that use one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(5, 5)
        self.scale = self.child.bias

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.child(x).tanh() * self.scale
        return y


def penalised(model: Any, x: Tensor) -> Tensor:
    return squares(model, x) + sum(p.square().sum() for p in model.parameters())


class Language(nn.Module):
    """A language model with learnt positions, which are written in many ways."""

    def __init__(self, spelling: str = "plain") -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, 8), nn.Embedding(16, 8)
        self.linear, self.norm, self.head = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, WORDS)
        self.spelling = spelling

    def forward(self, ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        count, length = ids.shape
        places = torch.arange(length)
        if position_ids is not None:
            p = self.places(position_ids)
        elif self.spelling == "[1, T]":
            p = self.places(places[None])
        elif self.spelling == "[1, T].squeeze":
            p = self.places(places[None]).squeeze(0)
        elif self.spelling == "reversed":
            p = self.places(places.flip(0))
        else:
            p = self.places(places)
            if self.spelling == "[None]":
                p = p[None]
            elif self.spelling == "unsqueeze":
                p = p.unsqueeze(0)
            elif self.spelling == "expand":
                p = p.expand(count, length, 8)
            elif self.spelling == "repeat":
                p = p.repeat(count, 1, 1)
            elif self.spelling == "in place":
                p += 1
            elif self.spelling == "gated":
                p = p * 0.5
        y: Tensor = self.head(torch.tanh(self.norm(self.linear(self.words(ids) + p))))
        return y


def token_means(model: Any, ids: Tensor) -> Tensor:
    losses = F.cross_entropy(model(ids).flatten(0, 1), ids.flatten(), reduction="none")
    return losses.view_as(ids).mean(1)


SEGMENTS = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2])
PLACES = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3, 4]])
UNEVEN = torch.tensor([0] * 3 + [1] * 4 + [2] * 6)


def by_segment(losses: Tensor, segments: Tensor, count: int) -> Tensor:
    return torch.zeros(count, dtype=losses.dtype).index_add(0, segments, losses) / torch.bincount(segments)


def packed(take: Callable[[Tensor], Tensor]) -> Losses:
    def losses(model: Any, ids: Tensor) -> Tensor:
        logits = take(model(ids, position_ids=PLACES))
        return by_segment(F.cross_entropy(logits, ids[0], reduction="none"), SEGMENTS, 3)

    return losses


class CausalLanguage(nn.Module):
    """Attention within the segments of one row, to the tokens before."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix = nn.Embedding(WORDS, 8), nn.Linear(8, 24)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, WORDS)

    def forward(self, ids: Tensor, segments: Tensor) -> Tensor:
        x = self.words(ids)
        q, k, v = self.mix(x).chunk(3, -1)
        length = torch.arange(ids.shape[1])
        seen = (segments[:, :, None] == segments[:, None]) & (length[:, None] >= length)
        y: Tensor = self.head(self.norm(x + F.scaled_dot_product_attention(q, k, v, attn_mask=seen)))
        return y


def answers_only(model: Any, ids: Tensor) -> Tensor:
    """Packed prompts and answers: the first two tokens of each segment are not predicted."""
    logits = model(ids, SEGMENTS[None])[0]
    losses = F.cross_entropy(logits, ids[0], reduction="none") * (PLACES[0] >= 2)
    return by_segment(losses, SEGMENTS, 3)


def two_rows(model: Any, ids: Tensor) -> Tensor:
    losses = F.cross_entropy(model(ids).flatten(0, 1), ids.flatten(), reduction="none")
    return by_segment(losses, torch.arange(6).repeat_interleave(4), 6)


class Flat(nn.Module):
    """Tokens of all examples in one dimension, without padding."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.linear, self.head = nn.Embedding(WORDS, 8), nn.Linear(8, 8), nn.Linear(8, WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.linear(self.words(ids))))
        return y


def flat(segments: Tensor) -> Losses:
    def losses(model: Any, ids: Tensor) -> Tensor:
        return by_segment(F.cross_entropy(model(ids), ids, reduction="none"), segments, 3)

    return losses


def pairs(model: Any, x: tuple[Tensor, Tensor]) -> Tensor:
    chosen, rejected = model(torch.cat(x)).chunk(2)
    return F.softplus((rejected - chosen).mean(1))


def two_calls(model: Any, x: tuple[Tensor, Tensor]) -> Tensor:
    return F.softplus((model(x[1]) - model(x[0])).mean(1))


def preferences(model: Any, x: tuple[Tensor, Tensor]) -> Tensor:
    both = torch.cat(x)
    losses = F.cross_entropy(model(both).flatten(0, 1), both.flatten(), reduction="none").view_as(both).mean(1)
    return F.softplus(losses[:COUNT] - losses[COUNT:])


def contrasts(model: Any, x: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(x[0]) @ model(x[1]).T, torch.arange(COUNT), reduction="none")


def two(batch: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: (batch(), batch())


class Experts(nn.Module):
    """Modules of which each sees the examples that are routed to it."""

    def __init__(self, experts: int = 3) -> None:
        super().__init__()
        self.router, self.head = nn.Linear(5, experts), nn.Linear(5, 2)
        self.experts = nn.ModuleList(nn.Linear(5, 5) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.router(x).softmax(-1).max(-1)
        mixed = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            tokens = (chosen == index).nonzero()[:, 0]
            if len(tokens):
                mixed = mixed.index_add(0, tokens, expert(x[tokens]) * weight[tokens, None])
        y: Tensor = self.head(mixed)
        return y


class Scripted(nn.Module):
    """A part that `torch.jit` has compiled, a list of parameters, and a `forward` that is called by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.part = torch.jit.script(nn.Sequential(nn.Linear(5, 4), nn.Tanh()).double())
        self.scale, self.head = nn.ParameterList([nn.Parameter(torch.ones(4))]), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head.forward(self.part(x) * self.scale[0])


class Mixing(nn.Module):
    """Subtracts the mean over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y - y.mean(0)


class TimeFirst(nn.Module):
    """Examples in the second dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x.transpose(0, 1))
        return y.transpose(0, 1)


class Own(nn.Module):
    """A user's own module: a learnt scale, and a learnt exponent."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.power = nn.Parameter(torch.rand(5)), nn.Parameter(torch.rand(1) + 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x.abs() ** self.power


def spectral() -> nn.Module:
    return mlp(nn.utils.spectral_norm).eval()


def spectral_in_training() -> nn.Module:
    return mlp(nn.utils.spectral_norm)


WHOLE = "forward mode"
PACKED = "formulas, rows by their losses"
ids = indices(COUNT, 5)
row = indices(1, 12)

CASES: dict[str, Case] = {
    "MultiheadAttention": Case(Attention, vectors(4, 8), squares, how=WHOLE),
    "MultiheadAttention, in_proj frozen": Case(lambda: Attention(frozen=True), vectors(4, 8), squares, how=WHOLE),
    "MultiheadAttention, also=": Case(
        Attention, vectors(4, 8), squares, how=WHOLE, options={"also": (nn.MultiheadAttention,)}
    ),
    "TransformerEncoderLayer": Case(
        lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), vectors(4, 8), squares, how=WHOLE
    ),
    "TransformerEncoderLayer, biases only": Case(biases_only, vectors(4, 8), squares, how=WHOLE),
    "weight_norm, old": Case(lambda: mlp(nn.utils.weight_norm), vectors(5), squares, how=WHOLE),
    "spectral_norm, old": Case(spectral, vectors(5), squares, how=WHOLE),
    "spectral_norm, old, in training": Case(spectral_in_training, vectors(5), squares, how=WHOLE),
    "prune": Case(lambda: mlp(pruned), vectors(5), squares, how=WHOLE),
    "parametrizations.weight_norm": Case(
        lambda: mlp(nn.utils.parametrizations.weight_norm), vectors(5), squares, how=WHOLE
    ),
    "parametrizations.orthogonal": Case(
        lambda: mlp(nn.utils.parametrizations.orthogonal), vectors(5), squares, how=WHOLE
    ),
    "forward hook that scales": Case(hooked(lambda _m, _a, y: 3 * y), vectors(5), squares),
    "forward hook that adds noise": Case(hooked(lambda _m, _a, y: y + 0 * torch.randn_like(y)), vectors(5), squares),
    "forward hook with an activation": Case(hooked(lambda _m, _a, y: y.relu()), vectors(5), squares),
    "patched forward": Case(patched, vectors(5), squares, how=WHOLE),
    "F.linear with a module's weight": Case(Functional, vectors(5), squares, how=WHOLE),
    "head tied by F.linear": Case(TiedByFunction, ids, squares, how=WHOLE),
    "parent and child share a parameter": Case(SharedInside, vectors(5), squares, how=WHOLE),
    "module of one's own": Case(lambda: nn.Sequential(nn.Linear(5, 5), Own()), vectors(5), squares, how=WHOLE),
    "torch.jit.script": Case(Scripted, vectors(5), squares, how=WHOLE),
    "complex numbers": Case(Spectral, vectors(5), squares, how=WHOLE),
    "state in Python": Case(Counting, vectors(5), squares, how=WHOLE),
    "gradient of the model in the loss": Case(
        mlp, vectors(5), equation, refused=r"0 \(Linear\), 2 \(Linear\): something made within it is used outside"
    ),
    "penalty on parameters in the loss": Case(
        mlp, vectors(5), penalised, refused=r"0 \(Linear\), 2 \(Linear\): its parameters enter the losses outside"
    ),
    "BatchNorm1d, in training": Case(
        lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)),
        vectors(5),
        squares,
        refused=r"1 \(BatchNorm1d\): batch normalisation in training mode mixes examples",
    ),
    "BatchNorm1d, in evaluation": Case(
        lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)).eval(), vectors(5), squares, how=WHOLE
    ),
    "LSTM": Case(lambda: nn.LSTM(8, 3, batch_first=True), vectors(4, 8), squares, how=WHOLE),
    "GRU, two directions": Case(
        lambda: nn.GRU(8, 3, batch_first=True, bidirectional=True), vectors(4, 8), squares, how=WHOLE
    ),
    "ConvTranspose1d": Case(lambda: nn.ConvTranspose1d(4, 3, 3), vectors(4, 8), squares, how=WHOLE),
    "InstanceNorm1d": Case(lambda: nn.InstanceNorm1d(4, affine=True), vectors(4, 8), squares, how=WHOLE),
    "GroupNorm, SiLU in place": Case(
        lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(inplace=True)), vectors(4, 6, 6), squares
    ),
    "Conv2d with everything": Case(
        lambda: nn.Conv2d(4, 8, 3, padding=2, groups=2, dilation=2, stride=2, padding_mode="reflect"),
        vectors(4, 9, 9),
        squares,
    ),
    "PReLU": Case(lambda: nn.Sequential(nn.Linear(5, 4), nn.PReLU(4)), vectors(5), squares, how=WHOLE),
    "EmbeddingBag": Case(lambda: nn.EmbeddingBag(WORDS, 5), ids, squares, how=WHOLE),
    "Bilinear": Case(lambda: nn.Bilinear(5, 5, 3), vectors(5), lambda m, x: squares(lambda y: m(y, y), x), how=WHOLE),
    "a mean over the batch inside": Case(Mixing, vectors(5), squares, how=WHOLE),
    "time in the first dimension": Case(TimeFirst, vectors(4, 8), squares, how=WHOLE),
    "time in the first dimension, T = B": Case(TimeFirst, vectors(COUNT, 8), squares, how=WHOLE),
    **{
        f"learnt positions: {spelling}": Case(lambda spelling=spelling: Language(spelling), ids, token_means)  # type: ignore[misc]
        for spelling in ("plain", "[None]", "unsqueeze", "expand", "repeat", "[1, T]", "[1, T].squeeze", "in place")
    },
    "learnt positions: scaled": Case(lambda: Language("gated"), ids, token_means, how=WHOLE),
    "positions reversed": Case(lambda: Language("reversed"), ids, token_means),
    "positions reversed, T = 2B": Case(lambda: Language("reversed"), indices(COUNT, 2 * COUNT), token_means),
    "positions reversed, T = B": Case(lambda: Language("reversed"), indices(COUNT, COUNT), token_means),
    "positions, T = B": Case(Language, indices(COUNT, COUNT), token_means),
    "packed, logits[0]": Case(Language, row, packed(lambda y: y[0]), 3, how=PACKED),
    "packed, logits.squeeze(0)": Case(Language, row, packed(lambda y: y.squeeze(0)), 3, how=PACKED),
    "packed, logits.view(-1, V)": Case(Language, row, packed(lambda y: y.view(-1, WORDS)[:12]), 3, how=PACKED),
    "packed, answers only, with attention": Case(CausalLanguage, row, answers_only, 3, how=PACKED),
    "packed, 2 rows of 6 examples": Case(Language, indices(2, 12), two_rows, how=PACKED),
    "padding-free, 12 tokens of 3": Case(Flat, indices(12), flat(SEGMENTS), 3, how=PACKED),
    "padding-free, 13 tokens of 3": Case(Flat, indices(13), flat(UNEVEN), 3, how=PACKED),
    "pairs along the batch": Case(mlp, two(vectors(5)), pairs, how=PACKED),
    "pairs by two calls": Case(mlp, two(vectors(5)), two_calls),
    "preferences (DPO)": Case(Language, two(ids), preferences, how=PACKED),
    "in-batch negatives": Case(
        mlp,
        two(vectors(5)),
        contrasts,
        refused=r"the model itself \(Sequential\): its rows enter the losses of several",
    ),
    "routed experts": Case(Experts, vectors(5), squares, how=WHOLE),
}


def shaken(model: nn.Module) -> nn.Module:
    """In float64, away from the constants that norms and biases start as, which would hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.double()


def table() -> str:
    """The verdicts as Markdown."""
    from tests.client.torch.architectures import ARCHITECTURES

    lines = [
        "# Which models contributions are right for",
        "",
        "Made by `python -m tests.client.torch.zoo` from the cases of the tests, which show each line: contributions",
        "by `GhostContributions` and `OnePassContributions` equal those of per-example gradients to 1e-6 in float64,",
        "or the model is refused and the line to paste is right. *Formulas*: about 0.3 of a step more; *forward mode*:",
        "the modules concerned are called again, about two more of their forward passes.",
        "",
        "| model or loss | by hooks | line to paste |",
        "|---|---|---|",
        *(
            f"| {name} | {'refused' if case.refused else f'right: {case.how}'} | {f'`{JVP}`' if case.refused else ''} |"
            for name, case in CASES.items()
        ),
        "",
        "| architecture of `transformers` | by hooks |",
        "|---|---|",
        *(f"| {name} | right: {architecture.how} |" for name, architecture in ARCHITECTURES.items()),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TABLE.write_text(table())
