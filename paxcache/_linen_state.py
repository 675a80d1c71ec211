"""The paged cache among the variables of a Linen model: where it stands, and what layers leave for it in `model.init`.

The "cache" collection holds one state for the whole model, in the deepest scope that all paged layers share. Each layer
looks for it from its own scope upwards.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
from flax.core import meta

from paxcache import _forward
from paxcache._types import PagedKVCache

if TYPE_CHECKING:
    from flax.core import Scope

    from paxcache._cache import Layer

type Path = tuple[str, ...]
type Variables = Mapping[str, Any]

STATE = "paxcache"  # name of the variable that holds the state
LAYER = "paged_layer"  # name of what a layer leaves in model.init, with its index if it has one


class _OfNoAxis(meta.AxisMetadata):
    """A variable that no transformation may slice or stack; Flax asks it before it does."""

    def unbox(self) -> Any:
        """Itself."""
        return self

    def replace_boxed(self, val: Any) -> Any:
        """The other value."""
        return val

    def add_axis(self, index: int, params: dict[Any, Any]) -> Any:
        """Refuses.

        Raises:
          ValueError: always.
        """
        raise ValueError(
            'variable_axes: the paged cache has no axis of layers or rows to slice; leave "cache" out of it. nn.scan '
            'must carry the cache: variable_carry="cache", and init_cache with scanned_in. nn.vmap cannot share it'
        )

    def remove_axis(self, index: int, params: dict[Any, Any]) -> Any:
        """Refuses, as `add_axis`."""
        return self.add_axis(index, params)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State(_OfNoAxis):
    """The one variable of a paged model."""

    forward: _forward.Forward
    layers: tuple[tuple[Path, Layer], ...] = dataclasses.field(metadata={"static": True})
    """Paths of the layers that found their index in `init_cache`."""
    masks_are_causal: bool = dataclasses.field(metadata={"static": True})

    def layer_at(self, path: Path) -> Layer | None:
        """The index of the layer at a path; None where layers are counted."""
        if self.forward.calls is not None:
            return None
        layer = dict(self.layers).get(path)
        if layer is None:
            known = ", ".join("/".join(known) for known, _ in self.layers) or "no layer"
            raise ValueError(f"{name_of(path)}: unknown to the cache, which was made for {known}")
        return layer


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Announced(_OfNoAxis):
    """What a layer leaves in `model.init`."""

    shape: _forward.LayerShape
    root: Path
    """Scope of the innermost transformation around the layer, above which it can find nothing."""
    transformations: tuple[str, ...]
    """Flax's name of it and those further out."""


def name_of(path: Path) -> str:
    """A layer's name in a message."""
    return "/".join(path) or "the model"


def root_of(scope: Scope) -> Scope:
    """The highest scope that can be seen from one."""
    while scope.parent is not None:
        scope = scope.parent
    return scope


def find(scope: Scope) -> Scope | None:
    """The scope that holds the state: this one or an ancestor."""
    at: Scope | None = scope
    while at is not None:
        if at.has_variable("cache", STATE):
            return at
        at = at.parent
    return None


# Transformations around a layer. Linen gives a lifted module scopes of its own and does not say why, but the call
# passes through `flax.core.lift`, so the stack knows which it was.

REMEDIES = {
    "checkpoint": "nn.remat hides a cache that stands outside of it. Decode with a model built without nn.remat, which "
    "serves gradients alone; give its blocks names, so that the parameters keep theirs",
    "jit": "nn.jit hides a cache that stands outside of it. Build the model without nn.jit, and jit model.apply "
    "as a whole",
    "vmap": "nn.vmap maps over the layer, and the rows of one cache cannot be mapped over. Call the layer with all "
    "rows, [B, Q, features]",
    "scan": 'nn.scan must carry the cache: variable_carry="cache" without "cache" in variable_axes, and init_cache '
    "with scanned_in=path of the scanned module",
    "while_loop": "nn.while_loop loses what a layer of an outer module writes. Call the layer in a Python loop, with "
    'init_cache(count_calls=True), or under nn.scan with variable_carry="cache", and init_cache with scanned_in',
    "cond": "nn.cond hides the cache, and every pass must run every layer. Call the layer outside of nn.cond",
    "switch": "nn.switch hides the cache, and every pass must run every layer. Call the layer outside of nn.switch",
}


def transformations() -> tuple[str, ...]:
    """Names of Flax's transformations of modules around the call, innermost first."""
    found, frame = [], sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == "flax.core.lift":
            name = frame.f_code.co_qualname.partition(".")[0]
            if name in REMEDIES and found[-1:] != [name]:
                found.append(name)
        frame = frame.f_back
    return tuple(found)


def hidden(path: Path, around: tuple[str, ...]) -> ValueError:
    """The error of a layer that cannot reach the cache."""
    if around:
        return ValueError(f"{name_of(path)}: no paged cache found from here upwards: {REMEDIES[around[0]]}")
    return ValueError(
        f"{name_of(path)}: no paged cache found from here upwards. Call paxcache.linen.init_cache on the "
        "variables first"
    )


def announce(scope: Scope, name: str, shape: _forward.LayerShape) -> None:
    """Leaves a layer's shape for `init_cache`, where it can be left.

    Raises:
      ValueError: the layer is mapped over.
    """
    around = transformations()
    if "vmap" in around:
        raise hidden(scope.path, ("vmap",))
    root = root_of(scope).path
    # The carry of a loop must keep its structure, so nothing may be left behind in one.
    if (set(around) <= {"checkpoint", "jit"} and (around or not root)) and scope.is_mutable_collection(
        "cache"
    ):
        scope.put_variable("cache", name, Announced(shape, root, around))


def _require_mapping(variables: Any) -> None:
    if not isinstance(variables, Mapping):
        raise TypeError(f"variables: expected a mapping of collections, got {type(variables).__name__}")


def take_announced(variables: Variables) -> tuple[dict[str, Any], dict[tuple[Path, int | None], Announced]]:
    """A copy of the cache collection without what layers left in it, and that."""
    _require_mapping(variables)
    announced: dict[tuple[Path, int | None], Announced] = {}

    def walk(tree, path):
        kept = {}
        for name, value in tree.items():
            if isinstance(value, Mapping):
                if inner := walk(value, (*path, name)):
                    kept[name] = inner
            elif isinstance(value, Announced):
                index = None if name == LAYER else int(name.removeprefix(f"{LAYER}_"))
                announced[path, index] = value
            elif name != STATE:
                kept[name] = value
        return kept

    return walk(variables.get("cache", {}), ()), announced


def in_order(announced: dict[tuple[Path, int | None], Announced]) -> list[tuple[Path, int | None, Announced]]:
    """Layers in the natural order of their paths."""
    items = [(path, index, layer) for (path, index), layer in announced.items()]
    return sorted(items, key=lambda item: _forward.natural_order(item[0]))


def number_layers(
    announced: dict[tuple[Path, int | None], Announced], kv: PagedKVCache
) -> tuple[tuple[Path, Layer], ...]:
    """The layers without an index of their own, with the indices that are left."""
    given = [index for _, index in announced if index is not None]
    expected = _forward.num_layers(kv)
    if len(announced) != expected or len(set(given)) != len(given) or not set(given) <= set(range(expected)):
        raise ValueError(
            f"variables: the cache has {expected} layers, but {len(announced)} paged layers were found"
            + (f", with the indices {sorted(given)}" if given else "")
            + (
                ". Layers that run several times in one pass (shared weights) need count_calls=True"
                if announced
                else f". If layers run under nn.scan: {REMEDIES['scan']}. If not: variables must come from "
                "model.init with decode=True"
            )
        )
    rest = iter(sorted(set(range(expected)) - set(given)))
    layers = []
    for path, index, layer in in_order(announced):
        at = next(rest) if index is None else index
        _forward.check_layer(name_of(path), kv, at, layer.shape)
        if index is None:
            layers.append((path, at))
    return tuple(layers)


def place_for(announced: dict[tuple[Path, int | None], Announced]) -> Path:
    """The deepest path that all layers share, which all of them must be able to see."""
    paths = [path for path, _ in announced]
    depth = 0
    while all(len(path) > depth and path[depth] == paths[0][depth] for path in paths):
        depth += 1
    for (path, _), layer in announced.items():
        if len(layer.root) > depth:
            raise hidden(path, layer.transformations)
    return paths[0][:depth]


def scanned_path(variables: Variables, path: Any) -> Path:
    """A path of a module, checked against the parameters."""
    if isinstance(path, str) or not all(isinstance(name, str) for name in path):
        raise TypeError(f"scanned_in: expected a tuple of names, such as ('layers',), got {path!r}")
    tree = variables.get("params", {})
    for name in path if "params" in variables else ():
        if name not in tree:
            raise ValueError(
                f"scanned_in: {'/'.join(path)} has no parameters; known there: {', '.join(tree)}"
            )
        tree = tree[name]
    return tuple(path)


def scanned_shapes(variables: Variables, path: Path) -> list[_forward.LayerShape]:
    """Shapes of the stock layers under a scan, which its stacked parameters tell."""
    tree = variables.get("params", {})
    for name in path:
        tree = tree.get(name, {})

    def walk(tree) -> Iterator[_forward.LayerShape]:
        if "query" in tree and "key" in tree and "out" in tree:
            key = meta.unbox(tree["key"]["kernel"])
            if key.ndim == 4:  # [L, features, K, D]
                heads = meta.unbox(tree["query"]["kernel"]).shape[2]
                shape = _forward.LayerShape(heads, key.shape[2], key.shape[3], key.shape[3], key.dtype)
                yield from [shape] * key.shape[0]
            return
        for name in sorted(tree, key=lambda name: _forward.natural_order((name,))):
            if isinstance(tree[name], Mapping):
                yield from walk(tree[name])

    return list(walk(tree))


def locate(variables: Variables) -> tuple[Path, State]:
    """Where the state stands in the cache collection."""

    def search(tree, path):
        for name, value in tree.items():
            if name == STATE and isinstance(value, State):
                return path, value
            if isinstance(value, Mapping) and (found := search(value, (*path, name))):
                return found
        return None

    _require_mapping(variables)
    found = search(variables.get("cache", {}), ())
    if found is None:
        raise ValueError("variables: expected a paged cache in the collection 'cache'; see init_cache")
    return found


def put(tree: Any, path: Path, state: State | None) -> dict[str, Any]:
    """A copy of a cache collection with another state (none at all for None)."""
    copy = dict(tree)
    if path:
        copy[path[0]] = put(copy.get(path[0], {}), path[1:], state)
    elif state is None:
        copy.pop(STATE, None)
    else:
        copy[STATE] = state
    return copy


def replace(variables: Variables, path: Path, state: State, forward: _forward.Forward) -> dict[str, Any]:
    """The variables with a new pass or a new cache."""
    changed = dataclasses.replace(state, forward=forward)
    return {**variables, "cache": put(variables["cache"], path, changed)}
