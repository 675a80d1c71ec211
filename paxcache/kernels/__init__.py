"""One file per kernel and architecture; they know arrays, never caches. `paxcache.ops` chooses among them."""
