"""Pages come back whole or not at all, whatever happens to the process, the disk and the files."""

from __future__ import annotations

import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from driver import config_of
from layouts import LAYOUTS, assert_same, bits, group
from paxcache import _files
from paxcache.persist import _layout, _places
from persisting import (
    WINDOWED,
    extent_of,
    flip,
    full_disk,
    key_of,
    killed_at_every_step,
    no_room_after,
    open_storage,
    page_file,
    run_until_killed,
)


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
    for odd in ("nothing://here", {"driver": "nothing"}, {"driver": 5}, {}, {"a": {"driver": "file"}}):
        with pytest.raises(ValueError, match="path: expected a directory, a URL or a specification"):
            open_storage(odd)
    for odd in (None, 3, b"bytes", [str(tmp_path)]):
        with pytest.raises(TypeError, match=r"path: expected str or os.PathLike"):
            open_storage(odd)
    for odd in ("", "a\0b"):
        with pytest.raises(ValueError, match="path: expected a path"):
            open_storage(odd)
    for odd in (
        {"driver": "ocdbt", "base": "file:///"},
        {"driver": "file"},
        {"driver": "file", "path": "here"},
        {"driver": "ocdbt", "base": {"driver": "file"}},
    ):
        with pytest.raises(ValueError, match="path: expected an absolute path for driver 'file'"):
            open_storage(odd)
    with pytest.raises(ValueError, match=r"expected a driver and a path, got \['file_io_sync'\] too"):
        open_storage({"driver": "file", "path": str(tmp_path / "new"), "file_io_sync": False})
    for odd in ("/", "//", "/..", "file:///"):
        with pytest.raises(ValueError, match="path: expected a directory of its own, got the root"):
            open_storage(odd)
    for odd in ("http://localhost/pages", {"driver": "ocdbt", "base": "https://localhost/"}):
        with pytest.raises(ValueError, match="path: expected a store that can be written, got driver 'http'"):
            open_storage(odd)
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


def test_a_store_that_does_not_answer_is_an_error(monkeypatch):
    class Never:
        def result(self, timeout=None):
            assert timeout is not None, "waits for ever"
            raise TimeoutError

    monkeypatch.setattr(_places.ts.KvStore, "open", lambda *_: Never())
    with pytest.raises(OSError, match=r"path: no access to 'memory://a': no answer within \d+ s"):
        open_storage("memory://a")


def put_a_fifo(path):
    path.unlink()
    os.mkfifo(path)


def put_a_folder(path):
    path.unlink()
    path.mkdir()


def put_a_device(path):
    path.unlink()
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("change", [put_a_fifo, put_a_folder, put_a_device])
def test_what_is_no_file_is_not_opened(change, tmp_path):
    config, keys = LAYOUTS["bf16"], key_of(0, 1)
    storage, extent = open_storage(tmp_path, config), extent_of(config, 2)
    storage.put(keys, extent)
    path = page_file(tmp_path, keys[0])
    change(path)
    for known in (storage, open_storage(tmp_path, config)):
        assert known.get(keys).held[0].tolist() == [False, True]
        assert known.counters.pages_damaged == 1
    if change is put_a_folder:  # which is not ours to replace
        with pytest.raises(OSError, match="1 writes failed, 1 of 2 pages are stored"):
            storage.put(keys, extent)
    else:
        assert storage.put(keys, extent) == 2 and path.is_file() and not path.is_symlink()
    manifest = tmp_path / "paxcache.json"
    change(manifest)
    with pytest.raises(OSError, match=r"path: no access to .*expected a regular file, got a"):
        open_storage(tmp_path, config)


def test_a_long_page_is_not_read(tmp_path):
    """Of a terabyte, which no process could read."""
    storage, keys = open_storage(tmp_path), key_of(0)
    storage.put(keys, extent_of(LAYOUTS["bf16"], 1))
    path = page_file(tmp_path, keys[0])
    os.truncate(path, 2**40)
    assert not storage.get(keys).held[0].any() and not path.exists()
    os.truncate(tmp_path / "paxcache.json", 2**40)
    with pytest.raises(
        ValueError, match="path: expected the manifest of a storage of pages, got 1099511627776 bytes"
    ):
        open_storage(tmp_path)


def test_nothing_foreign_is_removed(tmp_path):
    storage, keys = open_storage(tmp_path), key_of(0)
    storage.put(keys, extent_of(LAYOUTS["bf16"], 1))
    mine = [tmp_path / name for name in ("notes", "00/notes", f"00/{keys[0].hex()}-01", "ab/c")]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    (tmp_path / "cd").symlink_to(tmp_path / "ab")
    (tmp_path / f".left{_files.SUFFIX}").write_text("half")
    assert storage.clear() == 1
    left = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert left == sorted([*mine, tmp_path / "paxcache.json"])


def test_pages_that_cannot_be_removed_stay_known_and_counted(tmp_path, monkeypatch):
    config, keys, extent = LAYOUTS["bf16"], key_of(0, 1, 2), extent_of(LAYOUTS["bf16"], 3)
    storage = open_storage(tmp_path, config, 2 * _layout.Layout(config).page_bytes)
    storage.put([*keys[:2], None], extent)
    unlink = os.unlink

    def fail(path, **options):
        if keys[1].hex() in str(path):
            raise PermissionError(13, "no", path)
        unlink(path, **options)

    monkeypatch.setattr(os, "unlink", fail)
    with pytest.raises(OSError, match="put: 1 writes failed, 0 of 1 pages are stored"):
        storage.put([None, None, keys[2]], extent)
    with pytest.raises(OSError, match="remove: 1 removals failed, 1 pages are gone"):
        storage.remove(keys)
    assert storage.contains(keys).tolist() == [False, True, False]
    assert storage.num_bytes == sum(sizes_in(tmp_path).values())


def test_a_disk_that_fills_up_leaves_nothing_half_written(tmp_path):
    config, keys, extent = LAYOUTS["bf16"], key_of(0, 1, 2), extent_of(LAYOUTS["bf16"], 3)
    with no_room_after(10), pytest.raises(OSError, match=r"path: no access to .*No space left on device"):
        open_storage(tmp_path / "new", config)
    assert not list((tmp_path / "new").iterdir())
    storage = open_storage(tmp_path / "new", config)
    size = _layout.Layout(config).page_bytes
    with no_room_after(size + 20), pytest.raises(OSError, match=r"writes failed.*No space left on device"):
        storage.put(keys, extent)
    assert set(sizes_in(tmp_path / "new").values()) <= {size}
    assert storage.num_bytes == sum(sizes_in(tmp_path / "new").values())
    assert storage.put(keys, extent) == 3 and storage.get(keys).held[0].all()


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
    """And what a living one still writes is not, however old it is."""
    open_storage(tmp_path).put(key_of(0), extent_of(LAYOUTS["bf16"], 1))
    file, name = _files._begin(str(tmp_path))
    os.utime(name, (0, 0))
    left = tmp_path / f".left{_files.SUFFIX}"
    left.write_bytes(b"half")
    fifo = tmp_path / f".fifo{_files.SUFFIX}"
    os.mkfifo(fifo)
    assert len(open_storage(tmp_path)) == 1
    assert os.path.exists(name) and fifo.exists() and not left.exists()
    os.close(file)
    assert len(open_storage(tmp_path)) == 1
    assert not os.path.exists(name)


def store(folder, pages, max_bytes) -> None:
    storage = open_storage(folder, max_bytes=max_bytes)
    storage.put(key_of(*pages), extent_of(LAYOUTS["bf16"], len(pages)))


def sizes_in(folder) -> dict[str, int]:
    """Bytes of all files but for the manifest."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "paxcache.json"]
    return {path.name: path.stat().st_size for path in files}


@pytest.mark.parametrize("num_there", [0, 2])
def test_killed_at_any_step_it_keeps_its_budget_and_every_page_is_whole(num_there, tmp_path):
    """With an empty folder, and with one that is full."""
    size = _layout.Layout(LAYOUTS["bf16"]).page_bytes
    extent, keys = extent_of(LAYOUTS["bf16"], 2), key_of(0, 1)
    folder = tmp_path / "pages"
    num_steps = 0
    store(folder, range(num_there), 2 * size)
    for _ in killed_at_every_step(store, folder, (num_there,), 2 * size):
        num_steps += 1
        assert sum(sizes_in(folder).values()) <= 2 * size
        storage = open_storage(folder, max_bytes=2 * size)  # as the next process
        assert not [name for name in sizes_in(folder) if _files.is_temporary(name)]
        found = storage.get([*keys, *key_of(num_there)])
        assert storage.counters.pages_damaged == 0
        assert storage.num_bytes == sum(sizes_in(folder).values())
        here = np.asarray(found.held[0])[:2]
        np.testing.assert_array_equal(bits(found.blocks[0].k)[:2][here], bits(extent.blocks[0].k)[here])
        last = storage.contains(key_of(num_there)).item()
        shutil.rmtree(folder)
        store(folder, range(num_there), 2 * size)
    assert last and num_steps > 8
