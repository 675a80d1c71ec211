"""One current index for one writer and many readers."""

from __future__ import annotations

import threading

from paxcache import _checks
from paxcache.prefix._index import Index


class Store:
    """Holds the current version of an index.

    Readers take `index` and work on it as long as they like: a value cannot change under them. The writer makes a
    successor and hands it in with the version it was made from, so that a second writer cannot undo it unnoticed.
    What a reader finds in an older version may be gone from the cache: only `admit`, on the current one, shares pages.

    Args:
      index: the first version.

    Example:
      >>> import paxcache
      >>> from paxcache import prefix
      >>> config = paxcache.CacheConfig(num_layers=2, num_kv_heads=1, head_dim=8, num_pages=16, max_seqs=2,
      ...                               max_pages_per_seq=8)
      >>> store = prefix.Store(prefix.init(config))
      >>> old = store.index
      >>> store.replace(old, prefix.new_epoch(old))
      >>> store.index.epoch, old.epoch
      (1, 0)
    """

    def __init__(self, index: Index):
        _checks.instance("index", index, Index, source="prefix.init")
        self._index = index
        self._lock = threading.Lock()

    @property
    def index(self) -> Index:
        """The current version. Takes no lock."""
        return self._index

    def replace(self, old: Index, new: Index) -> None:
        """Makes `new` the current version.

        Args:
          old: the version that `new` was made from.
          new: its successor.

        Raises:
          RuntimeError: `old` is not the current version: somebody else wrote in between.
          TypeError: new is no `Index`.
        """
        _checks.instance("new", new, Index, source="prefix.init")
        with self._lock:
            if self._index is not old:
                raise RuntimeError(
                    "Store: the index was replaced since it was read; there may be one writer only"
                )
            self._index = new
