"""Prefix sharing: a request that starts like an earlier one neither computes nor stores that part again.

The host index is a value, like the cache. One call gives a row the pages that are stored, one offers what it computed:

    index = prefix.init(config)
    cache, index, num_reused = prefix.admit(cache, index, row, tokens)   # then compute tokens[num_reused:]
    cache, index = prefix.publish(cache, index, row, tokens)             # computed: others may share it
    cache, index, _ = prefix.make_room(cache, index, query_lens, num_tokens=T)   # evict what `extend` would lack

`prefix.device` is the same inside a compiled loop: fixed-size arrays, full pages, LRU.
"""

from paxcache.prefix import device as device
from paxcache.prefix._host import Match as Match
from paxcache.prefix._host import Pin as Pin
from paxcache.prefix._host import admit as admit
from paxcache.prefix._host import admit_rows as admit_rows
from paxcache.prefix._host import evict as evict
from paxcache.prefix._host import evictable as evictable
from paxcache.prefix._host import held as held
from paxcache.prefix._host import init as init
from paxcache.prefix._host import make_room as make_room
from paxcache.prefix._host import match as match
from paxcache.prefix._host import new_epoch as new_epoch
from paxcache.prefix._host import pin as pin
from paxcache.prefix._host import publish as publish
from paxcache.prefix._host import publish_rows as publish_rows
from paxcache.prefix._host import reset as reset
from paxcache.prefix._host import take_events as take_events
from paxcache.prefix._host import unpin as unpin
from paxcache.prefix._index import Cleared as Cleared
from paxcache.prefix._index import Counters as Counters
from paxcache.prefix._index import Index as Index
from paxcache.prefix._index import Removed as Removed
from paxcache.prefix._index import Stored as Stored
from paxcache.prefix._keys import ExtraKey as ExtraKey
from paxcache.prefix._keys import Item as Item
from paxcache.prefix._keys import page_keys as page_keys
from paxcache.prefix._store import Store as Store
