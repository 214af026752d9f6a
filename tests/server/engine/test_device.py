"""A device that fails in the middle of a step."""

import asyncio
import threading
from itertools import islice

import numpy as np
import pytest
import torch

from equipoise.v1 import policy_pb2 as pb
from equipoise_server.engine import Device, Outcome
from equipoise_server.errors import ServiceError
from equipoise_server.servicer import convert
from equipoise_server.servicer.fields import StepFields
from tests.server.engine.conftest import Servers
from tests.server.engine.runs import everything, send, spec, steps
from tests.server.servicer.conftest import LIMITS

FAULTS = [
    RuntimeError("CUDA error: unspecified launch failure\nCUDA kernel errors might be reported later"),
    torch.OutOfMemoryError("out of memory"),
    torch.AcceleratorError("the device is lost"),
]


def failing(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("fault", FAULTS)
async def test_what_a_failing_device_has_half_done_is_read_again_from_the_store(
    servers: Servers, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    engine = await servers.make()
    await engine.create(spec())
    runner = await engine.runner("policy")
    session, _ = await runner.open("trainer")
    numbered = steps(1000)
    for step in islice(numbered, 5):
        await send(runner, step)
    assert await runner.log.flush(timeout_s=60)
    expected = await everything(runner)
    apply, applied = runner.policy.apply, 0

    def fail_at_third(*arguments: object, **options: object) -> object:
        nonlocal applied
        applied += 1
        if applied == 3:
            raise fault
        return apply(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(runner.policy, "apply", fail_at_third)
    for limit in ("CALL_S", "INLINE_S"):  # all five in one call, however slow the machine is
        monkeypatch.setattr(f"equipoise_server.engine.applier.{limit}", 60.0)
    unanswered = [await runner.submit(step) for step in islice(numbered, 5)]
    errors = await asyncio.gather(*unanswered, return_exceptions=True)
    assert {getattr(error, "reason", None) for error in errors} == {"DEVICE_LOST"}
    assert (await asyncio.wait_for(session.ended, 60)).reason == "DEVICE_LOST"
    assert "launch failure\n" not in str(session.ended.result())

    again = await engine.runner("policy")
    assert again is not runner
    after = await everything(again)
    assert after == expected
    assert (await send(again, next(steps(1000, first=6)))).outcome is Outcome.APPLIED


async def test_a_read_of_a_lost_device_is_unavailable_and_a_bug_is_a_bug() -> None:
    device = Device(torch.device("cpu"))
    queue = device.queue("policy")
    for inline, long in ((False, False), (True, False), (False, True)):
        with pytest.raises(ServiceError) as caught:
            await queue.run(lambda: failing(FAULTS[0]), inline=inline, long=long)
        assert (caught.value.reason, caught.value.retry_after_s) == ("DEVICE_LOST", 1.0)
        with pytest.raises(RuntimeError, match="shape"):
            await queue.run(lambda: failing(RuntimeError("shape mismatch")), inline=inline, long=long)
    device.close()


async def test_sketches_are_multiplied_off_the_event_loop(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of tens of MiB must not hold up every other stream."""
    engine = await servers.make()
    await engine.create(spec())
    runner = await engine.runner("policy")
    parse, threads = convert.parse_sketches, []

    def spied(*arguments: object, **options: object) -> object:
        threads.append(threading.current_thread())
        return parse(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(convert, "parse_sketches", spied)
    request = pb.StepRequest(
        example_ids=np.arange(2, dtype="<u8").tobytes(),
        gradient_sketches=np.array([[1.0, 2.0], [3.0, -4.0]], "<f4").tobytes(),
        target_sketch=np.array([0.5, 0.25], "<f4").tobytes(),
    )
    step = await convert.convert_step(StepFields.of(request), trainer_id="trainer", runner=runner, limits=LIMITS)
    assert step.statistics is not None
    assert step.statistics.contributions is not None
    assert step.statistics.contributions.tolist() == [1.0, 0.5]
    assert threads
    assert threading.current_thread() not in threads
