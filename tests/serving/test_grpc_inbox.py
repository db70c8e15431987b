"""What gRPC may hold of calls and of their messages."""

from __future__ import annotations

import asyncio
import threading
import time

import grpc
import numpy as np
import pytest

from deploykit.serving.grpc_inbox import Inbox
from deploykit.serving.grpc_messages import SERVICE, messages
from deploykit.serving.requests import Busy, DeadlineExceeded, InvalidRequest
from deploykit.serving.v2_types import Limits

MADE = messages()
Code = grpc.StatusCode
INFER = f"/{SERVICE}/ModelInfer"


def message(model="nan", size=1, identity=""):
    x = {"name": "x", "datatype": "FP32", "shape": [size]}
    raw = np.zeros(size, np.float32).tobytes()
    return MADE["ModelInferRequest"](
        model_name=model, inputs=[x], raw_input_contents=[raw], id=identity
    ).SerializeToString()


def until(condition):
    for _ in range(500):
        if condition():
            return
        time.sleep(0.02)
    pytest.fail("it did not come to that in 10 s")


def code_of(channel, data, **options):
    try:
        channel.unary_unary(INFER)(data, timeout=60, **options)
    except grpc.RpcError as exc:
        return exc.code(), exc.details()
    return Code.OK, ""


class Held:
    """A call whose message comes when the test says so."""

    def __init__(self, channel, data, **options):
        self.go = threading.Event()
        self.call = channel.stream_unary(INFER).future(self.parts(data), **options)

    def parts(self, data):
        if self.go.wait(60):
            yield data


def test_more_calls_than_may_be_there_are_refused(running, fake_engine):
    limits = Limits(held_bytes=2**26, prompt_s=60)
    assert limits.calls == Limits(held_bytes=1).calls == 64 and Limits().calls == 1024
    engine = fake_engine()
    with running(engine, limits) as served, grpc.insecure_channel(served.grpc_address) as channel:
        calls = [Held(channel, b"") for _ in range(64)]
        until(lambda: code_of(channel, message())[0] is Code.RESOURCE_EXHAUSTED)
        assert "oncurrent RPC" in code_of(channel, message())[1] and not engine.refused
        for held in calls:
            held.call.cancel()
            held.go.set()
        until(lambda: code_of(channel, message())[0] is Code.OK)


def test_a_message_that_does_not_come_is_given_up(running, fake_engine):
    engine = fake_engine()
    with (
        running(engine, Limits(body_s=0.3)) as served,
        grpc.insecure_channel(served.grpc_address) as channel,
    ):
        held = Held(channel, message())
        with pytest.raises(grpc.RpcError) as caught:
            held.call.result(60)
        assert caught.value.code() is Code.DEADLINE_EXCEEDED and "did not arrive in time" in caught.value.details()
        held.go.set()
        assert engine.refused == [("", "DeadlineExceeded")] and not engine.asked


def test_a_message_that_takes_its_time_counts_as_the_largest(running, fake_engine):
    with (
        running(fake_engine(), Limits(held_bytes=1000, prompt_s=0.05)) as served,
        grpc.insecure_channel(served.grpc_address) as channel,
    ):
        # There is room for one of them, and only once it is late; the other is refused then.
        calls = [Held(channel, message(identity="slow")) for _ in range(2)]
        until(lambda: any(held.call.done() for held in calls))
        refused, left = sorted(calls, key=lambda held: not held.call.done())
        with pytest.raises(grpc.RpcError) as caught:
            refused.call.result(60)
        assert caught.value.code() is Code.RESOURCE_EXHAUSTED and "take all the room" in caught.value.details()
        assert code_of(channel, message())[0] is Code.RESOURCE_EXHAUSTED and not left.call.done()
        left.go.set()
        refused.go.set()
        assert MADE["ModelInferResponse"].FromString(left.call.result(60)).id == "slow"
        until(lambda: code_of(channel, message())[0] is Code.OK)


def test_a_call_without_a_message_is_refused(running, fake_engine):
    with running(fake_engine(), None) as served, grpc.insecure_channel(served.grpc_address) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            channel.stream_unary(INFER)(iter(()), timeout=60)
        assert caught.value.code() is Code.INVALID_ARGUMENT and "no message" in caught.value.details()
        assert code_of(channel, message())[0] is Code.OK


def test_who_has_no_token_sends_nothing(running, fake_engine):
    with running(fake_engine(), None, tokens=("one",)) as served, grpc.insecure_channel(served.grpc_address) as channel:
        held = Held(channel, message())
        with pytest.raises(grpc.RpcError) as caught:
            held.call.result(60)
        held.go.set()
        assert caught.value.code() is Code.UNAUTHENTICATED


# --- without a server ------------------------------------------------------------------------------------------------


class Context:
    def __init__(self, data=None):
        self.data = asyncio.get_running_loop().create_future()
        if data is not None:
            self.data.set_result(data)
        self.callbacks = []

    async def read(self):
        return await self.data

    def add_done_callback(self, callback):
        self.callbacks.append(callback)

    def end(self):
        for callback in self.callbacks:
            callback(self)


def test_an_answer_counts_until_its_client_has_it():
    async def run():
        inbox = Inbox(Limits(held_bytes=100), most=1000)
        first, second = Context(b"x" * 60), Context(b"y" * 60)
        share = inbox.share(first)
        assert await inbox.read(first, share) == b"x" * 60
        share.add(10_000)  # the answer
        refused = inbox.share(second)
        with pytest.raises(Busy):
            await inbox.read(second, refused)
        first.end()
        assert await inbox.read(second, refused) == b"y" * 60
        second.end()
        alone = Context(b"z" * 10_000)
        assert len(await inbox.read(alone, inbox.share(alone))) == 10_000

    asyncio.run(run())


def test_a_late_message_gives_back_what_it_did_not_need():
    async def run():
        inbox = Inbox(Limits(held_bytes=1000, prompt_s=0.0), most=1000)
        late, other = Context(), Context(b"y")
        reading = asyncio.ensure_future(inbox.read(late, inbox.share(late)))
        await asyncio.sleep(0.05)
        with pytest.raises(Busy):
            await inbox.read(other, inbox.share(other))
        late.data.set_result(b"x")
        assert await reading == b"x"
        assert await inbox.read(other, inbox.share(other)) == b"y"

    asyncio.run(run())


def test_a_client_that_goes_away_while_it_sends():
    async def run():
        inbox = Inbox(Limits(), most=1000)
        context = Context()
        reading = asyncio.ensure_future(inbox.read(context, inbox.share(context)))
        await asyncio.sleep(0)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        for found, error in ((grpc.aio.EOF, InvalidRequest), (None, DeadlineExceeded)):
            inbox = Inbox(Limits(body_s=0.0), most=1000)
            context = Context(found)
            with pytest.raises(error):
                await inbox.read(context, inbox.share(context))

    asyncio.run(run())
