"""Messages as they come in: whose turn it is to be parsed."""

import asyncio

import pytest

from equipoise.v1 import policy_pb2 as pb
from equipoise_server.errors import Code, ServiceError
from equipoise_server.messages import PARSED_BYTES_PER_S, MessageKind, Pace, Received

SIZE = 8 << 20


def received(data: bytes, *, pace: Pace, share: str = "a", max_bytes: int = 0) -> Received:
    return Received(data, MessageKind("StepRequest", pb.StepRequest.FromString, max_bytes), pace, share)


def large() -> bytes:
    return pb.StepRequest(contributions=bytes(SIZE)).SerializeToString()


async def test_large_messages_of_a_share_are_parsed_one_after_another_with_room_between_them() -> None:
    loop, pace = asyncio.get_running_loop(), Pace()
    started = loop.time()
    at: dict[str, list[float]] = {"a": [], "b": [], "small": []}

    async def parse(share: str, data: bytes, into: str) -> None:
        message: pb.StepRequest = await received(data, pace=pace, share=share).message()
        assert len(message.contributions) in (SIZE, 4)
        at[into].append(loop.time() - started)

    data, small = large(), pb.StepRequest(contributions=bytes(4)).SerializeToString()
    await asyncio.gather(*(parse("a", data, "a") for _ in range(4)), parse("b", data, "b"), parse("a", small, "small"))
    spacing = SIZE / PARSED_BYTES_PER_S
    for number, moment in enumerate(sorted(at["a"])):
        assert moment >= 0.99 * number * spacing
    assert max(*at["b"], *at["small"]) < max(at["a"])


async def test_what_is_no_message_or_too_long_is_refused_with_its_length() -> None:
    with pytest.raises(ServiceError, match="no valid StepRequest") as caught:
        await received(b"\xff", pace=Pace()).message()
    assert (caught.value.code, caught.value.reason) == (Code.INVALID_ARGUMENT, "MALFORMED_REQUEST")
    with pytest.raises(ServiceError, match="11 bytes; a StepRequest has 10 at most") as caught:
        await received(bytes(11), pace=Pace(), max_bytes=10).message()
    assert caught.value.reason == "REQUEST_TOO_LARGE"
