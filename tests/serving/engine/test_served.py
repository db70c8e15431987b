"""One version of a model, with workers that answer when they are told to."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref

import numpy as np
import pytest

from deploykit.errors import WorkerError
from deploykit.serving.requests import (
    Busy,
    DeadlineExceeded,
    Failed,
    InferRequest,
    InvalidRequest,
    NotReady,
    RequestError,
    WorkerLost,
)


def request(value: float = 1.0, rows: int = 1, **more) -> InferRequest:
    return InferRequest("net", {"x": np.full((rows, 4), value, np.float32)}, **more)


def ask(served, *args, **more) -> asyncio.Task:
    return asyncio.get_running_loop().create_task(served.infer(request(*args, **more)))


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_a_request_is_answered_with_its_times_and_its_own_copy(fake):
    async def run():
        made = await fake()
        task = ask(made.served, 3.0, id="a")
        await settle()
        buffer = np.full((1, 4), 6, np.float32)
        made.lane.answer(buffer)
        buffer[:] = 0
        found = await task
        assert (found.model, found.version, found.id, found.batch) == ("net", "1", "a", 0)
        assert found.compute_s == 0.5 and found.queue_s >= 0
        np.testing.assert_array_equal(found.outputs["y"], np.full((1, 4), 6))
        assert made.served.info().max_batch == 0

    asyncio.run(run())


def test_what_waits_meanwhile_is_joined_and_everybody_gets_their_own_rows(fake):
    async def run():
        made = await fake(max_batch=4)
        tasks = [ask(made.served, n, rows) for n, rows in enumerate((1, 2, 1, 1, 3))]
        await settle()
        sizes = []
        while made.lane.sent:
            sizes.append([len(part) for part in made.lane.answer()])
            await settle()
        assert sizes == [[1], [2, 1, 1], [3]]
        for n, (task, rows) in enumerate(zip(tasks, (1, 2, 1, 1, 3), strict=True)):
            np.testing.assert_array_equal((await task).outputs["y"], np.full((rows, 4), 2 * n))
        assert [(await t).batch for t in tasks] == [1, 4, 4, 4, 3]
        assert made.served.info().max_batch == 4

    asyncio.run(run())


def test_a_model_whose_rows_cannot_be_joined_is_asked_one_request_at_a_time(fake):
    async def run():
        made = await fake(max_batch=4, batched=False)
        tasks = [ask(made.served, n) for n in range(3)]
        await settle()
        while made.lane.sent:
            assert len(made.lane.answer()) == 1
            await settle()
        assert [float((await t).outputs["y"][0, 0]) for t in tasks] == [0, 2, 4]

    asyncio.run(run())


def test_a_request_waits_for_others_no_longer_than_the_delay(fake):
    async def run():
        made = await fake(max_batch=2, max_delay_s=0.01)
        task = ask(made.served)
        await settle()
        assert not made.lane.sent
        while not made.lane.sent:
            await asyncio.sleep(0.001)
        made.lane.answer()
        await task
        made = await fake(max_batch=2, max_delay_s=3600.0)
        tasks = [ask(made.served), ask(made.served)]
        await settle()
        assert len(made.lane.answer()) == 2
        await asyncio.gather(*tasks)

    asyncio.run(run())


def test_only_a_whole_batch_goes_to_a_lane_that_still_computes(fake):
    async def run():
        made = await fake(max_batch=2)
        tasks = [ask(made.served, n) for n in range(2)]
        await settle()
        assert [len(t[0].parts) for t, _ in made.lane.sent] == [1]
        tasks.append(ask(made.served, 2))
        await settle()
        assert [len(t[0].parts) for t, _ in made.lane.sent] == [1, 2]
        tasks.append(ask(made.served, 3))
        await settle()
        assert made.served.waiting == 1 and made.served.running == 3
        while made.lane.sent:
            made.lane.answer()
        assert [float((await t).outputs["y"][0, 0]) for t in tasks] == [0, 2, 4, 6]

    asyncio.run(run())


def test_the_lane_with_least_to_do_is_next(fake):
    async def run():
        made = await fake(instances=2)
        tasks = [ask(made.served, n) for n in range(3)]
        await settle()
        assert [len(w.lanes[0].sent) for w in made.workers] == [2, 1]
        for worker in made.workers:
            while worker.lanes[0].sent:
                worker.lanes[0].answer()
        await asyncio.gather(*tasks)

    asyncio.run(run())


def test_a_worker_with_nothing_to_do_is_next_before_another_lane_of_a_busy_one(fake):
    async def run():
        made = await fake(instances=2, lanes=2)
        tasks = [ask(made.served, n) for n in range(3)]
        await settle()
        assert [[lane.in_flight for lane in w.lanes] for w in made.workers] == [[1, 1], [1, 0]]
        for lane in (lane for w in made.workers for lane in w.lanes):
            while lane.sent:
                lane.answer()
        await asyncio.gather(*tasks)

    asyncio.run(run())


@pytest.mark.parametrize("max_batch", [1, 2])
def test_what_lies_ready_behind_a_slow_request_goes_to_the_first_worker_that_is_free(fake, max_batch):
    async def run():
        made = await fake(instances=2, max_batch=max_batch)
        first, second = (w.lanes[0] for w in made.workers)
        running = [ask(made.served, n) for n in (0, 1)]
        await settle()
        ready = [ask(made.served, n) for n in range(2, 2 + max_batch)]
        await settle()
        assert first.in_flight == 2 and second.in_flight == 1
        second.answer()
        assert first.values() == [[0]] and second.values() == [[float(n) for n in range(2, 2 + max_batch)]]
        second.answer()
        assert [float((await t).outputs["y"][0, 0]) for t in ready] == [2.0 * n for n in range(2, 2 + max_batch)]
        assert made.served.running == 1
        first.answer()
        await asyncio.gather(*running)

    asyncio.run(run())


def test_a_worker_that_comes_back_takes_what_lies_ready_behind_others(fake):
    async def run():
        made = await fake(instances=2)
        tasks = [ask(made.served, n) for n in range(3)]
        await settle()
        made.workers[1].die(WorkerLost("killed"))
        with pytest.raises(WorkerLost):
            await tasks[1]
        await settle()
        assert made.workers[0].lanes[0].values() == [[0]] and made.workers[2].lanes[0].values() == [[2]]
        made.workers[0].lanes[0].answer()
        made.workers[2].lanes[0].answer()
        assert float((await tasks[2]).outputs["y"][0, 0]) == 4

    asyncio.run(run())


def test_a_full_queue_refuses_and_recovers(fake):
    async def run():
        made = await fake(queue=3)
        tasks = [ask(made.served, n) for n in range(2 + 3)]
        await settle()
        assert made.served.waiting == 3
        with pytest.raises(Busy):
            await made.served.infer(request())
        made.lane.answer()
        tasks.append(ask(made.served, 5))
        await settle()
        while made.lane.sent:
            made.lane.answer()
            await settle()
        assert [float((await t).outputs["y"][0, 0]) for t in tasks] == [0, 2, 4, 6, 8, 10]

    asyncio.run(run())


def test_a_request_whose_time_runs_out_while_it_waits_never_runs(fake):
    async def run():
        made = await fake()
        running = [ask(made.served, n) for n in range(2)]
        late = ask(made.served, 2, deadline=time.monotonic() + 0.5)
        after = ask(made.served, 3)
        with pytest.raises(DeadlineExceeded, match="while it waited"):
            await late
        assert made.served._metrics.queue.state()[0][-1] == ("+Inf", 1)
        asked = []
        while made.lane.sent:
            asked += [float(part[0, 0]) for part in made.lane.answer()]
            await settle()
        await asyncio.gather(*running, after)
        assert asked == [0, 1, 3]

    asyncio.run(run())


def test_a_request_whose_time_runs_out_while_it_runs_is_told_so_and_the_lane_goes_on(fake):
    async def run():
        made = await fake()
        late = ask(made.served, 0, deadline=time.monotonic() + 0.5)
        with pytest.raises(DeadlineExceeded, match="while it ran"):
            await late
        with pytest.raises(DeadlineExceeded, match="after its deadline"):
            await made.served.infer(request(deadline=time.monotonic() - 1))
        task = ask(made.served, 1)
        await settle()
        made.lane.answer()
        made.lane.answer()
        assert float((await task).outputs["y"][0, 0]) == 2

    asyncio.run(run())


def test_how_long_a_request_waited_counts_where_its_client_gave_up(fake):
    async def run():
        made = await fake()
        tasks = [ask(made.served, n) for n in range(4)]
        await settle()
        for task in tasks[1:3]:  # one lies ready, one waits
            task.cancel()
        await settle()
        assert made.served._metrics.queue.state()[0][-1] == ("+Inf", 2)
        while made.lane.sent:
            made.lane.answer()
            await settle()
        await asyncio.gather(tasks[0], tasks[3])
        assert made.served._metrics.queue.state()[0][-1] == ("+Inf", 4)

    asyncio.run(run())


def test_a_batch_that_cannot_be_handed_on_is_told_so_and_nobody_else(fake, monkeypatch):
    async def run():
        made = await fake(max_batch=4)
        first = ask(made.served, 0)
        await settle()
        tasks = [ask(made.served, n) for n in (1, 2, 3)]
        send = made.lane.send

        def some(tensors, done):
            if any(part[0, 0] == 2 for part in tensors[0].parts):
                raise ValueError("of these tensors")
            return send(tensors, done)

        monkeypatch.setattr(made.lane, "send", some)
        await settle()
        while made.lane.sent:
            made.lane.answer()
            await settle()
        with pytest.raises(Failed, match="cannot be handed on: ValueError: of these tensors"):
            await tasks.pop(1)
        assert [float((await t).outputs["y"][0, 0]) for t in (first, *tasks)] == [0, 2, 6]
        assert made.served.running == made.served.waiting == 0

    asyncio.run(run())


def test_every_request_has_an_end(fake):
    async def run():
        made = await fake(timeout_s=0.01)
        with pytest.raises(DeadlineExceeded):
            await made.served.infer(request(deadline=time.monotonic() + 3600))
        while not made.workers[0].killed:  # it has computed for longer than anybody waits
            await asyncio.sleep(0.001)

    asyncio.run(run())


def test_a_cancelled_request_never_runs(fake):
    async def run():
        made = await fake(max_batch=4)
        tasks = [ask(made.served, n) for n in range(4)]
        await settle()
        tasks[2].cancel()
        await settle()
        assert made.served.waiting == 2
        asked = []
        while made.lane.sent:
            asked += [float(part[0, 0]) for part in made.lane.answer()]
            await settle()
        assert asked == [0, 1, 3]
        assert tasks[2].cancelled()
        await asyncio.gather(tasks[0], tasks[1], tasks[3])

    asyncio.run(run())


def test_a_request_that_is_cancelled_while_it_lies_ready_never_runs(fake):
    async def run():
        made = await fake()
        tasks = [ask(made.served, n) for n in range(4)]
        await settle()
        assert made.lane.values() == [[0], [1]] and made.served.running == 2
        tasks[1].cancel()
        await settle()
        assert made.lane.values() == [[0], [2]] and (made.served.running, made.served.waiting) == (2, 1)
        while made.lane.sent:
            made.lane.answer()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(found.pop(1), asyncio.CancelledError)
        assert [float(r.outputs["y"][0, 0]) for r in found] == [0, 4, 6]
        assert made.served.running == 0

    asyncio.run(run())


def test_a_request_whose_time_runs_out_while_it_lies_ready_never_runs(fake):
    async def run():
        made = await fake()
        running, late = ask(made.served, 0), ask(made.served, 1, deadline=time.monotonic() + 0.2)
        await settle()
        assert made.lane.values() == [[0], [1]]
        with pytest.raises(DeadlineExceeded, match="while it waited"):
            await late
        assert made.lane.values() == [[0]]
        made.lane.answer()
        await running

    asyncio.run(run())


def test_of_a_batch_that_lies_ready_only_those_run_that_are_waited_for(fake):
    async def run():
        made = await fake(max_batch=2)
        tasks = [ask(made.served, n) for n in range(3)]
        await settle()
        assert made.lane.values() == [[0], [1, 2]]
        tasks[1].cancel()
        await settle()
        assert made.lane.values() == [[0]] and made.served.waiting == 1
        tasks.append(ask(made.served, 3))  # it takes the place of the one that is gone
        await settle()
        assert made.lane.values() == [[0], [2, 3]]
        while made.lane.sent:
            made.lane.answer()
        assert [float((await tasks[n]).outputs["y"][0, 0]) for n in (0, 2, 3)] == [0, 4, 6]

    asyncio.run(run())


def test_a_cancelled_request_that_runs_does_not_disturb_the_others_in_its_batch(fake):
    async def run():
        made = await fake(max_batch=4)
        first = ask(made.served, 0)
        tasks = [ask(made.served, n) for n in range(1, 4)]
        await settle()
        made.lane.answer()
        await settle()
        tasks[1].cancel()
        await settle()
        made.lane.answer()
        await asyncio.gather(first, tasks[0], tasks[2])
        assert float(tasks[2].result().outputs["y"][0, 0]) == 6

    asyncio.run(run())


def test_one_bad_request_does_not_spoil_its_batch(fake):
    async def run():
        made = await fake(max_batch=4)
        first = ask(made.served, 0)
        tasks = [ask(made.served, n) for n in range(1, 4)]
        await settle()
        made.lane.answer()
        await settle()
        made.lane.answer(Failed("an index is out of range"))
        await settle()
        alone = []
        while made.lane.sent:
            bad = float(made.lane.sent[0][0][0].parts[0][0, 0]) == 2
            alone.append(len(made.lane.answer(InvalidRequest("index 2 is out of range") if bad else None)))
            await settle()
        await first
        assert alone == [1, 1, 1]
        assert float((await tasks[0]).outputs["y"][0, 0]) == 2 and float((await tasks[2]).outputs["y"][0, 0]) == 6
        with pytest.raises(InvalidRequest):
            await tasks[1]

    asyncio.run(run())


def test_outputs_without_the_rows_of_the_inputs_end_the_joining(fake):
    async def run():
        made = await fake(max_batch=4)
        tasks = [ask(made.served, n) for n in range(4)]
        await settle()
        made.lane.answer()
        await settle()
        made.lane.answer(np.zeros((1, 4), np.float32))
        await settle()
        while made.lane.sent:
            assert len(made.lane.answer()) == 1
            await settle()
        assert [float((await t).outputs["y"][0, 0]) for t in tasks] == [0, 2, 4, 6]
        assert made.served.info().max_batch == 0

    asyncio.run(run())


@pytest.mark.parametrize("batched", [False, True])
def test_rows_are_counted_whether_they_are_joined_or_not(fake, batched):
    async def run():
        made = await fake(max_batch=4, batched=batched)
        tasks = [ask(made.served, n, rows) for n, rows in enumerate((3, 1, 2))]
        await settle()
        while made.lane.sent:
            made.lane.answer()
        await asyncio.gather(*tasks)
        buckets, total = made.served._metrics.rows.state()
        assert (buckets[-1][1], total) == ((2, 6.0) if batched else (3, 6.0))

    asyncio.run(run())


def test_clients_are_told_why_requests_are_not_joined(fake):
    async def run():
        assert (await fake(max_batch=4)).served.info().batching == ""
        info = (await fake(max_batch=4, batched=False)).served.info()
        assert (info.max_batch, info.batching) == (0, "requests are not joined: of a reason")

    asyncio.run(run())


@pytest.mark.parametrize("how", ["failed", "late", "cancelled"])
def test_what_failed_is_gone_without_the_garbage_collector(fake, how):
    async def run():
        made = await fake()
        x = np.ones((1, 4), np.float32)
        kept = weakref.ref(x)
        deadline = time.monotonic() + 0.1 if how == "late" else None
        asked = [ask(made.served)]
        asked.append(asyncio.ensure_future(made.served.infer(InferRequest("net", {"x": x}, deadline=deadline))))
        del x
        await settle()
        if how == "failed":
            made.lane.answer()
            made.lane.answer(Failed("the runtime failed"))
        elif how == "cancelled":
            asked[1].cancel()
        found = await asyncio.gather(asked.pop(), return_exceptions=True)
        assert isinstance(found.pop(), asyncio.CancelledError if how == "cancelled" else RequestError)
        await settle()
        assert kept() is None
        while made.lane.sent:
            made.lane.answer()
        await asked[0]

    gc.disable()
    try:
        asyncio.run(run())
    finally:
        gc.enable()


def test_a_lost_worker_costs_what_it_had_and_another_takes_its_place(fake):
    async def run():
        made = await fake(max_batch=2)
        lost = [ask(made.served, n) for n in range(3)]
        kept = ask(made.served, 3)
        await settle()
        made.workers[0].die(WorkerLost("killed"))
        for task in lost:
            with pytest.raises(WorkerLost):
                await task
        await settle()
        assert len(made.workers) == 2 and made.served.ready
        made.workers[1].lanes[0].answer()
        assert float((await kept).outputs["y"][0, 0]) == 6

    asyncio.run(run())


def test_the_other_workers_are_unharmed(fake):
    async def run():
        made = await fake(instances=2)
        tasks = [ask(made.served, n) for n in range(2)]
        await settle()
        made.workers[0].die(WorkerLost("killed"))
        assert made.served.ready
        made.workers[1].lanes[0].answer()
        with pytest.raises(WorkerLost):
            await tasks[0]
        assert float((await tasks[1]).outputs["y"][0, 0]) == 2

    asyncio.run(run())


def test_where_no_worker_can_be_started_requests_are_refused_until_one_can(fake):
    async def run():
        made = await fake()
        failures = made.workers[0].failures
        failures += [WorkerError("no memory")]
        lost, waits = ask(made.served, 0), [ask(made.served, n) for n in (1, 2)]
        await settle()
        made.workers[0].die(WorkerLost("killed"))
        with pytest.raises(WorkerLost):
            await lost
        assert not made.served.ready
        with pytest.raises(WorkerLost):
            await waits[0]
        with pytest.raises(NotReady):
            await waits[1]
        with pytest.raises(NotReady, match="cannot be run"):
            await made.served.infer(request())
        while not made.served.ready:
            await asyncio.sleep(0.01)
        task = ask(made.served, 4)
        await settle()
        made.workers[-1].lanes[0].answer()
        assert float((await task).outputs["y"][0, 0]) == 8

    asyncio.run(run())


@pytest.mark.parametrize("failures", [1, 3000])
def test_whatever_keeps_a_worker_from_starting_another_is_tried(fake, monkeypatch, failures):
    monkeypatch.setattr("deploykit.serving.served._LAST_PAUSE_S", 0.001)

    async def run():
        made = await fake()
        made.served._failures = failures - 1
        made.workers[0].failures += [OSError("too many open files"), KeyError("ready")]
        made.workers[0].die(WorkerLost("killed"))
        while not made.served.ready:
            await asyncio.sleep(0.001)
        task = ask(made.served, 4)
        await settle()
        made.workers[-1].lanes[0].answer()
        assert float((await task).outputs["y"][0, 0]) == 8

    asyncio.run(run())


def test_an_answer_that_cannot_be_passed_on_is_an_error_for_those_who_wait(fake, monkeypatch):
    async def run():
        made = await fake()
        task = ask(made.served)
        await settle()

        def none(*_):
            raise MemoryError("no memory")

        with monkeypatch.context() as patch:
            patch.setattr("deploykit.serving.dispatch.split", none)
            made.lane.answer()
            with pytest.raises(Failed, match="no memory"):
                await task
        assert made.served.running == 0
        task = ask(made.served, 4)
        await settle()
        made.lane.answer()
        assert float((await task).outputs["y"][0, 0]) == 8

    asyncio.run(run())


def test_a_model_that_does_not_load_says_why_and_leaves_nothing(fake):
    async def run():
        with pytest.raises(WorkerError, match="corrupt"):
            await fake(failures=[WorkerError("the file is corrupt")])

    asyncio.run(run())


def test_draining_waits_for_all_and_stopping_refuses_the_rest(fake):
    async def run():
        made = await fake()
        tasks = [ask(made.served, n) for n in range(4)]
        await settle()
        drained = asyncio.get_running_loop().create_task(made.served.drain())
        while made.lane.sent:
            assert not drained.done()
            made.lane.answer()
            await settle()
        await drained
        await asyncio.gather(*tasks)
        left = [ask(made.served, n) for n in range(3)]
        await settle()
        await made.served.stop()
        assert made.workers[0].closed
        with pytest.raises(NotReady):
            await left[2]
        with pytest.raises(NotReady):
            await made.served.infer(request())
        for task in left[:2]:
            task.cancel()

    asyncio.run(run())


def test_what_runs_for_nobody_does_not_hold_the_end_up(fake):
    async def run():
        made = await fake()
        task = ask(made.served, deadline=time.monotonic() + 0.2)
        with pytest.raises(DeadlineExceeded):
            await task
        assert made.served.running == 1
        await made.served.drain()
        await made.served.stop()

    asyncio.run(run())


def test_what_does_not_fit_is_refused_before_it_waits(fake):
    async def run():
        made = await fake()
        with pytest.raises(InvalidRequest, match="no input 'z'"):
            await made.served.infer(InferRequest("net", {"z": np.zeros(1)}))
        with pytest.raises(InvalidRequest, match="no output 'z'"):
            await made.served.infer(request(outputs=("z",)))
        assert not made.lane.sent

    asyncio.run(run())
