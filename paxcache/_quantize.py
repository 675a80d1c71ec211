"""Quantised pages: the formats, their arithmetic, and the pools that hold values with their scales.

A stored value stands for ``value * scale`` with a float32 scale. Scales lie beside the values in the
pages and lead with ``[L, P]`` like every leaf, so whatever moves a page moves them too. There are two kinds:

- *per token and head*, ``[L, P, K, S]``: computed from each key or value as it is written;
- *per tensor*, ``[L, P, 1, 1]``: given for each layer, as calibrated checkpoints carry them, and the same in all
  pages. (In a pool of one head and one slot a page these are scales per token.)

Infinities and all that is too large saturate at the format's largest value. NaN stays NaN in the fp8 formats; the
integer formats have none and store 0. Neither takes part in a computed scale.

Reference: KIVI (Liu et al., 2024) for scales of single tokens; the fp8 caches of vLLM and TensorRT-LLM for given ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from paxcache._state import state

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int32, Shaped

type Quantization = Literal["fp8_e4m3", "fp8_e5m2", "int8", "int4"]
type Scales = Literal["per_token_head", "per_tensor"]


class Format(NamedTuple):
    """How one value is stored."""

    name: str
    dtype: Any
    largest: float
    """Stored values lie in [-largest, largest]."""
    per_element: int = 1
    """Values in one element of `dtype`: two halves of a row share bytes, the first in the low bits."""


FORMATS: dict[str, Format] = {
    form.name: form
    for form in (
        Format("fp8_e4m3", jnp.dtype(jnp.float8_e4m3fn), 448.0),
        Format("fp8_e5m2", jnp.dtype(jnp.float8_e5m2), 57344.0),
        Format("int8", jnp.dtype(jnp.int8), 127.0),
        Format("int4", jnp.dtype(jnp.uint8), 7.0, per_element=2),
    )
}
BY_DTYPE = {form.dtype: form for form in FORMATS.values()}
"""A pool's format, which the dtype of its values tells."""


@state
class QuantizedPages:
    """A pool of quantised keys or values. Stands where an array of pages does.

    Args:
      values: ``[P, K, S, D]``, or ``[L, P, K, S, D]`` for several layers: float8_e4m3fn, float8_e5m2 or int8; or uint8,
        which holds two 4-bit integers from -7 to 7 an element, D/2 elements a row: element d has number d in its low
        bits and number d + D/2 in its high bits, in two's complement.
      scales: f32 ``[P, K, S]`` or ``[P, 1, 1]`` (with L before them as values have it).

    Example:
      >>> import jax.numpy as jnp
      >>> from paxcache import ops
      >>> pages = ops.QuantizedPages(jnp.zeros((4, 1, 2, 8), jnp.int8), jnp.zeros((4, 1, 2)))
      >>> pages.shape
      (4, 1, 2, 8)
    """

    values: Shaped[Array, "*L P K S Dq"]
    scales: Float[Array, "*L P #K #S"]

    @property
    def form(self) -> Format:
        """The format."""
        return BY_DTYPE[jnp.dtype(self.values.dtype)]

    @property
    def per_token(self) -> bool:
        """Whether each token and head has a scale, or each page."""
        return self.scales.shape[-2:] == self.values.shape[-3:-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the pool that this stands for."""
        *lead, width = self.values.shape
        return (*lead, width * self.form.per_element)

    @property
    def ndim(self) -> int:
        """Axes of the pool."""
        return self.values.ndim

    @property
    def dtype(self) -> Any:
        """Dtype of the stored values."""
        return self.values.dtype


def empty(
    quantization: str, shape: tuple[int, int, int, int, int], scales: Float[Array, "L"] | None
) -> QuantizedPages:
    """A pool [L, P, K, S, D] of zeros; with `scales`, those of the layers."""
    form = FORMATS[quantization]
    L, P, K, S, D = shape
    values = jnp.zeros((L, P, K, S, D // form.per_element), form.dtype)
    if scales is None:
        return QuantizedPages(values, jnp.zeros((L, P, K, S), jnp.float32))
    return QuantizedPages(values, jnp.broadcast_to(scales[:, None, None, None], (L, P, 1, 1)))


def scales_of(x: Float[Array, "*N D"], form: Format) -> Float[Array, "*N"]:
    """The scale of each row: its largest finite magnitude becomes the format's largest value."""
    x = x.astype(jnp.float32)
    # Products and reciprocals, here and below: compilers make them of divisions, but not all of the same ones.
    scales = jnp.max(jnp.where(jnp.isfinite(x), jnp.abs(x), 0), axis=-1) * np.float32(1 / form.largest)
    return jnp.where(scales < jnp.finfo(jnp.float32).tiny, 0, scales)  # of a subnormal there is no reciprocal


def encode(x: Float[Array, "*N D"], scales: Float[Array, "*N"], form: Format) -> Shaped[Array, "*N Dq"]:
    """Rows as they are stored, given their scales. A scale of 0 stores zeros."""
    x, scales = x.astype(jnp.float32), scales[..., None]
    x = jnp.where((scales > 0) | jnp.isnan(x), x * (1 / jnp.where(scales > 0, scales, 1)), 0)
    x = jnp.clip(x, -form.largest, form.largest)
    if jnp.issubdtype(form.dtype, jnp.floating):
        return x.astype(form.dtype)
    q = jnp.round(jnp.where(jnp.isnan(x), 0, x)).astype(jnp.int8)
    if form.per_element == 1:
        return q
    low, high = jnp.split(q, 2, axis=-1)
    return ((low & 0xF) | (high << 4)).astype(jnp.uint8)


def decode(values: Shaped[Array, "*N Dq"], form: Format, dtype: Any) -> Float[Array, "*N D"]:
    """Stored values as numbers of a dtype, without their scales: exact in float16, bfloat16 and float32."""
    if form.per_element == 1:
        return values.astype(dtype)
    bits = values.astype(jnp.int8)
    low, high = (bits << 4) >> 4, bits >> 4  # arithmetic shifts: the sign goes along
    return jnp.concatenate([low, high], axis=-1).astype(dtype)


def load(
    pool: Float[Array, "L P K S D"] | QuantizedPages, layer: Any, pages: Int32[Array, "*N"], dtype: Any
) -> tuple[Float[Array, "*N K S D"], Float[Array, "*N #K #S"] | None]:
    """Pages of one layer, quantised ones as numbers of `dtype`, and the scales still to multiply them with."""
    if not isinstance(pool, QuantizedPages):
        return pool[layer, pages], None
    return decode(pool.values[layer, pages], pool.form, dtype), pool.scales[layer, pages]
