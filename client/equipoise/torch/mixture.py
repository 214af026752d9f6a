"""Mixing sources by the weights that a policy gives them."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import repeat
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DistributedSampler

from equipoise.errors import InvalidRequestError, is_integer, require
from equipoise.torch.agreement import Agreement
from equipoise.torch.newest import NewestWeights, Reading
from equipoise.torch.processes import num_processes, rank
from equipoise.torch.sampler import READ_AHEAD
from equipoise.torch.shares import Proportions
from equipoise.torch.sharing import is_dispatched, is_idle, sharer_of, skips_batches
from equipoise.torch.sources import MixedDataset
from equipoise.torch.stretches import Stretches, Told


class Mixture(DistributedSampler[int]):
    """Draws rows of several sources, each source as often as its policy says.

    The examples of the policy are the sources: ids 0 to S - 1 in order of their names. A source's share of the draws
    is its natural share times its weight; rows report their source's id, and their losses are not weighed again.

    There is one sequence of draws, the same in all processes, of which each takes its part; workers of a DataLoader
    fetch rows and draw nothing. Every `refresh_every` draws the first process reads the newest weights and tells the
    others, over a group of their own: so all draw by weights of the same version. While the server is lost, the last
    known weights hold, and before there are any the natural shares; nobody waits for it but once.

    Sources with places (`__getitem__` and `__len__`, as lists, map-style datasets and `datasets.Dataset`) are read in
    random order, each row once in a pass. Streams (any other iterable, as torch's and Hugging Face's `IterableDataset`)
    are read in their order: each worker of each process reads a stream for itself, skipping what others take, so that
    draws depend neither on the number of workers nor of processes. They must give the same rows each time, and must not
    be split among processes or workers.

    It works in a plain loop with DistributedDataParallel and in Lightning, where each process gets its part, and with
    `accelerator.prepare` and Hugging Face's `Trainer`, which share out what it gives.

    Example:
        >>> client = PolicyClient(address, policy="run-7", num_examples=3, rule="exponentiated_gradient")
        >>> mixture = Mixture({"books": books, "code": code, "web": web}, client=client, minimum=0.05)
        >>> for batch in DataLoader(mixture.dataset, batch_size=64, sampler=mixture):
        ...     with steps.capture(batch["example_id"]) as step:  # WeightedSteps(..., sampled=True)
        ...         step.loss(batch).backward()

    Args:
        sources: the data of each source by name, or pairs of both; None: a source that is to be added later.
        client: a `PolicyClient` of a policy with S examples. None: shares are natural.
        num_samples: draws in an epoch, over all processes; default: the sum of the lengths, if all are known.
        sizes: natural sizes by name, of which only the proportions matter; default: the lengths.
        temperature: natural shares are in proportion to `size^(1/temperature)`: 1 as they are, above it more equal.
        minimum: smallest share: of each source, or by name; 0 for those that are not named.
        ends: what happens when a source is over: `"repeat"`, it begins again, rows with places in another order;
            `"drop"`, it is out for the rest of the epoch and the others share its draws. To know when a stream is over
            whose length is unknown, the first process then reads it one stretch ahead.
        refresh_every: draws, over all processes, under weights of one version.
        explore: so many draws of the run, over all processes, are by natural shares whatever the weights, and nobody is
            asked for these: exploration first, in which all sources are compared alike, and a model that sees all of
            them; then what was found out counts. It ends with a stretch of `refresh_every` draws. Go together with it:
            `WeightedSteps(measure_until=...)`, after as many batches.
        seed: equal seeds draw equal rows under equal weights.
        id_column: where rows that are mappings have the id of their source; others become pairs of id and row.

    Attributes:
        dataset: the sources as one dataset, for the DataLoader that this is the sampler of.
        names: the names in order of their ids; `ExampleKeys(mixture.names)` names them for others.
        epoch: epochs begun.

    Raises:
        InvalidRequestError: a name comes twice, a source is empty, the policy has not S examples, or an argument breaks
            another rule.
    """

    rank = property(lambda self: rank())
    """Place of this process, from 0."""
    num_replicas = property(lambda self: num_processes())
    """How many processes share an epoch."""

    def __init__(
        self,
        sources: Mapping[str, Any] | Iterable[tuple[str, Any]],
        *,
        client: Reading | None = None,
        num_samples: int | None = None,
        sizes: Mapping[str, float] | None = None,
        temperature: float = 1.0,
        minimum: float | Mapping[str, float] = 0.0,
        ends: Literal["repeat", "drop"] = "repeat",
        refresh_every: int = 1024,
        explore: int = 0,
        seed: int = 0,
        id_column: str = "example_id",
    ) -> None:
        named = _named(sources)
        for field, value in (("num_samples", num_samples), ("refresh_every", refresh_every)):
            fits = value is None or is_integer(value, 1, 1 << 62)
            require(fits, field=field, value=value, rule="must be an integer of at least 1")
        for field, value in (("explore", explore), ("seed", seed)):
            require(is_integer(value, 0, 1 << 63), field=field, value=value, rule="must be an integer of at least 0")
        require(ends in ("repeat", "drop"), field="ends", value=ends, rule='must be "repeat" or "drop"')
        self.names = list(named)
        self.dataset: MixedDataset = MixedDataset(named, id_column=id_column)
        self.epoch = 0
        self._num_samples = num_samples
        self._proportions = Proportions(self.names, sizes=sizes, temperature=temperature, minimum=minimum)
        self._newest = NewestWeights(client, len(named))
        self._drops = ends == "drop"
        self._identity = {"names": self.names, "seed": seed, "refresh_every": refresh_every, "ends": ends}
        self._refresh_every = refresh_every
        self._explore = explore
        self._earlier = 0
        self._stretches = Stretches(
            self.dataset, num_sources=len(named), seed=seed, size=refresh_every, repeats=not self._drops
        )
        self._present = np.zeros(len(named), dtype=np.bool_)
        self._told: Told | None = None
        self._position = 0
        self._origin = 0
        self._total = 0
        self._resumed = False
        self._by = 1
        self._agreement = Agreement()
        self._measure()

    @property
    def client(self) -> Reading | None:
        """What tells weights."""
        return self._newest.client

    @client.setter
    def client(self, client: Reading | None) -> None:
        self._newest.client = client

    @property
    def lost(self) -> bool:
        """Whether the newest weights were not those of now, because the server did not answer."""
        return self._newest.lost

    @property
    def fallbacks(self) -> int:
        """How often that was so."""
        return self._newest.fallbacks

    @property
    def given(self) -> int:
        """Draws of this epoch that were given: to this process, or where something else shares them out, to all."""
        return (self._position - self._origin) // self._by + self._origin // self._by

    def __len__(self) -> int:
        """Draws in an epoch, of this process where nothing else shares them out; at most, where streams may end."""
        parts = self._parts(sharer_of(self))
        return -(-self._measure() // parts)

    def __iter__(self) -> Iterator[int]:
        """The places in `dataset` of an epoch's draws; after `load_state_dict` those of the rest of one.

        Raises:
            InvalidRequestError: something would share out what is a part of an epoch already; or, while it is iterated,
                the policy or the data do not fit.
        """
        sharer = sharer_of(self)
        rule = f"{type(sharer).__name__} would share out again what is shared already: give the mixture itself"
        require(not isinstance(sharer, DistributedSampler), field="sampler", value="Mixture", rule=rule)
        if is_idle(sharer):  # what is given here is thrown away
            return repeat(0, len(self))
        agrees = num_processes() > 1 and not is_dispatched(sharer)
        return self._epoch(self._parts(sharer), agrees=agrees, skips=skips_batches())

    def set_epoch(self, epoch: int) -> None:
        """Does nothing: draws differ from epoch to epoch by themselves."""

    def add(self, name: str, source: Any) -> None:
        """Gives the data of a source that had none; in all processes, and drawn from the next epoch on.

        Workers that live from epoch to epoch (`persistent_workers`) would not know of it: they raise an error.

        Raises:
            InvalidRequestError: no such source was named, it has data, or these are none.
        """
        require(name in self.names, field="name", value=name, rule=f"must be one of {', '.join(self.names)}")
        number = self.names.index(name)
        require(not self.dataset.has(number), field="name", value=name, rule="has data already")
        self.dataset.fill(name, source)
        self._measure()

    def metrics(self) -> dict[str, float]:
        """What is drawn now, for any logger.

        Returns:
            `policy/share/NAME`, the share of each source in the newest draws; `policy/mixture_version`, the version of
            the policy that the shares follow; `policy/mixture_fallbacks`. Empty before the first draw.
        """
        if self._told is None:
            return {}
        shares = zip(self.names, self._told["shares"].tolist(), strict=True)
        return {
            **{f"policy/share/{name}": share for name, share in shares},
            "policy/mixture_version": float(self._told["version"]),
            "policy/mixture_fallbacks": float(self.fallbacks),
        }

    def state_dict(self, *, trained: int | None = None) -> dict[str, Any]:
        """For a checkpoint: strings, integers and tensors, the same in all processes.

        Args:
            trained: draws of this epoch that have been trained on: of this process where nothing else shares them out,
                else of all. Needed where a loader takes draws ahead of the step; torchdata's `StatefulDataLoader`, the
                `Trainer` and Lightning's callback see to it. Default: all that were given.

        Raises:
            InvalidRequestError: `trained` is more than was given, or more than `READ_AHEAD` less.
        """
        given = self.given
        ahead = 0 if trained is None else given - trained
        rule = f"must be from {max(0, given - READ_AHEAD)} to {given}, the draws given in this epoch"
        require(0 <= ahead <= min(given, READ_AHEAD), field="trained", value=trained, rule=rule)
        position = self._position - ahead * self._by
        begun = self._stretches.begun_before(position)
        return {
            **self._identity,
            "epoch": self.epoch,
            "position": position,
            "earlier": self._earlier,
            "total": self._total,
            "begun": begun,
            "lengths": torch.from_numpy(self._lengths()),
            "present": torch.from_numpy(self._present.copy()),
            "newest": self._newest.state_dict(),
            "agreed": [told for told in self._stretches.agreed if told["number"] >= begun["number"]],
            "agreed_later": self._stretches.agreed,  # the list itself: see Stretches
        }

    def load_state_dict(self, state: Mapping[str, Any], *, own: bool = True) -> None:
        """Goes on where the mixture stood that gave `state`: within its epoch, or with the next where that was over.

        Draws go on exactly, also with another number of processes or workers.

        Args:
            state: what `state_dict` gave, in any process.
            own: of no account.

        Raises:
            InvalidRequestError: it is that of a mixture with other names, seed, ends, refresh_every or lengths.
        """
        for field, value in self._identity.items():
            require(state[field] == value, field=field, value=value, rule=f"was {state[field]!r} at the checkpoint")
        lengths = self._lengths().tolist()
        for name, before, now in zip(self.names, state["lengths"].tolist(), lengths, strict=True):
            same = -1 in (before, now) or before == now
            require(same, field=f"sources[{name!r}]", value=f"{now} examples", rule=f"had {before} at the checkpoint")
            if now < 0 <= before:
                self.dataset.know_length(self.names.index(name), before)
        self.epoch, self._total = state["epoch"], state["total"]
        self._position = self._origin = state["position"]
        self._earlier = state.get("earlier", 0)
        self._present = state["present"].numpy().copy()
        self._newest.load_state_dict(state["newest"])
        self._stretches.resume(state["epoch"], state["begun"], [*state["agreed"], *state["agreed_later"]])
        self._resumed = 0 < self._position < self._total

    def _epoch(self, parts: int, *, agrees: bool, skips: bool) -> Iterator[int]:
        """Of each `parts` draws that of this process.

        Before any of these is given all are made: else a process could wait for what the first one tells while that
        waits for it in a training step.
        """
        if not self._resumed:
            self._begin_epoch()
        self._resumed = False
        self._origin, self._by = self._position, parts
        self._total = self._origin + -(-(self._total - self._origin) // parts) * parts
        place = rank() if parts > 1 else 0
        if skips:  # what was given before the checkpoint is skipped once more, and not looked at
            yield from repeat(0, self._origin // parts)
        while self._position < self._total:
            if not self._stretches.extend(self._position + parts, self._total, lambda n: self._agreed(n, agrees)):
                end = self._stretches.end
                self._total = self._position + (end - self._position) // parts * parts
                continue
            position, self._position = self._position, self._position + parts
            self._stretches.forget(position, self._position - READ_AHEAD * parts)
            yield self._stretches.at(position + place)

    def _begin_epoch(self) -> None:
        self.epoch += 1
        self._earlier += self._position
        self._position, self._total = 0, self._measure()
        self._present = np.array([self.dataset.has(number) for number in range(len(self.names))])
        self._stretches.begin(self.epoch)

    def _agreed(self, number: int, agrees: bool) -> Told:
        """What holds for a stretch, in all processes."""
        told = self._agreement.on(lambda: self._tell(number)) if agrees else self._tell(number)
        for name, length, here in zip(self.names, told["lengths"].tolist(), self._lengths().tolist(), strict=True):
            same = -1 in (length, here) or length == here
            rule = f"has {length} in the first process: must be the same in all"
            require(same, field=f"sources[{name!r}]", value=f"{here} examples", rule=rule)
            if here < 0 <= length:  # else an epoch of streams would be of another length here
                self.dataset.know_length(self.names.index(name), length)
        self._told = told
        return told

    def _tell(self, number: int) -> Told:
        """Shares by the newest weights."""
        explores = self._earlier + self._stretches.end < self._explore
        weights = np.ones(len(self.names)) if explores else self._newest.read()
        drawn = self._stretches.counts
        lengths, open_ = self._lengths(), self._present.copy()
        if self._drops:
            lengths = self._lengths(within=drawn + self._refresh_every)
            open_ &= (lengths < 0) | (drawn < lengths)
        epoch, version = self._newest.version
        return {
            "number": number,
            "shares": torch.from_numpy(self._proportions.shares(weights, lengths, open_)),
            "lengths": torch.from_numpy(lengths),
            "epoch": epoch,
            "version": version,
        }

    def _parts(self, sharer: Any) -> int:
        """Among how many processes the draws are shared out here."""
        return num_processes() if sharer is None else 1

    def _lengths(self, *, within: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        """The length of each source, [S]; -1 where it is not known, though the source was read so far."""
        reach = [0] * len(self.names) if within is None else within.tolist()
        found = [self.dataset.length_of(number, within=places) for number, places in enumerate(reach)]
        return np.array([-1 if length is None else length for length in found], dtype=np.int64)

    def _measure(self) -> int:
        """Draws in an epoch; raises where that, or a natural share, cannot be told."""
        present = [number for number in range(len(self.names)) if self.dataset.has(number)]
        require(bool(present), field="sources", value="None", rule="at least one source must have data")
        lengths = [self.dataset.length_of(number) for number in present]
        known = None if None in lengths else sum(length for length in lengths if length is not None)
        for number, length in zip(present, lengths, strict=True):
            fits = length is not None or not self._proportions.need_lengths
            rule = "its length is not known: give `sizes`, of which the natural shares follow"
            require(fits, field=f"sources[{self.names[number]!r}]", value="a stream", rule=rule)
        count = known if self._num_samples is None else self._num_samples
        if count is None:
            unknown = [self.names[n] for n, length in zip(present, lengths, strict=True) if length is None]
            rule = f"must be given: the length of {', '.join(unknown)} is not known"
            raise InvalidRequestError(field="num_samples", value="None", rule=rule)
        self.dataset.length = min(count, known) if self._drops and known is not None else count
        return self.dataset.length


def _named(sources: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Sources by name, in the order of their names."""
    pairs = list(sources.items() if isinstance(sources, Mapping) else sources)
    require(bool(pairs), field="sources", value=[], rule="must not be empty")
    named: dict[str, Any] = {}
    for name, source in pairs:
        require(
            isinstance(name, str) and name != "", field="sources", value=name, rule="names must be strings, not empty"
        )
        require(name not in named, field="sources", value=name, rule="a name must not come twice")
        named[name] = source
    return dict(sorted(named.items()))
