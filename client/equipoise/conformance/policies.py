"""Checks of creation, listing, deletion, and of the errors these may have."""

from typing import Any

import grpc

from equipoise.conformance.check import check, expect, refused
from equipoise.conformance.target import Target, a_step
from equipoise.v1 import policy_pb2 as pb

INVALID = grpc.StatusCode.INVALID_ARGUMENT


@check("policies/create")
def create(target: Target) -> None:
    """A new policy is uniform at version 0, with a uid, an epoch above 0, N effective examples and every setting."""
    name = target.new_name()
    answer = _create(target, pb.PolicySpec(name=name, num_examples=5))
    expect("created", answer.created, True)
    status = answer.status
    expect("version", status.version, 0)
    expect("effective_examples", status.effective_examples, 5.0)
    expect("rule", status.spec.rule.name, "ema_sign")
    expect("durability", status.spec.durability, pb.DURABILITY_LOGGED)
    expect("sim is set", status.HasField("sim"), False)
    expect("settings hold floor", "floor" in status.spec.rule.settings, True)
    expect("32 hexadecimal digits in the uid", len(bytes.fromhex(status.uid)), 16)
    expect("epoch above 0", status.epoch > 0, True)


@check("policies/create again")
def create_again(target: Target) -> None:
    """The same creation again, with some of the fields or all resolved ones, returns the existing policy."""
    name = target.create()
    before = target.status(name)
    for spec in (pb.PolicySpec(name=name), before.spec):
        answer = _create(target, spec)
        expect("created", answer.created, False)
        expect("uid", answer.status.uid, before.uid)


@check("policies/create differently")
def create_differently(target: Target) -> None:
    """Another creation under the same name: ALREADY_EXISTS POLICY_EXISTS, and the first field that differs."""
    name = target.create()
    rule = pb.RuleSpec(name="ema_sign", settings={"floor": pb.SettingValue(number=0.5)})
    for spec, field in (
        (pb.PolicySpec(name=name, num_examples=9), "policy.num_examples"),
        (pb.PolicySpec(name=name, rule=rule), "policy.rule.settings.floor"),
        (pb.PolicySpec(name=name, durability=pb.DURABILITY_BEHIND), "policy.durability"),
    ):
        with refused(code=grpc.StatusCode.ALREADY_EXISTS, reason="POLICY_EXISTS", field=field):
            _create(target, spec)


@check("policies/bad specification")
def bad_specification(target: Target) -> str:
    """A bad specification: INVALID_ARGUMENT with its reason and field, and no policy."""
    name = target.new_name()
    number = pb.SettingValue(number=1.0)

    def setting(rule: str, key: str, value: pb.SettingValue) -> pb.PolicySpec:
        return pb.PolicySpec(name=name, num_examples=4, rule=pb.RuleSpec(name=rule, settings={key: value}))

    bad: list[tuple[pb.PolicySpec, str, str]] = [
        (pb.PolicySpec(name=f"{name}/", num_examples=4), "INVALID_POLICY_NAME", "policy.name"),
        (pb.PolicySpec(name=f"{name}{'x' * 128}", num_examples=4), "INVALID_POLICY_NAME", "policy.name"),
        (pb.PolicySpec(name=name), "OUT_OF_RANGE_VALUE", "policy.num_examples"),
        (
            pb.PolicySpec(name=name, num_examples=target.info.max_examples + 1),
            "OUT_OF_RANGE_VALUE",
            "policy.num_examples",
        ),
        (
            pb.PolicySpec(name=name, num_examples=4, reference_nats=float("nan")),
            "OUT_OF_RANGE_VALUE",
            "policy.reference_nats",
        ),
        (
            pb.PolicySpec(name=name, num_examples=4, rule=pb.RuleSpec(name="no-rule")),
            "UNKNOWN_RULE",
            "policy.rule.name",
        ),
        (setting("ema_sign", "nothing", number), "INVALID_SETTING", "policy.rule.settings.nothing"),
        (setting("ema_sign", "ema_decay", number), "INVALID_SETTING", "policy.rule.settings.ema_decay"),
        (setting("ema_sign", "guard", number), "INVALID_SETTING", "policy.rule.settings.guard"),
        (setting("ema_sign", "floor", pb.SettingValue(text="1")), "INVALID_SETTING", "policy.rule.settings.floor"),
        (setting("ema_sign", "floor", pb.SettingValue()), "INVALID_SETTING", "policy.rule.settings.floor"),
        (setting("trajectory", "rows", number), "INVALID_SETTING", "policy.rule.settings.learning_rate"),
    ]
    for spec, reason, field in bad:
        with refused(code=INVALID, reason=reason, field=field):
            _create(target, spec)
    _not_found(target, name)
    return f"{len(bad)} kinds refused"


@check("policies/unknown")
def unknown(target: Target) -> None:
    """Every call about a policy that does not exist: NOT_FOUND POLICY_NOT_FOUND."""
    name = target.new_name()
    calls: list[tuple[str, Any]] = [
        ("GetPolicy", pb.GetPolicyRequest(policy=name)),
        ("DeletePolicy", pb.DeletePolicyRequest(policy=name)),
        ("UpdateWeights", pb.UpdateWeightsRequest(policy=name, step=a_step(0))),
        ("SampleExamples", pb.SampleExamplesRequest(policy=name, count=1)),
    ]
    for method, request in calls:
        with refused(**_NOT_FOUND):
            target.call(method, request, policy=name)
    for method, request in (
        ("ReadWeights", pb.ReadWeightsRequest(policy=name)),
        ("WatchPolicy", pb.WatchPolicyRequest(policy=name)),
        ("ExportPolicy", pb.ExportPolicyRequest(policy=name)),
    ):
        with refused(**_NOT_FOUND):
            target.read(method, request, policy=name)
    with target.conversation(name) as stream, refused(**_NOT_FOUND):
        stream.opened()


@check("policies/list")
def listing(target: Target) -> None:
    """ListPolicies gives the names with a prefix in order, page by page, each once; a bad token is refused."""
    names = sorted(target.create() for _ in range(3))
    prefix = target.prefix
    found, token = [], ""
    while True:
        page = target.call("ListPolicies", pb.ListPoliciesRequest(prefix=prefix, page_size=2, page_token=token))
        expect("at most page_size policies", len(page.policies) <= 2, True)
        found += [one.spec.name for one in page.policies]
        if not (token := page.next_page_token):
            break
    expect("sorted names, each once", found, sorted(set(found)))
    expect("names missing", [name for name in names if name not in found], [])
    bad = pb.ListPoliciesRequest(page_token="/")
    with refused(code=INVALID, reason="INVALID_PAGE_TOKEN", field="page_token"):
        target.call("ListPolicies", bad)


@check("policies/delete")
def delete(target: Target) -> None:
    """Another uid deletes nothing (UID_MISMATCH); what is deleted is gone, its name gets a new uid, a higher epoch."""
    name = target.create()
    before = target.status(name)
    wrong = pb.DeletePolicyRequest(policy=name, uid="0" * 32)
    with refused(code=grpc.StatusCode.FAILED_PRECONDITION, reason="UID_MISMATCH") as found:
        target.call("DeletePolicy", wrong, policy=name)
    expect("metadata uid", found.metadata.get("uid"), before.uid)
    deleted = target.call("DeletePolicy", pb.DeletePolicyRequest(policy=name, uid=before.uid), policy=name)
    expect("uid of the deleted", deleted.uid, before.uid)
    _not_found(target, name)
    after = _create(target, pb.PolicySpec(name=name, num_examples=3)).status
    expect("a new uid", after.uid != before.uid, True)
    expect("a higher epoch", after.epoch > before.epoch, True)
    expect("version", after.version, 0)


@check("policies/header")
def header(target: Target) -> None:
    """The header x-equipoise-policy may be absent; a different one is INVALID_ARGUMENT POLICY_MISMATCH."""
    name = target.create()
    token = target.server.security.headers()
    request = pb.GetPolicyRequest(policy=name)
    target.call("GetPolicy", request, metadata=token)
    other = (*token, ("x-equipoise-policy", "another"))
    with refused(code=INVALID, reason="POLICY_MISMATCH"):
        target.call("GetPolicy", request, metadata=other)


_NOT_FOUND: dict[str, Any] = {"code": grpc.StatusCode.NOT_FOUND, "reason": "POLICY_NOT_FOUND"}


def _create(target: Target, spec: pb.PolicySpec) -> pb.CreatePolicyResponse:
    answer: pb.CreatePolicyResponse = target.call("CreatePolicy", pb.CreatePolicyRequest(policy=spec))
    return answer


def _not_found(target: Target, name: str) -> None:
    with refused(**_NOT_FOUND):
        target.status(name)
