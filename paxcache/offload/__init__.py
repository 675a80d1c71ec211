"""The host tier: pages in pinned host memory and back, preemption, stored prefixes, pools packed and resized, a store.

What lies on the host is a value too: an `Extent` holds page-major blocks ``[N, L, ...]``, one leaf for each leaf of a
group's pages, in memory of its own. It is written once, by one gather and one large transfer a leaf, and never again,
so a transfer under way cannot meet a later write: a pool of host pages would be copied on each swap, or be written
while it is read. The memory returns when the last reference to the extent is dropped.

    extent = offload.swap_out(cache, page_ids)                  # copies; references stay as they are
    cache, page_ids, ok = offload.swap_in(cache, extent)        # into free pages, all or none

    host = offload.init(config, num_pages)                      # how many pages tickets may hold together
    cache, host, ticket = offload.preempt(cache, host, rows)    # ticket.ok; the rows are idle, their pages free
    cache, host, ok = offload.resume(cache, host, ticket, rows)

    cache, host, ticket = offload.preempt(cache, host, rows, by_layer=True)      # or swap_out; inside a model, then:
    cache, host, arrival, ok = offload.begin_resume(cache, host, ticket, rows)   # or begin_swap_in
    cache, arrival = offload.land(cache, layer, arrival, x)     # in each layer, while the next one's pages travel
    cache = offload.cancel(cache, arrival)                      # or give up on what has not landed

    tier = offload.init_tier(config, num_pages)                 # below a prefix index: pages of prompts on the host
    cache, index, tier, _ = offload.evict(cache, index, tier, num_pages)   # to the host; also make_room, write_through
    cache, index, tier, _ = offload.prefetch(cache, index, tier, tokens)   # and back, before prefix.admit

    cache = offload.defragment(cache)                           # used pages to the front of their pools
    cache = offload.resize(cache, num_pages)
    index = offload.resize_index(cache, index)                  # and the prefix index goes on with it
    asleep = offload.sleep(cache)                               # no pools on the device until offload.wake(asleep)

`PageStore` holds arrays by key in ordinary CPU memory, for many threads, and is the one object here that changes.
`bind_thread` keeps a thread that makes pinned memory beside the GPU.

`resize` and the calls with a tier read counts on the host. All others run under jit, and pools change in place where a
caller's jit donates them. Call `swap_out` and `preempt` outside jit where something else is to run meanwhile: a
transfer within a program holds up what is launched after it. On the way back the pools need it, so whatever reads them
waits; `land` makes that a layer at a time. Keep the two directions in programs of their own: within one, XLA may drop
the way over the host. Nothing raises because of what values are: a refused call changes nothing and says so.

JAX's GPU client takes at most 64 GB of pinned memory, whatever the machine has. Where that is too little, set
``XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB`` (a number) in the environment before JAX first uses the GPU. A call outside jit
that meets it raises MemoryError with the bytes that it wanted; a program of the caller's raises RESOURCE_EXHAUSTED.
"""

from paxcache.offload._layers import Arrival as Arrival
from paxcache.offload._layers import begin_resume as begin_resume
from paxcache.offload._layers import begin_swap_in as begin_swap_in
from paxcache.offload._layers import cancel as cancel
from paxcache.offload._layers import fetch as fetch
from paxcache.offload._layers import land as land
from paxcache.offload._layers import time_layers as time_layers
from paxcache.offload._layers import wait as wait
from paxcache.offload._numa import Binding as Binding
from paxcache.offload._numa import bind_thread as bind_thread
from paxcache.offload._pages import Extent as Extent
from paxcache.offload._pages import drop as drop
from paxcache.offload._pages import swap_in as swap_in
from paxcache.offload._pages import swap_out as swap_out
from paxcache.offload._policies import evict as evict
from paxcache.offload._policies import make_room as make_room
from paxcache.offload._policies import match as match
from paxcache.offload._policies import prefetch as prefetch
from paxcache.offload._policies import write_through as write_through
from paxcache.offload._pools import Asleep as Asleep
from paxcache.offload._pools import defragment as defragment
from paxcache.offload._pools import resize as resize
from paxcache.offload._pools import resize_index as resize_index
from paxcache.offload._pools import sleep as sleep
from paxcache.offload._pools import wake as wake
from paxcache.offload._rows import Host as Host
from paxcache.offload._rows import Ticket as Ticket
from paxcache.offload._rows import discard as discard
from paxcache.offload._rows import init as init
from paxcache.offload._rows import preempt as preempt
from paxcache.offload._rows import resume as resume
from paxcache.offload._store import PageStore as PageStore
from paxcache.offload._tier import HostTier as HostTier
from paxcache.offload._tier import Traffic as Traffic
from paxcache.offload._tier import clear as clear
from paxcache.offload._tier import init_tier as init_tier
from paxcache.offload._tier import remove as remove
