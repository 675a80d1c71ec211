"""The matrix of shapes (`matrix`): a sample of it on a GPU, and what can be said of it without one."""

from __future__ import annotations

import os
import random

import jax.numpy as jnp
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
    "cell",
    [
        matrix.Cell(64, "fp8_e5m2", 4, "short"),
        matrix.Cell(96, "bfloat16", 1, "long"),
        matrix.Cell(64, "int8", 1, "decode"),
    ],
    ids=str,
)
def test_pages_of_any_size_mean_the_same(cell, monkeypatch):
    """In the xla form; values of any size, in half precision."""
    plain = matrix.features_of(cell, 0) | {"q_dtype": "bfloat16" if cell.dtype == "bfloat16" else "float16"}
    monkeypatch.setattr(matrix, "features_of", lambda cell, seed: plain | {"values": 10.0**-seed})
    for seed in range(0, 6, 3):
        problem = matrix.Problem(cell, seed)
        for page_size in (8, 128):
            results, program = problem.attend(page_size, "xla")
            assert "mosaic_gpu" not in program
            assert problem.fault(results) == ""


def test_what_no_kernel_computed_fails():
    cell = matrix.Cell(64, "bfloat16", 1, "decode")
    assert matrix.Problem(cell, seed=0).verdict(16) == "a kernel was refused"  # where there is no GPU


def test_a_crash_names_its_combination(monkeypatch):
    monkeypatch.setattr(matrix.sys, "executable", "/bin/false")
    chosen = [(matrix.Cell(64, "bfloat16", 1, "decode"), S) for S in (8, 16)]
    verdicts = matrix.run(chosen, seed=0, jobs=1)
    assert list(verdicts) == chosen
    assert all(x.startswith("ended with 1") for x in verdicts.values())
