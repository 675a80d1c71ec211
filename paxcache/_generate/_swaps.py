"""Pages of preempted prompts on the host and back, between two runs of the program."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from paxcache import offload
from paxcache._cache import release
from paxcache._generate._loop import State
from paxcache.offload import _rows
from paxcache.prefix import device

if TYPE_CHECKING:
    from jaxtyping import Array, Bool


class Swaps:
    """What is on the host of prompts under way. Changes, unlike the state: a ticket is good for one return."""

    def __init__(self, num_groups: int, host_pages: int | tuple[int, ...]):
        self.host = _rows.account("host_pages", num_groups, host_pages, "pinned_host")
        self.tickets: dict[int, offload.Ticket] = {}

    def serve(self, state: State) -> tuple[State, bool]:
        """Moves the pages that a state waits for; whether it did wait."""
        seats, rows, leaving, returning = jax.device_get(
            (state.seat_prompts, state.seat_rows, state.leaving, state.returning)
        )
        if leaving == len(seats) and not returning.any():
            return state, False
        cache, index = state.cache, state.index
        if leaving < len(seats):
            row = jnp.asarray(rows[leaving])[None]
            cache, self.host, ticket = offload.preempt(cache, self.host, row)
            if ticket.ok:
                self.tickets[int(seats[leaving])] = ticket
            else:  # no room on the host: it is recomputed
                cache = release(cache, jnp.zeros(cache.max_seqs, bool).at[row].set(True))
        for seat in np.flatnonzero(returning):
            ticket = self.tickets.pop(int(seats[seat]))
            if index is not None:
                pairs = zip(ticket.extent.held, cache.groups, strict=True)
                lacking = max(int(held.sum() - (group.ref_counts == 0).sum()) for held, group in pairs)
                cache, index, _ = device.evict(cache, index, max(lacking, 0))
            cache, self.host, ok = _resume(cache, self.host, ticket, jnp.asarray(rows[seat])[None])
            if not ok:  # no room on the device: it is recomputed
                self.host, _ = offload.discard(self.host, ticket)
        away = np.zeros(state.tokens.shape[0], bool)
        away[list(self.tickets)] = True
        return _moved(dataclasses.replace(state, cache=cache, index=index), away), True


_resume = jax.jit(offload.resume, donate_argnums=(0, 1))


@functools.partial(jax.jit, donate_argnums=0)
def _moved(state: State, away: Bool[Array, "N"]) -> State:
    """The state after the host moved pages and these prompts' are with it."""
    N, R = state.tokens.shape[0], state.seat_rows.shape[0]
    assert state.away is not None
    gone = jnp.arange(R, dtype=jnp.int32) == state.leaving
    new = jnp.sum(away & ~state.away, dtype=jnp.int32)
    return dataclasses.replace(
        state,
        seat_prompts=jnp.where(gone, N, state.seat_prompts),
        starved=state.starved & ~gone,
        num_swaps=state.num_swaps + new,
        away=away,
        leaving=jnp.int32(R),
    )


def committed(tree: Any) -> Any:
    """The same buffers, bound to their device as what comes from the host is, so that programs are compiled once."""
    if len({device for leaf in jax.tree.leaves(tree) for device in leaf.devices()}) > 1:
        return tree  # a sharded cache is bound already, and the rest may follow it
    return jax.device_put(tree, jax.tree.map(lambda leaf: leaf.sharding, tree))
