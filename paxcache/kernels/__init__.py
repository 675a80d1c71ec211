"""The backends of `paxcache.ops`: modules with the same six functions, for arrays that `ops` has checked.

A module is imported where its device is there, no sooner. A backend that cannot do a case raises NotImplementedError
with the reason, and `ops` asks the next one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from paxcache import _checks

if TYPE_CHECKING:
    from jaxtyping import Array, Int, Int32, PyTree, Shaped

    from paxcache.kernels._request import Pools, Rows, Scores, Shapes


class Backend(Protocol):
    """What a backend is: a module with these functions, perhaps with more options. Semantics are those of `ops`."""

    def make_plan(
        self, rows: Rows, shapes: Shapes, *, sliding_window: Any = None, causal: bool = True
    ) -> Any:
        """The work of a step's attention, on the device, without a host read.

        None where it cannot be known yet, as without the number of query heads: attention then plans for itself.
        """
        ...

    def paged_attention(
        self, q: Any, pools: Pools, rows: Rows, scores: Scores, *, max_query_len: int, plan: Any = None
    ) -> tuple[Array, Array | None]:
        """Attention of each row's queries over its own pages, and the log-sum-exp of their scores where asked for.

        A plan of another backend, or for other shapes, is not used: attention makes its own.
        """
        ...

    def write_pages(self, pools: Pools, k: Any, v: Any, slot_mapping: Int[Array, "T"]) -> tuple[Any, Any]:
        """Puts each token's key and value into its slot; returns both pools."""
        ...

    def copy_pages(
        self, pages: PyTree[Shaped[Array, "L P ..."]], src: Int32[Array, "N"], dst: Int32[Array, "N"]
    ) -> PyTree[Shaped[Array, "L P ..."]]:
        """Copies pages onto others, in all layers."""
        ...

    def gather_pages(
        self, pages: PyTree[Shaped[Array, "L P ..."]], page_ids: Int32[Array, "N"]
    ) -> PyTree[Shaped[Array, "N L ..."]]:
        """Pages with all their layers, page-major."""
        ...

    def scatter_pages(
        self,
        pages: PyTree[Shaped[Array, "L P ..."]],
        page_ids: Int32[Array, "N"],
        blocks: PyTree[Shaped[Array, "N L ..."]],
    ) -> PyTree[Shaped[Array, "L P ..."]]:
        """Puts page-major blocks back."""
        ...


def _mosaic_gpu() -> Backend:
    device = _checks.default_device()
    if device.platform != "gpu":
        raise NotImplementedError(
            f"mosaic_gpu needs a Hopper GPU, the default device is {device.device_kind!r}"
        )
    capability = getattr(device, "compute_capability", "none")
    if str(capability) != "9.0":
        raise NotImplementedError(
            f"mosaic_gpu needs a Hopper GPU (compute capability 9.0), {device.device_kind!r} has {capability}"
        )
    from paxcache.kernels import sm90  # noqa: PLC0415

    return sm90


def _triton() -> Backend:
    device = _checks.default_device()  # the kernels look for themselves whether it and the packages fit
    if device.platform != "gpu":
        raise NotImplementedError(f"triton needs an NVIDIA GPU, the default device is {device.device_kind!r}")
    from paxcache.kernels import triton  # noqa: PLC0415

    return triton


def _xla() -> Backend:
    from paxcache.kernels import xla  # noqa: PLC0415

    return xla


BACKENDS: dict[str, Callable[[], Backend]] = {"mosaic_gpu": _mosaic_gpu, "triton": _triton, "xla": _xla}
"""How to get each backend, the best first; NotImplementedError where the default device is none of its own."""
