"""The store of arrays in CPU memory: what it holds, who may use it at once, and what its files survive."""

from __future__ import annotations

import concurrent.futures

import jax.numpy as jnp
import numpy as np
import pytest

from paxcache import offload


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


def test_arguments_of_the_store_are_named():
    store = offload.PageStore(max_bytes=100)
    cases = (
        (ValueError, "max_bytes must be at least 1", lambda: offload.PageStore(0)),
        (ValueError, "arrays: expected one for each of 1", lambda: store.put([b"a"], [])),
        (TypeError, "keys: expected bytes", lambda: store.put([b"b", "a"], [np.ones(1)] * 2)),  # pyright: ignore
        (TypeError, "keys: expected bytes", lambda: store.get(["a"])),  # pyright: ignore
        (TypeError, "arrays: expected numbers", lambda: store.put([b"a"], [np.array([None])])),
    )
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
    assert len(store) == 0
