"""Pages come back bit for bit by their keys, within a budget."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import bench_persist
import paxcache
from layouts import LAYOUTS, assert_same, bits, group, ids
from paxcache import offload, prefix
from paxcache.persist import _layout
from persisting import (
    QUANTIZED,
    WINDOWED,
    extent_of,
    flip,
    key_of,
    open_storage,
    page_file,
    random_cache,
    raw,
    run_until_killed,
)


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
        ({"version": True}, "path: expected version 1, got true"),
        ({"version": 1.0}, "path: expected version 1, got 1.0"),
        ({"version": float("nan")}, "path: expected version 1, got NaN"),
        ({"groups": {}}, "config: expected groups {}, with which"),
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


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff", b"[" * 10**5, b'{"format": 1, "format": 1}', None]
)
def test_pages_without_a_whole_manifest_are_refused(content, tmp_path):
    open_storage(tmp_path).put(key_of(1), extent_of(LAYOUTS["bf16"], 1))
    manifest = tmp_path / "paxcache.json"
    if content is None:
        manifest.unlink()
    else:
        manifest.write_bytes(content)
    with pytest.raises(ValueError, match=r"path: expected .* got"):
        open_storage(tmp_path)


def test_a_url_of_a_folder_is_that_folder(tmp_path):
    keys, extent = key_of(0), extent_of(LAYOUTS["bf16"], 1)
    open_storage(f"file://{tmp_path}/a/").put(keys, extent)
    assert open_storage({"driver": "file", "path": f"{tmp_path}/a"}).contains(keys).all()
    assert page_file(tmp_path / "a", keys[0]).is_file()


def test_pages_are_removed_by_key_and_all_at_once(tmp_path):
    config, keys, extent = LAYOUTS["bf16"], key_of(0, 1, 2, 3), extent_of(LAYOUTS["bf16"], 4)
    database = {"driver": "ocdbt", "base": f"file://{tmp_path}/database/"}
    for place in (tmp_path / "folder", database):
        storage = open_storage(place, config)
        storage.put([*keys[:3], None], extent)
        other = open_storage(place, config)
        other.put([None, None, None, keys[3]], extent)
        assert storage.remove([keys[0], None, keys[0], *key_of(9)]) == 1
        assert storage.contains(keys).tolist() == [False, True, True, False]
        assert not storage.get(keys[:1]).held[0].any()
        assert storage.remove(keys[3:]) == 1  # which another process stored
        assert not open_storage(place, config).contains(keys[3:]).any()
        assert storage.num_bytes == 2 * _layout.Layout(config).page_bytes
        assert storage.remove([]) == 0
        other.put([None, None, None, keys[3]], extent)
        assert not other.get(keys[3:]).held[0].any()  # as it still believed
        assert other.put([None, None, None, keys[3]], extent) == 1
        assert storage.clear() == 3
        assert len(storage) == storage.num_bytes == 0 == len(open_storage(place, config))
        assert storage.clear() == 0
        assert storage.put(keys, extent) == 4 and storage.get(keys).held[0].all()


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
        (dataclasses.replace(extent, held=(None,)), "extent: expected a page of group 0 .*, got None"),
        (
            dataclasses.replace(extent, held=(jnp.ones(2),)),
            r"extent: expected .* bool\[2\], got float32\[2\]",
        ),
        (dataclasses.replace(extent, blocks=(None,)), "extent: expected leaves"),
        (offload.Extent((), ()), "extent: expected pages of 1 groups, got those of 0"),
        (jax.tree.map(lambda x: None if x.ndim > 1 else x, extent), "extent: expected leaves"),
        (jax.tree.map(lambda x: 1, extent), "extent: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            storage.put(keys, wrong)
    odd: Any
    for odd, message in (
        (extent.blocks, "extent: expected an Extent"),
        (None, "extent: expected an Extent"),
        (offload.Extent(*(None,) * 2), "extent.blocks: expected a tuple"),  # type: ignore[arg-type]
        (dataclasses.replace(extent, held=[*extent.held]), "extent.held: expected a tuple"),
    ):
        with pytest.raises(TypeError, match=message):
            storage.put(keys, odd)
    with pytest.raises(TypeError, match="extent: put writes on the host and cannot run inside jit"):
        jax.jit(lambda e: storage.put(keys, e))(extent)
    calls: Any = (lambda k: storage.put(k, extent), storage.get, storage.contains, storage.remove)
    for call in calls:
        for odd in (None, 3, "ab", keys[0], {keys[0]: 1}, iter(keys)):
            with pytest.raises(TypeError, match="keys: expected a sequence of bytes and None, got"):
                call(odd)
        for odd in ([keys], [[[]]], [3], [jnp.zeros(32, jnp.uint8)]):
            with pytest.raises(TypeError, match="keys: expected bytes or None"):
                call(odd)
        with pytest.raises(TypeError, match="keys: expected bytes or None, got 'a'"):
            call([keys[0], "a"])
        with pytest.raises(ValueError, match="keys: expected 32 bytes"):
            call([keys[0], b"a"])
    with pytest.raises(ValueError, match="memory_kind: expected one of"):
        storage.get(keys, memory_kind="disk")
    for odd in (None, ["device"]):
        with pytest.raises(TypeError, match="memory_kind: expected a str"):
            storage.get(keys, memory_kind=odd)
    for odd in (None, "1", 2.0**30, True):
        with pytest.raises(TypeError, match="max_bytes must be an int"):
            open_storage(tmp_path, max_bytes=odd)
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
    kvstore: Any = storage._place.kvstore  # type: ignore[attr-defined]
    kvstore.write(name, kvstore.read(name).result().value[:-1]).result()
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
