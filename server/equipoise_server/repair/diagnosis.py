"""What is damaged of a policy, what would bring it back, and what is lost by that."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from equipoise_server.store import LogEntry
from equipoise_server.store.salvage import Changes, Remains, Salvage

MAX_TRAINERS_TOLD = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class LogFacts:
    """What there is of a log.

    Attributes:
        versions: of its entries, in their order.
        damaged: versions of those that are not what was written.
    """

    versions: tuple[int, ...] = ()
    damaged: Collection[int] = ()

    @property
    def is_from_the_start(self) -> bool:
        """Whether it holds every step since the policy's creation, so that all can be made anew from it."""
        return not self.versions or self.versions[0] == 1

    def whole_through(self, after: int) -> int:
        """The last version up to which every entry behind `after` is there and whole."""
        there = set(self.versions).difference(self.damaged)
        last = after
        while last + 1 in there:
            last += 1
        return last


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """How a policy is.

    Attributes:
        policy: name.
        damage: what is wrong, one sentence each; empty: it is whole.
        lost: what a repair loses.
        saved: what it keeps.
        changes: what is to be written; None: nothing can be done.
        remains: what it was made from.
    """

    policy: str
    remains: Remains
    damage: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    saved: str = ""
    changes: Changes | None = None

    @property
    def is_whole(self) -> bool:
        """Whether nothing is to be done."""
        return not self.damage


@dataclass(slots=True)
class _Plan:
    """A diagnosis in the making."""

    damage: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    owner: dict[str, str] = field(default_factory=dict)
    without_header: bool = False
    cut_log: int | None = None
    restart_log: int | None = None
    trim_log: int | None = None


async def diagnose(salvage: Salvage, policy: str, *, now: float) -> Diagnosis | None:
    """Looks at a policy; None: there is none of this name. Raises StoreError."""
    remains = await salvage.remains(policy)
    if remains is None:
        return None
    facts = LogFacts()
    if remains.last_version is not None:
        versions, damaged = list[int](), set[int]()
        async for entry, broken in salvage.entries(remains, after=0):
            versions.append(entry.version)
            damaged.update({broken} - {0})
        facts = LogFacts(versions=tuple(versions), damaged=damaged)
    found = judge(remains, facts, now=now)
    end = found.changes.cut_log if found.changes else None
    if end is None:
        return found
    lost = [entry async for entry, broken in salvage.entries(remains, after=end) if broken != entry.version]
    return _with_trainers(found, lost)


def judge(remains: Remains, facts: LogFacts, *, now: float) -> Diagnosis:
    """What is wrong with a policy and what to do, from what there is of it.

    A header is of one version, and holds with the pages what every step up to it did. The log holds the steps behind
    it, or, where nothing was ever trimmed, all. So the newest state that can be had is: the header, the pages that are
    whole, and the steps behind it up to the first that is not. A page that is ahead of that is of no use: it holds
    steps that the others do not.
    """
    plan = _Plan()
    if remains.spec:
        return _hopeless(remains, f"the specification: {remains.spec}", "rule and size of the policy")
    base = _header_version(remains, facts, plan)
    if base is None:
        return _hopeless(remains, plan.damage[0], "who had sent what, which the log does not tell any more")
    last = _judge_log(remains, facts, plan, base=base)
    if last is None:
        return _hopeless(remains, plan.damage[-1], "every step: there is neither a log nor a header")
    pages, gone = _judge_pages(remains, facts, plan, last=last)
    generation = remains.generation
    listed_as_before = not (gone or remains.page_damage or remains.manifest_damage or plan.without_header)
    if not remains.owner:
        plan.damage.append("the record of its owner: it is gone")
        plan.owner["uid"] = remains.uid
        # Above every epoch there can have been: clients take a lower one for an old server.
        plan.owner["epoch"] = str(int(now))
        plan.owner[f"pages:{generation}"] = str(max(pages, default=-1) + 1)
        plan.owner[f"manifest:{generation}"] = str(len(pages))
        if base and not plan.without_header:
            plan.owner[f"header:{generation}"] = str(base)
    elif not listed_as_before:
        plan.owner[f"manifest:{generation}"] = str(len(pages))
    changes = Changes(
        owner=plan.owner,
        without_header=plan.without_header,
        pages=frozenset(gone),
        manifest=None if listed_as_before and remains.owner else pages,
        cut_log=plan.cut_log,
        restart_log=plan.restart_log,
        trim_log=plan.trim_log,
    )
    return Diagnosis(
        policy=remains.policy,
        remains=remains,
        damage=tuple(plan.damage),
        lost=tuple(plan.lost),
        saved=f"everything up to step {last}" + (", but for what is lost" if plan.lost else ""),
        changes=changes if plan.damage else None,
    )


def _hopeless(remains: Remains, damage: str, lacking: str) -> Diagnosis:
    return Diagnosis(
        policy=remains.policy,
        remains=remains,
        damage=(damage,),
        lost=(
            f"the policy: nothing that is left tells {lacking}; delete it (`equipoise repair --delete`), and import an"
            " export of it if there is one",
        ),
    )


def _header_version(remains: Remains, facts: LogFacts, plan: _Plan) -> int | None:
    """Version of the header, 0 for none; None: it is needed, and cannot be used."""
    written = remains.owner.get(f"header:{remains.generation}")
    if not remains.header_damage and (remains.header is not None or written is None):
        progress = json.loads((remains.header or {}).get("progress", b"{}"))
        return int(progress.get("version", 0))
    plan.damage.append(f"the header: {remains.header_damage or 'it is gone'}")
    if remains.last_version is None or not facts.versions or not facts.is_from_the_start:
        return None
    plan.without_header = True
    return 0


def _judge_log(remains: Remains, facts: LogFacts, plan: _Plan, *, base: int) -> int | None:
    """Version up to which the policy can be had; None: not at all."""
    last = remains.last_version
    if last is None and not base:
        plan.damage.append("the log: it is gone")
        return None
    if last is None or last < base:
        plan.damage.append("the log: it is gone" if last is None else f"the log: it ends at step {last}")
        plan.lost.append(f"every step behind {base}, of which the pages were written last")
        plan.restart_log = base
        return base
    whole = facts.whole_through(base)
    if whole < last:
        bad = whole + 1
        what = "it is not what was written" if bad in facts.versions else "it is gone"
        plan.damage.append(f"log entry {bad}: {what}")
        plan.lost.append(f"step {bad}" if bad == last else f"steps {bad} to {last}")
        plan.cut_log = whole
    if needless := [version for version in facts.damaged if version <= base]:
        plan.damage.append(f"log entry {min(needless)}, which nobody needs: the pages hold it")
        plan.trim_log = base
    return whole


def _judge_pages(remains: Remains, facts: LogFacts, plan: _Plan, *, last: int) -> tuple[Mapping[int, int], set[int]]:
    """The pages that stay, with their versions, and those that go."""
    # Every page can be made from a log that holds every step.
    anew = facts.is_from_the_start and bool(facts.versions) and plan.trim_log is None and plan.restart_log is None
    stay, gone = dict(remains.pages), set[int]()
    if plan.without_header:
        return {}, {*stay, *remains.page_damage}
    for index in sorted({*stay, *remains.page_damage}):
        why = remains.page_damage.get(index, "")
        if not why and stay[index] > last:
            why = f"it is of version {stay[index]}, ahead of what can be had of the others"
        if not why:
            continue
        plan.damage.append(f"page {index}: {why}")
        if not anew and index in stay and stay[index] <= last:
            plan.lost.append(f"page {index}: what steps behind {stay[index]} did to its examples")
            continue
        stay.pop(index, None)
        gone.add(index)
        if not anew:
            plan.lost.append(f"page {index}: all about its examples, which count as never scored")
    if remains.manifest_damage:
        plan.damage.append(f"the list of its pages: {remains.manifest_damage}")
        if "more pages are gone" in remains.manifest_damage and not anew:
            plan.lost.append("pages that are gone: all about their examples, which count as never scored")
    return stay, gone


def _with_trainers(found: Diagnosis, lost: list[LogEntry]) -> Diagnosis:
    """Says whose steps are lost: those trainers send them again, if they still have them."""
    first: dict[str, int] = {}
    for entry in lost:
        trainer, sequence = entry.fields.get("trainer", b"").decode(errors="replace"), entry.fields.get("sequence")
        if trainer and sequence:
            first.setdefault(trainer, int(sequence))
    told = [
        f"of trainer {trainer!r} from sequence {first[trainer]} on" for trainer in sorted(first)[:MAX_TRAINERS_TOLD]
    ]
    if len(first) > MAX_TRAINERS_TOLD:
        told.append(f"and of {len(first) - MAX_TRAINERS_TOLD} more trainers")
    if not told:
        return found
    return Diagnosis(
        policy=found.policy,
        remains=found.remains,
        damage=found.damage,
        lost=(*found.lost, "these are " + ", ".join(told)),
        saved=found.saved,
        changes=found.changes,
    )
