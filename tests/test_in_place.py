"""Compiled programs: pools change in place, memory does not follow the tables, indices hold beyond 2**31 elements.

Next to nothing here runs or allocates: programs are compiled from shapes. A pool's layer is made far larger than all
else, so that one copy of it, under whatever name and in whatever fusion, stands out both in the program's text and in
its temporary memory.
"""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import paxcache
from driver import config_of
from paxcache import ops

L, P, K, S, D = 3, 4096, 2, 8, 16
H, B, M, T = 4, 4, 8, 6
LAYER_ELEMENTS = P * K * S * D

_INSTRUCTION = re.compile(r"=\s*(?P<type>\([^=]*?\)|\S+)\s+(?P<op>[a-z][\w-]*)\(")
_SHAPE = re.compile(r"\w+\[([\d,]*)\]")
_HOST = re.compile(
    r"\b(infeed|outfeed|send|recv)\(|custom_call_target=\"[^\"]*(callback|host)[^\"]*\"", re.IGNORECASE
)
# What may stand for a pool without passing over it. What a fusion does is read in the fusion's own lines.
_PASSES_ON = {"parameter", "tuple", "get-tuple-element", "bitcast", "while", "call", "fusion", "opt-barrier"}
_UPDATES_A_PART = {"scatter", "dynamic-update-slice"}


def pool_passes(text: str, elements: int = LAYER_ELEMENTS) -> list[str]:
    """Instructions of an HLO module, in fusions too, that make at least so many elements and are no partial update.

    Copies are the usual ones; a select or a conversion over a whole pool costs as much.
    """
    found = []
    for line in text.splitlines():
        match = _INSTRUCTION.search(line)
        if match is None or match["op"] in _PASSES_ON | _UPDATES_A_PART:
            continue
        if "output_to_operand_aliasing" in line:  # a kernel that writes into what it is given
            continue
        sizes = [
            math.prod(map(int, dims.split(","))) if dims else 1 for dims in _SHAPE.findall(match["type"])
        ]
        if max(sizes, default=0) >= elements:
            found.append(line.strip())
    return found


def temporaries(compiled) -> int:
    return compiled.memory_analysis().temp_size_in_bytes


def text_of(compiled) -> str:
    return compiled.as_text()


def config(dtype="float32", **changes) -> paxcache.CacheConfig:
    group: dict[str, Any] = dict(num_layers=L, num_kv_heads=K, head_dim=D, dtype=dtype) | changes
    return config_of(
        paxcache.LayerGroup(**group), page_size=S, num_pages=P, max_seqs=B, max_pages_per_seq=M
    )  # fmt: skip


def cache_shapes(config: paxcache.CacheConfig):
    return jax.eval_shape(lambda: paxcache.init(config))


def shape(*dims: int, dtype="float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype)


def pool_bytes(cache) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for g in cache.groups for x in jax.tree.leaves(g.pages))


def assert_in_place(compiled, cache) -> None:
    """No pass over a pool in the text, no room for a copy in the temporaries, and the pools aliased."""
    passes = pool_passes(text_of(compiled))
    assert not passes, "\n".join(passes)
    memory: Any = compiled.memory_analysis()
    smallest = LAYER_ELEMENTS * min(x.dtype.itemsize for x in jax.tree.leaves(cache.groups[0].pages))
    assert memory.temp_size_in_bytes < smallest, f"{memory.temp_size_in_bytes} bytes of temporaries"
    assert memory.alias_size_in_bytes >= pool_bytes(cache)


# The programs: a step with unrolled layers, a scan over layers, a whole generation, integer calls.


def unrolled_step(cache, query_lens, k, v, q, *, options: Any = None):
    """As in a model, each layer's keys come from the layer before: else the compiler may write them all first."""
    options = options or {"num_tokens": T}
    cache, step = paxcache.extend(cache, query_lens, **options)
    for layer in range(L):
        new = q[..., :K, :]
        cache = paxcache.append(cache, layer, k + new, v + new, step)
        q += paxcache.attend(cache, layer, q, step)
    return cache, q


def scanned_step(cache, query_lens, k, v, q):
    cache, step = paxcache.extend(cache, query_lens, num_tokens=T)

    def layer(carry, index):
        cache, x = carry
        cache = paxcache.append(cache, (0, index), k + x[:, :K], v, step)
        return (cache, x + paxcache.attend(cache, (0, index), x, step)), None

    (cache, out), _ = lax.scan(layer, (cache, q), jnp.arange(L))
    return cache, out


def generation(cache, query_lens, k, v, q):
    """A while-loop over steps, with forks and releases in it, and a scan over layers in each."""

    def body(carry):
        i, cache, x = carry
        cache, ok = paxcache.fork(cache, jnp.array([0, -1]), jnp.array([3, -1]))
        cache, x = scanned_step(cache, query_lens * ok[0], k, v, x)
        cache = paxcache.truncate(cache, jnp.full(B, 50, jnp.int32))
        return i + 1, paxcache.release(cache, cache.seq_lens > 40), x

    return lax.while_loop(lambda carry: (carry[0] < 20) & (carry[1].seq_lens < 60).any(), body, (0, cache, q))


def tokens(dtype="float32"):
    kv = shape(T, K, D, dtype=dtype)
    return shape(B, dtype="int32"), kv, kv, shape(T, H, D, dtype=dtype)


@pytest.mark.parametrize("program", [unrolled_step, scanned_step, generation])
def test_donated_pool_is_never_copied(program):
    cache = cache_shapes(config())
    assert_in_place(jax.jit(program, donate_argnums=0).lower(cache, *tokens()).compile(), cache)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_donated_pool_in_half_precision_is_never_copied(dtype):
    """Where a processor lacks the dtype, the compiler may widen whole arrays behind our back."""
    cache = cache_shapes(config(dtype))
    assert_in_place(jax.jit(scanned_step, donate_argnums=0).lower(cache, *tokens(dtype)).compile(), cache)


def test_row_aligned_step_is_in_place():
    cache = cache_shapes(config())
    program = functools.partial(unrolled_step, options={"max_query_len": 2})
    kv = shape(B, 2, K, D)
    arguments = cache, shape(B, dtype="int32"), kv, kv, shape(B, 2, H, D)
    assert_in_place(jax.jit(program, donate_argnums=0).lower(*arguments).compile(), cache)


def test_groups_with_windows_and_without_values_are_in_place():
    sizes: dict[str, Any] = dict(num_kv_heads=K, head_dim=D, dtype="float32")
    groups = (
        paxcache.LayerGroup(num_layers=1, **sizes),
        paxcache.LayerGroup(num_layers=L - 1, v_head_dim=0, sliding_window=9, **sizes),
    )
    cache = cache_shapes(config_of(*groups, page_size=S, num_pages=P, max_seqs=B, max_pages_per_seq=M))

    def step(cache, query_lens, k, v, q):
        cache, step = paxcache.extend(cache, query_lens, num_tokens=T)
        cache = paxcache.append(cache, 0, k, v, step)

        def layer(carry, index):
            cache, x = carry
            cache = paxcache.append(cache, (1, index), k, None, step)
            return (cache, x + paxcache.attend(cache, (1, index), x, step)), None

        return lax.scan(layer, (cache, paxcache.attend(cache, 0, q, step)), jnp.arange(L - 1))[0]

    assert_in_place(jax.jit(step, donate_argnums=0).lower(cache, *tokens()).compile(), cache)


def test_vmapped_step_is_in_place():
    """Independent caches side by side: a conditional or a loop of its own length for each would select whole pools."""
    N = 2
    stacked = lambda tree: jax.tree.map(lambda x: shape(N, *x.shape, dtype=x.dtype), tree)  # noqa: E731
    cache = stacked(cache_shapes(config()))
    compiled = jax.jit(jax.vmap(scanned_step), donate_argnums=0).lower(cache, *stacked(tokens())).compile()
    assert_in_place(compiled, cache)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_page_ops_are_in_place(dtype):
    pages = cache_shapes(config(dtype)).groups[0].pages
    ids = shape(5, dtype="int32")
    blocks = jax.eval_shape(ops.gather_pages, pages, ids)
    for function, arguments in ((ops.copy_pages, (ids, ids)), (ops.scatter_pages, (ids, blocks))):
        compiled = jax.jit(function, donate_argnums=0).lower(pages, *arguments).compile()
        assert not pool_passes(text_of(compiled))
        assert temporaries(compiled) < LAYER_ELEMENTS * 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_writes_are_in_place(dtype):
    pool, new = shape(L, P, K, S, D, dtype=dtype), shape(T, K, D, dtype=dtype)
    write = jax.jit(lambda k, v, *rest: ops.write_pages(k, v, *rest, layer=1), donate_argnums=(0, 1))
    compiled = write.lower(pool, pool, new, new, shape(T, dtype="int32")).compile()
    assert not pool_passes(text_of(compiled))
    assert temporaries(compiled) < LAYER_ELEMENTS * 2


# The detector sees what it should.


def is_seen(compiled) -> bool:
    return bool(pool_passes(text_of(compiled))) or temporaries(compiled) >= LAYER_ELEMENTS * 4


def test_detector_sees_the_copy_of_a_pool_that_is_not_donated():
    cache = cache_shapes(config())
    compiled = jax.jit(scanned_step).lower(cache, *tokens()).compile()
    assert any(" copy(" in line for line in pool_passes(text_of(compiled)))
    with pytest.raises(AssertionError):
        assert_in_place(compiled, cache)


def test_detector_sees_what_scanning_over_the_pool_costs():
    """The mistake to catch: layers as xs and ys of the scan instead of an index into the carry."""

    def scan_over_pool(pool, new):
        return lax.scan(lambda x, layer: (x, layer.at[0, :, 0].set(x)), new, pool)[1]

    assert is_seen(
        jax.jit(scan_over_pool, donate_argnums=0).lower(shape(L, P, K, S, D), shape(K, D)).compile()
    )


def test_detector_sees_the_selection_of_a_pool():
    """The mistake to catch: a condition around a pool, under vmap."""

    def maybe(pool, yes, at, new):
        return lax.cond(yes, lambda p: p.at[0, at].set(new), lambda p: p, pool)

    args = shape(2, L, P, K, S, D), shape(2, dtype="bool"), shape(2, 3, dtype="int32"), shape(2, 3, K, S, D)
    assert is_seen(jax.jit(jax.vmap(maybe), donate_argnums=0).lower(*args).compile())


def test_detector_reads_fusions_tuples_and_async_copies():
    text = """
    %fused_computation { %c = f32[3,4096,2,8,16]{4,3,2,1,0} copy(%p) }
    %s = (f32[3,4096,2,8,16]{4,3,2,1,0}, f32[3,4096,2,8,16]{4,3,2,1,0}, u32[]) copy-start(%p)
    ROOT %d = f32[3,4096,2,8,16]{4,3,2,1,0} copy-done(%s)
    %flat = f32[3145728]{0} copy(%p)
    %small = s32[4,8]{1,0} copy(%t)
    %other = f32[3,4096,2,8,16]{4,3,2,1,0} dynamic-update-slice(%p, %copy.1, %i)
    """
    assert [line.split()[-1] for line in pool_passes(text)] == [
        "}",
        "copy-start(%p)",
        "copy-done(%s)",
        "copy(%p)",
    ]


# Integer calls move integers.

INTEGER_CALLS = {
    "fork": lambda c: paxcache.fork(c, jnp.array([0, 1]), jnp.array([2, 3]))[0],
    "reorder": lambda c: paxcache.reorder(c, jnp.array([1, 0, -1, 2])),
    "truncate": lambda c: paxcache.truncate(c, jnp.array([1, 2, 3, 4])),
    "release": lambda c: paxcache.release(c, jnp.array([True, False, True, False])),
}


@pytest.mark.parametrize("name", INTEGER_CALLS)
def test_integer_call_does_not_touch_the_pool(name):
    """And nothing loops."""
    cache = cache_shapes(config())
    compiled = jax.jit(INTEGER_CALLS[name], donate_argnums=0).lower(cache).compile()
    assert_in_place(compiled, cache)
    assert temporaries(compiled) < 100_000
    assert " while(" not in text_of(compiled)


@pytest.mark.parametrize("name", INTEGER_CALLS)
def test_eager_integer_call_returns_the_same_pool(name):
    """The new cache holds the old one's buffers: a release that copies a pool of gigabytes is no release."""
    cache = paxcache.init(config_of())
    after = INTEGER_CALLS[name](cache)
    for old, new in zip(
        jax.tree.leaves(cache.groups[0].pages), jax.tree.leaves(after.groups[0].pages), strict=True
    ):
        assert old.unsafe_buffer_pointer() == new.unsafe_buffer_pointer()


# Memory and traffic of a step.


def test_step_never_talks_to_the_host():
    compiled = jax.jit(generation, donate_argnums=0).lower(cache_shapes(config()), *tokens()).compile()
    assert not _HOST.search(text_of(compiled))
    closed = jax.make_jaxpr(generation)(cache_shapes(config()), *tokens())
    assert not [str(e.primitive) for e in equations(closed.jaxpr) if "callback" in str(e.primitive)]


def attention_temporaries(*, rows: int, pages: int, tokens: int, ragged: bool, **options) -> int:
    pool = shape(L, P, K, S, 64)
    arguments = [
        shape(tokens, H, 64),
        pool,
        pool,
        shape(rows, pages, dtype="int32"),
        shape(rows, dtype="int32"),
    ]
    if ragged:
        arguments += [shape(rows, dtype="int32")] * 2

    def attend(q, k, v, tables, lens, *queries):
        names = dict(zip(("query_starts", "query_lens"), queries, strict=False))
        return ops.paged_attention(q, k, v, tables, lens, layer=1, **names, **options)

    return temporaries(jax.jit(attend).lower(*arguments).compile())


@pytest.mark.parametrize("options", [{}, {"sliding_window": 100, "soft_cap": 4.0}], ids=["plain", "window"])
@pytest.mark.parametrize("ragged", [False, True], ids=["decode", "ragged"])
def test_attention_memory_does_not_follow_the_tables(ragged, options):
    """Tables of 32 times the pages: gathering all of them would take half a gigabyte, the tables take 2 MB."""
    rows, few, many = 16, 1024, 32768
    sizes = [
        attention_temporaries(rows=rows, pages=m, tokens=16, ragged=ragged, **options) for m in (few, many)
    ]
    assert sizes[1] - sizes[0] <= 2 * rows * (many - few) * 4, sizes


def test_attention_memory_does_not_follow_the_rows():
    """The same 64 tokens among 32 times as many rows of 1024 pages each."""
    sizes = [attention_temporaries(rows=b, pages=1024, tokens=64, ragged=True) for b in (2, 64)]
    gathered = 62 * 1024 * K * S * 64 * 4
    assert sizes[1] - sizes[0] < gathered / 50, sizes


def test_extend_memory_does_not_hold_the_pages_that_it_may_copy():
    """Copy-on-write of every row at once would be B pages of all layers."""
    sizes: dict[str, Any] = dict(num_layers=64, num_kv_heads=8, head_dim=128, dtype="bfloat16")
    rows = 64
    big = paxcache.CacheConfig(**sizes, page_size=16, num_pages=4096, max_seqs=rows, max_pages_per_seq=64)
    cache = cache_shapes(big)
    extend = jax.jit(functools.partial(paxcache.extend, num_tokens=rows), donate_argnums=0)
    size = temporaries(extend.lower(cache, shape(rows, dtype="int32")).compile())
    assert size < rows * big.page_bytes / 8, size


STEPS = {
    "extend, packed": lambda c, n, T, Q: paxcache.extend(c, n, num_tokens=T),
    "extend, row-aligned": lambda c, n, T, Q: paxcache.extend(c, n, max_query_len=Q),
    "plan": lambda c, n, T, Q: (c, ops.plan(
        c.groups[0].block_tables, c.seq_lens, num_kv_heads=K, page_size=S, query_lens=n, num_tokens=T, max_query_len=Q
    )),
    "fork": lambda c, n, T, Q: paxcache.fork(c, n, n),
    "reorder": lambda c, n, T, Q: paxcache.reorder(c, n),
    "truncate": lambda c, n, T, Q: paxcache.truncate(c, n),
    "release": lambda c, n, T, Q: paxcache.release(c, n > 0),
    "stats": lambda c, n, T, Q: (c, paxcache.stats(c)),
}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_integer_memory_follows_rows_and_tokens_but_not_their_product(name):
    """8192 rows of 128 tokens: an array of rows × tokens would take 33 GB, one of rows × rows 268 MB."""
    words = []
    for rows, queries in ((2048, 32), (8192, 32), (8192, 128)):
        cache = cache_shapes(
            config_of(
                paxcache.LayerGroup(num_layers=1, num_kv_heads=1, head_dim=2, sliding_window=100),
                page_size=S,
                num_pages=P,
                max_seqs=rows,
                max_pages_per_seq=M,
            )
        )
        step = functools.partial(STEPS[name], T=min(rows * queries, 250_000), Q=queries)
        compiled = jax.jit(step, donate_argnums=0).lower(cache, shape(rows, dtype="int32"))
        words.append(temporaries(compiled.compile()) / 4 / (rows * (queries + M) + P))
    assert max(words) < 32, f"{words} int32 words for each token and table entry"


# Pools beyond 2**31 elements.

HUGE = dict(layers=80, pages=2**18, heads=8, slots=16, width=128)  # 6.9e12 elements; 2.7e9 slots of one head


def equations(jaxpr):
    """All equations of a jaxpr, inner ones too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(
            equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


_INDEXED = {
    "gather",
    "dynamic_slice",
    "dynamic_update_slice",
    "scatter",
    "scatter-add",
    "scatter-max",
    "scatter-min",
}


def shape_of(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def indexed_dims(function, *args) -> set[tuple[int, ...]]:
    """Shapes of the arrays that the function indexes with computed indices, those of pool size."""
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    shapes = {shape_of(e.invars[0]) for e in equations(jaxpr) if str(e.primitive) in _INDEXED}
    return {s for s in shapes if math.prod(s) > 2**31}


def huge_programs():
    h = HUGE
    pool = shape(h["layers"], h["pages"], h["heads"], h["slots"], h["width"], dtype="bfloat16")
    ids, new = shape(6, dtype="int32"), shape(6, h["heads"], h["width"], dtype="bfloat16")
    block = shape(6, h["layers"], *pool.shape[2:], dtype="bfloat16")
    q, tables = shape(6, 16, h["width"], dtype="bfloat16"), shape(6, 8, dtype="int32")
    index = shape(dtype="int32")
    xla: dict[str, Any] = {"implementation": "xla"}
    return {
        "write_pages": (
            lambda k, n, s, i: ops.write_pages(k, None, n, None, s, layer=i, **xla),
            (pool, new, ids, index),
        ),
        "paged_attention": (
            lambda q, k, t, n, i: ops.paged_attention(q, k, k, t, n, layer=i, **xla),
            (q, pool, tables, ids, index),
        ),
        "copy_pages": (functools.partial(ops.copy_pages, **xla), (pool, ids, ids)),
        "gather_pages": (functools.partial(ops.gather_pages, **xla), (pool, ids)),
        "scatter_pages": (functools.partial(ops.scatter_pages, **xla), (pool, ids, block)),
    }


@pytest.mark.parametrize("name", huge_programs())
def test_pools_beyond_int32_are_indexed_by_axes_that_int32_holds(name):
    """A flattened pool has more rows than int32 counts; page, head and slot apart always fit."""
    function, args = huge_programs()[name]
    indexed = indexed_dims(function, *args)
    assert indexed, "the program indexes no pool: the test has lost its subject"
    for dims in indexed:
        assert max(dims) < 2**31, f"an axis of {max(dims)} is indexed with int32"
    jax.jit(function).lower(*args)


def test_detector_sees_a_flattened_pool():
    h = HUGE
    pool = shape(h["layers"], h["pages"], h["heads"], h["slots"], h["width"], dtype="bfloat16")
    with pytest.raises((AssertionError, OverflowError, ValueError, TypeError)):
        dims = indexed_dims(lambda p, i: p.reshape(-1, h["width"])[i], pool, shape(6, dtype="int32"))
        assert max(max(d) for d in dims) < 2**31
