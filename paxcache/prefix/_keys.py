"""What a prompt is to the index: its tokens, what keeps it apart from others, and stable names of its pages.

Imports `_checks` of the library, NumPy and the standard library.

An *extra key* keeps prompts apart whose tokens agree and whose keys and values do not: tenants, LoRA adapters, images
behind placeholder tokens. It is encoded to bytes without loss, so comparing the bytes compares the values. A page's
*stable key* is a SHA-256 over its parent's stable key, its extra key and its tokens, the same in every process: a name
for events and storage. Lookups compare tokens and never use it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jax.core import Tracer

from paxcache import _checks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Int

TOKEN = np.dtype("<i4")
"""Tokens as they are stored, compared and hashed: little-endian on every machine."""
KEY_BYTES = 32
MAX_DEPTH = 32
"""Most tuples in one another in an extra key."""


class Item(NamedTuple):
    """One multimodal input of a prompt: the content that stands behind its placeholder tokens."""

    content: str | bytes
    """A hash of the content that identifies it, such as a SHA-256."""
    offset: int
    """Position of its first token."""
    length: int
    """Tokens it stands behind."""


type Salt = str | bytes | int | tuple[Salt, ...] | None
"""What an extra key may consist of: values that are the same in every process."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtraKey:
    """An extra key with multimodal inputs; without them, give the salt itself as ``extra_key``.

    Args:
      salt: keeps whole prompts apart, such as ``(tenant, adapter)``.
      items: the multimodal inputs. A page depends on those with a token in it (and, through its parents, on all that
        came before); one that ends exactly at a page's start does not belong to it.

    Raises:
      TypeError, ValueError: the salt, or an item's content, offset or length, is of another type or out of range.

    Example:
      >>> from paxcache import prefix
      >>> image = prefix.Item(content="9f86d081", offset=3, length=13)
      >>> a = prefix.page_keys(list(range(32)), page_size=16, extra_key=prefix.ExtraKey(items=(image,)))
      >>> b = prefix.page_keys(list(range(32)), page_size=16)
      >>> a[0] == b[0], len(a)
      (False, 2)

    Reference: vLLM's extra hash keys of a block (LoRA, multimodal inputs, cache salt).
    """

    salt: Salt = None
    items: tuple[Item, ...] = ()

    def __post_init__(self):
        """Checks the items and brings them to one form."""
        encode(self.salt)
        if not isinstance(self.items, Iterable) or isinstance(self.items, (str, bytes, Item)):
            raise TypeError(f"items: expected a tuple of Item, got {self.items!r}")
        checked = []
        for item in self.items:
            if not isinstance(item, tuple) or len(item) != len(Item._fields):
                raise TypeError(f"items: expected Item(content, offset, length), got {item!r}")
            content, offset, length = item
            if not isinstance(content, (str, bytes)):
                raise TypeError(f"items: content must be str or bytes, got {content!r}")
            offset = _checks.static_int("items: offset", offset, minimum=0)
            checked.append(Item(content, offset, _checks.static_int("items: length", length, minimum=1)))
        object.__setattr__(self, "items", tuple(sorted(checked, key=lambda i: (i.offset, i.length))))


def encode(value: Any, depth: int = 0) -> bytes:
    """The bytes of an extra key's value. Self-delimiting, so that no two values or sequences of them share any."""
    if depth > MAX_DEPTH:
        raise ValueError(f"extra_key: expected at most {MAX_DEPTH} tuples in one another, got more")
    if value is None:
        return b"n"
    if isinstance(value, bool):
        raise TypeError(f"extra_key: expected None, str, bytes, int or tuples of them, got {value!r}")
    if isinstance(value, (int, np.integer)):
        return b"i%d;" % int(value)
    if isinstance(value, (str, bytes)):
        data = value if isinstance(value, bytes) else value.encode(errors="surrogatepass")
        return b"%s%d:%s" % (b"b" if isinstance(value, bytes) else b"s", len(data), data)
    if isinstance(value, tuple):
        return b"t%d:%s" % (len(value), b"".join(encode(v, depth + 1) for v in value))
    raise TypeError(f"extra_key: expected None, str, bytes, int or tuples of them, got {value!r}")


class Prompt(NamedTuple):
    """A token sequence made ready for comparing."""

    tokens: bytes
    num_tokens: int
    page_size: int
    namespace: bytes
    """Epoch and salt, encoded: what keeps whole prompts apart."""
    extras: dict[int, bytes]
    """By page, its multimodal inputs, encoded; no entry for a page without."""
    plain: dict[int, int]
    """By page with multimodal inputs, how many of its tokens come before the first."""

    @property
    def num_pages(self) -> int:
        """Full pages."""
        return self.num_tokens // self.page_size

    def page(self, index: int) -> bytes:
        """The tokens of a page; fewer than page_size at the end."""
        width = self.page_size * TOKEN.itemsize
        return self.tokens[index * width : (index + 1) * width]

    def salt(self, index: int) -> bytes:
        """What must agree besides the tokens of a page and everything before it."""
        if index == 0:
            return self.namespace + self.extras.get(0, b"")
        return self.extras.get(index, b"")


def prompt(tokens: Int[np.ndarray, "N"] | Any, *, page_size: int, extra_key: Any, epoch: int) -> Prompt:
    """Makes tokens ready. int32 arrays are taken as they are; anything else is converted and checked."""
    if isinstance(tokens, Tracer):
        raise TypeError(
            "tokens: the host index reads them on the host; inside jit use paxcache.prefix.device"
        )
    try:
        data = np.asarray(tokens)
    except ValueError as error:  # lists of unequal lengths
        raise ValueError(f"tokens: expected shape [N], got {tokens!r}") from error
    if data.ndim != 1:
        raise ValueError(f"tokens: expected shape [N], got {_checks.describe(data)}")
    if data.size == 0:
        data = data.astype(TOKEN)
    if data.dtype.kind not in "iu":
        raise TypeError(f"tokens: expected integers, got {_checks.describe(data)}")
    if data.dtype != TOKEN:
        limits = np.iinfo(np.int32)
        if int(data.min()) < limits.min or int(data.max()) > limits.max:
            raise ValueError(f"tokens: values must fit int32, got {data.min()} to {data.max()}")
        data = data.astype(TOKEN)
    key = extra_key if isinstance(extra_key, ExtraKey) else ExtraKey(salt=extra_key)
    extras, plain = {}, {}
    for item in key.items:
        last = min(item.offset + item.length, data.size) - 1
        for page in range(item.offset // page_size, last // page_size + 1):
            extras[page] = extras.get(page, b"") + encode(tuple(item))
            start = max(item.offset - page * page_size, 0)
            plain[page] = min(plain.get(page, page_size), start)
    return Prompt(data.tobytes(), data.size, page_size, _one(encode((epoch, key.salt))), extras, plain)


@functools.lru_cache(maxsize=1024)
def _one(value: bytes) -> bytes:
    """Mostly one object for equal values: it takes less room, and Python compares an object with itself quickly."""
    return value


def root_key(prompt: Prompt) -> bytes:
    """The parent of a first page's stable key."""
    return hashlib.sha256(b"paxcache.prefix/1" + prompt.namespace).digest()


def chain(prompt: Prompt, first_page: int, parent: bytes) -> bytes:
    """The stable keys of the full pages from `first_page` on, one after the other, given that of the page before."""
    keys = []
    for page in range(first_page, prompt.num_pages):
        extra = prompt.extras.get(page, b"")
        parent = hashlib.sha256(
            parent + len(extra).to_bytes(8, "little") + extra + prompt.page(page)
        ).digest()
        keys.append(parent)
    return b"".join(keys)


def split_keys(keys: bytes) -> tuple[bytes, ...]:
    """Stable keys one by one."""
    return tuple(keys[i : i + KEY_BYTES] for i in range(0, len(keys), KEY_BYTES))


def page_keys(
    tokens: Int[np.ndarray, "N"] | Sequence[int],
    *,
    page_size: int,
    extra_key: ExtraKey | Salt = None,
    epoch: int = 0,
) -> tuple[bytes, ...]:
    """Stable keys of a prompt's full pages: what `publish` names them, in this and in any other process.

    Args:
      tokens: integers [N].
      page_size: token slots in a page, S.
      extra_key: as in `match`.
      epoch: the weights' version, as in `new_epoch`.

    Returns:
      N // S keys of 32 bytes: SHA-256 over parent key, extra key and tokens.

    Raises:
      ValueError, TypeError: an argument's type or shape is wrong.

    Example:
      >>> from paxcache import prefix
      >>> keys = prefix.page_keys([1, 2, 3, 4], page_size=2)
      >>> [key.hex()[:8] for key in keys]
      ['e1622adb', '273a7ad0']
      >>> prefix.page_keys([1, 2], page_size=2)[0] == keys[0]
      True

    Reference: vLLM's chained block hashes, with a hash that no process seeds.
    """
    page_size = _checks.static_int("page_size", page_size, minimum=1)
    epoch = _checks.static_int("epoch", epoch, minimum=0)
    made = prompt(tokens, page_size=page_size, extra_key=extra_key, epoch=epoch)
    return split_keys(chain(made, 0, root_key(made)))
