"""The cache's bookkeeping, scenario by scenario: admission, sharing, copy-on-write, rollback, windows, checks.

Most tests drive the cache and the plain-Python model together (`driver.Driver`), which compares tables, counts,
stored tokens and outputs after every call; what a scenario is about is asserted besides.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracle
import paxcache
from driver import Driver, config_of, poisoned
from paxcache import Status

INT32_MAX, INT32_MIN = 2**31 - 1, -(2**31)
OK, NO_PAGES, ROW_FULL, STEP_FULL, INVALID = Status
LOCAL = paxcache.LayerGroup(
    num_layers=1, num_kv_heads=2, head_dim=4, v_head_dim=0, dtype=jnp.float32, sliding_window=5, num_pages=8
)
GLOBAL = paxcache.LayerGroup(num_layers=2, num_kv_heads=1, head_dim=4, dtype=jnp.float32)


@pytest.fixture
def driver() -> Driver:
    """4 rows of up to 4 pages of 4 slots; 10 pages."""
    return Driver(config_of())


@pytest.fixture
def windowed() -> Driver:
    """The same, with a second group that keeps a window of 5 tokens in 8 pages and stores no values."""
    return Driver(config_of(GLOBAL, LOCAL))


def used(driver: Driver, group: int = 0) -> int:
    return int((np.asarray(driver.cache.groups[group].ref_counts) > 0).sum())


def leaves_equal(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


# The empty cache.


def test_statuses_have_fixed_numbers():
    assert [s.value for s in (OK, NO_PAGES, ROW_FULL, STEP_FULL, INVALID)] == [0, 1, 2, 3, 4]


def test_init_shapes_and_dtypes():
    groups = (
        paxcache.LayerGroup(num_layers=3, num_kv_heads=2, head_dim=8, v_head_dim=6, dtype=jnp.bfloat16),
        paxcache.LayerGroup(
            num_layers=1, num_kv_heads=1, head_dim=16, v_head_dim=0, dtype=jnp.float16, num_pages=5
        ),
    )
    cache = paxcache.init(config_of(*groups))
    first, second = cache.groups
    assert (first.pages.k.shape, first.pages.k.dtype) == ((3, 10, 2, 4, 8), jnp.bfloat16)
    assert first.pages.v is not None
    assert (first.pages.v.shape, first.pages.v.dtype) == ((3, 10, 2, 4, 6), jnp.bfloat16)
    assert (second.pages.k.shape, second.pages.k.dtype) == ((1, 5, 1, 4, 16), jnp.float16)
    assert second.pages.v is None
    for group, num_pages in ((first, 10), (second, 5)):
        assert group.block_tables.shape == (4, 4) and (group.block_tables == paxcache.NO_PAGE).all()
        assert group.ref_counts.shape == (num_pages,) and not group.ref_counts.any()
        assert group.block_tables.dtype == group.ref_counts.dtype == jnp.int32
    assert cache.seq_lens.shape == (4,) and cache.seq_lens.dtype == jnp.int32 and not cache.seq_lens.any()
    assert all(leaf.shape[:2] == (3, 10) for leaf in jax.tree.leaves(first.pages))


def test_buffers_of_a_new_cache_are_all_different():
    """Two leaves in one buffer could not be donated."""
    leaves = jax.tree.leaves(paxcache.init(config_of(GLOBAL, LOCAL)))
    pointers = [leaf.unsafe_buffer_pointer() for leaf in leaves]
    assert len(set(pointers)) == len(pointers)


# Admission.


def test_zero_tokens_take_nothing(driver):
    driver.extend([3, 0, 4, 0], num_tokens=8)
    before = driver.cache
    step = driver.extend([0, 0, 0, 0], num_tokens=8)
    assert np.asarray(step.ok).all()
    leaves_equal(driver.cache, before)


def test_zero_tokens_are_fine_in_a_full_pool(driver):
    driver.extend([16, 16, 8, 0], num_tokens=40)
    assert used(driver) == 10
    step = driver.extend([0, 0, 0, 0], num_tokens=8)
    assert np.asarray(step.ok).all() and not np.asarray(step.pages_short).any()


def test_zero_tokens_do_not_copy_a_shared_page(driver):
    driver.extend([3, 0, 0, 0], num_tokens=8)
    driver.fork([0], [1])
    driver.extend([0, 0, 2, 0], num_tokens=8)
    assert int(driver.cache.groups[0].ref_counts.max()) == 2


def test_last_free_page_is_given(driver):
    step = driver.extend([16, 16, 7, 0], num_tokens=40)
    assert np.asarray(step.ok).all() and used(driver) == 10


def test_row_without_pages_is_refused_and_told_how_many(driver):
    driver.extend([16, 16, 0, 0], num_tokens=40)
    step = driver.extend([0, 0, 4, 9], num_tokens=40)
    assert step.status.tolist() == [OK, OK, OK, NO_PAGES]
    assert step.pages_short.tolist() == [0, 0, 0, 2]
    assert driver.cache.seq_lens.tolist() == [16, 16, 4, 0]


def test_small_request_does_not_overtake_a_large_one(driver):
    driver.extend([16, 10, 0, 0], num_tokens=40)  # 7 of 10 pages
    step = driver.extend([0, 2, 16, 1], num_tokens=40)
    assert step.status.tolist() == [OK, OK, NO_PAGES, NO_PAGES]
    assert step.pages_short.tolist() == [0, 0, 1, 2]
    assert driver.cache.seq_lens.tolist() == [16, 12, 0, 0]


def test_row_that_needs_no_page_passes_rows_that_wait(driver):
    driver.extend([16, 13, 0, 1], num_tokens=40)  # 4 + 4 + 1 of 10 pages
    step = driver.extend([0, 2, 16, 3], num_tokens=40)
    assert step.status.tolist() == [OK, OK, NO_PAGES, OK]
    assert step.pages_short.tolist() == [0, 0, 3, 0]
    assert driver.cache.seq_lens.tolist() == [16, 15, 0, 4]


def test_row_too_long_for_its_table_is_refused(driver):
    driver.extend([15, 16, 0, 0], num_tokens=40)
    step = driver.extend([2, 1, 17, 16], num_tokens=40)
    assert step.status.tolist() == [ROW_FULL, ROW_FULL, ROW_FULL, NO_PAGES]


def test_row_that_can_never_fit_does_not_hold_up_others(driver):
    """The 5 pages it would take must not count against the rows behind it."""
    step = driver.extend([17, 16, 5, 2], num_tokens=40)
    assert step.status.tolist() == [ROW_FULL, OK, OK, OK]
    assert used(driver) == 7


def test_tokens_past_the_step_are_refused(driver):
    step = driver.extend([5, 2, 2, 0], num_tokens=8)
    assert step.status.tolist() == [OK, OK, STEP_FULL, OK]
    assert step.query_starts.tolist()[:3] == [0, 5, 7]


def test_rows_behind_a_row_past_the_step_are_refused_too(driver):
    """Their place in the packed axis is past its end, however small they are."""
    step = driver.extend([3, 6, 1, 0], num_tokens=8)
    assert step.status.tolist() == [OK, STEP_FULL, STEP_FULL, OK]


def test_exactly_full_step_is_served(driver):
    assert np.asarray(driver.extend([1, 6, 0, 1], num_tokens=8).ok).all()


def test_refused_rows_keep_their_place_among_the_tokens(driver):
    """Tokens lie where the requests put them, whoever is refused."""
    driver.extend([15, 0, 1, 0], num_tokens=40)
    step = driver.extend([2, 3, 2, 0], num_tokens=40)
    assert step.status.tolist() == [ROW_FULL, OK, OK, OK]
    assert step.query_starts.tolist() == [0, 2, 5, 7]
    assert step.query_lens.tolist() == [0, 3, 2, 0]


def test_negative_request_is_invalid_and_counts_as_zero(driver):
    step = driver.extend([-1, 2, INT32_MIN, 3], num_tokens=8)
    assert step.status.tolist() == [INVALID, OK, INVALID, OK]
    assert step.query_starts.tolist() == [0, 0, 2, 2]
    assert driver.cache.seq_lens.tolist() == [0, 2, 0, 3]


@pytest.mark.parametrize(
    "lens",
    [
        [INT32_MAX] * 4,
        [3, INT32_MAX, INT32_MAX, 2],
        [INT32_MAX, 0, 0, 1],
        [2**30, 2**30, 2**30, 2**30],
        [1, INT32_MAX - 1, 2, INT32_MAX],
    ],
)
@pytest.mark.parametrize("options", [{"num_tokens": 8}, {"max_query_len": 3}])
def test_huge_requests_do_not_wrap_around(driver, lens, options):
    driver.extend([1, 1, 0, 0], **options)
    driver.extend(lens, **options)
    assert all(n <= 4 for n in driver.cache.seq_lens.tolist())


def test_row_aligned_step(driver):
    step = driver.extend([2, 0, 3, 4], max_query_len=3)
    assert step.positions.shape == step.rows.shape == step.slot_mapping[0].shape == (4, 3)
    assert step.status.tolist() == [OK, OK, OK, STEP_FULL]
    assert step.query_starts.tolist() == [0, 3, 6, 9]
    driver.extend([1, 3, 0, 2], max_query_len=3)
    driver.extend([1, 0, 1, 1], max_query_len=1)


def test_packed_and_row_aligned_steps_alternate(driver):
    driver.extend([5, 1, 0, 2], num_tokens=8)
    driver.extend([3, 3, 3, 0], max_query_len=3)
    driver.extend([0, 7, 1, 0], num_tokens=8)
    assert driver.cache.seq_lens.tolist() == [8, 11, 4, 2]


def test_step_longer_than_a_row_can_be(driver):
    """num_tokens and max_query_len may pass M * S."""
    driver.extend([16, 16, 4, 0], num_tokens=100)
    driver.release([True] * 4)
    driver.extend([16, 3, 0, 16], max_query_len=50)


def test_refused_rows_change_nothing_at_all(driver):
    driver.extend([15, 14, 0, 3], num_tokens=40)
    before = jax.tree.map(np.asarray, driver.cache)
    step = driver.extend([2, -3, 100, 9], num_tokens=40)
    assert not np.asarray(step.ok).any()
    leaves_equal(driver.cache, before)


def test_pages_are_taken_and_returned_to_the_last_one(driver):
    for _ in range(3):
        driver.extend([16, 16, 8, 0], num_tokens=40)
        driver.release([True, True, True, True])
        assert used(driver) == 0


def test_raise_if_failed_names_rows_reasons_and_shortfall(driver):
    driver.extend([15, 16, 0, 0], num_tokens=40).raise_if_failed()
    step = driver.extend([3, -1, 16, 0], num_tokens=40)
    with pytest.raises(paxcache.StepError) as error:
        step.raise_if_failed()
    assert isinstance(error.value, RuntimeError)
    for words in ("0", "ROW_FULL", "1", "INVALID", "2", "NO_PAGES"):
        assert words in str(error.value)
    assert int(step.pages_short[2]) == 2 and "2 pages" in str(error.value)
    assert "row 3" not in str(error.value)


def test_raise_if_failed_inside_jit_says_what_to_use():
    cache = paxcache.init(config_of())

    @jax.jit
    def bad(cache):
        _, step = paxcache.extend(cache, jnp.ones(4, jnp.int32), num_tokens=4)
        step.raise_if_failed()

    with pytest.raises(TypeError, match=r"step\.ok"):
        bad(cache)


ONE_LAYER = dataclasses.replace(GLOBAL, num_layers=1)


def test_more_than_a_thousand_rows():
    """Sums over rows take another way when there are many."""
    driver = Driver(config_of(ONE_LAYER, page_size=2, num_pages=1300, max_seqs=1100, max_pages_per_seq=2))
    driver.extend([7 * b % 4 for b in range(1100)], num_tokens=1700)
    step = driver.extend([(b + 1) % 2 for b in range(1100)], num_tokens=1700)
    assert {OK, NO_PAGES} <= set(step.status.tolist())
    driver.reorder([(b + 1) % 1100 for b in range(1100)])
    driver.truncate([b % 3 for b in range(1100)])


def test_rows_of_hundreds_of_pages():
    """And sums over the pages of a row, when a step may fill very many."""
    driver = Driver(config_of(ONE_LAYER, page_size=1, num_pages=1300, max_pages_per_seq=600))
    step = driver.extend([600, 3, 500, 300], num_tokens=1450)
    assert step.status.tolist() == [OK, OK, OK, NO_PAGES] and step.pages_short.tolist() == [0, 0, 0, 103]
    driver.fork([1], [3])
    driver.extend([0, 90, 1, 100], num_tokens=1450)


# Sharing and copy-on-write.


def test_fork_moves_integers_only(driver):
    driver.extend([6, 0, 0, 0], num_tokens=8)
    pages = driver.cache.groups[0].pages
    driver.fork([0, 0], [1, 3])
    assert used(driver) == 2 and driver.cache.groups[0].ref_counts.max() == 3
    leaves_equal(driver.cache.groups[0].pages, pages)


def test_forked_rows_write_to_pages_of_their_own(driver):
    driver.extend([6, 0, 0, 0], num_tokens=8)
    driver.fork([0], [1])
    driver.extend([2, 2, 0, 0], num_tokens=8)
    assert used(driver) == 3  # the first page shared; both rows left the second, which is free again


def test_only_the_writer_leaves_a_shared_page(driver):
    driver.extend([6, 0, 0, 0], num_tokens=8)
    driver.fork([0], [1])
    driver.extend([0, 2, 0, 0], num_tokens=8)
    assert used(driver) == 3
    driver.extend([2, 0, 0, 0], num_tokens=8)  # alone on its page by now: nothing to take
    assert used(driver) == 3


def test_fork_at_a_page_boundary_copies_nothing(driver):
    driver.extend([8, 0, 0, 0], num_tokens=8)
    driver.fork([0], [1])
    driver.extend([1, 1, 0, 0], num_tokens=8)
    assert used(driver) == 4
    assert driver.cache.groups[0].ref_counts.tolist().count(2) == 2


def test_one_parent_many_children_in_one_call(driver):
    driver.extend([7, 0, 0, 0], num_tokens=8)
    driver.fork([0, 0, 0], [1, 2, 3])
    assert driver.cache.groups[0].ref_counts.max() == 4
    driver.extend([2, 2, 2, 2], num_tokens=8)
    assert used(driver) == 9


def test_shared_last_page_without_a_free_one(driver):
    """The rows are refused, and nobody's tokens change; freeing one page serves one of them."""
    driver.extend([6, 0, 16, 16], num_tokens=40)
    driver.fork([0], [1])
    before = jax.tree.map(np.asarray, driver.cache)
    step = driver.extend([1, 1, 0, 0], num_tokens=40)
    assert step.status.tolist() == [NO_PAGES, NO_PAGES, OK, OK]
    assert step.pages_short.tolist() == [1, 2, 0, 0]
    leaves_equal(driver.cache, before)
    driver.truncate([INT32_MAX, INT32_MAX, 12, INT32_MAX])
    step = driver.extend([1, 1, 0, 0], num_tokens=40)
    assert step.status.tolist() == [OK, NO_PAGES, OK, OK]


def test_fork_then_truncate_into_a_shared_page_then_extend(driver):
    driver.extend([8, 0, 0, 0], num_tokens=8)
    driver.fork([0], [1])
    driver.truncate([INT32_MAX, 5, INT32_MAX, INT32_MAX])
    driver.extend([0, 3, 0, 0], num_tokens=8)  # new tokens 5 to 7 in a page whose old 5 to 7 the parent keeps
    assert driver.cache.seq_lens.tolist() == [8, 8, 0, 0] and used(driver) == 3


def test_parent_truncated_and_extended_leaves_its_child_alone(driver):
    driver.extend([8, 0, 0, 0], num_tokens=8)
    driver.fork([0], [1])
    driver.truncate([1, INT32_MAX, INT32_MAX, INT32_MAX])
    driver.extend([6, 0, 0, 0], num_tokens=8)


def test_parent_released_leaves_its_child_whole(driver):
    driver.extend([6, 0, 0, 0], num_tokens=8)
    driver.fork([0], [2])
    driver.release([True, False, False, False])
    driver.extend([4, 0, 3, 0], num_tokens=8)


def test_fork_of_a_fork(driver):
    driver.extend([6, 0, 0, 0], num_tokens=8)
    driver.fork([0], [1])
    driver.extend([0, 1, 0, 0], num_tokens=8)
    driver.fork([1, 0], [2, 3])
    driver.extend([1, 1, 1, 1], num_tokens=8)


def test_fork_judges_every_entry_before_it_changes_any(driver):
    """A child is no parent in the same call: row 2 becomes a share of the idle row 1."""
    driver.extend([5, 0, 0, 0], num_tokens=8)
    driver.fork([0, 1], [1, 2])
    assert driver.cache.seq_lens.tolist() == [5, 5, 0, 0]


@pytest.mark.parametrize(
    ("parents", "children", "ok"),
    [
        ([-1, 0, -1], [1, -1, -1], [True, True, True]),  # padding on either side
        ([4, -2, INT32_MAX], [1, 2, 3], [False, False, False]),
        ([0, 0, 0], [4, -2, INT32_MIN], [False, False, False]),
        ([0, 1], [1, 0], [False, False]),  # live children
        ([0, 0], [0, 2], [False, True]),  # a live row onto itself
        ([2, 0], [2, 3], [True, True]),  # an idle row onto itself: nothing to do
        ([0, 1, 0], [2, 2, 3], [False, False, True]),  # a child named twice
        ([0, 9, 0], [2, 2, 3], [False, False, True]),  # twice, once by a parent that is none
        ([0, -1, 0], [2, 2, 3], [True, True, True]),  # padding names nobody
        ([3, 0], [2, 3], [True, True]),  # an idle parent that is filled in the same call
        ([], [], []),
    ],
)
def test_fork_entries(driver, parents, children, ok):
    driver.extend([5, 3, 0, 0], num_tokens=8)
    assert driver.model.fork(parents, children) == ok
    _, found = paxcache.fork(driver.cache, jnp.asarray(parents, jnp.int32), jnp.asarray(children, jnp.int32))
    assert found.tolist() == ok
    driver = Driver(driver.config)
    driver.extend([5, 3, 0, 0], num_tokens=8)
    driver.fork(parents, children)


def test_row_of_length_zero_with_pages_is_live(driver):
    """Room reserved for a row makes it no child: its pages would leak."""
    driver.extend([0, 6, 0, 0], num_tokens=8)
    tables = driver.cache.groups[0].block_tables
    group = dataclasses.replace(driver.cache.groups[0], block_tables=tables)
    cache = dataclasses.replace(driver.cache, groups=(group,), seq_lens=jnp.zeros(4, jnp.int32))
    after, ok = paxcache.fork(cache, jnp.array([0]), jnp.array([1]))
    assert not ok.item()
    leaves_equal(after, cache)


@pytest.mark.parametrize(
    "parents",
    [
        [0, 1, 2, 3],  # stay
        [1, 0, 3, 2],  # swap
        [1, 1, 1, 1],  # one survives in all rows
        [2, 2, -1, -1],  # dying parents
        [-1, -1, -1, -1],
        [3, 3, 3, 0],  # an idle row spreads, and is filled
        [4, -2, INT32_MAX, INT32_MIN],  # out of range: rows stay
        [4, 0, 99, 1],
    ],
)
def test_reorder(driver, parents):
    driver.extend([6, 4, 9, 0], num_tokens=40)
    driver.fork([0], [3])
    driver.release([False, False, False, True])
    driver.reorder(parents)
    driver.extend([1, 1, 1, 1], num_tokens=40)
    driver.release([True] * 4)
    assert used(driver) == 0


def test_beam_search_in_a_pool_without_room_to_spare(driver):
    """Beams of 4 from one prompt: shared pages, dying parents, a token a step, to the end of the table."""
    driver.extend([6, 0, 0, 0], num_tokens=8)
    driver.fork([0, 0, 0], [1, 2, 3])
    for parents in ([0, 0, 1, 2], [3, 2, 1, 0], [1, 1, 1, 1], [0, 0, 2, 2], [2, 0, 0, 0]):
        driver.extend([1, 1, 1, 1], num_tokens=8)
        driver.reorder(parents)
    assert driver.cache.seq_lens.tolist() == [11] * 4


# Rollback.


@pytest.mark.parametrize(
    "lens",
    [
        [6, 4, 9, 0],  # as long as they are
        [5, 3, 8, 0],
        [4, 0, 0, 0],
        [100, 100, 100, 100],  # never longer
        [INT32_MAX] * 4,
        [-1, -5, INT32_MIN, -1],  # left alone
        [0, INT32_MAX, 1, 7],
    ],
)
def test_truncate(driver, lens):
    driver.extend([6, 4, 9, 0], num_tokens=40)
    driver.truncate(lens)
    driver.extend([1, 1, 1, 1], num_tokens=40)


def test_truncate_to_a_page_boundary_frees_the_page_behind_it(driver):
    driver.extend([9, 0, 0, 0], num_tokens=40)
    driver.truncate([8, 0, 0, 0])
    assert used(driver) == 2


def test_truncate_to_zero_empties_a_row(driver):
    driver.extend([9, 3, 0, 0], num_tokens=40)
    driver.truncate([0, INT32_MAX, 0, 0])
    driver.fork([1], [0])  # idle again
    assert driver.cache.seq_lens.tolist() == [3, 3, 0, 0]


def test_rejected_drafts_are_written_again(driver):
    """Speculative decoding: extend by 3, keep 1, again and again over page boundaries."""
    driver.extend([3, 1, 0, 0], num_tokens=8)
    for kept in (4, 5, 6, 7, 8, 9):
        driver.extend([3, 2, 0, 0], num_tokens=8)
        driver.truncate([kept, kept - 2, INT32_MAX, INT32_MAX])


# Release.


def test_double_release(driver):
    driver.extend([6, 3, 0, 0], num_tokens=40)
    driver.fork([0], [2])
    for _ in range(3):
        driver.release([True, False, False, False])
    assert driver.cache.groups[0].ref_counts.max() == 1


def test_release_of_idle_rows_is_a_no_op(driver):
    driver.release([True] * 4)
    driver.extend([0, 3, 0, 0], num_tokens=40)
    before = driver.cache
    driver.release([True, False, True, True])
    leaves_equal(driver.cache, before)


def test_release_of_a_shared_page_frees_it_once(driver):
    driver.extend([6, 0, 0, 0], num_tokens=40)
    driver.fork([0, 0, 0], [1, 2, 3])
    driver.release([True, True, False, True])
    assert sorted(driver.cache.groups[0].ref_counts.tolist())[-3:] == [0, 1, 1]
    driver.release([True, True, True, True])
    assert used(driver) == 0


def test_release_gives_back_pages_past_the_length(driver):
    driver.extend([9, 0, 0, 0], num_tokens=40)
    cache = dataclasses.replace(driver.cache, seq_lens=jnp.zeros(4, jnp.int32))
    cache = paxcache.release(cache, jnp.array([True, False, False, False]))
    assert not cache.groups[0].ref_counts.any() and (cache.groups[0].block_tables == -1).all()


# Pages mapped past the length.


def with_length(driver: Driver, row: int, length: int) -> None:
    """Shortens a row on both sides and leaves its pages mapped."""
    driver.cache = dataclasses.replace(driver.cache, seq_lens=driver.cache.seq_lens.at[row].set(length))
    driver.model.lens[row] = length


def test_pages_past_the_length_are_used_before_free_ones(driver):
    driver.extend([16, 16, 8, 0], num_tokens=40)  # no page is free
    with_length(driver, 0, 3)
    step = driver.extend([9, 0, 0, 0], num_tokens=40)
    assert np.asarray(step.ok).all() and used(driver) == 10


def test_shared_pages_past_the_length_are_left_to_others(driver):
    driver.extend([10, 0, 0, 0], num_tokens=40)
    driver.fork([0], [1])
    with_length(driver, 1, 2)
    driver.extend([0, 8, 0, 0], num_tokens=40)
    assert used(driver) == 6  # all three were shared, and row 1 took three of its own


def test_truncate_leaves_pages_past_the_length_unless_the_row_shrinks(driver):
    driver.extend([12, 0, 0, 0], num_tokens=40)
    with_length(driver, 0, 5)
    driver.truncate([5, 0, 0, 0])
    assert used(driver) == 3
    driver.truncate([INT32_MAX] * 4)
    assert used(driver) == 3
    driver.truncate([4, 0, 0, 0])
    assert used(driver) == 1


def test_forks_and_reorders_carry_pages_past_the_length(driver):
    driver.extend([12, 0, 0, 0], num_tokens=40)
    with_length(driver, 0, 5)
    driver.fork([0], [1])
    driver.reorder([1, 0, 0, -1])
    driver.extend([1, 1, 1, 0], num_tokens=40)
    driver.release([True] * 4)
    assert used(driver) == 0


# Layer groups and windows.


def test_window_frees_pages_that_no_later_query_sees(windowed):
    windowed.extend([8, 0, 0, 0], num_tokens=8)
    assert used(windowed, 1) == 2
    windowed.extend([1, 0, 0, 0], num_tokens=8)  # position 8 sees 4 to 8: tokens 0 to 3 are out of sight
    assert windowed.cache.groups[1].block_tables[0].tolist()[0] == -1
    assert used(windowed, 0) == 3 and used(windowed, 1) == 2
    windowed.extend([3, 0, 0, 0], num_tokens=8)  # position 9 sees 5 to 9: token 5 is in the second page
    windowed.extend([1, 0, 0, 0], num_tokens=8)
    assert windowed.cache.groups[1].block_tables[0].tolist()[:2] == [-1, -1]


def test_window_counts_from_the_first_new_token(windowed):
    """A long chunk: its first token still sees what its last does not."""
    windowed.extend([4, 0, 0, 0], num_tokens=40)
    windowed.extend([12, 0, 0, 0], num_tokens=40)
    assert used(windowed, 1) == 4
    windowed.extend([0, 1, 0, 0], num_tokens=40)  # a row without new tokens keeps its pages
    assert used(windowed, 1) == 5


def test_pages_freed_by_a_window_are_not_handed_out_at_once(windowed):
    windowed.extend(
        [8, 8, 8, 8], num_tokens=40
    )  # 8 pages a group: the local pool is full, the global one not
    step = windowed.extend([1, 1, 0, 0], num_tokens=40)
    assert step.status.tolist() == [NO_PAGES, NO_PAGES, OK, OK]
    assert step.pages_short.tolist() == [1, 2, 0, 0]
    assert used(windowed, 1) == 8, "a refused row frees nothing"


def test_a_row_is_refused_in_all_groups_or_in_none(windowed):
    windowed.extend([8, 8, 8, 4], num_tokens=40)  # 7 of 10 global pages, 7 of 8 local ones
    step = windowed.extend([0, 5, 1, 1], num_tokens=40)
    assert step.status.tolist() == [OK, NO_PAGES, NO_PAGES, NO_PAGES]
    assert step.pages_short.tolist() == [0, 1, 2, 3]


def test_window_pages_shared_by_a_fork_lose_one_reference(windowed):
    windowed.extend([9, 0, 0, 0], num_tokens=40)
    windowed.fork([0], [1])
    windowed.extend([0, 3, 0, 0], num_tokens=40)
    windowed.extend([0, 1, 0, 0], num_tokens=40)
    assert windowed.cache.groups[1].block_tables[0, 0] >= 0
    windowed.release([False, True, False, False])
    windowed.extend([3, 0, 0, 0], num_tokens=40)


def test_sequences_longer_than_the_local_pool():
    """Two rows of 16 tokens, 8 pages' worth, live in 6 local pages since windows give theirs back."""
    driver = Driver(config_of(dataclasses.replace(LOCAL, num_pages=6)))
    for _ in range(16):
        assert np.asarray(driver.extend([1, 1, 0, 0], num_tokens=40).ok).all()
    assert driver.cache.seq_lens.tolist() == [16, 16, 0, 0]


@pytest.mark.parametrize("base", [3, 4, 5, 7, 8, 9, 10, 12])
def test_rollback_to_the_last_extend_is_exact_beside_a_window(windowed, base):
    """Rejected drafts: whatever the extend freed, a row cut back to its old length sees all that it should."""
    windowed.extend([base, 0, 0, 0], num_tokens=40)
    windowed.extend([3, 0, 0, 0], num_tokens=40)
    windowed.truncate([base, 0, 0, 0])
    windowed.extend([2, 0, 0, 0], num_tokens=40)
    windowed.truncate([base + 1, 0, 0, 0])


def rolled_back_past_a_window(driver) -> Any:
    """Row 0 at length 2, its only page in the local group given back long ago; row 1 at length 3."""
    driver.extend([12, 3, 0, 0], num_tokens=40)
    driver.extend([1, 0, 0, 0], num_tokens=40)
    back = jnp.array([2, INT32_MAX, INT32_MAX, INT32_MAX])
    driver.model.truncate(back.tolist())
    driver.cache = paxcache.truncate(driver.cache, back)
    return driver


def test_rollback_past_a_window_harms_no_other_row(windowed):
    """Pages left of the window are gone; the row may see nothing there, the others stay exact."""
    driver = rolled_back_past_a_window(windowed)
    driver.compare_tokens()
    paxcache.check(driver.cache)  # `truncate` says that this may be
    driver.release([True, False, False, False])
    driver.extend([1, 2, 0, 0], num_tokens=40)
    driver.release([True] * 4)
    assert used(driver, 0) == used(driver, 1) == 0


def test_row_without_its_last_page_is_refused(windowed):
    """A fresh page in its place would show the row its last owner's tokens."""
    before = rolled_back_past_a_window(windowed).cache
    after, step = paxcache.extend(before, jnp.array([1, 2, 0, 0]), num_tokens=40)
    assert step.status.tolist()[:2] == [paxcache.Status.INVALID, paxcache.Status.OK]
    assert after.seq_lens.tolist() == [2, 5, 0, 0]
    for old, new in zip(before.groups, after.groups, strict=True):
        np.testing.assert_array_equal(old.block_tables[0], new.block_tables[0])


def test_layers_count_through_the_groups(windowed):
    windowed.extend([5, 2, 0, 0], num_tokens=8)
    cache = windowed.cache
    for layer, (group, index) in enumerate([(0, 0), (0, 1), (1, 0)]):
        for name in ((group, index), (group, jnp.int32(index))):
            for found, wanted in zip(
                paxcache.gather_dense(cache, name, 16), paxcache.gather_dense(cache, layer, 16), strict=True
            ):
                assert (found is None) == (wanted is None)
                if found is not None:
                    np.testing.assert_array_equal(found, wanted)


# References from outside.


def hold(driver: Driver, row: int, entry: int) -> int:
    """A reference from outside to the page in a table entry, as a prefix index would take it."""
    page_id = int(driver.cache.groups[0].block_tables[row, entry])
    page = driver.model.groups[0].tables[row][entry]
    assert page is not None
    driver.model.groups[0].held[page_id] = page
    counts = driver.cache.groups[0].ref_counts.at[page_id].add(1)
    driver.cache = dataclasses.replace(
        driver.cache, groups=(dataclasses.replace(driver.cache.groups[0], ref_counts=counts),)
    )
    return page_id


def test_held_pages_outlive_their_rows(driver):
    driver.extend([8, 0, 0, 0], num_tokens=40)
    hold(driver, 0, 0)
    driver.release([True] * 4)
    assert used(driver) == 1
    step = driver.extend([16, 16, 8, 0], num_tokens=40)
    assert step.status.tolist() == [OK, OK, NO_PAGES, OK] and step.pages_short.tolist() == [0, 0, 1, 0]


def test_held_page_is_copied_before_a_row_writes_to_it(driver):
    driver.extend([6, 0, 0, 0], num_tokens=8)
    page = hold(driver, 0, 1)
    kept = np.asarray(driver.cache.groups[0].pages.k[:, page])
    driver.extend([2, 0, 0, 0], num_tokens=8)
    assert driver.cache.groups[0].block_tables[0, 1] != page
    np.testing.assert_array_equal(driver.cache.groups[0].pages.k[:, page], kept)


def test_held_pages_survive_reorder_and_truncate(driver):
    driver.extend([8, 4, 0, 0], num_tokens=40)
    hold(driver, 0, 1)
    driver.reorder([1, 1, 0, -1])
    driver.truncate([1, 1, 1, 0])
    driver.reorder([-1, -1, -1, -1])
    assert used(driver) == 1


# check.


def corrupt(cache, **changes):
    """The cache with fields of its first group, or seq_lens, replaced through functions of the old arrays."""
    lens = changes.pop("seq_lens", None)
    group = cache.groups[0]
    group = dataclasses.replace(group, **{n: jnp.asarray(f(getattr(group, n))) for n, f in changes.items()})
    cache = dataclasses.replace(cache, groups=(group, *cache.groups[1:]))
    return cache if lens is None else dataclasses.replace(cache, seq_lens=lens(cache.seq_lens))


CORRUPTIONS = {
    "a count too high": {"ref_counts": lambda c: c.at[0].add(1)},
    "a count too low": {"ref_counts": lambda c: c - (c > 0)},
    "a negative count": {"ref_counts": lambda c: c.at[9].set(-1)},
    "a leaked page": {"ref_counts": lambda c: c.at[9].set(1)},
    "an entry past the pool": {"block_tables": lambda t: t.at[3, 3].set(10)},
    "an entry below -1": {"block_tables": lambda t: t.at[3, 3].set(-2)},
    "an entry lost": {"block_tables": lambda t: t.at[0, 0].set(-1)},
    "a free page mapped": {"block_tables": lambda t: t.at[3, 3].set(9)},
    "a negative length": {"seq_lens": lambda n: n.at[3].set(-1)},
    "a length past the table": {"seq_lens": lambda n: n.at[3].set(17)},
    "a length without pages": {"seq_lens": lambda n: n.at[0].set(16)},
    "a page twice in a row": {
        "block_tables": lambda t: t.at[0, 1].set(t[0, 0]),
        "ref_counts": lambda c: c.at[0].set(2).at[1].set(0),
    },
}


@pytest.mark.parametrize("what", CORRUPTIONS)
def test_check_finds(what):
    cache, _ = paxcache.extend(paxcache.init(config_of()), jnp.array([5, 3, 0, 0]), num_tokens=8)
    paxcache.check(cache)
    with pytest.raises(paxcache.InvariantError) as error:
        paxcache.check(corrupt(cache, **CORRUPTIONS[what]))
    assert isinstance(error.value, RuntimeError) and any(c.isdigit() for c in str(error.value))


def test_check_looks_into_every_group():
    cache, _ = paxcache.extend(paxcache.init(config_of(GLOBAL, LOCAL)), jnp.array([5, 3, 0, 0]), num_tokens=8)
    group = dataclasses.replace(cache.groups[1], ref_counts=cache.groups[1].ref_counts.at[7].add(1))
    with pytest.raises(paxcache.InvariantError, match="1"):
        paxcache.check(dataclasses.replace(cache, groups=(cache.groups[0], group)))


def test_check_with_held_references():
    cache, _ = paxcache.extend(paxcache.init(config_of()), jnp.array([5, 3, 0, 0]), num_tokens=8)
    held = np.zeros(10, np.int32)
    held[[0, 9]] = 2, 1
    more = corrupt(cache, ref_counts=lambda c: c + jnp.asarray(held))
    paxcache.check(more, held=held)
    paxcache.check(more, held=jnp.asarray(held))
    with pytest.raises(paxcache.InvariantError):
        paxcache.check(more)
    with pytest.raises(paxcache.InvariantError):
        paxcache.check(cache, held=held)
    with pytest.raises((ValueError, TypeError), match="held"):
        paxcache.check(cache, held=held[:-1])


def test_check_tolerates_holes_and_pages_past_the_length(driver):
    driver.extend([9, 0, 0, 0], num_tokens=40)
    with_length(driver, 0, 2)
    driver.compare()
    windowed = Driver(config_of(LOCAL))
    windowed.extend([9, 0, 0, 0], num_tokens=40)
    windowed.extend([1, 0, 0, 0], num_tokens=40)
    assert windowed.cache.groups[0].block_tables[0, 0] == -1
    windowed.compare()


# stats.


def test_stats_count_pages_tokens_and_bytes():
    cache = paxcache.init(config_of(GLOBAL, LOCAL))
    cache, _ = paxcache.extend(cache, jnp.array([5, 3, 0, 0]), num_tokens=8)
    cache, _ = paxcache.fork(cache, jnp.array([0]), jnp.array([2]))
    stats = jax.jit(paxcache.stats)(cache)
    assert int(stats.num_tokens) == 13
    assert (int(stats.num_used_pages), int(stats.num_free_pages), int(stats.num_shared_pages)) == (6, 12, 4)
    page_bytes = (2 * 1 * 4 * (4 + 4) * 4, 1 * 2 * 4 * 4 * 4)
    assert stats.page_bytes == page_bytes
    assert stats.pool_bytes == 10 * page_bytes[0] + 8 * page_bytes[1]
    assert stats.used_bytes == 3 * sum(page_bytes)
    np.testing.assert_allclose(stats.waste, (3 * 4 - 8) / 12, 1e-6)  # 8 tokens lie in 3 pages, in each group


def test_stats_of_an_empty_cache_divide_by_nothing():
    stats = paxcache.stats(paxcache.init(config_of()))
    assert int(stats.num_used_pages) == int(stats.num_tokens) == 0 and float(stats.waste) == 0


# gather_dense.


@pytest.mark.parametrize("max_len", [1, 3, 4, 5, 16, 17, 40])
def test_gather_dense_of_any_length(driver, max_len):
    driver.extend([6, 3, 0, 16], num_tokens=40)
    full, _ = paxcache.gather_dense(driver.cache, 1, 16)
    k, v = paxcache.gather_dense(driver.cache, 1, max_len)
    assert v is not None and k.shape == v.shape == (4, max_len, 1, 4)
    wanted = np.zeros((4, max_len, 1, 4), np.float32)
    wanted[:, : min(max_len, 16)] = full[:, :max_len]
    np.testing.assert_array_equal(k, wanted)


# Options of attend.

ATTEND_OPTIONS = {
    "plain": {},
    "scale": {"sm_scale": 0.3},
    "soft cap": {"soft_cap": 1.5},
    "window": {"sliding_window": 3},
    "window of one": {"sliding_window": 1},
    "traced window": {"sliding_window": jnp.int32(2)},
    "sinks": {"sinks": jnp.array([0.5, -1.0, 2.0, 0.0])},
    "not causal": {"causal": False},
    "all": {"sm_scale": 0.3, "soft_cap": 1.5, "sliding_window": 4, "sinks": jnp.ones(4), "causal": False},
}


@pytest.mark.parametrize("options", [pytest.param(o, id=n) for n, o in ATTEND_OPTIONS.items()])
@pytest.mark.parametrize("group", [0, 1], ids=["global", "local"])
def test_attend_options(group, options):
    """After prefill in two chunks; the group's own window holds unless a narrower one is given."""
    kv_heads, window = (1, None) if group == 0 else (2, 5)
    rng = np.random.default_rng(0)
    cache = poisoned(paxcache.init(config_of(GLOBAL, LOCAL)))
    for lens in ([6, 3, 0, 1], [3, 1, 0, 4]):
        k, q = (jnp.asarray(rng.standard_normal((12, n, 4)), jnp.float32) for n in (kv_heads, 4))
        cache, step = paxcache.extend(cache, jnp.asarray(lens), num_tokens=12)
        cache = paxcache.append(cache, (group, 0), k, k if group == 0 else None, step)
    out = paxcache.attend(cache, (group, 0), q, step, **options)
    pages = cache.groups[group].pages
    wanted, _ = oracle.paged_attention(
        q,
        pages.k[0],
        None if pages.v is None else pages.v[0],
        cache.groups[group].block_tables,
        cache.seq_lens,
        query_starts=[0, 3, 4, 4],
        query_lens=[3, 1, 0, 4],
        **{"sliding_window": window, **options},
    )
    np.testing.assert_allclose(out, wanted, 1e-5, 1e-5)


# A step stands on its own.


def test_step_shares_no_buffer_with_the_cache():
    """Donating the cache must leave the step whole, and the other way round."""
    for extend in (
        paxcache.extend,
        jax.jit(paxcache.extend, static_argnames=("num_tokens", "max_query_len")),
    ):
        cache = paxcache.init(config_of(GLOBAL, LOCAL))
        cache, step = extend(cache, jnp.array([5, 1, 0, 2]), num_tokens=8)
        mine = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(cache)}
        theirs = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(step)}
        assert not mine & theirs


def test_step_survives_the_donation_of_its_cache():
    cache, step = paxcache.extend(paxcache.init(config_of()), jnp.array([5, 1, 0, 2]), num_tokens=8)
    before = jax.tree.map(np.array, step)
    k = jnp.ones((8, 1, 4))
    cache = jax.jit(paxcache.append, donate_argnums=0, static_argnums=1)(cache, 0, k, k, step)
    leaves_equal(step, before)
    assert paxcache.attend(cache, 0, jnp.ones((8, 2, 4)), step).shape == (8, 2, 4)


def test_old_caches_stay_valid():
    """Values: an old cache goes on from where it was, whatever became of the new one."""
    first, _ = paxcache.extend(poisoned(paxcache.init(config_of())), jnp.array([5, 0, 0, 0]), num_tokens=8)
    kept = jax.tree.map(np.array, first)
    second, step = paxcache.extend(first, jnp.array([2, 3, 0, 0]), num_tokens=8)
    second = paxcache.append(second, 0, jnp.ones((8, 1, 4)), jnp.ones((8, 1, 4)), step)
    paxcache.release(second, jnp.ones(4, bool))
    leaves_equal(first, kept)
    again, other = paxcache.extend(first, jnp.array([2, 3, 0, 0]), num_tokens=8)
    leaves_equal(other, step)
    paxcache.check(again)
