"""A state comes back bit for bit or not at all, whatever happens to the process, the disk and the files."""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import paxcache
from driver import config_of
from layouts import LAYOUTS, assert_same, group, ids, with_random_bits
from paxcache import offload, persist, prefix, sharding
from paxcache.persist import _checkpoint
from paxcache.prefix import _tree
from persisting import QUANTIZED, full_disk, init, random_cache, raw, run_until_killed, shapes_of

DTYPES = [
    *("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int4", "float16", "bfloat16"),
    *("float32", "complex64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz", "float8_e8m0fnu"),
]


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


def test_an_index_that_was_published_page_by_page_is_not_too_deep(tmp_path):
    """A node remembers each publish of its run, one within the other."""
    config = config_of(group(num_layers=1), num_pages=100, max_pages_per_seq=100)
    cache, index = paxcache.init(config), prefix.init(config)
    for num_tokens in range(4, 400, 4):
        cache, _ = paxcache.extend(cache, ids(4, 0, 0, 0), max_query_len=4)
        cache, index = prefix.publish(cache, index, 0, range(num_tokens))
    persist.save(tmp_path, {"serving": [{"index": index}]})
    assert_equal(persist.load(tmp_path), {"serving": [{"index": index}]})


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


def test_into_another_pool(tmp_path):
    """A checkpoint's shapes are its own: what is larger or smaller is made of what was loaded."""
    cache, index = busy_state()["cache"], busy_state()["index"]
    persist.save(tmp_path, {"cache": cache, "index": index})
    loaded = persist.load(tmp_path)["cache"]
    assert_same(offload.resize(loaded, 40), offload.resize(cache, 40))
    for num_pages in (23, 40):
        other = dataclasses.replace(BUSY, num_pages=num_pages)
        with pytest.raises(ValueError, match=r"target: expected bfloat16\[2, 24, 2, 4, 4\] at tree"):
            persist.load(tmp_path, {"cache": jax.eval_shape(lambda c=other: paxcache.init(c)), "index": None})
        with pytest.raises(
            ValueError, match=r"target: expected \(24,\) as tree\['index'\].num_pages, got \("
        ):
            persist.load(tmp_path, {"cache": None, "index": prefix.init(other)})
    same = persist.load(tmp_path, {"cache": None, "index": prefix.init(BUSY)})
    assert_equal(same["index"], index)


@pytest.mark.parametrize("config", QUANTIZED.values(), ids=QUANTIZED)
def test_quantised_pools_come_back(config, tmp_path):
    cache = init(config)
    persist.save(tmp_path, cache)
    assert_equal(persist.load(tmp_path), cache)
    assert_equal(persist.load(tmp_path, shapes_of(config)), cache)


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
    nested: Any = []
    for _ in range(300):
        nested = [nested]
    endless: Any = {}
    endless["x"] = endless
    donated = jnp.ones(3)
    donated.delete()
    cache = paxcache.init(BUSY)
    for tree, error, message in (
        (nested, ValueError, "tree: expected at most 200 levels"),
        (endless, ValueError, "tree: expected at most 200 levels"),
        ([donated], ValueError, r"tree\[0\]: expected an array, got one that was deleted"),
        ([10**5000], ValueError, r"tree\[0\]: expected an int of at most 4000 digits"),
        ({object(): 1}, TypeError, "tree: expected an array"),
        (np.dtype([("a", int)]), TypeError, "tree: expected an array of numbers"),
        (
            dataclasses.replace(cache, seq_lens=None),
            TypeError,
            r"tree.seq_lens: expected Int32.*, got a NoneType",
        ),
        (
            dataclasses.replace(cache, groups=3),
            TypeError,
            r"tree.groups: expected tuple\[GroupCache, ...\], got",
        ),
        (prefix.Pin(*["4", 1]), TypeError, "tree.num_tokens: expected int, got a str"),
    ):
        with pytest.raises(error, match=message):
            persist.save(tmp_path, tree)
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
    os.mkfifo(tmp_path / "state-2")
    (tmp_path / "state-3").symlink_to(tmp_path / "state-3")
    with pytest.raises(FileNotFoundError):
        persist.load(tmp_path)


def test_paths_are_named():
    calls: Any = (lambda path: persist.save(path, {}), persist.load)
    for call in calls:
        for odd in (None, 3, b"bytes", ["a"], {}):
            with pytest.raises(TypeError, match=r"path: expected str or os.PathLike, got"):
                call(odd)
        for odd in ("", "a\0b"):
            with pytest.raises(ValueError, match="path: expected a path"):
                call(odd)
        for odd in ("http://host/run", "nothing://here"):
            with pytest.raises(ValueError, match="path: expected a directory, or a URL that Orbax knows"):
                call(odd)


def test_checksums_see_every_element_and_its_place():
    rng = np.random.default_rng(0)

    def checksum(data):
        return int(_checkpoint._checksum(jnp.asarray(data)))

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
    for flip in (True, True, True, True, False):
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
    (left,) = tmp_path.glob("*orbax-checkpoint-tmp*")
    assert not list(left.iterdir())  # the disk may be full
    assert_equal(persist.load(tmp_path), old)
    persist.save(tmp_path, new)
    assert_equal(persist.load(tmp_path), new)
    left = os.listdir(tmp_path)
    assert len(left) == 2 and "mine" in left  # one whole checkpoint, and what is none of ours


def test_nothing_foreign_is_removed(tmp_path):
    """Even where it has the name of a checkpoint."""
    mine = [tmp_path / "state-7" / "notes", tmp_path / "state-1", tmp_path / "states" / "tree"]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    (tmp_path / "state-9").symlink_to(tmp_path / "states")
    for number in range(3):
        persist.save(tmp_path, number)
        assert persist.load(tmp_path) == number
    assert [path.read_text() for path in mine] == ["mine"] * 3
    assert len(os.listdir(tmp_path)) == 5


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
