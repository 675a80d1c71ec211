"""What is stored comes back bit for bit or not at all, whatever happens to the process, the disk and the files."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
import pathlib
import re
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import bench_persist
import paxcache
from driver import config_of
from layouts import LAYOUTS, assert_same, bits, group, ids, with_random_bits
from paxcache import offload, persist, prefix, sharding
from paxcache.persist import _checkpoint
from paxcache.prefix import _tree

PLENTY = 2**30


QUANTIZED = {
    "int8": config_of(group(quantization="int8")),
    "fp8 and int4 per tensor": config_of(
        group(quantization="fp8_e4m3"), group(quantization="int4", scales="per_tensor", v_head_dim=0)
    ),
}
WINDOWED = config_of(group(), group(num_layers=1, sliding_window=5))


def random_cache(config: paxcache.CacheConfig) -> paxcache.PagedKVCache:
    return with_random_bits(paxcache.init(config))


def key_of(*numbers: int) -> list[bytes]:
    return [n.to_bytes(32, "big") for n in numbers]


def init(config: paxcache.CacheConfig) -> paxcache.PagedKVCache:
    """An empty cache, with scales where it needs any."""
    given = [g for g in config.layer_groups if g.scales == "per_tensor"]
    scales = jnp.arange(1.0, 1 + sum(g.num_layers for g in config.layer_groups))
    v_scales = scales if any(g.value_dim for g in given) else None
    return paxcache.init(config, k_scales=scales if given else None, v_scales=v_scales)


@functools.cache
def shapes_of(config: paxcache.CacheConfig) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), init(config))


def extent_of(
    config: paxcache.CacheConfig, num_pages: int, *, seed: int = 0, held: Any = None
) -> offload.Extent:
    """Pages of random bits, which depend on the seed and the page alone."""
    pools = shapes_of(config)
    rngs = [np.random.default_rng([seed, page]) for page in range(num_pages)]

    def fill(leaf):
        size = leaf.size // leaf.shape[1] * leaf.dtype.itemsize
        data = np.frombuffer(b"".join(rng.bytes(size) for rng in rngs), leaf.dtype)
        return jnp.asarray(data.reshape(num_pages, leaf.shape[0], *leaf.shape[2:]))

    blocks = tuple(jax.tree.map(fill, g.pages) for g in pools.groups)
    return offload.Extent(blocks, held or (jnp.ones(num_pages, bool),) * len(blocks))


def open_storage(path, config: Any = LAYOUTS["bf16"], max_bytes=PLENTY) -> persist.Storage:
    return persist.Storage.open(path, config, max_bytes=max_bytes)


def page_file(folder, key: bytes):
    (path,) = folder.glob(f"*/{key.hex()}-*")
    return path


@contextlib.contextmanager
def full_disk(size: int):
    """No file can grow beyond a size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@functools.cache
def processes():
    """Starts processes from one that has imported everything and used nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["paxcache.persist", "pytest"])
    return context


def run_until_killed(work, *args, seconds: float) -> list[Any]:
    """What a process reported until it was killed, some time after its first report."""
    ours, theirs = processes().Pipe(duplex=False)
    process = processes().Process(target=work, args=(*args, theirs))
    process.start()
    theirs.close()
    assert ours.poll(60)
    time.sleep(seconds)
    process.kill()
    process.join()
    reports = []
    with contextlib.suppress(EOFError, OSError):
        while True:
            reports.append(ours.recv())
    ours.close()
    process.close()
    return reports


# Storage.


@pytest.mark.parametrize("config", [*LAYOUTS.values(), *QUANTIZED.values()], ids=[*LAYOUTS, *QUANTIZED])
def test_pages_come_back_bit_for_bit(config, tmp_path):
    keys, extent = key_of(0, 1, 2), extent_of(config, 3)
    assert open_storage(tmp_path, config).put(keys, extent) == 3
    found = open_storage(tmp_path, config).get(keys)
    assert_same(found, extent)
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(found.blocks)} == {"pinned_host"}
    kept = open_storage(tmp_path, config).get(keys[::-1], memory_kind="device")
    assert_same(jax.tree.map(lambda x: x[::-1], kept), extent)


def test_pages_go_from_a_cache_into_another(tmp_path):
    config = LAYOUTS["groups"]
    cache = random_cache(config)
    names = ids(5, 0, 7, 2), ids(-1, -1, 3, 6)  # the first pages are left of the window
    groups = [
        dataclasses.replace(
            g, ref_counts=g.ref_counts.at[pages].set(1, mode="drop", wrap_negative_indices=False)
        )
        for g, pages in zip(cache.groups, names, strict=True)
    ]
    cache = dataclasses.replace(cache, groups=tuple(groups))
    extent, keys = offload.swap_out(cache, names), key_of(*range(4))
    assert [held.tolist() for held in extent.held] == [[True] * 4, [False, False, True, True]]
    assert open_storage(tmp_path, config).put(keys, extent) == 4
    found = open_storage(tmp_path, config).get(keys)
    target, page_ids, ok = offload.swap_in(paxcache.init(config), found)
    assert ok
    for old, new, source, place, held in zip(
        cache.groups, target.groups, names, page_ids, extent.held, strict=True
    ):
        np.testing.assert_array_equal(np.asarray(place) >= 0, held)
        for a, b in zip(jax.tree.leaves(old.pages), jax.tree.leaves(new.pages), strict=True):
            np.testing.assert_array_equal(bits(a[:, source[held]]), bits(b[:, place[held]]))


def test_keys_are_looked_up_one_by_one(tmp_path):
    storage, extent = open_storage(tmp_path), extent_of(LAYOUTS["bf16"], 4)
    a, b, c, other = key_of(1, 2, 3, 4)
    held = (jnp.array([True, True, False, True]),)
    assert storage.put([a, None, c, b], dataclasses.replace(extent, held=held)) == 2
    assert storage.contains([a, b, c, other, None]).tolist() == [True, True, False, False, False]
    found = storage.get([other, b, None, b, a])
    assert found.held[0].tolist() == [False, True, False, True, True]
    for entry, source in ((1, 3), (3, 3), (4, 0)):
        np.testing.assert_array_equal(bits(found.blocks[0].k)[entry], bits(extent.blocks[0].k)[source])
    assert storage.get([]).held[0].shape == (0,)
    assert storage.put([], extent_of(LAYOUTS["bf16"], 0)) == 0
    assert dataclasses.astuple(storage.counters) == (2, 3, 1, 0, 0)


def test_a_page_needs_all_groups_without_a_window(tmp_path):
    storage = open_storage(tmp_path, WINDOWED)
    extent = extent_of(WINDOWED, 4, held=(jnp.array([1, 1, 0, 0], bool), jnp.array([1, 0, 1, 0], bool)))
    keys = key_of(*range(4))
    assert storage.put(keys, extent) == 2
    found = open_storage(tmp_path, WINDOWED).get(keys)
    assert [h.tolist() for h in found.held] == [[True, True, False, False], [True, False, False, False]]
    assert not bits(found.blocks[1].k)[1:].any()
    np.testing.assert_array_equal(bits(found.blocks[0].k)[1], bits(extent.blocks[0].k)[1])

    whole, less = storage.num_bytes, page_file(tmp_path, keys[1]).stat().st_size
    more = dataclasses.replace(extent, held=(jnp.ones(4, bool), jnp.array([0, 1, 0, 0], bool)))
    assert storage.put(keys[:2] + [None] * 2, more) == 2
    assert [h[:2].tolist() for h in storage.get(keys).held] == [[True, True], [True, True]]
    assert storage.num_bytes == whole - less + page_file(tmp_path, keys[0]).stat().st_size
    files = [path for path in tmp_path.rglob("*-*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) == storage.num_bytes


def test_the_fuller_one_of_two_is_kept(tmp_path):
    """As if a writer was killed after storing a page with a group more and before removing the old one."""
    (key,) = key_of(1)
    less = extent_of(WINDOWED, 1, held=(jnp.ones(1, bool), jnp.zeros(1, bool)))
    open_storage(tmp_path, WINDOWED).put([key], less)
    path = page_file(tmp_path, key)
    old = path.read_bytes()
    open_storage(tmp_path, WINDOWED).put([key], extent_of(WINDOWED, 1))
    path.write_bytes(old)
    os.utime(path, (0, 0))
    for age in (0, 2e9):
        path.write_bytes(old)
        os.utime(path, (age, age))
        storage = open_storage(tmp_path, WINDOWED)
        assert not path.exists()
        assert len(storage) == 1 and storage.get([key]).held[1].tolist() == [True]


def test_the_least_recently_used_go_first(tmp_path):
    config = LAYOUTS["bf16"]
    open_storage(tmp_path, config).put(key_of(0), extent_of(config, 1))
    size = page_file(tmp_path, key_of(0)[0]).stat().st_size
    storage = open_storage(tmp_path, config, 4 * size + 1)
    everything = key_of(*range(9))

    def known():
        return np.flatnonzero(storage.contains(everything)).tolist()

    assert storage.put(key_of(0, 1, 2, 3), extent_of(config, 4)) == 4
    storage.get(key_of(2))
    assert storage.put(key_of(4), extent_of(config, 1)) == 1
    assert known() == [0, 1, 2, 4]  # the last of a prompt goes first
    storage = open_storage(tmp_path, config, 4 * size)  # another process knows the order too
    assert storage.put(key_of(5), extent_of(config, 1)) == 1 and known() == [0, 2, 4, 5]
    assert storage.put(key_of(0, 6), extent_of(config, 2)) == 2 and known() == [0, 4, 5, 6]
    assert (
        storage.put(key_of(8, 7, 6, 3, 2, 1), extent_of(config, 6)) == 4
    )  # more than fits: the first of them
    assert known() == [3, 6, 7, 8]
    assert storage.num_bytes == 4 * size and storage.counters.pages_evicted == 5
    assert len([path for path in tmp_path.glob("*/*") if path.is_file()]) == 4
    smaller = open_storage(tmp_path, config, size)
    assert len(smaller) == 4
    assert smaller.put(key_of(8), extent_of(config, 1)) == 1 and len(smaller) == 1


def test_a_batch_is_stored_up_to_the_page_that_does_not_fit(tmp_path):
    """A later page may be smaller and fit, but is of no use without those before it."""
    held = (jnp.ones(3, bool), jnp.array([True, True, False]))
    extent, keys = extent_of(WINDOWED, 3, held=held), key_of(0, 1, 2)
    sizes = open_storage(tmp_path / "sizes", WINDOWED)
    sizes.put(keys, extent)
    whole, _, part = (page_file(tmp_path / "sizes", key).stat().st_size for key in keys)
    assert part < whole
    storage = open_storage(tmp_path / "tight", WINDOWED, whole + part)
    assert storage.put(keys, extent) == 1
    assert storage.contains(keys).tolist() == [True, False, False]


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def flip_the_head(path):
    data = bytearray(path.read_bytes())
    data[9] ^= 1
    path.write_bytes(data)


def exchange(path):
    path.write_bytes(page_file(path.parents[1], key_of(1)[0]).read_bytes())


DAMAGE = {
    "a bit": flip,
    "a bit of the head": flip_the_head,
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "empty": lambda path: os.truncate(path, 0),
    "another page": exchange,
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_page_is_missing(damage, tmp_path):
    config, keys = LAYOUTS["narrow values"], key_of(0, 1, 2)
    extent = extent_of(config, 3)
    open_storage(tmp_path, config).put(keys, extent)
    path = page_file(tmp_path, keys[0])
    damage(path)
    storage = open_storage(tmp_path, config)
    found = storage.get(keys)
    assert found.held[0].tolist() == [False, True, True]
    assert not bits(found.blocks[0].k)[0].any()
    assert storage.counters.pages_damaged == 1 and storage.counters.pages_found == 2
    assert not path.exists() and storage.contains(keys).tolist() == [False, True, True]
    assert storage.num_bytes == sum(page_file(tmp_path, key).stat().st_size for key in keys[1:])
    assert storage.put(keys, extent) == 3
    assert_same(storage.get(keys).blocks, extent.blocks)


def test_pages_that_are_gone_or_cannot_be_read_are_missing(tmp_path):
    config, keys = LAYOUTS["bf16"], key_of(0, 1, 2)
    storage, extent = open_storage(tmp_path, config), extent_of(config, 3)
    storage.put(keys, extent)
    page_file(tmp_path, keys[0]).unlink()  # as another process evicts it
    path = page_file(tmp_path, keys[1])
    path.unlink()
    path.symlink_to(path)  # an error for every user, root too
    assert storage.get(keys).held[0].tolist() == [False, False, True]
    assert (storage.counters.pages_missing, storage.counters.pages_damaged) == (1, 1)
    assert storage.contains(keys).tolist() == [False, False, True]
    path.unlink()
    assert storage.put(keys, extent) == 3 and storage.get(keys).held[0].all()


def test_a_full_disk_is_an_error_that_costs_nothing_else(tmp_path):
    """A page without its window's group is small enough to be written; the others are not."""
    storage, keys = open_storage(tmp_path, WINDOWED), key_of(0, 1, 2)
    held = (jnp.ones(3, bool), jnp.array([True, False, True]))
    extent = extent_of(WINDOWED, 3, held=held)
    small = sum(leaf.nbytes for leaf in jax.tree.leaves(extent.blocks[0])) // 3 + 64
    with (
        full_disk(small),
        pytest.raises(OSError, match=r"2 writes failed, 1 of 3 pages are stored.*too large"),
    ):
        storage.put(keys, extent)
    for known in (storage, open_storage(tmp_path, WINDOWED)):
        assert known.contains(keys).tolist() == [False, True, False]
        assert known.get(keys).held[0].tolist() == [False, True, False]
        assert known.num_bytes == page_file(tmp_path, keys[1]).stat().st_size
    assert len([path for path in tmp_path.glob("*/*") if path.is_file()]) == 1  # no half page is left
    assert storage.put(keys, extent) == 3
    assert storage.get(keys).held[0].all()


def test_places_that_cannot_be_opened(tmp_path):
    file = tmp_path / "file"
    file.write_text("not a directory")
    for path in (file, file / "below", "/proc/paxcache"):
        with pytest.raises(OSError, match="path: no access to"):
            open_storage(path)
    assert file.read_text() == "not a directory"
    with pytest.raises(ValueError, match="path: expected a directory, a URL or a specification"):
        open_storage("nothing://here")
    with pytest.raises(
        ValueError, match="path: expected a storage of pages or an empty place, got one with 'file'"
    ):
        open_storage(tmp_path)
    assert os.listdir(tmp_path) == ["file"]
    with pytest.raises(ValueError, match="max_bytes must be at least"):
        open_storage(tmp_path / "new", max_bytes=100)
    with pytest.raises(TypeError, match="config: expected a CacheConfig"):
        open_storage(tmp_path / "new", config="llama")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"page_size": 8}, "config: expected page_size 4, .* got 8"),
        ({"groups": (group(dtype=jnp.float16),)}, "config: expected groups .*bfloat16.* got .*float16"),
        (
            {"groups": (group(dtype=jnp.bfloat16, sliding_window=8),)},
            "config: expected groups .*null.* got .* 8",
        ),
        ({"groups": (group(dtype=jnp.bfloat16, num_layers=3),)}, "config: expected groups"),
        ({"groups": (group(dtype=jnp.bfloat16), group())}, "config: expected groups"),
    ],
)
def test_another_config_is_refused(change, message, tmp_path):
    open_storage(tmp_path)
    with pytest.raises(ValueError, match=message):
        open_storage(tmp_path, dataclasses.replace(LAYOUTS["bf16"], **change))
    larger = dataclasses.replace(LAYOUTS["bf16"], num_pages=99, max_seqs=9, max_pages_per_seq=9)
    open_storage(tmp_path, larger)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "path: expected version 1, got 2"),
        ({"format": "other"}, "path: expected format"),
        ({"keys": None}, 'path: expected keys "paxcache.prefix/1", got null'),
    ],
)
def test_another_format_is_refused(change, message, tmp_path):
    open_storage(tmp_path)
    manifest = tmp_path / "paxcache.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        open_storage(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", None])
def test_pages_without_a_whole_manifest_are_refused(content, tmp_path):
    open_storage(tmp_path).put(key_of(1), extent_of(LAYOUTS["bf16"], 1))
    manifest = tmp_path / "paxcache.json"
    if content is None:
        manifest.unlink()
    else:
        manifest.write_bytes(content)
    with pytest.raises(ValueError, match=r"path: expected .* got"):
        open_storage(tmp_path)


def test_wrong_arguments_store_nothing(tmp_path):
    storage, keys, extent = open_storage(tmp_path), key_of(0, 1), extent_of(LAYOUTS["bf16"], 2)
    for wrong, message in (
        (
            extent_of(LAYOUTS["f16"], 2),
            r"extent: expected bfloat16\[2, 2, 2, 4, 4\] for group 0, got float16",
        ),
        (extent_of(LAYOUTS["no values"], 2), "extent: expected leaves"),
        (extent_of(WINDOWED, 2), "extent: expected pages of 1 groups, got those of 2"),
        (extent_of(LAYOUTS["bf16"], 3), "extent: expected a page of group 0 for each of 2 keys"),
    ):
        with pytest.raises(ValueError, match=message):
            storage.put(keys, wrong)
    with pytest.raises(TypeError, match="extent: expected an Extent"):
        storage.put(keys, extent.blocks)  # type: ignore[arg-type]
    calls: Any = (lambda k: storage.put(k, extent), storage.get, storage.contains)
    for call in calls:
        with pytest.raises(TypeError, match="keys: expected bytes or None, got 'a'"):
            call([keys[0], "a"])
        with pytest.raises(ValueError, match="keys: expected 32 bytes"):
            call([keys[0], b"a"])
    with pytest.raises(ValueError, match="memory_kind: expected one of"):
        storage.get(keys, memory_kind="disk")
    assert len(storage) == 0 == storage.num_bytes


def test_any_key_value_store(tmp_path):
    """In memory, and a database of tensorstore's on disk: names and values alone are used."""
    config, keys, extent = LAYOUTS["bf16"], key_of(0, 1, 2), extent_of(LAYOUTS["bf16"], 3)
    database = {"driver": "ocdbt", "base": f"file://{tmp_path}/"}
    for path in ("memory://pages", database):
        storage = open_storage(path, config)
        assert storage.put(keys, extent) == 3
        assert_same(storage.get(keys).blocks, extent.blocks)
    again = open_storage(database, config, storage.num_bytes * 2 // 3)
    assert again.get(keys).held[0].all()
    again.put(key_of(4), extent_of(config, 1))
    assert len(again) == 2
    name = f"00/{keys[0].hex()}-1"
    storage._kvstore.write(name, storage._kvstore.read(name).result().value[:-1]).result()
    assert storage.get(keys[:1]).held[0].tolist() == [False]
    assert storage.counters.pages_damaged + storage.counters.pages_missing == 1


def test_progress_shows_a_bar(tmp_path, capsys, monkeypatch):
    storage, keys = open_storage(tmp_path), key_of(0, 1, 2)
    storage.put(keys, extent_of(LAYOUTS["bf16"], 3), progress=True)
    storage.get(keys, progress=True)
    shown = capsys.readouterr().err
    assert shown.count("3/3") == 2 and "pages" in shown
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match="pip install tqdm"):
        storage.get(keys, progress=True)
    with pytest.raises(ImportError, match="pip install tqdm"):
        storage.put(key_of(4), extent_of(LAYOUTS["bf16"], 1), progress=True)
    assert len(storage) == 3


# Six pages of two groups, the second with a window; a mask says which groups of a page are offered.
offers = st.dictionaries(st.integers(0, 5), st.integers(0, 3), max_size=6)
moves = st.one_of(
    st.tuples(st.just("put"), offers),
    st.tuples(st.just("get"), st.lists(st.integers(0, 5), unique=True, max_size=4)),
    st.tuples(st.sampled_from(["open", "lose", "damage"]), st.integers(0, 5)),
)


@hypothesis.settings(max_examples=25)
@hypothesis.given(st.lists(moves, min_size=4, max_size=12), st.integers(2, 5))
def test_any_calls_agree_with_a_list_of_pages(calls, room):
    """Against a list of (page, groups) in order of use: what is kept, in which groups, and what the files weigh."""
    extent, keys = extent_of(WINDOWED, 6), key_of(*range(6))
    part, whole = (
        (sum(leaf.nbytes for leaf in jax.tree.leaves(extent.blocks[:n])) // 6 + 12) for n in (1, 2)
    )
    size = {1: part, 3: whole}
    model: dict[int, int] = {}  # oldest first
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        storage = open_storage(folder, WINDOWED, room * whole)
        for call, what in calls:
            if call == "put":
                masks = np.zeros(6, int)
                masks[list(what)] = list(what.values())
                order = [*what, *(page for page in range(6) if page not in what)]
                held = tuple(jnp.asarray(masks[order] >> g & 1 == 1) for g in range(2))
                blocks = jax.tree.map(lambda x, order=order: x[np.array(order)], extent.blocks)
                offered = {page: mask for page, mask in what.items() if mask & 1}
                num_stored = storage.put([keys[page] for page in order], offload.Extent(blocks, held))
                total = sum(size[mask] for page, mask in model.items() if page in offered)
                new = {}
                for page, mask in offered.items():
                    if mask & ~model.get(page, 0):
                        if total + size[mask] > room * whole:
                            break
                        total += size[mask]
                        new[page] = mask
                others = {page: mask for page, mask in model.items() if page not in offered}
                while sum(size[mask] for mask in others.values()) + total > room * whole:
                    del others[next(iter(others))]
                used = {p: new.get(p) or model[p] for p in offered if p in new or p in model}
                model = {**others, **dict(reversed(used.items()))}
                assert num_stored == len(used)
            elif call == "get":
                found = storage.get([keys[page] for page in what])
                here = [page for page in what if page in model]
                masks = np.asarray(found.held[0]) + 2 * np.asarray(found.held[1])
                assert masks.tolist() == [model.get(page, 0) for page in what]
                for at, page in enumerate(what):
                    if page in model:
                        assert raw(found.blocks[0].k[at]) == raw(extent.blocks[0].k[page])
                model = {
                    **{p: m for p, m in model.items() if p not in here},
                    **{p: model[p] for p in here[::-1]},
                }
            elif call == "open":
                storage = open_storage(folder, WINDOWED, room * whole)
            elif what in model:
                path = page_file(folder, keys[what])
                path.unlink() if call == "lose" else flip(path)
                assert not storage.get([keys[what]]).held[0].any()
                del model[what]
            assert storage.contains(keys).tolist() == [page in model for page in range(6)]
            files = [path.stat().st_size for path in folder.glob("*/*")]
            assert (
                storage.num_bytes == sum(files) == sum(size[mask] for mask in model.values()) <= room * whole
            )


def test_many_threads(tmp_path):
    """Writers and readers of overlapping pages under a budget: what is found is right, and the books stay true."""
    config, N = LAYOUTS["bf16"], 24
    extent = extent_of(config, N)
    size = open_storage(tmp_path / "one", config)
    size.put(key_of(0), extent_of(config, 1))
    storage = open_storage(tmp_path / "all", config, 12 * size.num_bytes)
    held = [(jnp.asarray((np.arange(N) // 4) % 6 == i),) for i in range(6)]

    def work(number):
        storage.put(key_of(*range(N)), dataclasses.replace(extent, held=held[number % 6]))
        found = storage.get(key_of(*range(N)))
        here = np.asarray(found.held[0])
        np.testing.assert_array_equal(bits(found.blocks[0].k)[here], bits(extent.blocks[0].k)[here])

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(24)))
    files = [path for path in (tmp_path / "all").glob("*/*") if path.is_file()]
    assert len(files) == len(storage) <= 12
    assert sum(path.stat().st_size for path in files) == storage.num_bytes
    assert storage.counters.pages_damaged == 0


BIG = config_of(group(num_kv_heads=8, head_dim=256, num_layers=4), page_size=16)  # 1 MiB a page
BATCH = 3


def store_forever(folder, first: int, reports) -> None:
    storage = open_storage(folder, BIG)
    for number in range(first, first + 1000):
        keys = key_of(*range(number * BATCH, (number + 1) * BATCH))
        assert storage.put(keys, extent_of(BIG, BATCH, seed=number)) == BATCH
        reports.send(number)


def test_what_was_reported_stored_survives_a_kill(tmp_path):
    first = 0
    for seconds in (0.0, 0.03, 0.07, 0.15):
        reports = run_until_killed(store_forever, tmp_path, first, seconds=seconds)
        assert reports[0] == first
        storage = open_storage(tmp_path, BIG)
        for number in range(first, reports[-1] + 2):  # the last batch was under way
            keys = key_of(*range(number * BATCH, (number + 1) * BATCH))
            found = storage.get(keys)
            here = np.asarray(found.held[0])
            assert here.all() or number > reports[-1]
            expected = extent_of(BIG, BATCH, seed=number)
            np.testing.assert_array_equal(bits(found.blocks[0].k)[here], bits(expected.blocks[0].k)[here])
        assert storage.counters.pages_damaged == 0
        first = reports[-1] + 1


def test_what_a_killed_writer_left_half_written_is_swept_up(tmp_path):
    open_storage(tmp_path).put(key_of(0), extent_of(LAYOUTS["bf16"], 1))
    old, new = (tmp_path / "00" / f"{name}.__lock" for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    assert len(open_storage(tmp_path)) == 1
    assert new.exists() and not old.exists()  # a new one may be somebody's


def serve(folder, epoch: int, reports) -> None:
    """Computes the pages of a prompt that are not stored yet, and stores them."""
    config = LAYOUTS["bf16"]
    keys = prefix.page_keys(range(20), page_size=4, epoch=epoch)
    storage = open_storage(folder, config)
    found = storage.get(keys)
    computed = int((~found.held[0]).sum())
    storage.put(keys, extent_of(config, len(keys), seed=epoch))
    reports.send((computed, np.asarray(found.blocks[0].k).tobytes()))


def test_a_second_process_reuses_what_the_first_computed(tmp_path):
    answers = [run_until_killed(serve, tmp_path, epoch, seconds=0)[0] for epoch in (0, 0, 1)]
    assert [computed for computed, _ in answers] == [5, 0, 5]
    assert answers[1][1] == np.asarray(extent_of(LAYOUTS["bf16"], 5, seed=0).blocks[0].k).tobytes()


def test_the_benchmark_runs_and_checks_what_it_reads(tmp_path):
    config = bench_persist.make_config()
    times = bench_persist.measure(tmp_path, config, bench_persist.make_extent(config, 2), storage_first=True)
    assert len(times) == 6 and all(seconds > 0 for seconds in times.values())
    assert (tmp_path / "plain").stat().st_size == 2 * config.page_bytes


# Checkpoints.

DTYPES = [
    *("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int4", "float16", "bfloat16"),
    *("float32", "complex64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz", "float8_e8m0fnu"),
]


def raw(array) -> bytes:
    return np.asarray(array).tobytes()


def assert_equal(a: Any, b: Any) -> None:
    """The same types, structure, dtypes and bits, also of what JAX takes for no pytree."""
    assert type(a) is type(b), (a, b)
    if isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        assert a.dtype == b.dtype
        assert_equal(jax.random.key_data(a), jax.random.key_data(b))
    elif isinstance(a, (jax.Array, np.ndarray, np.generic)):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert raw(a) == raw(b)
        if isinstance(a, jax.Array):
            assert a.sharding.memory_kind == b.sharding.memory_kind
    elif dataclasses.is_dataclass(a):
        for field in dataclasses.fields(a):
            assert_equal(getattr(a, field.name), getattr(b, field.name))
    elif isinstance(a, dict):
        assert_equal(list(a.items()), list(b.items()))
    elif isinstance(a, (tuple, list)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b


def test_every_dtype_and_plain_value_comes_back_bit_for_bit(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {}
    for name in DTYPES:
        data = rng.integers(0, 2 if name == "bool" else 8 if "int4" in name else 256, 48, np.uint8)
        arrays[name] = jnp.asarray(data.view(name))
    arrays["minus zero"] = jnp.full((2, 3), -0.0, jnp.bfloat16)
    arrays["empty"] = jnp.zeros((0, 2), jnp.float16)
    tree = {
        **arrays,
        "keys": [jax.random.key(3), jax.random.split(jax.random.key(4, impl="rbg"), 3)],
        "numpy": (np.arange(6.0).reshape(2, 3), np.float32(-0.0), np.zeros((0, 1), ">i2"), np.bool_(True)),
        "plain": (None, True, 3, -(2**70), 0.1, float("-inf"), "a\u00e9\0", b"\xff\0", ()),
        (1, "x"): [],
    }
    persist.save(tmp_path, tree)
    loaded = persist.load(tmp_path)
    assert_equal(loaded, tree)
    loaded["numpy"][0][0] = 7  # one's own


BUSY = config_of(group(dtype=jnp.bfloat16), num_pages=24, max_pages_per_seq=8)


@functools.cache
def busy_state() -> dict[str, Any]:
    """All that a server may hold: shared prefixes in two indices, pins, events, a preempted row, a key."""
    config = BUSY
    cache, index = random_cache(config), prefix.init(config, events=True)
    extra = prefix.ExtraKey(salt=("tenant", 2**80), items=(prefix.Item(b"\0image", 1, 3),))
    prompts = ([*range(13)], None), ([*range(4), *[7] * 9], None), ([1] * 13, extra)
    for row, (tokens, key) in enumerate(prompts):
        cache, index, reused = prefix.admit(cache, index, row, tokens, extra_key=key)
        lens = jnp.zeros(4, jnp.int32).at[row].set(13 - reused)
        cache, _ = paxcache.extend(cache, lens, max_query_len=13)
        ttl = None if row else 5.0
        cache, index = prefix.publish(cache, index, row, tokens, extra_key=key, ttl=ttl, now=row)
    index, pin = prefix.pin(index, range(4))
    cache, host, ticket = offload.preempt(cache, offload.init(config, 64), ids(0, 2))
    assert ticket.ok
    cache, index, freed = prefix.evict(cache, index, 1, policy="priority")
    assert freed == 1
    return {
        "cache": cache,
        "index": index,
        "pin": pin,
        "device": prefix.device.init(config, capacity=8),
        "host": host,
        "tickets": [ticket],
        "key": jax.random.key(0),
    }


def test_a_whole_state_comes_back_and_goes_on(tmp_path):
    state = busy_state()
    persist.save(tmp_path, state)
    loaded = persist.load(tmp_path)
    assert_equal(loaded, state)
    results = []
    for s in (state, loaded):
        cache, host, ok = offload.resume(s["cache"], s["host"], s["tickets"][0], ids(0, 2))
        assert ok
        cache, index, reused = prefix.admit(cache, s["index"], 3, range(9), now=9.0)
        index, events = prefix.take_events(prefix.unpin(index, s["pin"]))
        cache, index, freed = prefix.evict(cache, index, 24, policy="slru")
        results.append((cache, host, index, reused, events, freed))
    assert_equal(*results)


def test_a_state_from_before_rows_had_epochs_and_runs_bytes_is_read(tmp_path, monkeypatch):
    state, fields = busy_state(), _checkpoint._fields

    def fields_before(cls):
        names = [name for name in fields(cls) if name not in ("epochs", "identity")]
        return [*names, "row_epochs"] if cls is prefix.Index else names

    nodes, runs = {}, {}
    for node_id, node in _tree.items(state["index"].nodes):
        run = node.run
        arrays = run._replace(ids=run.table.copy(), where=np.frombuffer(run.where, np.uint8).copy())
        nodes[node_id] = node._replace(run=runs.setdefault(id(run), arrays))
    old = {**state, "index": dataclasses.replace(state["index"], nodes=_tree.update(None, nodes))}
    with monkeypatch.context() as before:
        before.setattr(prefix.Index, "row_epochs", None, raising=False)
        before.setattr(_checkpoint, "_fields", fields_before)
        persist.save(tmp_path, old)
    for target in (None, state):
        loaded = persist.load(tmp_path, target)
        cache, (ticket,) = loaded["cache"], loaded["tickets"]
        for x, now in ((cache, state["cache"]), (ticket, state["tickets"][0])):
            assert now.epochs.any() and not x.epochs.any()
            assert x.epochs.sharding == x.seq_lens.sharding
        loaded["cache"] = dataclasses.replace(cache, epochs=state["cache"].epochs)
        saved = state["tickets"][0]
        assert int(loaded["host"].identity) == int(ticket.identity) == 0 != int(saved.identity)
        loaded["host"] = dataclasses.replace(loaded["host"], identity=state["host"].identity)
        loaded["tickets"] = [dataclasses.replace(ticket, epochs=saved.epochs, identity=saved.identity)]
        assert_equal(loaded, state)


def test_an_index_shares_and_orders_as_before(tmp_path):
    """Nodes that were split from one run still show parts of one, and a long log does not nest too deep."""
    index = busy_state()["index"]
    for number in range(3000):
        index = dataclasses.replace(index, log=(prefix.Removed((bytes([number % 256]),)), index.log))
    persist.save(tmp_path, index)
    loaded = persist.load(tmp_path)
    assert prefix.take_events(loaded)[1] == prefix.take_events(index)[1]

    def shared(index):
        nodes = [node for _, node in _tree.items(index.nodes)]
        return [[a.run is b.run for a in nodes] for b in nodes]

    assert shared(loaded) == shared(index)
    assert np.sum(shared(index)) > len(shared(index))
    for _, order in loaded.orders:
        assert all(type(part) in (int, bool, float) for key, _ in _tree.items(order) for part in key)


@jax.jit
def decode(state: dict[str, Any]) -> dict[str, Any]:
    """Draws a token for each row with a small model, whose logits depend on all keys and values."""
    cache, tokens = state["cache"], state["tokens"]
    key, now = jax.random.split(state["key"])
    cache, step = paxcache.extend(cache, jnp.ones_like(tokens), max_query_len=1)
    x = jax.nn.one_hot(tokens, 8).reshape(-1, 1, 2, 4).astype(jnp.bfloat16)
    cache = paxcache.append(cache, 0, x, x, step)
    out = paxcache.attend(cache, 0, x + step.positions[..., None, None] / 7, step)
    tokens = jax.random.categorical(now, 3 * out.reshape(-1, 8).astype(jnp.float32))
    return {"cache": cache, "tokens": tokens, "key": key}


def test_a_resumed_decode_gives_the_same_tokens_and_pools(tmp_path):
    config = config_of(group(num_layers=1, dtype=jnp.bfloat16, sliding_window=6))
    state = {"cache": paxcache.init(config), "tokens": jnp.arange(4), "key": jax.random.key(5)}
    went_on = [state]
    for _ in range(11):
        went_on.append(decode(went_on[-1]))
    assert len(np.unique([s["tokens"] for s in went_on])) > 3
    for number in range(11):
        if number % 4 == 1:
            persist.save(tmp_path, state)
            state = persist.load(tmp_path)
        state = decode(state)
    assert_equal(state, went_on[-1])


def test_onto_another_sharding_and_back(tmp_path, cpu_devices):
    config = LAYOUTS["bf16"]
    cache = random_cache(config)
    mesh = Mesh(np.array(cpu_devices), ("heads",))
    over_heads = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        sharding.partition_specs(cache, "heads"),
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )
    everywhere = NamedSharding(mesh, PartitionSpec())
    persist.save(tmp_path / "one", {"cache": cache, "key": jax.random.key(1), "n": 3})
    loaded = persist.load(tmp_path / "one", {"cache": over_heads, "key": everywhere, "n": None})
    assert loaded["cache"].groups[0].pages.k.addressable_shards[0].data.shape[2] == 1
    assert loaded["cache"].seq_lens.sharding.is_fully_replicated
    assert_same(loaded["cache"], cache)
    assert_equal(jax.random.key_data(loaded["key"]).tolist(), jax.random.key_data(jax.random.key(1)).tolist())

    persist.save(tmp_path / "two", loaded)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), cache)
    back = persist.load(
        tmp_path / "two", {"cache": shapes, "key": jax.eval_shape(lambda: jax.random.key(0)), "n": 0}
    )
    assert_equal(back, {"cache": cache, "key": jax.random.key(1), "n": 3})
    for target in (everywhere, {"cache": loaded["cache"], "key": loaded["key"], "n": None}):
        again = persist.load(tmp_path / "one", target)
        assert len(again["cache"].groups[0].pages.k.sharding.device_set) == 2
        assert_same(again["cache"], cache)


def test_into_a_larger_pool(tmp_path, cpu_devices):
    large = dataclasses.replace(BUSY, num_pages=40)
    state = {name: busy_state()[name] for name in ("cache", "index")}
    persist.save(tmp_path, state)
    target = {"cache": jax.eval_shape(lambda: paxcache.init(large)), "index": prefix.init(large)}
    loaded = persist.load(tmp_path, target)
    assert_same(loaded["cache"], offload.resize(state["cache"], 40))
    paxcache.check(loaded["cache"], held=prefix.held(loaded["index"]))
    _, index, reused = prefix.admit(loaded["cache"], loaded["index"], 3, range(9))
    assert reused == 8 and index.num_pages == (40,)

    mesh = Mesh(np.array(cpu_devices), ("heads",))
    over = sharding.partition_specs(target["cache"], "heads")
    places = jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)),
        target["cache"],
        over,
    )
    assert_same(persist.load(tmp_path, {"cache": places, "index": None})["cache"], loaded["cache"])

    small = dataclasses.replace(BUSY, num_pages=23)
    with pytest.raises(
        ValueError, match=r"target: expected bfloat16\[2, 24, 2, 4, 4\] \(or longer along axis 1\)"
    ):
        persist.load(tmp_path, {"cache": jax.eval_shape(lambda: paxcache.init(small)), "index": None})
    with pytest.raises(ValueError, match="target: expected an index for the saved config"):
        persist.load(tmp_path, {"cache": None, "index": prefix.init(small)})


def test_quantised_pools_and_their_growth(tmp_path):
    for config in QUANTIZED.values():
        cache = init(config)
        persist.save(tmp_path, cache)
        assert_equal(persist.load(tmp_path), cache)
        large = dataclasses.replace(config, num_pages=config.num_pages + 3)
        # Where a layer has one scale, new pages have it too.
        assert_equal(persist.load(tmp_path, shapes_of(large)), init(large))


def test_a_host_tier_comes_back(tmp_path):
    config = config_of(num_pages=8)
    cache, index, tokens = paxcache.init(config), prefix.init(config), range(9)
    cache, _ = paxcache.extend(cache, ids(9, 0, 0, 0), max_query_len=9)
    cache, index = prefix.publish(with_random_bits(cache), index, 0, tokens)
    cache = paxcache.release(cache, jnp.array([True, False, False, False]))
    cache, index, tier, freed = offload.evict(cache, index, offload.init_tier(config, 8), 2)
    assert freed == 2
    persist.save(tmp_path, (cache, index, tier))
    went_on = offload.prefetch(cache, index, tier, tokens)
    cache, index, tier = persist.load(tmp_path)
    resumed = offload.prefetch(cache, index, tier, tokens)
    assert_equal(resumed, went_on)
    assert prefix.admit(resumed[0], resumed[1], 1, tokens)[2] == 8


def test_targets_that_do_not_fit(tmp_path):
    cache, key = paxcache.init(LAYOUTS["groups"]), jax.random.key(0)
    persist.save(tmp_path, {"cache": cache, "key": key, "list": [1, np.arange(3)]})
    other = dataclasses.replace(cache.groups[1], sliding_window=6)
    for target, message in (
        ([], "target: expected a dict at tree, got a list"),
        ({"cache": None}, r"target: expected \['cache', 'key', 'list'\] in tree, got \['cache'\]"),
        (
            {"cache": cache.groups[0], "key": None, "list": None},
            "expected a PagedKVCache at tree.'cache'., got a Group",
        ),
        ({"cache": paxcache.init(LAYOUTS["f16"]), "key": None, "list": None}, "target: expected "),
        (
            {"cache": None, "key": jax.random.key(0, impl="rbg"), "list": None},
            r"expected key<fry>\[\] at .* key<rbg>",
        ),
        (
            {"cache": None, "key": key, "list": [1, np.arange(4)]},
            r"expected int64\[3\] at tree\['list'\]\[1\]",
        ),
        ({"cache": None, "key": key, "list": [1]}, "target: expected"),
        ({"cache": None, "key": "key", "list": None}, "target: expected key"),
        (
            {"cache": dataclasses.replace(cache, groups=(cache.groups[0], other)), "key": None, "list": None},
            r"target: expected 5 as tree\['cache'\].groups\[1\].sliding_window, got 6",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            persist.load(tmp_path, target)


Pair = collections.namedtuple("Pair", "a b")


@functools.partial(jax.tree_util.register_dataclass, data_fields=["x", "inner"], meta_fields=["name"])
@dataclasses.dataclass(frozen=True)
class Mine:
    x: Any
    inner: Any
    name: str


def test_pytrees_of_others_are_built_like_their_target(tmp_path):
    tree = {"mine": Mine(jnp.arange(3), Pair(None, [jnp.ones(2)]), "a")}
    persist.save(tmp_path, tree)
    with pytest.raises(ValueError, match=r"target: expected a .*Mine at tree\['mine'\], which only a target"):
        persist.load(tmp_path)
    target = {"mine": Mine(jax.ShapeDtypeStruct((3,), jnp.int32), Pair(None, [jnp.zeros(2)]), "b")}
    loaded = persist.load(tmp_path, target)
    assert_equal(loaded["mine"], dataclasses.replace(tree["mine"], name="b"))
    with pytest.raises(ValueError, match=r"target: expected a .*Pair"):
        persist.load(tmp_path, {"mine": dataclasses.replace(target["mine"], inner=(None, None))})


def test_what_cannot_be_saved_is_refused(tmp_path):
    persist.save(tmp_path, {"n": 1})
    for leaf in (object(), {1, 2}, np.array([object()]), np.zeros(2, [("a", int)]), jnp.zeros(2, "uint4")):
        with pytest.raises(TypeError, match=r"tree\['x'\]\[0\]: expected an array"):
            persist.save(tmp_path, {"x": [leaf]})
    with pytest.raises(TypeError, match="tree: save writes on the host"):
        jax.jit(lambda x: persist.save(tmp_path, x))(1)
    assert persist.load(tmp_path) == {"n": 1}


def test_what_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "state-1").mkdir()  # without the file that Orbax writes last
    for path in (tmp_path, tmp_path / "nothing", tmp_path / "file"):
        with pytest.raises(
            FileNotFoundError, match="path: expected a checkpoint that save wrote, got none in"
        ):
            persist.load(path)
    with pytest.raises(OSError, match="path: could not save to"):
        persist.save(tmp_path / "file", {})


def test_other_versions_are_refused(tmp_path):
    persist.save(tmp_path, {"pin": prefix.Pin(3, 1)})
    file = tmp_path / "state-1" / "tree" / "metadata"
    described = json.loads(file.read_text())

    def load_changed(**changes):
        changed = {**described, **changes}
        file.write_text(json.dumps({**changed, "checksum": _checkpoint._text_checksum(changed)}))
        return persist.load(tmp_path)

    assert load_changed() == {"pin": prefix.Pin(3, 1)}
    for changes, message in (
        ({"version": 1}, "path: expected version 2, got 1"),
        ({"format": None}, "path: expected format 'paxcache checkpoint', got None"),
        (
            {"types": {**described["types"], "Pin": ["node"]}},
            "expected the fields .*num_tokens.* of Pin, got",
        ),
        ({"types": {"Later": ["x"]}}, "written by another version"),
        ({"tree": ["known", "os.system", "true"]}, "path: expected a type of this library, got 'os.system'"),
        ({"tree": ["reduce", "true"]}, "path: expected a description of a tree, got 'reduce'"),
    ):
        with pytest.raises(ValueError, match=message):
            load_changed(**changes)


def test_checksums_see_every_element_and_its_place():
    rng = np.random.default_rng(0)

    def checksum(data, dims=None):
        return int(_checkpoint._checksum(jnp.asarray(data), dims or data.shape))

    for name in DTYPES:
        data = rng.integers(0, 2 if name == "bool" else 8 if "int4" in name else 256, (3, 2, 16), np.uint8)
        data = data.view(name)
        sums = {
            checksum(data),
            checksum(data.swapaxes(0, 1)),
            *(checksum(np.flip(data, i)) for i in range(3)),
        }
        for at in range(data.size):
            changed = data.copy()
            changed.view(np.uint8).reshape(data.size, -1)[at, 0] ^= 1
            sums.add(checksum(changed))
        assert len(sums) == 5 + data.size, name
        longer = np.pad(data.view(np.uint8), [(0, 2), (0, 0), (0, 16)]).view(name)
        assert checksum(longer, data.shape) == checksum(data)


@pytest.mark.filterwarnings(
    "ignore:coroutine .* was never awaited", "ignore::pytest.PytestUnraisableExceptionWarning"
)
@pytest.mark.parametrize(
    "place, message",
    [("arrays", r"of tree\['x'\]"), ("host", "of values beside the arrays"), ("tree", "of the description")],
)
def test_a_damaged_checkpoint_is_an_error(place, message, tmp_path):
    """Whatever byte of its largest file changes, or if that ends early: an error, or what was saved."""
    rng = np.random.default_rng(0)
    state = {"x": jnp.asarray(rng.random(5000, np.float32)), "y": rng.random(5000), "z": [*range(5000)]}
    persist.save(tmp_path, state)
    files = [f for f in (tmp_path / "state-1" / place).rglob("*") if f.is_file()]
    file = max(files, key=lambda f: f.stat().st_size)
    whole, messages = file.read_bytes(), []
    for flip in (*[True] * 16, False):  # most break the JSON: some must get as far as the checksum
        data, at = bytearray(whole), rng.integers(len(whole))
        data[at] ^= 1 << rng.integers(8)
        file.write_bytes(data if flip else data[:at])
        try:
            assert_equal(persist.load(tmp_path), state)
        except (ValueError, OSError) as error:
            messages.append(str(error))
    assert all(str(tmp_path) in text for text in messages)
    assert any(re.search(f"path: damaged: expected checksum .* {message}", text) for text in messages)
    file.write_bytes(whole)
    assert_equal(persist.load(tmp_path), state)


def test_a_save_that_fails_leaves_the_old_checkpoint(tmp_path):
    rng = np.random.default_rng(0)
    old, new = ({"x": jnp.asarray(rng.random(50_000))} for _ in range(2))
    (tmp_path / "state-1.orbax-checkpoint-tmp-5").mkdir(parents=True)
    (tmp_path / "mine").mkdir()
    persist.save(tmp_path, old)
    with full_disk(20_000), pytest.raises(OSError, match="path: could not save to"):
        persist.save(tmp_path, new)
    assert_equal(persist.load(tmp_path), old)
    persist.save(tmp_path, new)
    assert_equal(persist.load(tmp_path), new)
    left = os.listdir(tmp_path)
    assert len(left) == 2 and "mine" in left  # one whole checkpoint, and what is none of ours


def save_forever(folder, first: int, reports) -> None:
    for number in range(first, first + 1000):
        persist.save(folder, {"number": number, "x": jnp.full(2**19, number), "y": np.full(2**19, number)})
        reports.send(number)


def test_a_killed_save_leaves_a_whole_checkpoint(tmp_path):
    first = 0
    for seconds in (0.0, 0.03, 0.07, 0.15):
        reports = run_until_killed(save_forever, tmp_path, first, seconds=seconds)
        state = persist.load(tmp_path)
        assert reports[0] == first and state["number"] in (reports[-1], reports[-1] + 1)
        assert (state["x"] == state["number"]).all() and (state["y"] == state["number"]).all()
        first = state["number"] + 1
    persist.save(tmp_path, {})
    assert len(os.listdir(tmp_path)) == 1


ALONE = """
import sys
import paxcache
assert not {"orbax.checkpoint", "tensorstore"} & set(sys.modules)
sys.modules["tensorstore"] = None
import paxcache.persist
"""


def test_says_what_it_needs():
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=False)
    assert "pip install 'paxcache[persist]'" in done.stderr
    assert "AssertionError" not in done.stderr
