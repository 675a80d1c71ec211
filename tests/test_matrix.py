"""The matrix of shapes (`matrix`): a sample of it on a GPU, and what can be said of it without one."""

from __future__ import annotations

import os
import random

import jax.numpy as jnp
import numpy as np
import pytest

import matrix
from paxcache import ops
from paxcache.kernels.sm90 import _mosaic
from paxcache.kernels.sm90.operands import check_supported, query_dtype


@pytest.mark.gpu
def test_sample_on_gpu():
    seed = random.SystemRandom().randrange(1 << 30)
    print(f"seed {seed}")  # pytest shows it with a failure
    chosen = random.Random(seed).sample(matrix.combinations(), 24)
    verdicts = matrix.run(chosen, seed=seed, jobs=min(8, os.cpu_count() or 1))
    assert verdicts == dict.fromkeys(chosen, "ok")


def test_kernels_refuse_what_the_matrix_says():
    limits = _mosaic.DeviceLimits()
    for cell, page_size in matrix.combinations():
        dtype = ops.FORMATS[cell.dtype].dtype if cell.dtype in ops.FORMATS else jnp.dtype(cell.dtype)
        shapes = {
            "head_dim": cell.head_dim,
            "v_head_dim": cell.head_dim,
            "page_size": page_size,
            "kv_dtype": dtype,
        }
        try:
            check_supported("a kernel", **shapes, q_dtype=query_dtype(dtype), limits=limits)
        except NotImplementedError:
            assert matrix.is_refused(cell), (cell, page_size)
        else:
            assert not matrix.is_refused(cell), (cell, page_size)


@pytest.mark.parametrize(
    "cell", [matrix.Cell(64, "fp8_e4m3", 4, "short"), matrix.Cell(96, "bfloat16", 1, "mixed")], ids=str
)
def test_pages_of_any_size_mean_the_same(cell):
    problem = matrix.Problem(cell, seed=0)
    for page_size in (8, 128):
        (out, lse), program = problem.attend(page_size, "xla")
        assert "mosaic_gpu" not in program
        np.testing.assert_allclose(np.asarray(out, np.float32), problem.expected[0], atol=0.02, rtol=0.02)
        np.testing.assert_allclose(lse, problem.expected[1], atol=1e-4, rtol=1e-4)


def test_what_no_kernel_computed_fails():
    cell = matrix.Cell(64, "bfloat16", 1, "decode")
    assert matrix.Problem(cell, seed=0).verdict(16) == "a kernel was refused"  # where there is no GPU


def test_a_crash_names_its_combination(monkeypatch):
    monkeypatch.setattr(matrix.sys, "executable", "/bin/false")
    chosen = [(matrix.Cell(64, "bfloat16", 1, "decode"), S) for S in (8, 16)]
    verdicts = matrix.run(chosen, seed=0, jobs=1)
    assert list(verdicts) == chosen
    assert all(x.startswith("ended with 1") for x in verdicts.values())
