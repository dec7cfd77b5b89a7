"""Stores of many blocks: work units against a brute-force account of all windows, and what reading them costs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFile

from mtc.text import (
    TokenStore,
    TokenStoreWriter,
    Window,
    blocks,
    heldout_units,
    rows_wanted,
    shuffle,
    token_store,
    tokens_wanted,
    windows_table,
    work_units,
)
from mtc.text.token_store import SUMS_FILE
from tests.text.test_tokens import CONTEXT, byte_tokenizer, make_config, make_texts, write_store

GROUP = 3
WINDOWS = 8
"""Windows in a block here."""


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_POSITIONS", WINDOWS * CONTEXT)
    monkeypatch.setattr(shuffle, "GROUP_BLOCKS", GROUP)


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    return write_store(str(tmp_path / "store"), make_texts(400), make_config(), shard=101)


def everything(store: TokenStore) -> pa.Table:
    return pa.concat_tables([pq.read_table(Path(store.url, shard.name)) for shard in store.info.shards])


@pytest.mark.parametrize("unit_tokens", [16, 20, 64, 500])
@pytest.mark.parametrize(("num_tokens", "epochs"), [(2048, 1), (12_000, 1), (30_000, 3)])
def test_units_are_the_wanted_windows_once_an_epoch(
    store: TokenStore, num_tokens: int, epochs: int, unit_tokens: int
) -> None:
    config = make_config(data={"num_tokens": num_tokens, "max_epochs": epochs, "unit_tokens": unit_tokens})
    table = everything(store)
    heldout = table["split"].to_numpy() == "heldout"
    tokens, lengths = (table[name].to_numpy().astype(np.int64) for name in ("trainable", "length"))
    rows, enough = rows_wanted(heldout, tokens, tokens_wanted(config))
    assert enough and rows < len(tokens)
    work = work_units(store, config)
    flat, reserved = (np.concatenate(list(units)) for units in work)
    pool = np.setdiff1d(np.flatnonzero(~heldout[:rows]), reserved)
    # Calibration: never trained on, enough, and not a window more.
    assert not heldout[reserved].any() and len(np.unique(reserved)) == len(reserved) and reserved.max() < rows
    assert 300 <= tokens[reserved].sum() < 300 + CONTEXT
    for at in range(0, len(flat), len(pool)):
        part = flat[at : at + len(pool)]
        assert len(np.unique(part)) == len(part) and np.isin(part, pool).all()
    steps = config.total_steps * 256
    assert steps <= tokens[flat].sum() < steps + CONTEXT
    for units in work:
        sizes = [int(lengths[unit].sum()) for unit in units]
        assert all(
            len(unit) and (size <= unit_tokens or len(unit) == 1) for unit, size in zip(units, sizes, strict=True)
        )
        assert all(len(np.unique(unit // WINDOWS)) <= GROUP for unit in units)
    # By number, in any order, in a process that has seen no other.
    again = work_units(TokenStore.open(store.url), config)
    assert again.digest(store) == work.digest(store)
    for number in (len(work.training) - 1, 0, len(work.training) // 2):
        assert np.array_equal(again.training[number], work.unit(number))
    assert np.array_equal(again.calibration[0], work.unit(len(work.training)))
    held = np.concatenate(heldout_units(store, config, 200))
    assert heldout[held].all() and held.max() < rows and 200 <= tokens[held].sum() < 200 + CONTEXT
    assert len(np.unique(held)) == len(held)


def test_what_is_read_is_what_was_written(store: TokenStore) -> None:
    table, rows = everything(store), np.random.default_rng(0).permutation(store.rows)
    expected = table.take(rows)
    assert [ids.tolist() for ids in store.input_ids(rows)] == expected["input_ids"].to_pylist()
    assert store.positions(rows).tolist() == expected["length"].to_pylist()
    assert store.trainable_tokens(rows).tolist() == expected["trainable"].to_pylist()
    assert store.document_ids(rows) == expected["document_id"].to_pylist()
    train = set(table.filter(pa.compute.equal(table["split"], "train"))["document_id"].to_pylist())
    names = [*table["document_id"].to_pylist()[::5], "f" * 16]
    assert store.known_documents("train", names) == train & set(names)


def test_a_store_of_an_earlier_version_gives_the_same_work(store: TokenStore) -> None:
    config = make_config()
    expected = [unit.tolist() for unit in work_units(store, config).training]
    digest = work_units(store, config).digest(store)
    Path(store.url, SUMS_FILE).unlink()
    for shard in store.info.shards:
        pq.write_table(pq.read_table(Path(store.url, shard.name)), Path(store.url, shard.name))  # in one row group
    old = TokenStore.open(store.url)
    assert [unit.tolist() for unit in work_units(old, config).training] == expected
    assert work_units(old, config).digest(old) == digest


def test_the_digest_tells_another_text_behind_the_same_name(tmp_path: Path) -> None:
    texts, config = make_texts(400), make_config()
    texts[3:6] = ["one, one", "two: two two", "three"]
    other = [*texts[:3], texts[5], texts[4], texts[3], *texts[6:]]  # two documents have changed places
    stores = [write_store(str(tmp_path / f"{n}"), each, config) for n, each in enumerate((texts, other))]
    assert stores[0].info.tokens == stores[1].info.tokens
    first, second = (work_units(each, config).digest(each) for each in stores)
    assert first != second
    assert first != work_units(stores[0], make_config(data={"unit_tokens": 80})).digest(stores[0])


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of every read of a file in memory."""
    sizes: list[int] = []
    read = MemoryFile.read

    def counted(file: MemoryFile, *arguments: int) -> bytes:
        data: bytes = read(file, *arguments)
        sizes.append(len(data))
        return data

    monkeypatch.setattr(MemoryFile, "read", counted)
    return sizes


def test_a_unit_reads_the_blocks_of_its_group_and_no_more(
    monkeypatch: pytest.MonkeyPatch, bytes_read: list[int]
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_POSITIONS", 2048 * CONTEXT)  # larger than what Parquet says of them
    dice, url = np.random.default_rng(0), f"memory://{uuid.uuid4().hex}/store"
    windows = [
        Window(f"{n // 8:016x}", "train" if n // 8 % 10 else "heldout", [1, *ids])
        for n, ids in enumerate(dice.integers(3, 50_000, (40_000, CONTEXT - 1)).tolist())
    ]
    with TokenStoreWriter(url, "f", {}, byte_tokenizer(), CONTEXT) as writer:
        writer.write(windows_table(windows, [1]))
        info = writer.finish(exhausted=True)
    store = TokenStore.open(url)
    work = work_units(store, make_config(data={"num_tokens": 500_000}))
    assert len(store.sums) == 20
    store = TokenStore.open(url)
    before = len(list(store._cache.glob("*.block")))
    bytes_read.clear()
    store.input_ids(work.training[len(work.training) // 3])
    footer, block = 65_536, sum(shard.bytes for shard in info.shards) / 20  # pyarrow looks for a footer in so much
    assert before < 20 - GROUP
    assert 0 < sum(bytes_read) < GROUP * (footer + 1.1 * block) < 8 * block
    before = sum(bytes_read)
    at = len(work.training) // 3
    for unit in work.training[at : at + 4]:
        TokenStore.open(store.url).input_ids(unit)  # as another process of the node does
    assert sum(bytes_read) == before


def test_the_cache_keeps_its_limit(store: TokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_store, "CACHE_BYTES", 20_000)
    monkeypatch.setattr(token_store, "MAPPED_BLOCKS", 4)
    expected, rows = everything(store)["input_ids"].to_pylist(), np.arange(store.rows)
    held = []
    for at in range(0, store.rows, 50):
        assert [ids.tolist() for ids in store.input_ids(rows[at : at + 50])] == expected[at : at + 50]
        held.append(sum(path.stat().st_size for path in store._cache.parent.glob("*/*.block")))
    assert max(held) <= 20_000 and held[-1] > 10_000


def test_nodes_that_share_the_cache_directory_leave_each_other_what_is_in_use(
    store: TokenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "first")
    store.input_ids(np.arange(store.rows))
    (theirs, *_) = store._cache.glob("*.block")
    gone = store._cache / "7.block"
    gone.write_bytes(b"of a node that is gone")
    os.utime(gone, (0, 0))
    monkeypatch.setattr(socket, "gethostname", lambda: "second")
    monkeypatch.setattr(token_store, "CACHE_BYTES", 0)
    TokenStore.open(store.url).input_ids(np.arange(store.rows))
    assert theirs.exists() and not gone.exists()


def test_processes_of_a_node_share_what_was_fetched(store: TokenStore) -> None:
    expected = everything(store)["input_ids"].to_pylist()
    program = (
        "import sys, numpy as np; from mtc.text import TokenStore, blocks; "
        f"blocks.BLOCK_POSITIONS = {WINDOWS * CONTEXT}; store = TokenStore.open(sys.argv[1]); "
        "print(sum(len(ids) for ids in store.input_ids(np.arange(store.rows))))"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", program, store.url], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    answers = [int(each.communicate(timeout=120)[0]) for each in both]
    assert answers == [sum(map(len, expected))] * 2
    for shard in store.info.shards:
        Path(store.url, shard.name).unlink()
    assert [ids.tolist() for ids in store.input_ids(np.arange(store.rows))] == expected


def test_a_file_of_the_cache_that_is_not_whole_is_fetched_again(store: TokenStore) -> None:
    rows, expected = np.arange(WINDOWS), everything(store)["input_ids"].to_pylist()[:WINDOWS]
    store.input_ids(rows)
    (path,) = store._cache.glob("0.block")
    for rest in (b"", path.read_bytes()[: WINDOWS * 30]):
        path.unlink()
        path.write_bytes(rest)
        assert [ids.tolist() for ids in TokenStore.open(store.url).input_ids(rows)] == expected
