"""paxcache: a paged KV cache for JAX. Immutable states, pure functions, GPU kernels.

The cache is a value: `init` makes one, and every other function takes one and returns a new one.

    cache, step = paxcache.extend(cache, query_lens, num_tokens=T)   # once a forward pass
    cache = paxcache.append(cache, layer, k, v, step)                # in each layer
    out = paxcache.attend(cache, layer, q, step)

`generate` and `stream` run a model over it until every prompt is answered, in one compiled program; `check_model` tells
whether a model function is right.

`paxcache.ops` holds the array-level ops, `paxcache.prefix` the sharing of computed prefixes, `paxcache.offload` the
host tier, `paxcache.sharding` the layout over devices. Imported by name, since they need more than JAX: `paxcache.nnx`
and `paxcache.linen`, the Flax layers, and `paxcache.persist`, storage and checkpoints.
"""

from paxcache import offload as offload
from paxcache import ops as ops
from paxcache import prefix as prefix
from paxcache import sharding as sharding
from paxcache._cache import append as append
from paxcache._cache import attend as attend
from paxcache._cache import extend as extend
from paxcache._cache import fork as fork
from paxcache._cache import init as init
from paxcache._cache import release as release
from paxcache._cache import reorder as reorder
from paxcache._cache import truncate as truncate
from paxcache._check_model import check_model as check_model
from paxcache._generate import Generation as Generation
from paxcache._generate import StopReason as StopReason
from paxcache._generate import Stream as Stream
from paxcache._generate import generate as generate
from paxcache._generate import stream as stream
from paxcache._inspect import Stats as Stats
from paxcache._inspect import check as check
from paxcache._inspect import gather_dense as gather_dense
from paxcache._inspect import stats as stats
from paxcache._sampling import Sampling as Sampling
from paxcache._types import NO_PAGE as NO_PAGE
from paxcache._types import CacheConfig as CacheConfig
from paxcache._types import InvariantError as InvariantError
from paxcache._types import LayerGroup as LayerGroup
from paxcache._types import PagedKVCache as PagedKVCache
from paxcache._types import Status as Status
from paxcache._types import Step as Step
from paxcache._types import StepError as StepError
