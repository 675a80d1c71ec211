"""Every argument of every call of `offload`, with values that it cannot take: the error names it."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import paxcache
from driver import config_of
from layouts import group, ids
from paxcache import offload, prefix

CONFIG = config_of(group(num_layers=1), num_pages=12)
PROMPT = list(range(6))


@functools.cache
def parts() -> dict[str, Any]:
    """One value of each kind."""
    cache, index = paxcache.init(CONFIG), prefix.init(CONFIG)
    cache, _ = paxcache.extend(cache, jnp.array([6, 3, 0, 0]), max_query_len=6)
    cache, index = prefix.publish(cache, index, 0, PROMPT)
    host = offload.init(CONFIG, 8)
    idle, account, ticket = offload.preempt(cache, host, ids(1), by_layer=True)
    begun, _, arrival, ok = offload.begin_resume(idle, account, ticket, ids(1))
    assert ok
    return {
        "cache": cache,
        "index": index,
        "host": host,
        "idle": idle,
        "account": account,
        "ticket": ticket,
        "begun": begun,
        "arrival": arrival,
        "extent": offload.swap_out(cache, ids(0, 1), by_layer=True),
        "tier": offload.init_tier(CONFIG, 8),
        "asleep": offload.sleep(cache),
    }


def calls() -> dict[str, dict[str, Any]]:
    """Arguments that each call takes."""
    p = parts()
    cache, index, tier = p["cache"], p["index"], p["tier"]
    stored = {"cache": cache, "index": index, "tier": tier}
    ticket = {"cache": p["idle"], "host": p["account"], "ticket": p["ticket"], "rows": ids(1)}
    landing = {"layer": 0, "arrival": p["arrival"]}
    return {
        "init": {"config": CONFIG, "num_pages": 8, "memory_kind": "pinned_host"},
        "preempt": {"cache": cache, "host": p["host"], "rows": ids(1), "max_pages": 4, "by_layer": True},
        "resume": ticket,
        "discard": {"host": p["account"], "ticket": p["ticket"]},
        "swap_out": {
            "cache": cache,
            "page_ids": ids(0, 1),
            "memory_kind": "pinned_host",
            "by_layer": True,
            "layers": [0],
        },
        "swap_in": {"cache": cache, "extent": p["extent"], "page_ids": ids(0, 1)},
        "drop": {"cache": cache, "page_ids": ids(-1)},
        "begin_swap_in": {"cache": cache, "extent": p["extent"]},
        "begin_resume": ticket,
        "land": {"cache": p["begun"], **landing},
        "cancel": {"cache": p["begun"], "arrival": p["arrival"]},
        "fetch": {"arrival": p["arrival"]},
        "wait": {"layer": 0, "arrival": offload.fetch(p["arrival"]), "timeout": 10.0},
        "time_layers": {"arrival": p["arrival"]},
        "defragment": {"cache": cache},
        "resize": {"cache": cache, "num_pages": 13},
        "resize_index": {"cache": cache, "index": index},
        "sleep": {"cache": cache, "keep_pages": True, "memory_kind": "pinned_host"},
        "wake": {"asleep": p["asleep"]},
        "init_tier": {"config": CONFIG, "num_pages": 8, "memory_kind": "pinned_host", "block_bytes": 999},
        "evict": {**stored, "num_pages": 1, "policy": "lru", "now": 1.0},
        "make_room": {**stored, "query_lens": jnp.array([1, 1, 1, 1]), "num_tokens": 4, "now": 1.0},
        "write_through": {**stored, "prompts": [PROMPT], "extra_keys": [None], "min_hits": 0},
        "match": {"index": index, "tier": tier, "tokens": PROMPT, "extra_key": None},
        "prefetch": {
            **stored,
            "tokens": PROMPT,
            "max_pages": 2,
            "policy": "lru",
            "now": 1.0,
            "donate": False,
        },
        "remove": {"tier": tier, "keys": [bytes(32)]},
        "clear": {"tier": tier},
        "bind_thread": {"device": jax.devices("cpu")[0]},
    }


OPTIONAL = {
    "max_pages",
    "layers",
    "swap_in page_ids",
    "num_tokens",
    "policy",
    "now",
    "extra_key",
    "extra_keys",
    "device",
}
"""Arguments that may be None; `num_tokens` is refused with `max_query_len`, whose names stand together."""

WRONG = {
    "None": None,
    "text": "text",
    "number": -7,
    "fraction": 2.5,
    "nan": float("nan"),
    "object": object(),
    "tuple": (),
    "list": [None],
    "dict": {},
    "array": jnp.zeros((1, 2, 3)),
}
FINE = {  # what is a value like others for an argument of that name, or holds nothing that could be wrong
    "now": {"fraction"},
    "timeout": {"fraction"},
    "extra_key": {"text", "number", "tuple"},
    "page_ids": {"number"},
    "rows": {"tuple"},
    "layers": {"tuple", "dict"},
    "extra_keys": {"list"},
    "keys": {"tuple", "dict"},
    "tokens": {"tuple"},
    "prompts": {"tuple", "dict"},
}
NAMED_AS = {"prompts": "prompts|tokens", "extra_keys": "extra_key", "layers": "layer"}
"""What an error may name instead: one of the list."""


NAMES = [
    "init", "preempt", "resume", "discard", "swap_out", "swap_in", "drop", "begin_swap_in", "begin_resume", "land",
    "cancel", "fetch", "wait", "time_layers", "defragment", "resize", "resize_index", "sleep", "wake", "init_tier",
    "evict", "make_room", "write_through", "match", "prefetch", "remove", "clear", "bind_thread",
]  # fmt: skip


def test_every_call_is_here():
    functions = {name for name, value in vars(offload).items() if inspect.isfunction(value)}
    assert functions == set(NAMES) == set(calls())


@pytest.mark.parametrize("name", NAMES)
def test_errors_name_the_argument(name):
    call, arguments = getattr(offload, name), calls()[name]
    call(**arguments)
    for argument in arguments:
        for kind, value in WRONG.items():
            if kind in FINE.get(argument, ()):
                continue
            if value is None and (argument in OPTIONAL or f"{name} {argument}" in OPTIONAL):
                continue
            with pytest.raises((TypeError, ValueError), match=NAMED_AS.get(argument, argument)) as info:
                call(**{**arguments, argument: value})
            # Python's own words for what it met on the way name nothing that the caller wrote.
            assert ": " in str(info.value) or " must be " in str(info.value), (
                argument,
                kind,
                str(info.value),
            )


def test_values_of_other_making_are_refused():
    """Of the right class, with something else in it."""
    p = parts()
    extent, ticket, cache, host = p["extent"], p["ticket"], p["idle"], p["account"]
    for blocks in (None, (), 3, (None,), (extent.blocks[0][0],), ((None, None),), ((3,),)):
        bad = dataclasses.replace(extent, blocks=blocks)
        for call in (offload.swap_in, offload.begin_swap_in):
            with pytest.raises((TypeError, ValueError), match="extent: expected"):
                call(cache, bad)
        with pytest.raises((TypeError, ValueError), match="ticket: expected"):
            offload.resume(cache, host, dataclasses.replace(ticket, extent=bad), ids(1))
    for held in (None, (), (None,), (jnp.zeros(2, jnp.int32),), (jnp.zeros(1, bool),)):
        with pytest.raises((TypeError, ValueError), match="extent"):
            offload.swap_in(cache, dataclasses.replace(extent, held=held))
    for layer in ((), (0,), (0, 1), (1, 0), (0, 0, 0), -1, 1, (0, None)):
        with pytest.raises((TypeError, ValueError), match="layer"):
            offload.land(p["begun"], layer, p["arrival"])  # pyright: ignore
    for layers in ([1], [-1], [(0, 1)], [(1, 0)], [None], "0", 0):
        with pytest.raises((TypeError, ValueError), match="layer"):
            offload.swap_out(cache, ids(0), layers=layers)  # pyright: ignore
    with pytest.raises(ValueError, match="page_ids: expected shape"):
        offload.swap_in(p["cache"], extent, page_ids=ids(0))
    with pytest.raises(ValueError, match="timeout: expected at least 0 seconds, got -1"):
        offload.wait(0, offload.fetch(p["arrival"]), timeout=-1)
