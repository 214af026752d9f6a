"""The pages of the contract say what the code says: reasons, settings, methods, limits, numbers."""

import ast
import re
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from equipoise import session, tickets
from equipoise.v1 import policy_pb2
from equipoise_server import app
from equipoise_server.engine import EngineLimits, trainers
from equipoise_server.metrics import refusals
from equipoise_server.rules import build, names
from equipoise_server.rules.registry import _RULES
from equipoise_server.rules.settings import RANGE
from equipoise_server.security import ALLOWED
from equipoise_server.servicer import exchange, reading, service
from equipoise_server.settings import Settings
from tests.server.rules.conftest import told

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "proto" / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))
SERVICE = policy_pb2.DESCRIPTOR.services_by_name["PolicyService"]
REQUIRED = {"trajectory": {"rows": 2, "learning_rate": 0.1}}


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def prose(name: str) -> str:
    """A page with its line breaks as spaces."""
    return " ".join(page(name).split())


def rows(text: str, *, columns: int) -> Iterator[list[str]]:
    """Rows of tables whose first cell is code, such as `floor`, cells stripped."""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `") and len(cells) == columns:
            yield cells


@dataclass
class Told:
    """What the code says of a reason."""

    codes: set[str] = field(default_factory=set)
    retry_s: set[float] = field(default_factory=set)
    metadata: set[str] = field(default_factory=set)


def reasons_of_the_code() -> dict[str, Told]:
    """Every reason that the server's source gives to an error."""
    found: dict[str, Told] = {}
    for path in (ROOT / "server" / "equipoise_server").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        constants = {
            target.id: node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name):
                _note(call, call.func.id, constants, found)
    return found


def _note(call: ast.Call, name: str, constants: dict[str, ast.expr], found: dict[str, Told]) -> None:
    """Adds what a call that makes an error says."""
    codes = {"invalid": "INVALID_ARGUMENT", "_unauthenticated": "UNAUTHENTICATED"}
    if name == "ServiceError" and isinstance(call.args[0], ast.Attribute) and call.args[0].attr.isupper():
        code, given = call.args[0].attr, call.args[1]
    elif name in codes:
        code, given = codes[name], call.args[0]
    else:
        return
    if isinstance(given, ast.Name):  # a reason that was chosen before
        given = constants.get(given.id, given)
    for reason in (node.value for node in ast.walk(given) if isinstance(node, ast.Constant)):
        if not isinstance(reason, str) or not re.fullmatch(r"[A-Z_]+", reason):
            continue
        told_of = found.setdefault(reason, Told())
        told_of.codes.add(code)
        for keyword in call.keywords:
            value = keyword.value
            if isinstance(value, ast.Name):
                value = constants[value.id]
            if keyword.arg == "retry_after_s":
                told_of.retry_s.add(float(ast.literal_eval(value)))
            if keyword.arg == "metadata":
                assert isinstance(value, ast.Dict)
                told_of.metadata |= {ast.literal_eval(key) for key in value.keys if key is not None}


def test_every_reason_of_the_code_is_on_the_page_and_none_besides() -> None:
    code = reasons_of_the_code()
    assert len(code) > 40
    documented = {cells[0].strip("`"): cells[1:] for cells in rows(page("errors.md"), columns=6)}
    assert sorted(documented) == sorted(code)
    assert list(documented) == sorted(documented)
    for reason, (codes, retry, retry_s, metadata, when) in documented.items():
        told_of = code[reason]
        assert codes == ", ".join(sorted(told_of.codes)), reason
        assert {float(retry_s)} if retry_s else set() == told_of.retry_s, reason
        assert metadata == ", ".join(f"`{key}`" for key in sorted(told_of.metadata)), reason
        assert retry in ("yes", "no", "elsewhere"), reason
        assert not (retry_s and retry == "no"), reason
        assert when, reason


def test_every_reason_is_counted_in_the_family_of_its_code() -> None:
    families = {
        "auth_failures": refusals.ACCESS_REASONS,
        "rejected_values": refusals.VALUE_REASONS,
        "refusals": refusals.STATE_REASONS,
    }
    access, values = {"UNAUTHENTICATED", "PERMISSION_DENIED"}, {"INVALID_ARGUMENT"}
    for reason, facts in reasons_of_the_code().items():
        expected = (
            "auth_failures" if facts.codes <= access else "rejected_values" if facts.codes <= values else "refusals"
        )
        assert [family for family, reasons in families.items() if reason in reasons] == [expected], reason
    assert sum(map(len, families.values())) == len(reasons_of_the_code())
    assert set(refusals.LEFT_REASONS) | set(refusals.LOAD_REASONS) <= {*refusals.STATE_REASONS, refusals.UNKNOWN_REASON}


def test_the_proto_names_only_reasons_that_there_are_and_links_to_the_pages() -> None:
    proto = (ROOT / "proto" / "equipoise" / "v1" / "policy.proto").read_text(encoding="utf-8")
    named = set(re.findall(r"`([A-Z]+(?:_[A-Z]+)+)`", proto)) - set(dir(policy_pb2))
    assert named <= set(reasons_of_the_code())
    assert {f"docs/{name}" for name in PAGES if name != "README.md"} <= set(re.findall(r"docs/\w+\.md", proto))


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page(name)):
        assert (DOCS / target).exists(), target


def test_every_setting_of_every_rule_has_its_default_and_range() -> None:
    sections = re.split(r"^### `(\w+)`$", page("rules.md").partition("## The guard")[0], flags=re.MULTILINE)
    documented = dict(zip(sections[1::2], sections[2::2], strict=True))
    assert sorted(documented) == names()
    for rule, text in documented.items():
        expected = {
            each.name: (_shown(each.default), str(each.metadata[RANGE])) for each in fields(_RULES[rule].settings_type)
        }
        found = {cells[0].strip("`"): (cells[1], cells[2]) for cells in rows(text, columns=4)}
        assert found == expected, rule
        for signal in build(rule, REQUIRED.get(rule, {})).signals:
            assert f"`{signal}`" in text, (rule, signal)


def _shown(default: object) -> str:
    if default is MISSING:
        return "required"
    return str(default).lower() if isinstance(default, bool) else f"{default:g}"


def test_the_exported_columns_and_scalars_are_those_of_the_rules() -> None:
    seen = []
    for line in page("rules.md").partition("## Exported state")[2].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("| `"):
            continue
        scalars: set[str] = set()
        for rule in re.findall(r"`(\w+)`", cells[0]):
            seen.append(rule)
            built = build(rule, REQUIRED.get(rule, {}))
            columns = {name: str(dtype).removeprefix("torch.") for name, dtype in built.columns.items()}
            assert dict(re.findall(r"`(\w+)` (int32|int64|float32)", cells[1])) == columns, rule
            penalised = build(rule, {"loss_penalty": 1.0}) if "loss_penalty" in built.settings else built
            state = penalised.init(3, device=torch.device("cpu"))
            step = told(penalised, None, np.arange(3, dtype=np.float32))
            if rule == "strata":
                step = replace(step, target_losses=np.ones(1, np.float32))
            prepared = set() if built.trajectory_rows else set(penalised.prepare(state, step))
            scalars |= {name.partition(".")[0] for name in prepared}
        assert set(re.findall(r"`([a-z_]+)`", cells[2])) - {"loss_penalty"} == scalars, line
    assert sorted(seen) == names()


def test_every_method_has_its_scope() -> None:
    documented = {cells[0].strip("`"): cells[1] for cells in rows(page("methods.md"), columns=4)}
    assert list(documented) == [method.name for method in SERVICE.methods]
    for method, scope in documented.items():
        assert re.findall(r"\w+", scope.replace(" or ", " ")) == sorted(ALLOWED[method]), method


def test_limits_are_the_settings_defaults() -> None:
    documented = {cells[0].strip("`"): cells[1] for cells in rows(page("connection.md"), columns=3)}
    assert "max_message_bytes" in documented
    for name, default in documented.items():
        assert default == f"{Settings.model_fields[name].default:.12g}", name


@pytest.mark.parametrize(
    ("name", "phrase"),
    [
        ("training.md", f"`first_message_timeout_s` ({Settings.model_fields['first_message_timeout_s'].default:g} s)"),
        ("training.md", f"({exchange.MAX_IN_FLIGHT:,}, or {exchange.MAX_UNREAD_BYTES >> 20} MiB of weights)"),
        ("training.md", f"or {Settings.model_fields['max_queued_steps'].default} steps for the policy"),
        ("training.md", f"beyond the {trainers.MAX_REFUSED} newest refused steps"),
        ("training.md", f"every {session.PROBE_SECONDS * 1000:g} ms"),
        ("training.md", f"`trainer_idle_s` ({Settings.model_fields['trainer_idle_s'].default / 3600:g} h)"),
        ("methods.md", f"{service.MAX_WAIT_S:g} s without a deadline"),
        ("connection.md", f"more than {app.MAX_PING_STRIKES} is disconnected"),
        ("connection.md", f"in chunks of {reading.PIECE_VALUES:,} values"),
        ("connection.md", f"after {['', 'one', 'two', 'three', 'four', 'five'][tickets.SUSPECT_STREAMS]} streams"),
        ("connection.md", f"larger than {tickets.SUSPECT_BYTES >> 10} KiB"),
    ],
)
def test_numbers_in_the_text_are_those_of_the_code(name: str, phrase: str) -> None:
    assert phrase in prose(name)


def test_an_opening_waits_as_long_as_the_pages_say() -> None:
    waits = next(each.default for each in fields(EngineLimits) if each.name == "load_wait_s")
    assert f"An opening may take {waits:g} s" in prose("training.md")
    assert f"the opening of a stream waits {waits:g} s" in prose("methods.md")
