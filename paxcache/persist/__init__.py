"""What outlives the process: pages on disk or in an object store, and checkpoints of whole states.

Needs tensorstore and Orbax (``pip install 'paxcache[persist]'``); nothing else of the library imports either.

    storage = persist.Storage.open("/var/cache/pages", config, max_bytes=2**40)
    storage.put(keys, offload.swap_out(cache, page_ids))            # keys: prefix.page_keys, the same in any process
    cache, page_ids, ok = offload.swap_in(cache, storage.get(keys))

    persist.save("/var/checkpoints/run", {"cache": cache, "index": index, "key": key})
    state = persist.load("/var/checkpoints/run")                    # goes on bit for bit
"""

try:
    import orbax.checkpoint as _orbax  # noqa: F401
    import tensorstore as _tensorstore  # noqa: F401
except ImportError as error:
    raise ImportError(
        "paxcache.persist needs tensorstore and orbax-checkpoint: pip install 'paxcache[persist]'"
    ) from error

from paxcache.persist._checkpoint import load as load
from paxcache.persist._checkpoint import save as save
from paxcache.persist._storage import Counters as Counters
from paxcache.persist._storage import Storage as Storage
