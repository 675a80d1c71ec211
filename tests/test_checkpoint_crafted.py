"""Checkpoints that somebody wrote by hand, with right checksums: one clear error, and never half a state."""

from __future__ import annotations

import json
import os
import random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paxcache
from driver import config_of
from layouts import group
from paxcache import offload, persist, prefix
from paxcache.persist import _checkpoint, _classes, _tree_json

NAN = float("nan")
DEEP: Any = 1
for _ in range(_tree_json.MAX_DEPTH + 1):
    DEEP = ["list", DEEP]


def make_state() -> dict[str, Any]:
    """A value of every kind, and an index and a tier with pages in them."""
    config = config_of(group(num_layers=1), num_pages=8)
    cache, index = paxcache.init(config), prefix.init(config, events=True)
    cache, _ = paxcache.extend(cache, jnp.array([9, 0, 0, 0]), max_query_len=9)
    salt = prefix.ExtraKey(salt=("a", 1), items=(prefix.Item(b"image", 0, 2),))
    cache, index = prefix.publish(cache, index, 0, range(9), extra_key=salt)
    cache = paxcache.release(cache, jnp.array([True, False, False, False]))
    cache, index, tier, _ = offload.evict(cache, index, offload.init_tier(config, 8), 1)
    return {
        "pin": prefix.Pin(3, 1),
        "x": jnp.arange(6.0).reshape(2, 3),
        "none": jnp.zeros((0, 2)),
        "key": jax.random.key(0),
        "numpy": np.arange(4),
        "scalar": np.float32(1),
        "plain": (b"abc", None, True, 0.5, "text", [1, 2]),
        "dtype": np.dtype("bfloat16"),
        "status": paxcache.Status.OK,
        "cache": cache,
        "index": index,
        "tier": tier,
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    persist.save(folder, make_state())
    file = folder / "state-1" / "tree" / "metadata"
    return folder, file, json.loads(file.read_text())


def load_changed(saved, text: str | None = None, **changes):
    """What the checkpoint gives with another description, whose checksum is right."""
    folder, file, described = saved
    if text is None:
        changed = {name: value for name, value in {**described, **changes}.items() if value is not ...}
        changed["checksum"] = _checkpoint._text_checksum(changed)
        text = json.dumps(changed)
    file.write_text(text)
    try:
        return persist.load(folder)
    finally:
        file.write_text(json.dumps(described))


def node_of(saved, name: str) -> Any:
    """The node of a value of the state."""
    return next(part for key, part in saved[2]["tree"][1:] if key == name)


def with_field(node, saved, field: str, value: Any) -> Any:
    """A node of a class of this library with another value of a field."""
    node = list(node)
    node[2 + saved[2]["types"][node[1]].index(field)] = value
    return node


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        # kinds
        (["known", "os.system", "true"], "expected a type of this library, got 'os.system'"),
        (["reduce", "true"], "expected a description of a tree, got 'reduce' of .* at tree"),
        ([], "expected a description of a tree, got .* at tree"),
        ({}, "expected a description of a tree, got .* at tree"),
        ({"a": 1}, "expected a description of a tree, got .* at tree"),
        ([["tuple"]], "expected a description of a tree"),
        ([None], "expected a description of a tree"),
        (["tuple", 1, ["list", ["dict", {}]]], r"expected a description of a tree, .* at tree\[1\]\[0\]"),
        (DEEP, "expected at most 200 levels"),
        # bytes
        (["bytes"], "expected a description of a tree, got 'bytes'"),
        (["bytes", -1, 1], "expected a description of a tree, got 'bytes'"),
        (["bytes", 0, -1], "expected a description of a tree, got 'bytes'"),
        (["bytes", 0, 2**70], "expected a description of a tree, got 'bytes'"),
        (["bytes", 2**70, 0], "expected a description of a tree, got 'bytes'"),
        (["bytes", 0.0, 1], "expected a description of a tree, got 'bytes'"),
        (["bytes", False, True], "expected a description of a tree, got 'bytes'"),
        (["bytes", NAN, 1], "expected a description of a tree, got 'bytes'"),
        (["bytes", "0", 1], "expected a description of a tree, got 'bytes'"),
        # dicts
        (["dict", ["a"]], "expected a description of a tree, got 'dict'"),
        (["dict", "ab"], "expected a description of a tree, got 'dict'"),
        (["dict", ["a", 1], ["a", 2]], "expected keys of a dict, each once"),
        (["dict", [1, 1], [True, 2]], "expected keys of a dict, each once"),
        (["dict", [["list"], 1]], "expected keys of a dict, each once"),
        # NumPy
        (["numpy", "object", [1], 0], "expected a dtype, got 'object'"),
        (["numpy", "i4,i4", [1], 0], "expected a dtype"),
        (["numpy", "f4", [1], 0], "expected a dtype"),
        (["numpy", "nothing", [1], 0], "expected a dtype"),
        (["numpy", "(", [1], 0], "expected a dtype"),
        (["numpy", 4, [1], 0], "expected a description of a tree, got 'numpy'"),
        (["numpy", "int8", [-1], 0], "expected a description of a tree, got 'numpy'"),
        (["numpy", "int8", [True], 0], "expected a description of a tree, got 'numpy'"),
        (["numpy", "int8", 1, 0], "expected a description of a tree, got 'numpy'"),
        (["numpy", "int8", [1], -1], "expected a description of a tree, got 'numpy'"),
        (["numpy", "int8", [2**60], 0], r"expected int8\[.*\] within .* bytes"),
        (["numpy", "int8", [1], 2**60], r"expected int8\[1\] within .* bytes"),
        (["numpy", "int8", [0, 2**70], 0], "expected an array, got shape"),
        (["numpy", "int8", [1] * 99, 0], "expected an array, got shape"),
        (
            ["numpy scalar", "int8", [1], 0],
            r"expected a description of a tree, got \['numpy scalar'",
        ),
        (["dtype", "object"], "expected a dtype"),
        (["dtype", None], "expected a description of a tree, got 'dtype'"),
        # members and classes
        (["enum", "Status", 99], "expected a member of Status, got 99"),
        (["enum", "Status", True], "expected a description of a tree, got 'enum'"),
        (["enum", "Status", [1]], "expected a description of a tree, got 'enum'"),
        (["enum", "Pin", 1], "expected a member of Pin, got 1"),
        (["enum", "Nothing", 1], "expected a type of this library"),
        (["known", "Pin"], "expected the fields .* of Pin, got"),
        (["known", "Pin", 1], "expected the fields .* of Pin, got"),
        (["known", "Pin", 1, 2, 3], "expected the fields .* of Pin, got"),
        (["known", "Pin", "1", 2], "expected int, got '1' at tree.num_tokens"),
        (["known", "Pin", 1, None], "expected int, got None at tree.node"),
        (["known", "Pin", True, 1], "expected int, got True at tree.num_tokens"),
        (["known", "Pin", 1.0, 1], "expected int, got 1.0 at tree.num_tokens"),
        (["known", "Pin", NAN, 1], "expected int, got nan at tree.num_tokens"),
        (["known", "Status", 1], "expected the fields None of Status"),
        (["known", "Host", 1, 1, 1, 1, "disk"], "expected the fields None of Host"),  # none was saved
        (["known", "Item", ["bytes", 0, 1], -1, 1], None),  # a tuple, which checks nothing
        (
            ["known", "ExtraKey", None, ["tuple", ["known", "Item", ["bytes", 0, 1], -1, 1]]],
            "expected a ExtraKey, .*offset must be at least 0",
        ),
        (["known", "ExtraKey", ["list"], ["tuple"]], "expected Salt, got .* at tree.salt"),
        (["known", "Removed", ["tuple", "a"]], r"expected tuple\[bytes, ...\], got"),
        # what is shared
        (["shared"], "expected a description of a tree, got 'shared'"),
        (["shared", -1], "expected a description of a tree, got 'shared'"),
        (["shared", 10**9], "expected a description of a tree, got 'shared'"),
        (["shared", "0"], "expected a description of a tree, got 'shared'"),
        # arrays
        (["array"], "expected a description of a tree, got 'array'"),
        (["array", 0, "float32", [2, 3]], "expected a description of a tree, got 'array'"),
        (["array", "0", "float32", [2, 3], None], "expected a description of a tree, got 'array'"),
        (["array", -1, "float32", [2, 3], None], "expected a description of a tree, got 'array'"),
        (["array", 0, "float32", [2, 3], 7], "expected a description of a tree, got 'array'"),
        (["array", 0, "float32", [-2, 3], None], "expected a description of a tree, got 'array'"),
        (["array", 0, "float32", [2.0, 3], None], "expected a description of a tree, got 'array'"),
        (["array", 0, "float", [2, 3], None], "expected a dtype"),
        (["array", 0, "float32", [2, 3], None], "expected checksums of arrays"),  # the others are missing
        (["tuple", *[["array", 0, "float32", [2, 3], None]] * 2], "expected each array once, got 0 again"),
        # keys
        (
            ["key", "nothing", ["array", 0, "uint32", [2], None]],
            "expected a kind of random keys, got 'nothing'",
        ),
        (
            ["key", "fry", ["array", 0, "uint32", [2], None]],
            "expected a kind of random keys, got 'fry'",
        ),
        (["key", "threefry2x32", ["array", 0, "uint32", [3], None]], "expected data of threefry2x32 keys"),
        (["key", "threefry2x32", ["array", 0, "uint32", [], None]], "expected data of threefry2x32 keys"),
        (
            ["key", "threefry2x32", ["array", 0, "int32", [2], None]],
            "expected a description of a tree, got 'key'",
        ),
        (["key", "threefry2x32", 1], "expected a description of a tree, got 'key'"),
        (["key", "threefry2x32", ["tuple"]], "expected a description of a tree, got 'key'"),
        # pytrees of others
        (["pytree"], "expected a description of a tree, got 'pytree'"),
        (["pytree", 1], "expected a description of a tree, got 'pytree'"),
    ],
)
def test_a_crafted_tree_is_one_clear_error(saved, tree, message):
    """As a part of the state, so that arrays and types are there that it may name."""
    if message is None:
        message = "expected checksums of arrays"
    with pytest.raises(ValueError, match=f"path: (damaged: )?({message})") as caught:
        load_changed(saved, tree=tree)
    assert type(caught.value) is ValueError and str(saved[0]) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 1}, "expected version 2, got 1"),
        ({"version": 3}, "expected version 2, got 3"),
        ({"version": 2.0}, "expected version 2, got 2.0"),
        ({"version": "2"}, "expected version 2, got '2'"),
        ({"version": ...}, "expected version 2, got None"),
        ({"format": None}, "expected format 'paxcache checkpoint', got None"),
        ({"format": ["a"] * 999}, "expected format 'paxcache checkpoint', got"),
        ({"tree": ...}, "expected tree in the description"),
        ({"shared": ...}, "expected shared in the description"),
        ({"types": ...}, "expected types in the description"),
        ({"types": []}, "expected a list of shared values and types by name"),
        (
            {"types": {"Pin": ["node"]}},
            "written by another version .*expected the fields .*num_tokens.* of Pin, got",
        ),
        ({"types": {"Pin": None}}, "written by another version"),
        ({"types": {"Later": ["x"]}}, "written by another version"),
        ({"types": {}}, "expected the fields None of Pin"),
        ({"shared": {}}, "expected a list of shared values and types by name"),
        ({"shared": []}, "expected a description of a tree, got 'shared'"),
        ({"shared": [1]}, "expected a run of pages, got 1"),
        ({"shared": [["shared", 0]]}, "expected at most 200 levels"),
        ({"shared": [["known", "Pin", 1, 2]]}, "expected a run of pages, got Pin"),
        ({"checksums": ...}, "expected checksums of arrays, got None"),
        ({"checksums": {}}, "expected checksums of arrays .*, got those of"),
        ({"checksums": {"0": None}}, "expected checksums of arrays, got"),
        ({"checksums": {"0": -1}}, "expected checksums of arrays, got"),
        ({"checksums": {"00": 1}}, "expected checksums of arrays"),
        ({"host_bytes": ...}, "expected host_bytes, got None"),
        ({"host_bytes": -1}, "expected host_bytes, got -1"),
        ({"host_bytes": True}, "expected host_bytes, got True"),
        ({"host_bytes": 2**60}, "damaged: expected .* in host, got"),
        ({"host_checksum": ...}, "expected host_checksum, got None"),
        ({"host_checksum": "1"}, "expected host_checksum, got '1'"),
        ({"host_checksum": 1}, "damaged: expected checksum 1 of values beside the arrays"),
    ],
)
def test_a_crafted_description_is_one_clear_error(saved, changes, message):
    with pytest.raises(ValueError, match=f"path: {message}") as caught:
        load_changed(saved, **changes)
    assert type(caught.value) is ValueError and str(saved[0]) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected JSON, got"),
        ("{", "expected JSON, got"),
        ("\0", "expected JSON, got"),
        ("[" * 10**6, "expected JSON, got too many levels"),
        ("9" * 5000, "expected JSON, got"),
        ("[]", r"expected format 'paxcache checkpoint', got \[\]"),
        ("null", "expected format 'paxcache checkpoint', got None"),
        ('{"format": 1, "format": "paxcache checkpoint"}', "expected each name once, got"),
        (
            '{"format": "paxcache checkpoint", "version": 2}',
            "damaged: expected checksum None of the description",
        ),
    ],
)
def test_what_is_no_description_is_one_clear_error(saved, text, message):
    with pytest.raises(ValueError, match=f"path: {message}") as caught:
        load_changed(saved, text)
    assert type(caught.value) is ValueError and str(saved[0]) in str(caught.value)


def test_values_of_other_shapes_and_types_than_were_saved(saved):
    """Within the state, where all else is right: by name, the part of it and what is changed there."""
    x, none, cache, index, tier = (node_of(saved, name) for name in ("x", "none", "cache", "index", "tier"))
    assert x[:4] == ["array", 0, "float32", [2, 3]]
    nodes = index[2 + saved[2]["types"]["Index"].index("nodes")]
    assert nodes[:2] == ["tuple", 0]
    for name, node, message in (
        ("x", [*x[:3], [3, 2], None], "damaged: expected .*in arrays, got"),
        ("x", [*x[:3], [2, 2], None], "damaged: expected .*in arrays, got"),
        ("x", [*x[:3], [2**20, 2**20], None], "damaged: expected .*in arrays, got"),
        ("x", [*x[:2], "int32", [2, 3], None], "damaged: expected .*in arrays, got"),
        ("x", [*x[:3], [0, 3], None], "expected checksums of arrays"),
        ("none", x, "expected each array once, got 0 again"),
        ("none", [*none[:3], [0, 2**70], None], r"expected a shape, got .* at tree\['none'\]"),
        (
            "cache",
            with_field(cache, saved, "seq_lens", 3),
            r"expected Int32.*, got 3 at tree\['cache'\].seq_lens",
        ),
        ("cache", with_field(cache, saved, "groups", ["list"]), "expected tuple.*, got .*groups"),
        ("cache", with_field(cache, saved, "groups", ["tuple", 1]), "expected tuple.*, got .*groups"),
        ("index", with_field(index, saved, "page_size", "4"), "expected int, got '4' at .*page_size"),
        ("index", with_field(index, saved, "log", ["list"]), "expected a tuple of events, got"),
        (
            "index",
            with_field(index, saved, "nodes", ["tuple", 0, ["tuple", 1], ["tuple", 1]]),
            "expected Tree",
        ),
        ("index", with_field(index, saved, "nodes", ["tuple", 1, *nodes[2:]]), "expected Tree, got .*nodes"),
        ("index", with_field(index, saved, "nodes", [*nodes[:2], ["tuple"], ["tuple"]]), "expected Tree"),
        (
            "index",
            with_field(index, saved, "pins", ["tuple", 0, ["tuple", 2, 1], ["tuple", 1, 1]]),
            "expected Tree",
        ),
        (
            "index",
            with_field(index, saved, "pins", ["tuple", 0, ["tuple", 2, "a"], ["tuple", 1, 1]]),
            "expected Tree",
        ),
        ("index", with_field(index, saved, "held", ["tuple", node_of(saved, "numpy")]), "expected .*Bool"),
        ("tier", with_field(tier, saved, "capacity", ["tuple", None]), "expected tuple.*capacity"),
    ):
        pairs = [[key, node if key == name else part] for key, part in saved[2]["tree"][1:]]
        with pytest.raises(ValueError, match=f"path: {message}"):
            load_changed(saved, tree=["dict", *pairs])


def change_somewhere(node: Any, rng: random.Random) -> Any:
    """A description with one odd value somewhere in it, or a part that is missing, there twice, or elsewhere."""
    if not isinstance(node, list) or not node or rng.random() < 0.1:
        return rng.choice(
            [None, True, -1, 0, 1, 2**70, NAN, 0.5, "", "list", [], ["list"], {}, DEEP, [node], [node] * 2]
        )
    node, at = list(node), rng.randrange(len(node))
    how = rng.random()
    if how < 0.05:
        del node[at]
    elif how < 0.1:
        node.insert(at, node[at])
    elif how < 0.15:
        rng.shuffle(node)
    else:
        node[at] = change_somewhere(node[at], rng)
    return node


def test_any_change_is_one_clear_error_or_another_whole_state():
    """Whatever is changed: it is refused, or what comes of it can be described again."""
    made, rng = _tree_json.describe(make_state()), random.Random(0)
    num_refused = 0
    for _ in range(400):
        tree, shared = made.tree, made.shared
        if rng.random() < 0.8:
            tree = change_somewhere(tree, rng)
        else:
            shared = change_somewhere(shared, rng)
        try:
            reader = _tree_json.Reader(tree, shared, made.types, made.data, None)
            wanted = reader.plan()
            if all(wanted[n].shape == x.shape for n, x in enumerate(made.arrays) if n in wanted):
                _tree_json.describe(reader.build({n: made.arrays[n] for n in wanted}))
        except _tree_json.MalformedError as error:
            num_refused += 1
            assert "expected" in str(error)
    assert 200 < num_refused < 400


def test_every_field_is_checked():
    """The classes' own annotations say what their fields are; none of them is unknown."""
    for name, cls in _classes.TYPES.items():
        assert cls.__name__ == name
        if not issubclass(cls, paxcache.Status):
            assert [field for field, _, _ in _classes._checks_of(cls)] == _classes.fields(cls)
    cache = paxcache.init(config_of())
    for odd in (None, 3, "a", np.zeros(4, np.float32), jnp.zeros(4)):
        assert _classes.misfit(type(cache), [odd, cache.groups, cache.epochs]) == (
            "seq_lens",
            "Int32[Array, 'B']",
            odd,
        )


def test_what_is_no_file_is_not_opened(tmp_path):
    """In any place of a checkpoint: a FIFO would wait for its other end for ever, a device for its own."""
    persist.save(tmp_path, {"x": jnp.arange(4), "y": 1})
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        data = path.read_bytes()
        for target in (None, "/dev/zero"):
            path.unlink()
            path.symlink_to(target) if target else os.mkfifo(path)
            with pytest.raises(ValueError, match=r"path: expected a file, got a (FIFO|device)") as caught:
                persist.load(tmp_path)
            assert str(path) in str(caught.value)
        path.unlink()
        path.write_bytes(data)
    assert persist.load(tmp_path)["y"] == 1
    (tmp_path / "state-1" / "tree").rename(tmp_path / "tree")
    (tmp_path / "state-1" / "tree").symlink_to(tmp_path / "tree")
    with pytest.raises(ValueError, match="path: expected a directory, got a link to one"):
        persist.load(tmp_path)


def test_a_long_description_is_not_read(tmp_path):
    """Of a terabyte, which no process could read."""
    persist.save(tmp_path, {})
    os.truncate(tmp_path / "state-1" / "tree" / "metadata", 2**40)
    with pytest.raises(ValueError, match="path: damaged: expected a description, got 1099511627776 bytes"):
        persist.load(tmp_path)


def test_without_64_bits_such_arrays_are_refused(tmp_path):
    with jax.enable_x64(True):
        persist.save(tmp_path, {"x": jnp.arange(3.0, dtype=jnp.float64)})
        assert persist.load(tmp_path)["x"].dtype == jnp.float64
    with pytest.raises(ValueError, match=r"path: float64\[3\] at tree\['x'\] needs jax_enable_x64"):
        persist.load(tmp_path)
