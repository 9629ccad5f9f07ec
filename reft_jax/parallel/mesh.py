"""The device mesh (data, fsdp, tensor), and how the logical axes of the model are spread over it."""

import math
from contextlib import contextmanager

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from reft_jax.types import InputError

# Logical axis -> mesh axes, in training and scoring. Rows are spread over data and fsdp; weights over fsdp (gathered
# when used) and tensor. Between the products of a layer, positions are spread over tensor ("sequence parallelism",
# arXiv 2205.05198): norms and sums are then not computed by every device of a tensor group, nor kept by it.
RULES = (
    ("batch", ("data", "fsdp")),
    ("length", None),
    ("act_length", "tensor"),
    ("act_embed", None),
    ("layers", None),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("head_dim", None),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
)
# In rollouts a step reads all weights for one token per row, so gathering them would cost too much: the devices of one
# tensor group hold all weights together. And there are no positions to spread.
ROLLOUT_RULES = tuple((axis, None if axis in ("embed", "act_length") else where) for axis, where in RULES)


def make_mesh(data: int, fsdp: int, tensor: int, devices=None) -> Mesh:
    """Makes a mesh over `devices` (all if None); `data=-1` takes the devices that the other axes leave.

    Raises InputError if the product of the axes is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if data == -1:
        data = len(devices) // (fsdp * tensor)
    if data * fsdp * tensor != len(devices):
        raise InputError(f"config: mesh.data*fsdp*tensor = {data}*{fsdp}*{tensor} does not make {len(devices)} devices")
    # Auto axes: with jax's default Explicit ones Linen's embedding lookup fails.
    axes, kinds = ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3
    # Like jax.make_mesh, but a mesh axis may be a part of a torus axis: 8 of a 4 × 4 × 4.
    sizes = (data, fsdp, tensor)
    return Mesh(mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True), axes, axis_types=kinds)


@contextmanager
def on_mesh(mesh: Mesh):
    """Binds the model's logical constraints to `mesh` inside the `with` (`with mesh:` would drop them silently)."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield


def shardings(mesh: Mesh, abstract_params, rules=RULES):
    """Returns NamedShardings for a tree with its logical axes (boxed, as `eval_shape` of `model.init` gives it)."""
    return nn.logical_to_mesh_sharding(nn.get_partition_spec(abstract_params), mesh, rules)


def check_divides(mesh: Mesh, boxed) -> None:
    """Raises InputError if the mesh does not divide a dimension of a tensor; it names both.

    boxed: a tree with its logical axes, as for `shardings`.
    """
    for path, where in jax.tree.leaves_with_path(shardings(mesh, boxed)):
        box = boxed
        for key in path:
            box = box[key.key]
        for number, (size, axes) in enumerate(zip(box.value.shape, where.spec, strict=False)):
            ways = math.prod(mesh.shape[axis] for axis in ([axes] if isinstance(axes, str) else axes or ()))
            if size % ways:
                remedy = "choose a mesh that does"
                if box.names[number] == "kv_heads":
                    remedy = f"key-value heads are not copied, so mesh.tensor can be at most {size}, and must divide it"
                raise InputError(
                    f"config: mesh.{axes}={ways} does not divide dimension {number} ({box.names[number]}, {size}) of "
                    f"{'.'.join(key.key for key in path)} {list(box.value.shape)}; {remedy}"
                )


def by_row(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """The sharding that spreads rows (dimension `axis`) over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(*([None] * axis), ("data", "fsdp")))


def row_shards(mesh: Mesh) -> int:
    """The number of parts that rows are spread into; row counts must be a multiple of it."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def rows_per_device(rows: int) -> int:
    """How many of `rows` one device holds, under the mesh of `on_mesh`; without a mesh there is one device."""
    shape = jax.sharding.get_abstract_mesh().shape
    return -(-rows // (shape.get("data", 1) * shape.get("fsdp", 1)))


def round_up(n: int, multiple: int) -> int:
    """Rounds `n` up to a multiple, so that it shards evenly and few shapes are compiled."""
    return -(-n // multiple) * multiple


def sizes_up_to(largest: int, parts: int, multiple: int) -> list[int]:
    """The sizes that an array may have: 1/parts, 2/parts, … of the largest, each rounded up to a multiple.

    With so few sizes, few shapes are compiled.
    """
    largest = round_up(largest, multiple)
    return sorted({min(largest, round_up(-(-largest * part // parts), multiple)) for part in range(1, parts + 1)})


def put(tree, where):
    """Puts host arrays onto the mesh, by a tree of NamedShardings.

    Every host has each whole array and gives its own devices their parts. (`jax.device_put` would first compare the
    arrays of all hosts, over the devices.)
    """

    def put_one(x, sharding: NamedSharding):
        return jax.make_array_from_callback(np.shape(x), sharding, np.asarray(x).__getitem__)

    return jax.tree.map(put_one, tree, where)


def put_rows(mesh: Mesh, tree, axis: int = 0):
    """Puts host arrays onto the mesh, spread by row."""
    return put(tree, jax.tree.map(lambda _: by_row(mesh, axis), tree))


def unboxed(boxed):
    """Returns the tree without its logical axes. (`nn.unbox` constrains shardings, which fails on abstract arrays.)"""

    def is_box(x):
        return isinstance(x, nn.LogicallyPartitioned)

    return jax.tree.map(lambda x: x.value if is_box(x) else x, boxed, is_leaf=is_box)


def abstract_arrays(mesh: Mesh, boxed, rules=RULES):
    """Returns shapes, dtypes and shardings of a tree with its logical axes: the target of a restore."""
    return jax.tree.map(_placed, unboxed(boxed), shardings(mesh, boxed, rules))


def _placed(x, where: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def with_axes(mesh: Mesh, tree, axes, rules):
    """Returns shapes, dtypes and shardings of a tree; `axes` holds the logical axes of each array in its place."""

    def one(x, axes):
        return _placed(x, nn.logical_to_mesh_sharding(PartitionSpec(*axes), mesh, rules))

    return jax.tree.map(one, tree, axes)
