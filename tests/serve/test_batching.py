"""Token-budget batching: what runs together, what waits, what is refused, what is dropped."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Hashable
from typing import Any

import pytest

from serve.service import QueueFullError, TokenBatcher


class Array(str):
    """Like an array, it can't be told from another by ==."""

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        raise ValueError("ambiguous")


class Recorder:
    """Batches as they ran; each waits for the gate."""

    def __init__(self) -> None:
        self.batches: list[tuple[Hashable, list[str]]] = []
        self.gate = threading.Event()
        self.started = threading.Event()

    def __call__(self, key: Hashable, payloads: list[str]) -> list[str]:
        self.batches.append((key, payloads))
        self.started.set()
        assert self.gate.wait(30)
        if "bad" in [str(each) for each in payloads]:
            raise ValueError("a bad batch")
        return [f"{key}:{payload}" for payload in payloads]


def run(
    scenario: Callable[[TokenBatcher[str, str], Recorder], Coroutine[Any, Any, None]], max_batch: int = 10,
    max_queue: int = 20,
) -> Recorder:  # fmt: skip
    recorder = Recorder()

    async def main() -> None:
        await scenario(TokenBatcher(recorder, max_batch, max_queue), recorder)

    asyncio.run(asyncio.wait_for(main(), 60))
    return recorder


async def first(batcher: TokenBatcher[str, str], recorder: Recorder, *items: tuple[str, int, str]) -> list[Any]:
    """Tasks of a batch of one that runs until the gate opens, and of items that wait meanwhile."""
    tasks = [asyncio.create_task(batcher.submit("m", 1, "first"))]
    await asyncio.to_thread(recorder.started.wait, 30)
    tasks += [asyncio.create_task(batcher.submit(*item)) for item in items]
    await asyncio.sleep(0)  # lets them take their places in the queue
    return tasks


def test_waiting_items_share_batches_by_tokens_and_key() -> None:
    async def scenario(batcher: TokenBatcher[str, str], recorder: Recorder) -> None:
        items = [("m", 4, "a"), ("n", 3, "b"), ("m", 6, "c"), ("m", 1, "d"), ("n", 4, "e")]
        tasks = await first(batcher, recorder, *items)
        assert batcher.queued_tokens == 18
        recorder.gate.set()
        assert await asyncio.gather(*tasks) == ["m:first", "m:a", "n:b", "m:c", "m:d", "n:e"]
        assert batcher.queued_tokens == 0

    # 4 + 6 tokens fill a batch of 10; the one of another key keeps its place before the rest.
    expected = [("m", ["first"]), ("m", ["a", "c"]), ("n", ["b", "e"]), ("m", ["d"])]
    assert run(scenario).batches == expected


def test_item_larger_than_a_batch_runs_alone() -> None:
    async def scenario(batcher: TokenBatcher[str, str], recorder: Recorder) -> None:
        tasks = await first(batcher, recorder, ("m", 15, "large"), ("m", 1, "small"))
        recorder.gate.set()
        await asyncio.gather(*tasks)

    assert run(scenario).batches[1:] == [("m", ["large"]), ("m", ["small"])]


def test_full_queue_refuses_at_once_with_the_numbers() -> None:
    async def scenario(batcher: TokenBatcher[str, str], recorder: Recorder) -> None:
        tasks = await first(batcher, recorder, ("m", 25, "more than the queue, but nothing waits"))
        with pytest.raises(QueueFullError) as refused:
            await batcher.submit("m", 2, "b")
        assert (refused.value.tokens, refused.value.queued, refused.value.limit) == (2, 25, 20)
        recorder.gate.set()
        await asyncio.gather(*tasks)
        assert await batcher.submit("m", 2, "b") == "m:b"

    run(scenario)


def test_cancelled_item_is_not_run_and_frees_its_room() -> None:
    async def scenario(batcher: TokenBatcher[str, str], recorder: Recorder) -> None:
        tasks = await first(
            batcher, recorder, ("m", 4, Array("stays")), ("m", 9, Array("gone")), ("m", 4, Array("too"))
        )
        tasks[2].cancel()
        await asyncio.gather(tasks[2], return_exceptions=True)
        assert batcher.queued_tokens == 8
        recorder.gate.set()
        assert await asyncio.gather(tasks[0], tasks[1], tasks[3]) == ["m:first", "m:stays", "m:too"]

    assert [len(payloads) for _, payloads in run(scenario).batches] == [1, 2]


@pytest.mark.parametrize("bad", [{0}, {63}, {17, 40}])
def test_of_a_failing_batch_only_the_guilty_fail(bad: set[int]) -> None:
    names = ["bad" if n in bad else str(n) for n in range(64)]

    async def scenario(batcher: TokenBatcher[str, str], recorder: Recorder) -> None:
        tasks = await first(batcher, recorder, *[("m", 1, name) for name in names], ("n", 1, "after"))
        recorder.gate.set()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        wanted = ["a bad batch" if name == "bad" else f"m:{name}" for name in names]
        assert [str(answer) for answer in answers] == ["m:first", *wanted, "n:after"]

    run(scenario, max_batch=64, max_queue=100)


def test_a_lost_device_is_not_asked_for_ever() -> None:
    """64 items that all fail, as without memory or a device, take 16 passes or so and not 127."""

    async def scenario(batcher: TokenBatcher[str, str], recorder: Recorder) -> None:
        tasks = await first(batcher, recorder, *[("m", 1, "bad")] * 64)
        recorder.gate.set()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert [str(answer) for answer in answers] == ["m:first", *["a bad batch"] * 64]

    assert len(run(scenario, max_batch=64, max_queue=100).batches) - 1 <= 24


def test_who_leaves_while_a_batch_is_run_again_costs_no_pass() -> None:
    async def scenario(batcher: TokenBatcher[str, str], recorder: Recorder) -> None:
        tasks = await first(batcher, recorder, ("m", 1, "bad"), ("m", 1, "gone"))

        def leave(key: Hashable, payloads: list[str]) -> list[str]:
            if "gone" in payloads:
                tasks[2].get_loop().call_soon_threadsafe(tasks[2].cancel)
            return recorder(key, payloads)

        batcher._run = leave
        recorder.gate.set()
        await asyncio.gather(*tasks, return_exceptions=True)

    assert [payloads for _, payloads in run(scenario).batches] == [["first"], ["bad", "gone"], ["bad"]]
