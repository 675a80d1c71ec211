"""The cache under JAX's transformations: each program gives what the same calls give one by one."""

from __future__ import annotations

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

import paxcache
from driver import Driver, config_of, copy_of, poisoned
from paxcache import ops, sharding

L, K, D, H, T = 2, 2, 4, 4, 8
CONFIG = config_of(
    paxcache.LayerGroup(num_layers=L, num_kv_heads=K, head_dim=D, dtype=jnp.float32), num_pages=11
)
LENS = ([3, 0, 4, 1], [1, 1, 1, 1], [0, 5, 1, 2], [1, 1, 0, -1], [2, 9, 1, 1], [1, 1, 1, 1])


def inputs(seed: int, lead=(T,)):
    rng = np.random.default_rng(seed)
    k, v, q = (rng.standard_normal((*lead, n, D)).astype(np.float32) for n in (K, K, H))
    return jnp.asarray(k), jnp.asarray(v), jnp.asarray(q)


def forward(cache, query_lens, k, v, q, *, num_tokens=T):
    """A step in which every layer's input is the output of the one before."""
    cache, step = paxcache.extend(cache, query_lens, num_tokens=num_tokens)
    for layer in range(L):
        cache = paxcache.append(cache, layer, k + layer, v, step)
        q = paxcache.attend(cache, layer, q, step)
    return cache, q, step.status


def scanned_forward(cache, query_lens, k, v, q):
    """The same, as a scan over layers with the cache as carry."""
    cache, step = paxcache.extend(cache, query_lens, num_tokens=T)

    def layer(carry, index):
        cache, q = carry
        cache = paxcache.append(cache, (0, index), k + index.astype(k.dtype), v, step)
        return (cache, paxcache.attend(cache, (0, index), q, step)), None

    (cache, q), _ = lax.scan(layer, (cache, q), jnp.arange(L))
    return cache, q, step.status


def churn(cache, i):
    """Integer calls between steps, so that pages are shared and freed."""
    parents = jnp.where(i % 3 == 1, jnp.array([0, 0, 2, 2]), jnp.arange(4))
    cache = paxcache.reorder(cache, parents)
    cache = paxcache.truncate(cache, cache.seq_lens - (i % 2))
    return paxcache.release(cache, (jnp.arange(4) == 1) & (i == 3))


@functools.cache
def reference():
    """Every call by itself, eager; caches (on the host) and outputs after each step."""
    cache, caches, outs = poisoned(paxcache.init(CONFIG)), [], []
    for i, lens in enumerate(LENS):
        cache, out, _ = forward(cache, jnp.asarray(lens), *inputs(i))
        cache = churn(cache, jnp.int32(i))
        paxcache.check(cache)
        caches.append(jax.tree.map(np.array, cache))
        outs.append(np.array(out))
    return caches, outs


def assert_same(cache, wanted) -> None:
    """Equal integers, and equal pages but for rounding."""
    paxcache.check(cache)
    chex.assert_trees_all_equal_dtypes(cache, wanted)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-5), cache, wanted)


def test_reference_covers_what_it_should():
    """Some rows were refused, some pages shared: else the comparisons below would prove little."""
    cache, statuses = paxcache.init(CONFIG), []
    for i, lens in enumerate(LENS):
        cache, _, status = forward(cache, jnp.asarray(lens), *inputs(i))
        statuses += status.tolist()
        cache = churn(cache, jnp.int32(i))
    caches, _ = reference()
    assert {paxcache.Status.OK, paxcache.Status.INVALID, paxcache.Status.STEP_FULL} <= set(statuses)
    assert max(c.groups[0].ref_counts.max() for c in caches) > 1


def test_jit_in_one_program():
    @jax.jit
    def program(cache, steps):
        for i, (lens, tensors) in enumerate(steps):
            cache, _, _ = forward(cache, lens, *tensors)
            cache = churn(cache, jnp.int32(i))
        return cache

    steps = [(jnp.asarray(lens), inputs(i)) for i, lens in enumerate(LENS)]
    assert_same(program(poisoned(paxcache.init(CONFIG)), steps), reference()[0][-1])


@pytest.mark.parametrize("step", [forward, scanned_forward], ids=["unrolled", "layers_scanned"])
def test_scan_over_steps(step):
    def body(cache, x):
        i, lens, tensors = x
        cache, out, _ = step(cache, lens, *tensors)
        cache = churn(cache, i)
        return cache, out

    tensors = jax.tree.map(lambda *x: jnp.stack(x), *[inputs(i) for i in range(len(LENS))])
    xs = jnp.arange(len(LENS)), jnp.asarray(LENS), tensors
    cache, outs = jax.jit(lambda cache: lax.scan(body, cache, xs), donate_argnums=0)(
        poisoned(paxcache.init(CONFIG))
    )
    caches, wanted = reference()
    assert_same(cache, caches[-1])
    np.testing.assert_allclose(outs, wanted, 1e-5, 1e-5)


def test_while_loop_over_steps():
    """The number of steps depends on what the cache says."""
    tensors = jax.tree.map(lambda *x: jnp.stack(x), *[inputs(i) for i in range(len(LENS))])

    def body(carry):
        i, cache = carry
        cache, _, _ = forward(cache, jnp.asarray(LENS)[i], *jax.tree.map(lambda x: x[i], tensors))
        return i + 1, churn(cache, i)

    def goes_on(carry):
        i, cache = carry
        return (i < len(LENS)) & (cache.seq_lens.max() < 6)

    start = jnp.int32(0), poisoned(paxcache.init(CONFIG))
    i, cache = jax.jit(lambda *carry: lax.while_loop(goes_on, body, carry), donate_argnums=1)(*start)
    caches, _ = reference()
    ended = next(n for n, c in enumerate(caches) if c.seq_lens.max() >= 6)
    assert int(i) == ended + 1 and 1 < ended + 1 < len(LENS)
    assert_same(cache, caches[ended])


def test_eager_jitted_and_donated_calls_mix():
    jitted, donated = jax.jit(forward), jax.jit(forward, donate_argnums=0)
    churned = jax.jit(churn, donate_argnums=0)
    cache = poisoned(paxcache.init(CONFIG))
    caches, outs = reference()
    for i, lens in enumerate(LENS):
        step = (forward, donated, jitted)[i % 3]
        before = cache
        cache, out, _ = step(cache, jnp.asarray(lens), *inputs(i))
        np.testing.assert_allclose(out, outs[i], 1e-5, 1e-5)
        assert before.groups[0].pages.k.is_deleted() == (step is donated)
        cache = (churned if i % 2 else churn)(cache, jnp.int32(i))
        assert_same(cache, caches[i])


def test_vmap_over_independent_caches():
    """Each member meets its own requests: where one copies, runs full or is refused, the others go on."""
    lens = jnp.asarray([LENS, LENS[::-1], [[0, 0, 0, 0]] * len(LENS)])
    N = lens.shape[0]
    stacked = jax.tree.map(lambda x: jnp.stack([x] * N), poisoned(paxcache.init(CONFIG)))
    single = poisoned(paxcache.init(CONFIG))
    alone = [single] * N
    together, one = jax.jit(jax.vmap(forward)), jax.jit(forward)
    for i in range(len(LENS)):
        tensors = [inputs(100 * n + i) for n in range(N)]
        stacked, outs, statuses = together(
            stacked, lens[:, i], *jax.tree.map(lambda *x: jnp.stack(x), *tensors)
        )
        stacked = jax.vmap(churn, in_axes=(0, None))(stacked, jnp.int32(i))
        for n in range(N):
            alone[n], out, status = one(alone[n], lens[n, i], *tensors[n])
            alone[n] = churn(alone[n], jnp.int32(i))
            np.testing.assert_allclose(outs[n], out, 1e-5, 1e-5)
            np.testing.assert_array_equal(statuses[n], status)
            assert_same(jax.tree.map(lambda x, n=n: x[n], stacked), alone[n])


def test_vmap_of_fork_and_copy_on_write():
    """Of three caches one copies two pages, one copies one, one none."""
    driver = Driver(CONFIG)
    driver.extend([6, 0, 0, 0], num_tokens=T)
    N = 3
    stacked = jax.tree.map(lambda x: jnp.stack([x] * N), driver.cache)
    parents, children = jnp.array([[0, 0], [0, -1], [-1, -1]]), jnp.array([[1, 2], [1, 2], [1, 2]])
    stacked, ok = jax.vmap(paxcache.fork)(stacked, parents, children)
    assert ok.all()
    lens = jnp.asarray([[1, 1, 1, 0]] * N)
    tensors = inputs(0)
    stacked, outs, _ = jax.vmap(forward, in_axes=(0, 0, None, None, None))(stacked, lens, *tensors)
    for n in range(N):
        cache, _ = paxcache.fork(driver.cache, parents[n], children[n])
        cache, out, _ = forward(cache, lens[n], *tensors)
        assert_same(jax.tree.map(lambda x, n=n: x[n], stacked), cache)
        np.testing.assert_allclose(outs[n], out, 1e-5, 1e-5)


def test_vmap_of_the_ops():
    rng = np.random.default_rng(0)
    pools = jnp.asarray(rng.standard_normal((3, 2, 6, K, 4, D)), jnp.float32)
    q, new = inputs(0, (3, 2))[2], inputs(1, (3, 2))[0]
    tables, lens = (
        jnp.asarray(rng.permuted(np.tile(np.arange(6), (3, 1)), axis=1).reshape(3, 2, 3)),
        jnp.array([5, 12]),
    )
    slots = jnp.array([[0, 9], [-1, 23], [24, 4]])

    def attend(q, pool, tables):
        return ops.paged_attention(q, pool, pool, tables, lens, layer=1)

    def write(pool, new, slots):
        return ops.write_pages(pool, None, new, None, slots, layer=0)[0]

    def move(pool, ids):
        blocks = ops.gather_pages(pool, ids)
        pool = ops.copy_pages(pool, ids, jnp.array([5, -1]))
        return ops.scatter_pages(pool, jnp.array([4, 6]), blocks)

    ids = jnp.array([[0, 1], [2, -1], [9, 3]])
    for function, args in ((attend, (q, pools, tables)), (write, (pools, new, slots)), (move, (pools, ids))):
        found = jax.vmap(function)(*args)
        for n in range(3):
            wanted = function(*jax.tree.map(lambda x, n=n: x[n], args))
            np.testing.assert_allclose(found[n], wanted, 1e-5, 1e-5)


def test_vmap_of_queries_over_one_pool():
    """An unbatched pool and a batch of queries and tables."""
    pool = jnp.asarray(np.random.default_rng(0).standard_normal((6, K, 4, D)), jnp.float32)
    q, tables, lens = inputs(0, (3, 2))[2], jnp.array([[5, 1], [2, 3]]), jnp.array([[5, 8], [0, 1], [3, 4]])
    found = jax.vmap(lambda q, lens: ops.paged_attention(q, pool, pool, tables, lens))(q, lens)
    for n in range(3):
        wanted = ops.paged_attention(q[n], pool, pool, tables, lens[n])
        np.testing.assert_allclose(found[n], wanted, 1e-5, 1e-5)


def over_heads(step, mesh, specs):
    """The step on a mesh whose devices hold KV heads each."""
    heads = Spec(None, "heads")
    in_specs, out_specs = (specs, Spec(), heads, heads, heads), (specs, heads, Spec())
    return jax.jit(jax.shard_map(step, mesh=mesh, in_specs=in_specs, out_specs=out_specs), donate_argnums=0)


@pytest.mark.parametrize("step", [forward, scanned_forward], ids=["unrolled", "layers_scanned"])
def test_shard_map_over_kv_heads(step, cpu_devices):
    """Tables and lengths are replicated; each device holds its KV heads and their query heads."""
    mesh = Mesh(np.asarray(cpu_devices), ("heads",))
    with jax.default_device(cpu_devices[0]):
        cache = poisoned(paxcache.init(CONFIG))
    specs = jax.tree.map(lambda x: Spec(None, None, "heads") if x.ndim == 5 else Spec(), cache)
    cache = jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), cache, specs)
    sharded = over_heads(step, mesh, specs)
    whole = jax.jit(
        jax.shard_map(churn, mesh=mesh, in_specs=(specs, Spec()), out_specs=specs), donate_argnums=0
    )
    caches, outs = reference()
    for i, lens in enumerate(LENS):
        cache, out, _ = sharded(cache, jnp.asarray(lens), *inputs(i))
        assert cache.groups[0].pages.k.sharding.spec == Spec(None, None, "heads")
        np.testing.assert_allclose(out, outs[i], 1e-5, 1e-5)
        cache = whole(cache, jnp.int32(i))
        assert_same(cache, caches[i])


@pytest.mark.gpu
@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("step", [forward, scanned_forward], ids=["unrolled", "layers_scanned"])
def test_shard_map_over_two_gpus(step, quantization):
    """As on one GPU, with the kernels that are the GPU's own; the pages to the bit."""
    devices = jax.devices("gpu")
    if len(devices) < 2:
        pytest.skip("needs two GPUs")
    config = config_of(
        paxcache.LayerGroup(
            num_layers=L, num_kv_heads=K, head_dim=128, dtype=jnp.bfloat16, quantization=quantization
        ),
        num_pages=11,
        page_size=16,
    )
    mesh = Mesh(np.asarray(devices[:2]), ("heads",))
    alone, cache = paxcache.init(config), paxcache.init(config)
    specs = sharding.partition_specs(cache, "heads")
    cache = jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), cache, specs)
    sharded = over_heads(step, mesh, specs)
    for i, lens in enumerate(LENS):
        rng = np.random.default_rng(i)
        k, v, q = (jnp.asarray(rng.standard_normal((T, n, 128)), jnp.bfloat16) for n in (K, K, 4 * K))
        alone, expected, _ = step(alone, jnp.asarray(lens), k, v, q)
        cache, out, _ = sharded(cache, jnp.asarray(lens), k, v, q)
        np.testing.assert_allclose(out.astype(jnp.float32), expected.astype(jnp.float32), 2e-2, 2e-2)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), cache, alone)


def test_one_trace_for_all_lengths():
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(forward, n=1), donate_argnums=0)
    change = jax.jit(chex.assert_max_traces(churn, n=1), donate_argnums=0)
    cache = poisoned(paxcache.init(CONFIG))
    for i, lens in enumerate([*LENS, [0, 0, 0, 0], [8, 0, 0, 0], [2**31 - 1] * 4]):
        cache, _, _ = step(cache, jnp.asarray(lens), *inputs(i))
        cache = change(cache, jnp.int32(i))
    paxcache.check(cache)


@pytest.mark.parametrize(
    "lens", [np.array([1, 0, 2, 0]), [1, 0, 2, 0], (1, 0, 2, 0)], ids=["numpy64", "list", "tuple"]
)
def test_lengths_may_be_host_integers(lens):
    """NumPy's own int64 included; the same program serves them."""
    cache, step = paxcache.extend(paxcache.init(CONFIG), lens, num_tokens=T)
    assert cache.seq_lens.tolist() == [1, 0, 2, 0] and cache.seq_lens.dtype == jnp.int32
    assert step.ok.all()


def test_everything_with_64_bit_integers_enabled():
    """Sums of int32 become int64 by default there; carried state must keep its dtypes, and results their values."""
    caches, outs = reference()
    with jax.enable_x64(True):
        cache = poisoned(paxcache.init(CONFIG))
        chex.assert_trees_all_equal_shapes_and_dtypes(cache, caches[0])

        def body(cache, x):
            i, lens, tensors = x
            cache, out, _ = scanned_forward(cache, lens, *tensors)
            return churn(cache, i), out

        tensors = jax.tree.map(lambda *x: jnp.stack(x), *[inputs(i) for i in range(len(LENS))])
        xs = jnp.arange(len(LENS)), jnp.asarray(LENS), tensors
        assert xs[1].dtype == jnp.int64
        cache, found = lax.scan(body, cache, xs)
        chex.assert_trees_all_equal_shapes_and_dtypes(cache, caches[-1])
        cache, ok = paxcache.fork(cache, jnp.array([-1]), jnp.array([3]))
        assert ok.all()
        assert paxcache.gather_dense(cache, 1, 9)[0].dtype == jnp.float32
        paxcache.stats(cache)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, outs, 1e-5, 1e-5)
    assert_same(cache, caches[-1])


def test_strict_dtype_promotion():
    """Callers who forbid implicit promotion can use the library."""
    with jax.numpy_dtype_promotion("strict"):
        cache, _, _ = forward(paxcache.init(CONFIG), jnp.asarray([3, 0, 4, 1], jnp.int32), *inputs(0))
        cache = churn(cache, jnp.int32(1))
    paxcache.check(cache)


def test_cache_and_step_are_pytrees_that_survive_a_round_trip():
    cache, step = paxcache.extend(paxcache.init(CONFIG), jnp.array([3, 0, 4, 1]), num_tokens=T)
    for tree in (cache, step):
        leaves, structure = jax.tree.flatten(tree)
        again = jax.tree.unflatten(structure, leaves)
        assert type(again) is type(tree)
        chex.assert_trees_all_equal(again, tree)
        assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    assert jax.tree.structure(copy_of(cache)) == jax.tree.structure(paxcache.init(CONFIG))


# Derivatives.


def _cache_and_step():
    cache, step = paxcache.extend(paxcache.init(CONFIG), jnp.array([3, 0, 4, 1]), num_tokens=T)
    return cache, step


_POOL = jnp.zeros((6, K, 4, D))
_TABLES = jnp.array([[5, 1], [2, 3]])
_IDS = jnp.array([0, 1])


def _attend(x):
    cache, step = _cache_and_step()
    return paxcache.attend(cache, 0, x * jnp.ones((T, H, D)), step).sum()


def _append(x):
    cache, step = _cache_and_step()
    cache = paxcache.append(cache, 0, x * jnp.ones((T, K, D)), jnp.ones((T, K, D)), step)
    return cache.groups[0].pages.k.sum()


def _paged(q, pool, **options):
    out: Any = ops.paged_attention(q, pool, pool, _TABLES, jnp.array([5, 8]), **options)
    return out.sum()


DIFFERENTIATED = {
    "attend": _attend,
    "append": _append,
    "paged_attention: q": lambda x: _paged(x * jnp.ones((2, H, D)), _POOL),
    "paged_attention: pages": lambda x: _paged(jnp.ones((2, H, D)), x * _POOL),
    "paged_attention: sinks": lambda x: _paged(jnp.ones((2, H, D)), _POOL, sinks=x * jnp.ones(H)),
    "paged_attention: sm_scale": lambda x: _paged(jnp.ones((2, H, D)), _POOL, sm_scale=x),
    "write_pages": lambda x: ops.write_pages(_POOL, None, x * jnp.ones((2, K, D)), None, _IDS)[0].sum(),
    "copy_pages": lambda x: ops.copy_pages(x * _POOL, _IDS, _IDS + 2).sum(),
    "gather_pages": lambda x: ops.gather_pages(x * _POOL, _IDS).sum(),
    "scatter_pages": lambda x: ops.scatter_pages(x * _POOL[None], _IDS, jnp.zeros((2, 1, K, 4, D))).sum(),
}


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_grad_says_that_there_is_no_derivative(name, jit):
    function = jax.jit(DIFFERENTIATED[name]) if jit else DIFFERENTIATED[name]
    for transform in (jax.grad, lambda f: lambda x: jax.jvp(f, (x,), (x,))):
        with pytest.raises((NotImplementedError, TypeError), match=r"(?i)derivative|differentia"):
            transform(function)(1.0)


def test_grad_of_a_loss_beside_the_cache_works():
    """Integers and a cache in the program do no harm while nothing flows through them."""

    def loss(x):
        cache, step = _cache_and_step()
        cache = paxcache.append(cache, 0, jnp.ones((T, K, D)), jnp.ones((T, K, D)), step)
        out = paxcache.attend(cache, 0, jnp.ones((T, H, D)), step)
        return (x**2 * lax.stop_gradient(out)).sum()

    assert jax.grad(loss)(1.0) == 2 * T * H * D
