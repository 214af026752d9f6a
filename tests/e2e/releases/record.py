"""What a release has left: its data directory, and a conversation with each policy that it carried on from there."""

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from equipoise.v1 import policy_pb2 as pb

FOLDER = Path(__file__).parent
_FILES = "data/"


@dataclass(kw_only=True)
class Record:
    """One release's state, and how it went on.

    Attributes:
        files: of its data directory as a SIGKILL left it, by name.
        again: by policy, the last step that is in these files; sent again, it is a duplicate.
        steps: by policy, the steps behind it, each with that release's answer to it.
        ends: by policy, that release's picture of it afterwards.
        weights: by policy, all its weights then, float32.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    again: dict[str, pb.StepRequest] = field(default_factory=dict)
    steps: dict[str, list[tuple[pb.StepRequest, pb.StepResponse]]] = field(default_factory=dict)
    ends: dict[str, pb.PolicyStatus] = field(default_factory=dict)
    weights: dict[str, bytes] = field(default_factory=dict)

    @classmethod
    def load(cls, release: str) -> "Record":
        """The record of a release."""
        with zipfile.ZipFile(FOLDER / f"{release}.zip") as archive:
            held = {name: archive.read(name) for name in archive.namelist()}
        found = cls(files={name.removeprefix(_FILES): held[name] for name in held if name.startswith(_FILES)})
        for policy in sorted({name.split("/")[0] for name in held} - {_FILES.rstrip("/")}):
            found.again[policy] = pb.StepRequest.FromString(held[f"{policy}/again"])
            found.ends[policy] = pb.PolicyStatus.FromString(held[f"{policy}/end"])
            found.weights[policy] = held[f"{policy}/weights"]
            asked = (held.get(f"{policy}/{number}.request") for number in range(len(held)))
            found.steps[policy] = [
                (pb.StepRequest.FromString(step), pb.StepResponse.FromString(held[f"{policy}/{number}.response"]))
                for number, step in enumerate(asked)
                if step is not None
            ]
        return found

    def save(self, release: str) -> Path:
        """Writes it beside this file; the same bytes for the same record."""
        path = FOLDER / f"{release}.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in self._members():
                member = zipfile.ZipInfo(name)  # of no particular time
                archive.writestr(member, content, zipfile.ZIP_DEFLATED, compresslevel=9)
        return path

    def _members(self) -> Iterator[tuple[str, bytes]]:
        for name, content in self.files.items():
            yield _FILES + name, content
        for policy, steps in self.steps.items():
            yield f"{policy}/again", self.again[policy].SerializeToString()
            yield f"{policy}/end", self.ends[policy].SerializeToString()
            yield f"{policy}/weights", self.weights[policy]
            for number, (step, answer) in enumerate(steps):
                yield f"{policy}/{number}.request", step.SerializeToString()
                yield f"{policy}/{number}.response", answer.SerializeToString()
