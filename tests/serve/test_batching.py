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


def test_failing_batch_fails_its_own_items_only() -> None:
    async def scenario(batcher: TokenBatcher[str, str], recorder: Recorder) -> None:
        tasks = await first(batcher, recorder, ("m", 5, "bad"), ("m", 5, "with it"), ("m", 5, "after"))
        recorder.gate.set()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert [str(answer) for answer in answers] == ["m:first", "a bad batch", "a bad batch", "m:after"]

    run(scenario)
