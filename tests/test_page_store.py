"""The store of arrays in CPU memory: what it holds, who may use it at once, and what its files survive."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxcache import _files, offload
from paxcache.offload import _store
from persisting import killed_at_every_step, no_room_after


def arrays_of_all_dtypes():
    rng = np.random.default_rng(0)
    names = ("float32", "float16", "bfloat16", "int8", "uint8", "float8_e4m3fn", "bool")
    values = [rng.integers(0, 2, 48, np.uint8).view(bool) if n == "bool"
              else rng.integers(0, 256, 48, np.uint8).view(jnp.dtype(n)) for n in names]  # fmt: skip
    values = [v.reshape(2, -1) for v in values] + [np.zeros((0, 3), np.float32), np.array(1.5)]
    return [b"key %d" % i for i in range(len(values))], values


def test_store_gives_back_what_was_put():
    store = offload.PageStore(max_bytes=1000)
    keys, values = arrays_of_all_dtypes()
    assert store.put(keys, values) == len(keys) == len(store)
    for found, value in zip(store.get(keys), values, strict=True):
        assert found is not None and found.dtype == value.dtype and found.shape == value.shape
        assert found.tobytes() == value.tobytes()
    assert store.get([b"another"]) == [None]
    assert store.put([], []) == 0 and store.get([]) == []
    assert store.num_bytes == sum(v.nbytes for v in values)


def test_store_holds_copies():
    store, array = offload.PageStore(max_bytes=100), np.zeros(4)
    store.put([b"a"], [array])
    array[:] = 1
    (found,) = store.get([b"a"])
    assert found is not None and not found.any()
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 1


def test_store_drops_the_least_recently_used():
    store, page = offload.PageStore(max_bytes=32), np.zeros(2, np.float32)
    store.put([b"a", b"b", b"c", b"d"], [page] * 4)
    store.get([b"a"])
    store.put([b"b"], [page])
    store.put([b"e", b"f"], [page] * 2)
    assert [x is not None for x in store.get([b"a", b"b", b"c", b"d", b"e", b"f"])] == [True, True, False, False,
                                                                                      True, True]  # fmt: skip
    assert store.num_bytes == 32
    assert store.put([b"a"], [np.zeros(9, np.float32)]) == 0, "larger than the store"
    assert store.get([b"a"]) == [None], "the old value of a key that was to hold another is stale"
    assert store.num_bytes == 24 and len(store) == 3


def test_saved_store_is_loaded(tmp_path):
    store, (keys, values) = offload.PageStore(max_bytes=1000), arrays_of_all_dtypes()
    store.put(keys, values)
    store.get(keys[:1])
    store.save(tmp_path / "store")
    store.save(tmp_path / "store")
    assert [p.name for p in tmp_path.iterdir()] == ["store"]
    loaded = offload.PageStore.load(tmp_path / "store", max_bytes=1000)
    for found, value in zip(loaded.get(keys), values, strict=True):
        assert found is not None and found.dtype == value.dtype and found.shape == value.shape
        assert found.tobytes() == value.tobytes()
    small = offload.PageStore.load(tmp_path / "store", max_bytes=48)
    assert [k for k, x in zip(keys, small.get(keys), strict=True) if x is not None] == [keys[0]]
    offload.PageStore(max_bytes=1).save(tmp_path / "empty")
    assert len(offload.PageStore.load(tmp_path / "empty", max_bytes=1)) == 0


def test_damaged_file_is_refused(tmp_path):
    store, path = offload.PageStore(max_bytes=1000), tmp_path / "store"
    store.put(*arrays_of_all_dtypes())
    store.save(path)
    data = path.read_bytes()
    for position in (25, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(ValueError, match="path: expected a whole page store, got a damaged one"):
            offload.PageStore.load(path, max_bytes=1000)
    path.write_bytes(data[:-100])
    with pytest.raises(ValueError, match="path: expected a whole page store"):
        offload.PageStore.load(path, max_bytes=1000)
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="path: expected a saved page store"):
        offload.PageStore.load(path, max_bytes=1000)


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    store, path = offload.PageStore(max_bytes=1000), tmp_path / "store"
    store.put([b"a"], [np.ones(3)])
    store.save(path)
    store.put([b"b"], [np.ones(4)])

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        store.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["store"]
    assert len(offload.PageStore.load(path, max_bytes=1000)) == 1


def test_store_serves_many_threads(tmp_path):
    """Values tell their key: no thread may see another key's, a torn one, or a store over its bound."""
    store, num_keys = offload.PageStore(max_bytes=40 * 64), 100
    keys = [b"%d" % i for i in range(num_keys)]

    def work(seed):
        rng = np.random.default_rng(seed)
        hits = 0
        for turn in range(150):
            batch = rng.integers(0, num_keys, 5)
            if seed % 2:
                store.put([keys[i] for i in batch], [np.full(16, i, np.int32) for i in batch])
            for i, found in zip(batch, store.get([keys[i] for i in batch]), strict=True):
                if found is not None:
                    hits += 1
                    assert (found == i).all()
            assert store.num_bytes <= store.max_bytes
            if turn % 50 == 0:
                store.save(tmp_path / "store")
        return hits

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(work, range(8))) > 0
    assert store.num_bytes == 64 * len(store) <= store.max_bytes
    assert len(offload.PageStore.load(tmp_path / "store", max_bytes=40 * 64)) <= 40


class Meeting(bytes):
    """A key whose first look-up goes on only when all readers are in theirs."""

    barrier: threading.Barrier
    has_met = False

    def __hash__(self):
        if not self.has_met:
            self.has_met = True
            self.barrier.wait()
        return super().__hash__()


def test_readers_do_not_wait_for_each_other():
    """As many are inside at once as there are, or the barrier breaks."""
    store, num_readers = offload.PageStore(max_bytes=100), 4
    store.put([b"a"], [np.arange(3)])
    Meeting.barrier = threading.Barrier(num_readers, timeout=60)
    with concurrent.futures.ThreadPoolExecutor(num_readers) as pool:
        found: list[Any] = list(pool.map(store.get, [[Meeting(b"a")] for _ in range(num_readers)]))
    assert all(x is found[0][0] and x.tolist() == [0, 1, 2] for (x,) in found)


def test_readers_do_not_wait_for_a_writer_and_their_uses_count():
    store, page = offload.PageStore(max_bytes=16), np.zeros(1)
    store.put([b"a", b"b"], [page] * 2)
    with store._lock:  # as a writer holds it
        assert store.get([b"a"]) != [None] and store.get([b"c"]) == [None]
    store.put([b"c"], [page])
    assert [x is None for x in store.get([b"a", b"b", b"c"])] == [False, True, False]


def test_arrays_are_removed_by_key_and_all_at_once(tmp_path):
    store, page = offload.PageStore(max_bytes=100), np.zeros(2)
    store.put([b"a", b"b", b"c"], [page] * 3)
    (kept,) = store.get([b"a"])
    assert store.remove([b"a", b"a", b"z"]) == 1 and store.remove([]) == 0
    assert kept is not None and kept.tolist() == [0, 0]
    assert store.get([b"a"]) == [None] and (len(store), store.num_bytes) == (2, 32)
    store.save(tmp_path / "store")
    assert store.clear() == 2 and store.clear() == 0
    assert (len(store), store.num_bytes) == (0, 0) and store.get([b"b"]) == [None]
    assert len(offload.PageStore.load(tmp_path / "store", max_bytes=100)) == 2
    assert store.put([b"b"], [page]) == 1


def save_new(path) -> None:
    store = offload.PageStore(max_bytes=100)
    store.put([b"new"], [np.ones(4)])
    store.save(path)


def test_a_save_that_is_killed_at_any_step_leaves_the_old_file_or_the_new_one(tmp_path):
    path, old, seen = tmp_path / "store", offload.PageStore(max_bytes=100), []
    old.put([b"old"], [np.ones(3)])
    old.save(path)
    for _ in killed_at_every_step(save_new, path):
        store = offload.PageStore.load(path, max_bytes=100)  # as the next process, which tidies up too
        assert os.listdir(tmp_path) == ["store"]
        seen.append([x is not None for x in store.get([b"old", b"new"])])
        old.save(path)
    assert seen[0] == [True, False] and seen[-1] == [False, True]
    assert seen == sorted(seen, reverse=True) and len(seen) > 6


def test_saving_tidies_up_what_a_killed_one_left_and_nothing_else(tmp_path):
    file, name = _files._begin(str(tmp_path))  # as another process that still writes
    (tmp_path / f".left{_files.SUFFIX}").write_bytes(b"half")
    (tmp_path / "store.other").write_text("mine")
    save_new(tmp_path / "store")
    assert sorted(os.listdir(tmp_path)) == sorted([os.path.basename(name), "store", "store.other"])
    os.close(file)
    save_new(tmp_path / "store")
    assert sorted(os.listdir(tmp_path)) == ["store", "store.other"]


def test_a_full_disk_leaves_the_old_file(tmp_path):
    store, path = offload.PageStore(max_bytes=1000), tmp_path / "store"
    store.put([b"a"], [np.ones(3)])
    store.save(path)
    store.put([b"b"], [np.ones(9)])
    for room in range(0, 200, 20):
        with (
            no_room_after(room),
            pytest.raises(OSError, match=r"path: could not write .*No space left") as caught,
        ):
            store.save(path)
        assert caught.value.errno == 28
        assert os.listdir(tmp_path) == ["store"]
    assert len(offload.PageStore.load(path, max_bytes=1000)) == 1


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, "/dev/zero"):
        with pytest.raises(OSError, match=r"expected a regular file, got a (FIFO|directory|device)"):
            offload.PageStore.load(path, max_bytes=1)
        with pytest.raises(OSError, match=r"path: could not write .*expected a regular file, got a"):
            offload.PageStore(max_bytes=1).save(path)
    (tmp_path / "link").symlink_to(tmp_path / "store")
    save_new(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert len(offload.PageStore.load(tmp_path / "store", max_bytes=100)) == 1


def test_a_long_file_is_not_read(tmp_path):
    """Of a terabyte, which no process could read."""
    path = tmp_path / "store"
    path.write_bytes(b"")
    os.truncate(path, 2**40)
    with pytest.raises(ValueError, match="path: expected a saved page store, got another file"):
        offload.PageStore.load(path, max_bytes=1)
    save_new(path)
    os.truncate(path, 2**40)
    with pytest.raises(
        ValueError, match=r"path: expected a whole page store, got a damaged one: expected .* bytes"
    ):
        offload.PageStore.load(path, max_bytes=1)
    path.write_bytes(_store._MAGIC + (2**40 - 99).to_bytes(8, "little"))
    os.truncate(path, 2**40)
    with pytest.raises(ValueError, match="a table of 1099511627677 bytes in a file of 1099511627776"):
        offload.PageStore.load(path, max_bytes=1)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("", "its table"),
        ("{}", "expected a list, got {}"),
        ("[" * 10**5, "its table"),
        ([1], r"expected \[key, dtype, shape\], got 1"),
        ([["61", "int8"]], "expected .key, dtype, shape."),
        ([["61", "int8", 8]], "expected .key, dtype, shape."),
        ([["61", "int8", [8.0]]], "expected .key, dtype, shape."),
        ([["61", "int8", [True] * 8]], "expected .key, dtype, shape."),
        ([["61", "int8", [-8]]], "expected .key, dtype, shape."),
        ([["61", "int8", [-2, -4]]], "expected .key, dtype, shape."),
        ([[None, "int8", [8]]], "expected .key, dtype, shape."),
        ([["6", "int8", [8]]], "its table: non-hexadecimal number"),
        ([["61", None, [8]]], "expected .key, dtype, shape."),
        ([["61", "nothing", [8]]], "its table: data type 'nothing' not understood"),
        ([["61", "object", [1]]], "expected a dtype of numbers, got 'object'"),
        ([["61", "S8", [1]]], "expected a dtype of numbers, got 'S8'"),
        ([["61", "i4,i4", [1]]], "expected a dtype of numbers, got 'i4,i4'"),
        ([["61", "int8", [1] * 99]], "expected a shape"),
        ([["61", "int8", [0, 2**70]]], "its table"),
        ([["61", "int8", [2**40]]], "expected .* bytes of table and arrays, got"),
        ([["61", "int8", [7]]], "expected .* bytes of table and arrays, got"),
        ([["61", "int8", [4]]] * 2, "expected each key once, got '61' again"),
    ],
)
def test_a_crafted_table_is_one_clear_error(table, message, tmp_path):
    """With a right digest."""
    text = (table if isinstance(table, str) else json.dumps(table)).encode()
    body = _store._MAGIC + len(text).to_bytes(8, "little") + text + bytes(8)
    (tmp_path / "store").write_bytes(body + hashlib.blake2b(body, digest_size=32).digest())
    with pytest.raises(
        ValueError, match=f"path: expected a whole page store, got a damaged one: .*{message}"
    ):
        offload.PageStore.load(tmp_path / "store", max_bytes=100)


def test_arguments_of_the_store_are_named():
    store: Any = offload.PageStore(max_bytes=100)
    calls = (store.get, store.remove, lambda keys: store.put(keys, [np.ones(1)]))
    cases = (
        (ValueError, "max_bytes must be at least 1", lambda: offload.PageStore(0)),
        (ValueError, "arrays: expected one for each of 1", lambda: store.put([b"a"], [])),
        (TypeError, "keys: expected bytes", lambda: store.put([b"b", "a"], [np.ones(1)] * 2)),
        (TypeError, "keys: expected bytes", lambda: store.get(["a"])),
        (TypeError, "arrays: expected numbers", lambda: store.put([b"a"], [np.array([None])])),
        (TypeError, "max_bytes must be an int", lambda: offload.PageStore(None)),  # pyright: ignore
        (TypeError, "max_bytes must be an int", lambda: offload.PageStore.load("nothing", "1")),  # pyright: ignore
        *((TypeError, "keys: expected a sequence of bytes, got", lambda f=f, k=k: f(k))
          for k in (None, 3, "a", b"a", {b"a": 1}, iter([b"a"])) for f in calls),
        *((TypeError, "keys: expected bytes, got", lambda f=f, k=k: f([k]))
          for k in (None, 3, "a", [b"a"], (b"a",), np.zeros(1)) for f in calls),
        *((TypeError, "arrays: expected a sequence of arrays", lambda a=a: store.put([b"a"], a))
          for a in (None, 3, np.float32(1), jnp.float32(1))),
        *((TypeError, "arrays: expected numbers", lambda a=a: store.put([b"a"], [a]))
          for a in (None, "text", b"bytes", {}, [[1], [1, 2]], object(), np.zeros(1, "M8[s]"),
                    np.zeros(1, [("x", int)]), jax.random.key(0))),
        *((TypeError, r"path: expected str or os.PathLike", lambda f=f, p=p: f(p))
          for p in (None, 3, b"a", ["a"]) for f in (store.save, lambda p: offload.PageStore.load(p, 1))),
        *((ValueError, "path: expected a path", lambda f=f, p=p: f(p))
          for p in ("", "a\0b") for f in (store.save, lambda p: offload.PageStore.load(p, 1))),
        (OSError, "path: could not write", lambda: store.save("/nothing/here")),
    )  # fmt: skip
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
    assert len(store) == 0
