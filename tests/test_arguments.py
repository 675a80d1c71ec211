"""What users pass: every bad argument is refused by name, equal configurations are equal, states say what they are."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paxcache
from driver import config_of

LOCAL = paxcache.LayerGroup(
    num_layers=1, num_kv_heads=2, head_dim=4, v_head_dim=0, dtype=jnp.float32, sliding_window=5, num_pages=8
)
GLOBAL = paxcache.LayerGroup(num_layers=2, num_kv_heads=1, head_dim=4, dtype=jnp.float32)

# Errors at trace time.

CACHE = paxcache.CacheConfig(
    num_layers=2, num_kv_heads=1, head_dim=4, page_size=4, num_pages=10, max_seqs=4, max_pages_per_seq=4
)


def _state():
    return paxcache.extend(paxcache.init(CACHE), jnp.array([5, 1, 0, 2]), num_tokens=8)


_NONE = jnp.zeros(4, jnp.int32)
_LONG: Any = np.array([2**31, 0, 0, 0])
_FLOAT: Any = 4.0
_NAME: Any = "cuda"
_DICT: Any = {"num_layers": 2}
_NOTHING: Any = None
_KV, _Q = jnp.zeros((8, 1, 4)), jnp.zeros((8, 2, 4))
_ALIGNED = _KV.reshape(4, 2, 1, 4)


def _both(*values: Any) -> Any:
    return values


BAD_CALLS: dict[str, Any] = {
    "extend: neither": (lambda c, s: paxcache.extend(c, _NONE), "num_tokens"),
    "extend: rows": (lambda c, s: paxcache.extend(c, jnp.zeros(3, jnp.int32), num_tokens=4), "query_lens"),
    "extend: floats": (lambda c, s: paxcache.extend(c, jnp.zeros(4), num_tokens=4), "query_lens"),
    "extend: bools": (lambda c, s: paxcache.extend(c, jnp.zeros(4, bool), num_tokens=4), "query_lens"),
    "extend: zero tokens": (lambda c, s: paxcache.extend(c, _NONE, num_tokens=0), "num_tokens"),
    "extend: float tokens": (lambda c, s: paxcache.extend(c, _NONE, num_tokens=_FLOAT), "num_tokens"),
    "extend: traced tokens": (lambda c, s: jax.jit(lambda t: paxcache.extend(c, _NONE, num_tokens=t))(4), "num_tokens"),
    "extend: negative Q": (lambda c, s: paxcache.extend(c, _NONE, max_query_len=-1), "max_query_len"),
    "extend: past int32": (lambda c, s: paxcache.extend(c, _LONG, num_tokens=4), "query_lens"),
    "append: layer": (lambda c, s: paxcache.append(c, 2, _KV, _KV, s), "layer"),
    "append: negative layer": (lambda c, s: paxcache.append(c, -1, _KV, _KV, s), "layer"),
    "append: group": (lambda c, s: paxcache.append(c, (1, 0), _KV, _KV, s), "layer"),
    "append: index": (lambda c, s: paxcache.append(c, (0, 2), _KV, _KV, s), "layer"),
    "append: traced layer": (lambda c, s: jax.jit(lambda i: paxcache.append(c, i, _KV, _KV, s))(0), "layer"),
    "append: traced group": (lambda c, s: jax.jit(lambda i: paxcache.append(c, (i, 0), _KV, _KV, s))(0), "layer"),
    "append: bool layer": (lambda c, s: paxcache.append(c, True, _KV, _KV, s), "layer"),
    "append: k tokens": (lambda c, s: paxcache.append(c, 0, _KV[:7], _KV[:7], s), "k"),
    "append: k heads": (lambda c, s: paxcache.append(c, 0, _Q, _KV, s), "k"),
    "append: v width": (lambda c, s: paxcache.append(c, 0, _KV, _KV[..., :3], s), "v"),
    "append: v missing": (lambda c, s: paxcache.append(c, 0, _KV, None, s), "v"),
    "append: k integers": (lambda c, s: paxcache.append(c, 0, _KV.astype(int), _KV, s), "k"),
    "append: row-aligned k": (lambda c, s: paxcache.append(c, 0, _ALIGNED, _ALIGNED, s), "k"),
    "attend: q tokens": (lambda c, s: paxcache.attend(c, 0, _Q[:7], s), "q"),
    "attend: q width": (lambda c, s: paxcache.attend(c, 0, _Q[..., :3], s), "q"),
    "attend: layer": (lambda c, s: paxcache.attend(c, 2, _Q, s), "layer"),
    "attend: window": (lambda c, s: paxcache.attend(c, 0, _Q, s, sliding_window=0), "sliding_window"),
    "attend: sinks": (lambda c, s: paxcache.attend(c, 0, _Q, s, sinks=jnp.zeros(3)), "sinks"),
    "attend: implementation": (lambda c, s: paxcache.attend(c, 0, _Q, s, implementation=_NAME), "implementation"),
    "fork: lengths": (lambda c, s: paxcache.fork(c, jnp.array([0]), jnp.array([1, 2])), "children"),
    "fork: floats": (lambda c, s: paxcache.fork(c, jnp.array([0.0]), jnp.array([1])), "parents"),
    "reorder: rows": (lambda c, s: paxcache.reorder(c, jnp.array([0, 1])), "parents"),
    "truncate: rows": (lambda c, s: paxcache.truncate(c, jnp.array([0, 1])), "seq_lens"),
    "release: integers": (lambda c, s: paxcache.release(c, jnp.array([0, 1, 1, 0])), "rows"),
    "release: rows": (lambda c, s: paxcache.release(c, jnp.ones(3, bool)), "rows"),
    "gather_dense: length": (lambda c, s: paxcache.gather_dense(c, 0, 0), "max_len"),
    "gather_dense: layer": (lambda c, s: paxcache.gather_dense(c, 2, 4), "layer"),
    "init: no config": (lambda c, s: paxcache.init(_DICT), "config"),
    "extend: what extend returned": (lambda c, s: paxcache.extend(_both(c, s), _NONE, num_tokens=4), "cache"),
    "append: what extend returned": (lambda c, s: paxcache.append(_both(c, s), 0, _KV, _KV, s), "cache"),
    "append: no step": (lambda c, s: paxcache.append(c, 0, _KV, _KV, _NOTHING), "step"),
    "attend: no cache": (lambda c, s: paxcache.attend(_NOTHING, 0, _Q, s), "cache"),
    "attend: what extend returned": (lambda c, s: paxcache.attend(c, 0, _Q, _both(c, s)), "step"),
    "fork: no cache": (lambda c, s: paxcache.fork(_NOTHING, jnp.array([0]), jnp.array([1])), "cache"),
    "reorder: no cache": (lambda c, s: paxcache.reorder(_DICT, _NONE), "cache"),
    "truncate: no cache": (lambda c, s: paxcache.truncate(s, _NONE), "cache"),
    "release: no cache": (lambda c, s: paxcache.release(_NOTHING, jnp.ones(4, bool)), "cache"),
    "gather_dense: no cache": (lambda c, s: paxcache.gather_dense(_NOTHING, 0, 4), "cache"),
    "stats: no cache": (lambda c, s: paxcache.stats(_both(c, s)), "cache"),
    "check: no cache": (lambda c, s: paxcache.check(_both(c, s)), "cache"),
    "check: traced": (lambda c, s: jax.jit(paxcache.check)(c), "jit"),
}  # fmt: skip


LONG: Any = {
    "numpy int64": np.array([2**31, 0, 0, 0]),
    "numpy uint64": np.array([2**32 + 1, 0, 0, 0], np.uint64),
    "below": np.array([-(2**31) - 1, 0, 0, 0]),
    "Python": [2**31, 0, 0, 0],
    "Python, past 64 bits": [2**70, 0, 0, 0],
}
TAKES_INTEGERS = {
    "query_lens": lambda c, x: paxcache.extend(c, x, num_tokens=4),
    "parents": lambda c, x: paxcache.fork(c, x, _NONE),
    "children": lambda c, x: paxcache.fork(c, _NONE, x),
    "reorder's parents": paxcache.reorder,
    "seq_lens": paxcache.truncate,
    "layer's index": lambda c, x: paxcache.gather_dense(c, (0, np.asarray(x)[0]), 4),
}


@pytest.mark.parametrize("value", LONG)
@pytest.mark.parametrize("what", TAKES_INTEGERS)
def test_integers_past_int32_are_refused_by_name(what, value):
    """Converted by NumPy or JAX they would wrap around, and name another row."""
    name = what.rpartition(" ")[-1] if what != "layer's index" else "index"
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        TAKES_INTEGERS[what](_state()[0], LONG[value])


def test_wide_integers_on_the_device_stay_out_of_range():
    """Their values may be traced: what int32 does not hold is cut to its ends."""
    cache, _ = _state()
    with jax.enable_x64(True):
        past = jnp.array([2**32 + 2, 2**32, -(2**32) + 1, 0])
        assert past.dtype == jnp.int64
        _, step = paxcache.extend(cache, past, num_tokens=4)
        assert step.status.tolist()[:3] == [paxcache.Status.ROW_FULL] * 2 + [paxcache.Status.INVALID]
        _, ok = paxcache.fork(cache, past[:1], jnp.array([2]))
        assert not ok.any()
        kept = paxcache.truncate(cache, past)
    assert kept.seq_lens.tolist() == [5, 1, 0, 0]  # what was within int32 cuts


@pytest.mark.parametrize("wrong", [-2, 4, 2**31 - 1])
def test_reorder_by_numbers_of_no_row_is_refused_on_the_host(wrong):
    cache, _ = _state()
    for parents in ([1, wrong, 0, -1], np.array([1, wrong, 0, -1])):
        with pytest.raises(ValueError, match=rf"parents: expected rows in \[0, 4\) or -1, got {wrong}$"):
            paxcache.reorder(cache, parents)  # pyright: ignore[reportArgumentType]
    traced = paxcache.reorder(cache, jnp.array([1, wrong, 0, -1]))
    assert traced.seq_lens.tolist() == [1, 1, 5, 0]  # row 1 stays


# Steps of other caches.

OTHER_SHAPES: dict[str, dict[str, Any]] = {
    "max_seqs": {"max_seqs": 5},
    "max_pages_per_seq": {"max_pages_per_seq": 5},
    "page_size": {"page_size": 2},
    "num_pages": {"num_pages": 11},
    "groups": {
        "groups": (
            paxcache.LayerGroup(num_layers=2, num_kv_heads=1, head_dim=4),
            paxcache.LayerGroup(num_layers=2, num_kv_heads=1, head_dim=4),
        ),
        **dict.fromkeys(("num_layers", "num_kv_heads", "head_dim")),
    },
}


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("what", OTHER_SHAPES)
def test_step_of_a_cache_of_another_shape_is_refused(what, jit):
    """Its slots are those of other rows: written, they would overwrite them."""
    _, step = _state()
    other = paxcache.init(dataclasses.replace(CACHE, **OTHER_SHAPES[what]))
    wrap = jax.jit if jit else lambda f: f
    name = {"num_pages": "num_pages of each group", "groups": "num_pages of each group"}.get(what, what)
    for call in (
        lambda c, s: paxcache.append(c, 0, _KV, _KV, s),
        lambda c, s: paxcache.attend(c, 0, _Q, s),
    ):
        with pytest.raises(ValueError, match=rf"step: expected .*{name}=.* got one made for .*{name}="):
            wrap(call)(other, step)
    other, own = paxcache.extend(other, jnp.zeros(other.max_seqs, jnp.int32), num_tokens=8)
    paxcache.append(other, 0, _KV, _KV, own)


# Indices and windows that are traced.


@pytest.mark.parametrize("index", [-1, 2, -(2**31), 2**31 - 1])
def test_traced_layer_past_the_group_writes_nothing_and_sees_nothing(index):
    cache, step = _state()

    @jax.jit
    def layer(cache, index):
        cache = paxcache.append(cache, (0, index), _KV + 1, _KV + 1, step)
        return (
            cache,
            paxcache.attend(cache, (0, index), _Q, step),
            paxcache.gather_dense(cache, (0, index), 8),
        )

    plain: Any = layer
    for function in (layer, plain.__wrapped__):
        after, out, dense = function(cache, jnp.int32(index))
        jax.tree.map(np.testing.assert_array_equal, after, cache)
        assert not out.any() and not any(x.any() for x in dense)
        inside, out, dense = function(cache, jnp.int32(1))
        assert out.any() and all(x.any() for x in dense) and inside.groups[0].pages.k[1].any()


@pytest.mark.parametrize("window", [0, -3, -(2**31), 1, 4, 5, 6, 2**31 - 1])
def test_traced_window_is_cut_to_what_the_group_keeps(window):
    """A wider one would see as far as pages happen to be kept."""
    cache = paxcache.init(config_of(LOCAL))
    k = jnp.arange(1, 1 + 16 * 2 * 4, dtype=jnp.float32).reshape(16, 2, 4) / 100
    for lens in ([9, 3, 0, 2], [3, 1, 0, 2]):
        cache, step = paxcache.extend(cache, jnp.array(lens), num_tokens=16)
        cache = paxcache.append(cache, 0, k, None, step)
    q = jnp.ones((16, 2, 4))
    for attend in (paxcache.attend, jax.jit(paxcache.attend, static_argnums=1)):
        out = attend(cache, 0, q, step, sliding_window=jnp.int32(window))
        if window < 1:
            assert not out.any()
            continue
        wanted = paxcache.attend(cache, 0, q, step, sliding_window=min(window, 5))
        np.testing.assert_allclose(out, wanted, 1e-6)
    with pytest.raises(ValueError, match="sliding_window"):
        paxcache.attend(cache, 0, q, step, sliding_window=np.array(6))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("what", BAD_CALLS)
def test_bad_call_names_the_argument(what):
    call, name = BAD_CALLS[what]
    with pytest.raises((ValueError, TypeError), match=rf"\b{name}\b"):
        call(*_state())


def test_window_wider_than_the_group_keeps_is_refused():
    cache, step = paxcache.extend(paxcache.init(config_of(LOCAL)), jnp.array([5, 1, 0, 2]), num_tokens=8)
    q = jnp.zeros((8, 2, 4))
    with pytest.raises(ValueError, match="sliding_window"):
        paxcache.attend(cache, 0, q, step, sliding_window=6)
    paxcache.attend(cache, 0, q, step, sliding_window=4)


# The configuration.


def test_config_byte_arithmetic():
    config = paxcache.CacheConfig(
        groups=(
            paxcache.LayerGroup(num_layers=3, num_kv_heads=2, head_dim=8, v_head_dim=6, dtype=jnp.bfloat16),
            dataclasses.replace(LOCAL, num_kv_heads=1, head_dim=16, num_pages=5),
        ),
        page_size=4,
        num_pages=7,
        max_seqs=2,
        max_pages_per_seq=3,
    )  # fmt: skip
    first, second = 3 * 2 * 4 * (8 + 6), 1 * 1 * 4 * 16
    assert config.page_elements == first + second
    assert config.page_bytes == 2 * first + 4 * second
    assert config.pool_bytes == 7 * 2 * first + 5 * 4 * second
    assert config.tokens_capacity == 5 * 4
    real = sum(leaf.nbytes for group in paxcache.init(config).groups for leaf in jax.tree.leaves(group.pages))
    assert config.pool_bytes == real


@pytest.mark.parametrize("spare", [0, 1, 4095])
def test_config_fit_takes_the_most_pages_that_fit(spare):
    arguments: dict[str, Any] = dict(
        num_layers=2, num_kv_heads=2, head_dim=16, page_size=8, max_seqs=1, max_pages_per_seq=2
    )
    page_bytes = 2 * 2 * 8 * (16 + 16) * 2
    config = paxcache.CacheConfig.fit(memory_bytes=5 * page_bytes + spare, **arguments)
    assert config.num_pages == 5 + spare // page_bytes
    assert config == paxcache.CacheConfig(num_pages=config.num_pages, **arguments)
    with pytest.raises(ValueError, match="memory_bytes"):
        paxcache.CacheConfig.fit(memory_bytes=page_bytes - 1, **arguments)
    unit: Any = "1 GiB"
    with pytest.raises(TypeError, match="memory_bytes"):
        paxcache.CacheConfig.fit(memory_bytes=unit, **arguments)


def test_config_is_hashable_and_frozen():
    same, other = dataclasses.replace(CACHE), dataclasses.replace(CACHE, num_pages=11)
    assert same == CACHE and hash(same) == hash(CACHE) and other != CACHE
    with pytest.raises(dataclasses.FrozenInstanceError):
        CACHE.num_pages = 3  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    "name",
    ["num_layers", "num_kv_heads", "head_dim", "page_size", "num_pages", "max_seqs", "max_pages_per_seq"],
)
def test_config_names_the_bad_argument(name):
    good: dict[str, Any] = dict(
        num_layers=2, num_kv_heads=2, head_dim=8, page_size=4, num_pages=9, max_seqs=2, max_pages_per_seq=3
    )
    for value, error in (
        (0, ValueError),
        (-1, ValueError),
        (2.0, TypeError),
        ("2", TypeError),
        (True, TypeError),
    ):
        with pytest.raises(error, match=name):
            paxcache.CacheConfig(**{**good, name: value})


def test_config_refuses_sizes_whose_slots_int32_does_not_hold():
    good: dict[str, Any] = dict(num_layers=1, num_kv_heads=1, head_dim=1, max_seqs=1)
    with pytest.raises(ValueError, match="num_pages"):
        paxcache.CacheConfig(**good, page_size=16, num_pages=2**27, max_pages_per_seq=4)
    with pytest.raises(ValueError, match="max_pages_per_seq"):
        paxcache.CacheConfig(**good, page_size=16, num_pages=4, max_pages_per_seq=2**27)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"page_size": 65537, "max_pages_per_seq": 32767}, r"max_pages_per_seq.*32767 \* 65537 = 2147450879"),
        ({"page_size": 1, "max_pages_per_seq": 2**31 - 1}, "max_pages_per_seq"),
        ({"max_seqs": 2**20, "max_pages_per_seq": 2**11}, r"max_seqs.*1048576 \* 2048 = 2147483648"),
        ({"page_size": 2**29, "max_pages_per_seq": 1}, r"num_pages.*4 \* 536870912 = 2147483648"),
        ({"sliding_window": 2**31}, "sliding_window"),
        ({"page_size": 2**40}, "page_size"),
        ({"v_head_dim": -1}, "v_head_dim"),
        ({"v_head_dim": False}, "v_head_dim"),
    ],
)
def test_config_refuses_products_that_int32_does_not_hold(changes, match):
    good: dict[str, Any] = dict(
        num_layers=1, num_kv_heads=1, head_dim=1, page_size=4, num_pages=4, max_seqs=2
    )
    with pytest.raises((ValueError, TypeError), match=match):
        paxcache.CacheConfig(**{"max_pages_per_seq": 4, **good, **changes})
    group = paxcache.LayerGroup(num_layers=1, num_kv_heads=1, head_dim=1)
    sizes: dict[str, Any] = dict(page_size=1, max_seqs=1, max_pages_per_seq=1, num_pages=2**30)
    with pytest.raises(ValueError, match=r"1073741824 \+ 1073741824 = 2147483648"):
        paxcache.CacheConfig(groups=(group, group), **sizes)
    fitted = paxcache.CacheConfig.fit(
        groups=(group, group), memory_bytes=2**40, page_size=1, max_seqs=1, max_pages_per_seq=1
    )
    assert fitted.num_pages == 2**30 - 1


def test_steps_whose_tokens_int32_does_not_count_are_refused():
    cache = jax.eval_shape(lambda: paxcache.init(dataclasses.replace(CACHE, max_seqs=2**16)))
    lens = jnp.zeros(2**16, jnp.int32)
    options: Any = ({"num_tokens": 2**15}, {"max_query_len": 2**15})
    for given in options:
        with pytest.raises(ValueError, match=rf"{next(iter(given))}: 32768 tokens × 65536 rows"):
            jax.eval_shape(functools.partial(paxcache.extend, **given), cache, lens)


def test_rows_as_long_as_can_be_get_their_slots():
    """Lengths rounded up to pages once passed int32: such rows were served, and got no slots."""
    S, M = 65537, 32766
    config = paxcache.CacheConfig(
        num_layers=1,
        num_kv_heads=1,
        head_dim=1,
        page_size=S,
        num_pages=3,
        max_seqs=1,
        max_pages_per_seq=M,
        dtype=jnp.float16,
    )
    cache = dataclasses.replace(paxcache.init(config), seq_lens=jnp.array([M * S - 40_000], jnp.int32))
    cache, step = paxcache.extend(cache, jnp.array([40_000]), num_tokens=40_000)
    assert step.ok.all() and (np.asarray(step.slot_mapping[0]) < 3 * S).all()
    _, step = paxcache.extend(cache, jnp.array([1]), num_tokens=1)
    assert step.status.tolist() == [paxcache.Status.ROW_FULL]


def test_tables_with_room_past_int32_are_refused():
    tables, lens = jnp.zeros((1, 2**15), jnp.int32), jnp.zeros(1, jnp.int32)
    with pytest.raises(ValueError, match=r"block_tables.*M=32768 pages of 65536"):
        paxcache.ops.plan(tables, lens, num_kv_heads=1, head_dim=8, page_size=2**16, dtype=jnp.float32)


def test_stats_count_more_tokens_than_int32_holds():
    """4 rows of 2**30 tokens."""
    cache, _ = _state()
    cache = dataclasses.replace(cache, seq_lens=jnp.full(4, 2**30, jnp.int32))
    for stats in (paxcache.stats(cache), jax.jit(paxcache.stats)(cache)):
        assert stats.num_tokens == 2**32


EQUAL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dtypes": ({"dtype": "float32"}, {"dtype": jnp.float32}),
    "NumPy's dtype": ({"dtype": np.dtype("float32")}, {"dtype": np.float32}),
    "width of values": ({"v_head_dim": 4}, {}),
    "NumPy's integers": ({"num_layers": np.int64(2), "sliding_window": np.uint8(3)}, {"sliding_window": 3}),
}


@pytest.mark.parametrize("kind", [paxcache.CacheConfig, paxcache.LayerGroup])
@pytest.mark.parametrize("what", EQUAL)
def test_configs_that_say_the_same_are_equal(what, kind):
    """Equal and of one hash: as a static argument they are compiled once."""
    base: dict[str, Any] = dict(num_layers=2, num_kv_heads=1, head_dim=4, num_pages=3)
    if kind is paxcache.CacheConfig:
        base |= dict(max_seqs=1, max_pages_per_seq=2)
    first, second = (kind(**{**base, **changes}) for changes in EQUAL[what])
    assert first == second and hash(first) == hash(second) and repr(first) == repr(second)
    traced = []
    count = jax.jit(traced.append, static_argnums=0)
    for config in (first, second, dataclasses.replace(first)):
        count(config)
    assert len(traced) == 1


def test_values_follow_keys_that_are_made_wider():
    group = paxcache.LayerGroup(num_layers=1, num_kv_heads=1, head_dim=8)
    assert dataclasses.replace(group, head_dim=16).value_dim == 16
    assert dataclasses.replace(group, v_head_dim=4, head_dim=16).value_dim == 4


def test_a_list_of_groups_is_a_tuple():
    sizes: dict[str, Any] = dict(num_pages=3, max_seqs=1, max_pages_per_seq=2)
    listed: Any = [GLOBAL]
    assert hash(paxcache.CacheConfig(groups=listed, **sizes)) == hash(
        paxcache.CacheConfig(groups=(GLOBAL,), **sizes)
    )


# States as Python objects.


def _states() -> list[Any]:
    cache, step = _state()
    quantized = paxcache.init(dataclasses.replace(CACHE, quantization="int4"))
    return [cache, step, paxcache.stats(cache), step.plans[0], cache.groups[0], quantized]


def test_states_are_equal_to_themselves_alone():
    for one, other in zip(_states(), _states(), strict=True):
        assert one == one and one != other and len({one, other}) == 2  # noqa: PLR0124


def test_reprs_are_short_and_show_no_numbers():
    for state in _states():
        text = repr(state)
        assert "Array(" not in text and len(text) < 1000
        assert repr(jax.eval_shape(lambda s: s, state)) == text
    cache = paxcache.init(config_of(GLOBAL, LOCAL))
    lines = repr(cache).splitlines()
    assert len(lines) == 3 and "float32[2,10,1,4,4]" in lines[1] and "sliding_window=5" in lines[2]
    repr(jax.tree.map(lambda _: None, cache))
    traced = []
    jax.eval_shape(lambda c: traced.append(repr(c)), cache)
    assert traced == [repr(cache)]


def test_programs_over_states_are_exported():
    """jax.export knows the states by name, so that a serving binary may load a program of extend and append."""
    pytest.importorskip("flatbuffers", reason="jax.export serializes by it")

    def program(cache, lens):
        cache, step = paxcache.extend(cache, lens, num_tokens=8)
        return paxcache.append(cache, 0, _KV, _KV, step), step, paxcache.stats(cache)

    for config in (
        CACHE,
        config_of(GLOBAL, LOCAL, num_pages=7),
        dataclasses.replace(CACHE, quantization="int8"),
    ):
        cache, lens = paxcache.init(config), jnp.array([5, 1, 0, 2])
        blob = jax.export.export(jax.jit(program))(cache, lens).serialize()
        found = jax.export.deserialize(blob).call(cache, lens)
        jax.tree.map(np.testing.assert_array_equal, found, program(cache, lens))
