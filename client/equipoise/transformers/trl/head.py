"""TRL's fused language-model head, computed in a call of the head module, where hooks can see it.

TRL computes log-probabilities from the weight of the head and never calls the head itself. While `observed_head` lasts,
the same kernel runs on the same rows inside of a call of the head, so that nothing changes but who is told of it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from equipoise.errors import InvalidRequestError
from equipoise.torch.processes import unwrapped

_ROWS, _COLUMNS = 4096, 32768  # of a tile of logits
_KERNEL = "_ChunkedLogProbFunction"

Fields: TypeAlias = tuple[Tensor | None, ...]
"""What TRL's kernel gives for each row: log-probabilities, entropy and other metrics that were asked for."""


@dataclass(frozen=True, slots=True)
class Options:
    """How logits become log-probabilities, as TRL's kernel takes it.

    Attributes:
        temperature: what logits are divided by.
        chunk_size: width of a tile of logits.
        softcap: bound of the logits, by tanh; None: unbounded.
        logit_scale: what logits are multiplied by before they are bounded.
        outputs: names of the metrics.
        last: whether the last position of each row is computed; it predicts nothing.
    """

    temperature: float
    chunk_size: int
    softcap: float | None
    logit_scale: float
    outputs: tuple[str, ...]
    last: bool = True


@dataclass(frozen=True, slots=True)
class _Scope:
    """A forward pass under way.

    Attributes:
        head: the module whose weight is used.
        labels: the label of each position, -100 where there is none: integers [R, T].
        padded: whether the last position was added for the sake of the shape.
    """

    head: nn.Module
    labels: Tensor
    padded: bool


_scopes: list[_Scope] = []


def check_kernel() -> None:
    """Refuses a TRL that computes log-probabilities by something else: its head would be seen by nobody.

    Raises:
        InvalidRequestError: it does.
    """
    import trl
    from trl.trainer import utils

    if not hasattr(utils, _KERNEL):
        raise InvalidRequestError(
            field="trl",
            value=trl.__version__,
            rule=f"must compute log-probabilities by {utils.__name__}.{_KERNEL}, as 1.16 does: use that one, "
            "pip install 'trl==1.16.*', or give PolicyTraining.losses",
        )


@contextmanager
def observed_head(model: nn.Module) -> Iterator[None]:
    """While it lasts, `fused_call` runs the head of a model as a module; afterwards the model is as before."""
    from trl.trainer import utils

    head = _head_of(model)
    if head is None:
        yield
        return
    kernel = getattr(utils, _KERNEL)
    before = vars(head).get("forward")
    head.forward = partial(_forward, head, head.forward)
    setattr(utils, _KERNEL, _Kernel)
    try:
        yield
    finally:
        setattr(utils, _KERNEL, kernel)
        if before is None:
            del head.forward
        else:
            head.forward = before


def fused_call(model: Any, kwargs: dict[str, Any], *, packed: bool) -> Any:
    """The output of a model with a fused head, given `labels`: [R, T - 1] for each field of a token.

    Args:
        model: the model, wrapped or not.
        kwargs: its inputs.
        packed: whether a row holds several examples: outputs of the modules then all have T positions.
    """
    head = _head_of(unwrapped(model))
    if head is None or vars(head).get("forward") is None:
        return model(**kwargs)
    labels = nn.functional.pad(kwargs["labels"][:, 1:], (0, 1 if packed else 0), value=-100)
    if packed:
        kwargs = {**{name: value for name, value in kwargs.items() if name != "labels"}, "shift_labels": labels}
    _scopes.append(_Scope(head, labels, packed))
    try:
        output = model(**kwargs)
    finally:
        _scopes.pop()
    if not packed:
        return output
    return type(output)(**{n: y[:, :-1] if isinstance(y, Tensor) and y.ndim > 1 else y for n, y in output.items()})


class _Kernel:
    """Stands in for TRL's autograd function."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = (),
    ) -> Fields:
        """As TRL's function."""
        scope = _scopes[-1] if _scopes else None
        if scope is None or scope.head.weight is not weight:
            options = Options(temperature, chunk_size, softcap, logit_scale, tuple(outputs))
            return _scored(hidden, weight, bias, targets, options)
        labels = scope.labels.to(hidden.device)
        mask = labels != -100
        chosen = len(hidden) != mask.numel()  # on devices with Triton only positions with a label are given
        if chosen:
            rows = hidden.new_zeros(*mask.shape, hidden.shape[-1]).masked_scatter(mask[..., None], hidden)
        else:
            rows = hidden.view(*mask.shape, hidden.shape[-1])
        given = temperature, chunk_size, softcap, logit_scale, tuple(outputs), not scope.padded
        found: Fields = scope.head(rows, labels, given)
        return tuple(None if y is None else y[mask] if chosen else y.reshape(-1) for y in found)


def _forward(
    head: Any, plain: Callable[[Tensor], Any], x: Tensor, labels: Tensor | None = None, given: tuple[Any, ...] = ()
) -> Any:
    """The head's plain forward pass; given labels, [R, T] for each field of a token from hidden states, [R, T, H]."""
    if labels is None:
        return plain(x)
    options = Options(*given)
    if not options.last:
        x, labels = x[:, :-1], labels[:, :-1]
    mask = labels != -100
    from trl.trainer import utils

    chosen = bool(utils._use_triton(x.device))
    rows = x[mask] if chosen else x.reshape(-1, x.shape[-1])
    targets = labels[mask] if chosen else labels.clamp(min=0).reshape(-1)
    found = []
    for y in _scored(rows, head.weight, head.bias, targets, options):
        if y is not None:
            y = y.new_zeros(mask.shape).masked_scatter(mask, y) if chosen else y.view(mask.shape)
            y = y if options.last else nn.functional.pad(y, (0, 1))
        found.append(y)
    return tuple(found)


def _scored(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: Options) -> Fields:
    """TRL's kernel on some rows; in forward-mode differentiation with the tangent of the log-probabilities."""
    from trl.kernels import ChunkedLogProbFunction

    (x, dx), (w, dw), (b, db) = (_unpacked(tensor) for tensor in (hidden, weight, bias))
    found: Fields = ChunkedLogProbFunction.apply(
        x,
        w,
        b,
        targets,
        options.temperature,
        options.chunk_size,
        options.softcap,
        options.logit_scale,
        options.outputs,
    )
    if dx is None and dw is None and db is None:
        return found
    log_probs = found[0]
    assert log_probs is not None
    parts = []
    for rows in (slice(start, start + _ROWS) for start in range(0, max(len(x), 1), _ROWS)):
        moved = None if dx is None else dx[rows]
        parts.append(_tangent(x[rows], moved, (w, b), (dw, db), targets[rows], log_probs[rows], options))
    dual: Tensor = forward_ad.make_dual(log_probs, torch.cat(parts).to(log_probs.dtype))  # type: ignore[no-untyped-call]
    return dual, *found[1:]


def _tangent(
    x: Tensor,
    dx: Tensor | None,
    head: tuple[Any, Tensor | None],
    moves: tuple[Tensor | None, Tensor | None],
    targets: Tensor,
    log_probs: Tensor,
    options: Options,
) -> Tensor:
    """How the log-probabilities of some rows change, [N]: dz at the target minus the mean of dz under p.

    One pass over the logits, since `log_probs` tell about how large their exponentials are.
    """

    def logits(columns: Any) -> tuple[Tensor, Tensor]:
        """Logits of some columns and how they change: for a slice [N, C], for a column of each row [N, 1]."""
        of_rows = isinstance(columns, Tensor)

        def product(rows: Tensor, matrix: Tensor) -> Tensor:
            chosen = matrix[columns].to(x.dtype)
            rows = rows.to(x.dtype)
            return (rows * chosen).sum(-1, keepdim=True) if of_rows else rows @ chosen.T

        def shift(vector: Tensor) -> Tensor:
            return vector[columns].to(x.dtype)[:, None] if of_rows else vector[columns].to(x.dtype)

        z, dz = product(x, weight), x.new_zeros(())
        z = z if bias is None else z + shift(bias)
        for part in (
            None if dx is None else product(dx, weight),
            None if moves[0] is None else product(x, moves[0]),
            None if moves[1] is None else shift(moves[1]),
        ):
            dz = dz if part is None else dz + part
        z, dz = z * options.logit_scale, dz * options.logit_scale
        if options.softcap is not None:
            bounded = torch.tanh(z / options.softcap)
            z, dz = bounded * options.softcap, dz * (1 - bounded.square())
        return z / options.temperature, dz / options.temperature

    weight, bias = head
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    z, moved = logits(targets)
    log_z = z - log_probs[:, None]
    sums = x.new_zeros(2, len(x))
    for start in range(0, len(weight), _COLUMNS):
        z, dz = logits(slice(start, start + _COLUMNS))
        p = (z - log_z).exp()
        sums += torch.stack([p.sum(-1), (p * dz).sum(-1)])
    return moved[:, 0] - sums[1] / sums[0]


def _head_of(model: nn.Module) -> Any:
    """The module whose weight TRL takes for the head of a model; None: it has no such head."""
    embeddings = getattr(model, "get_output_embeddings", lambda: None)()
    weight = getattr(embeddings, "weight", None)
    if embeddings is None or weight is None:
        return None
    return next((module for module in embeddings.modules() if module._parameters.get("weight") is weight), None)


def _unpacked(tensor: Tensor | None) -> tuple[Any, Tensor | None]:
    if tensor is None:
        return None, None
    value, tangent = forward_ad.unpack_dual(tensor)  # type: ignore[no-untyped-call]
    return value, tangent
