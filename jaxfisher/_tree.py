"""Parameters and vectors as pytrees: their order, their common dtype, and checks that name the first bad path.

A vector of the library is a pytree shaped like the parameters. Flat arrays appear only inside, in the order of
`jax.flatten_util.ravel_pytree`: leaves in pytree order, each raveled row by row.

The vector space is real. Inside the library a complex leaf is stored as two real ones, `Parts`: `split` is applied to the
user's trees, `joined` to the arguments of a user's function, and `joined` or `cast_like` to results.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, Scalar

from jaxfisher._values import check_array, check_flag, is_array, is_sparse, is_table
from jaxfisher._values import described as described
from jaxfisher._values import dtype_of as dtype_of

HIGHEST = jax.lax.Precision.HIGHEST
"""The precision of every product in the library: the default precision is that of bfloat16 on some devices."""


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """The static structure of a parameter pytree, all that an operator needs of it. It is hashable, as ``jit`` requires.

    ``dtype`` is that of statistics: float32, or float64 if a parameter is wider than float32.
    """

    treedef: Any
    paths: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[Any, ...]

    # Computed once: these are read for every leaf, and each reading goes through all leaves.
    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of scalars in each leaf."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def size(self) -> int:
        """Number of parameters, ``p``."""
        return sum(self.sizes)

    @functools.cached_property
    def dtype(self) -> Any:
        """The dtype of statistics: float32, or float64 if a parameter is float64."""
        wide = any(jnp.dtype(dtype).itemsize > 4 for dtype in self.dtypes)
        return jnp.dtype(jnp.float64 if wide else jnp.float32)

    def leaves(self, tree: chex.ArrayTree, name: str) -> list[Array]:
        """The leaves of a vector in the statistics dtype, after checking that it is shaped like the parameters."""
        self.check(tree, name)
        return [jnp.asarray(leaf).astype(self.dtype) for leaf in jax.tree.leaves(split(tree))]

    def vector(self, tree: chex.ArrayTree, name: str = "v") -> Any:
        """A vector in the statistics dtype, after checking that it is shaped like the parameters."""
        return self.tree(self.leaves(tree, name))

    def stacked(self, tree: chex.ArrayTree, name: str) -> list[Array]:
        """The leaves of vectors stacked along a leading axis, in the statistics dtype, after checking the shape of a vector."""
        leaves = jax.tree.leaves(tree)
        counts = {jnp.shape(leaf)[:1] for leaf in leaves}
        if len(counts) != 1 or counts == {()}:
            raise ValueError(
                f"`{name}` has leaves of shapes {[jnp.shape(leaf) for leaf in leaves]}; expected pytrees like the parameters "
                "stacked along a leading axis, of one length in all leaves. Stack them, such as with jnp.stack."
            )
        self.check(jax.eval_shape(lambda tree: jax.tree.map(lambda leaf: leaf[0], tree), tree), name)
        return [jnp.asarray(leaf).astype(self.dtype) for leaf in jax.tree.leaves(split(tree))]

    def tree(self, leaves: list[Array]) -> Any:
        """The parameter-shaped pytree with these leaves."""
        return jax.tree.unflatten(self.treedef, leaves)

    def ravel(self, tree: chex.ArrayTree, name: str) -> Float[Array, " p"]:
        """The flat vector, in `ravel_pytree` order and the statistics dtype."""
        leaves = [leaf.reshape(-1) for leaf in self.leaves(tree, name)]
        return jnp.concatenate(leaves) if leaves else jnp.zeros(0, self.dtype)

    def unravel(self, flat: Float[Array, " p"]) -> Any:
        """Inverse of `ravel`, leaves in the statistics dtype."""
        leaves, start = [], 0
        for shape, size in zip(self.shapes, self.sizes, strict=True):
            leaves.append(flat[start : start + size].reshape(shape))
            start += size
        return self.tree(leaves)

    def zeros(self) -> Any:
        """A zero vector in the statistics dtype."""
        return self.tree([jnp.zeros(shape, self.dtype) for shape in self.shapes])

    def check(self, tree: chex.ArrayTree, name: str) -> None:
        """Raise an error naming the first path at which ``tree`` is not a vector shaped like the parameters."""
        refuse_sparse(tree, lambda path: f"`{name}` at {path}")
        paths, leaves = path_names(tree), jax.tree.leaves(tree)
        for path, leaf in zip(paths, leaves, strict=True):
            check_array(f"`{name}` at {path}", leaf)
            # Integers are refused too: results take the dtypes of the vector, and would be truncated to integers.
            in_parts = f"{'' if path == BARE else path}.real" in self.paths
            if in_parts and is_array(leaf) and not is_complex(leaf):
                raise TypeError(
                    f"`{name}` at {path} is {described(leaf)}, where the parameter is complex; expected complex numbers: one "
                    "number each for its real and its imaginary part. Pass x + 0j if the imaginary parts are zero."
                )
            if not in_parts and (not is_array(leaf) or not jnp.issubdtype(dtype_of(leaf), jnp.floating)):
                whole = is_array(leaf) and not is_complex(leaf)
                raise TypeError(
                    f"`{name}` at {path} is {described(leaf)}; expected real floating numbers. "
                    f"{'Make it floating, 2.0 for 2.' if whole else 'Pass a pytree like the parameters.'}"
                )
        where = self.mismatch_of(tree)
        if where is not None:
            raise ValueError(
                f"`{name}` is not shaped like the parameters: {where}. Pass a pytree with the parameters' structure, "
                "for instance a gradient."
            )

    def check_same(self, other: ParamSpec, what: str) -> None:
        """Raise `ValueError` unless another operator has the same parameters; ``what`` begins the message."""
        if other != self:
            where = self.mismatch(other.treedef, other.paths, other.shapes)
            raise ValueError(
                f"{what}, which is over other parameters: {where or f'their dtypes are {other.dtypes}, not {self.dtypes}'}. "
                "Make both at the same parameters."
            )

    def mismatch_of(self, tree: chex.ArrayTree) -> str | None:
        """The first way in which a pytree differs from the parameters in structure or shapes; None if it does not."""
        tree = split(tree)
        return self.mismatch(jax.tree.structure(tree), path_names(tree), tuple(map(jnp.shape, jax.tree.leaves(tree))))

    def mismatch(self, treedef: Any, paths: tuple[str, ...], shapes: tuple[tuple[int, ...], ...]) -> str | None:
        """The first way in which a pytree of this structure, paths and shapes differs from the parameters; None if none."""
        if treedef != self.treedef:
            missing = [path for path in self.paths if path not in paths]
            extra = [path for path in paths if path not in self.paths]
            if missing:
                return f"it has no leaf at {missing[0]}"
            if extra:
                return f"it has a leaf at {extra[0]}, where the parameters have none"
            return f"its containers differ: {treedef} against {self.treedef}"
        for path, seen, expected in zip(paths, shapes, self.shapes, strict=True):
            if seen != expected:
                return f"at {path} it has shape {seen}, where the parameter has shape {expected}"
        return None

    def flags(self, keep: Callable[[str], bool], caller: str) -> tuple[bool, ...]:
        """The value of a filter of paths for each leaf; an error unless the filter keeps some leaves and not all."""
        check_function("keep", keep, "path -> bool, of the path of a parameter leaf")
        kept_by = {path: keep(path) for path in given_paths(self)}
        for path, flag in kept_by.items():
            check_flag(f"{caller}: `keep` of {path}", flag)
        found = tuple(bool(kept_by[path]) for path in for_both_parts(given_paths(self), self))
        if all(found) or not any(found):
            what = "every leaf" if all(found) else "no leaf"
            raise ValueError(f"{caller}: `keep` keeps {what} of {list(self.paths)}. Keep some of them, and not all.")
        return found

    def restrict(self, keep: tuple[bool, ...], treedef: Any) -> ParamSpec:
        """The spec of the kept leaves, whose tree has the structure ``treedef``."""
        return self.at([place for place, flag in enumerate(keep) if flag], treedef)

    def at(self, places: Iterable[int], treedef: Any) -> ParamSpec:
        """The spec of the leaves at these places, whose tree has the structure ``treedef``."""
        paths, shapes, dtypes = self.paths, self.shapes, self.dtypes
        chosen = list(places)
        return ParamSpec(
            treedef, tuple(paths[k] for k in chosen), tuple(shapes[k] for k in chosen), tuple(dtypes[k] for k in chosen)
        )


class Parts(NamedTuple):
    """A complex leaf as the library stores it: two real leaves."""

    real: Any
    imag: Any


def is_complex(leaf: Any) -> bool:
    """Whether the leaf is a complex number or an array of them."""
    return isinstance(leaf, complex) or getattr(getattr(leaf, "dtype", None), "kind", None) == "c"


def split(tree: chex.ArrayTree) -> Any:
    """The tree with each complex leaf as `Parts`."""
    return jax.tree.map(_in_parts, tree) if any(map(is_complex, jax.tree.leaves(tree))) else tree


def _in_parts(leaf: Any) -> Any:
    if not is_complex(leaf):
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return Parts(*(jax.eval_shape(part, leaf) for part in (jnp.real, jnp.imag)))
    return Parts(jnp.real(leaf), jnp.imag(leaf))


def joined(tree: Any) -> Any:
    """The tree with a complex leaf for each `Parts`: the inverse of `split`."""
    return jax.tree.map(lambda node: jax.lax.complex(*node) if _is_parts(node) else node, tree, is_leaf=_is_parts)


def either_part(flags: Any) -> Any:
    """A tree of booleans with one for each complex leaf: whether the flag of its real or of its imaginary part is true."""
    return jax.tree.map(lambda node: node.real | node.imag if _is_parts(node) else node, flags, is_leaf=_is_parts)


def _is_parts(node: Any) -> bool:
    return isinstance(node, Parts)


def _counted(spec: ParamSpec) -> Any:
    return jax.tree.unflatten(spec.treedef, spec.sizes)


def joined_structure(spec: ParamSpec) -> Any:
    """The structure of the user's parameters, in which a complex leaf is one leaf."""
    return jax.tree.structure(_counted(spec), is_leaf=_is_parts)


def given_paths(spec: ParamSpec) -> list[str]:
    """The paths of the user's parameters, in which a complex leaf has one path."""
    flat = jax.tree_util.tree_leaves_with_path(_counted(spec), is_leaf=_is_parts)
    return [jax.tree_util.keystr(path) or BARE for path, _ in flat]


def for_both_parts(tree: Any, spec: ParamSpec) -> list[Any]:
    """One value for each leaf of ``spec``, from a tree with one value for each leaf of the user's parameters."""
    nodes = jax.tree.leaves(_counted(spec), is_leaf=_is_parts)
    values = zip(nodes, jax.tree.leaves(tree), strict=True)
    return [value for node, value in values for _ in range(len(node) if _is_parts(node) else 1)]


def uphill(tree: Any) -> Any:
    r"""The result of `jax.grad` as a vector of steepest ascent.

    For a complex leaf ``a + i b``, `jax.grad` gives :math:`\partial_a L - i\, \partial_b L`. The gradient is its conjugate.
    """
    return jax.tree.map(lambda leaf: jnp.conj(leaf) if is_complex(leaf) else leaf, tree)


def kept(values: Iterable[Any], keep: tuple[bool, ...]) -> tuple[Any, ...]:
    """The values whose flag is set."""
    return tuple(value for value, flag in zip(values, keep, strict=True) if flag)


def narrowed(within: tuple[bool, ...], keep: tuple[bool, ...]) -> tuple[bool, ...]:
    """Flags over all leaves: of those that ``within`` keeps, the ones that ``keep``, which has flags for these only, keeps."""
    rest = iter(keep)
    return tuple(flag and next(rest) for flag in within)


def subtree(treedef: jax.tree_util.PyTreeDef, keep: tuple[bool, ...]) -> jax.tree_util.PyTreeDef:
    """The structure of a tree with None for each leaf whose flag is not set."""
    return jax.tree.structure(jax.tree.unflatten(treedef, [0 if flag else None for flag in keep]))


def path_names(tree: chex.ArrayTree) -> tuple[str, ...]:
    """The path of every leaf, as a user would index it: ``['layer']['w']``, or ``params`` for a bare array."""
    return tuple(jax.tree_util.keystr(path) or BARE for path, _ in jax.tree_util.tree_leaves_with_path(tree))


BARE = "params"
"""The path of a bare array."""


def refuse_sparse(tree: chex.ArrayTree, name: Callable[[str], str]) -> None:
    """Raise `TypeError` if a part of the tree is a sparse array, whose own leaves would be taken for leaves of the tree."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_sparse):
        if is_sparse(leaf):
            check_array(name(jax.tree_util.keystr(path) or BARE), leaf)


def param_spec(params: chex.ArrayTree) -> ParamSpec:
    """The spec of a parameter pytree, or a `TypeError` that names a leaf that is not a floating array."""
    refuse_sparse(params, lambda path: f"the parameter at {path}")
    for path, leaf in zip(path_names(params), jax.tree.leaves(params), strict=True):
        _check_leaf(path, leaf)
    params = split(params)
    leaves, treedef = jax.tree.flatten(params)
    return ParamSpec(treedef, path_names(params), tuple(map(jnp.shape, leaves)), tuple(map(jnp.result_type, leaves)))


def check_function(name: str, value: Any, signature: str) -> None:
    """Raise `TypeError` unless the argument is a function."""
    if not callable(value):
        raise TypeError(f"`{name}` is {described(value)}; expected a function, {signature}.")


def _check_leaf(path: str, leaf: Any) -> None:
    check_array(f"the parameter at {path}", leaf)
    if not is_array(leaf) or is_table(leaf):
        raise TypeError(
            f"the parameter at {path} is a {type(leaf).__name__}, not an array. Keep functions and settings out of `params`: "
            "close over them in the model (for Equinox modules, `equinox.partition(model, equinox.is_inexact_array)`)."
        )
    dtype = dtype_of(leaf)
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(
            f"the parameter at {path} has dtype {dtype}, which has no derivative. Make it floating, or pass it as data (for "
            "modules of Flax NNX, `graph, params, rest = nnx.split(net, nnx.Param, ...)`, and in the model "
            "`nnx.merge(graph, params, rest)`)."
        )


def at_least_float32(dtype: Any) -> Any:
    """The dtype itself, or float32 for a narrower one."""
    return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


def cast_like(tree: Any, like: chex.ArrayTree) -> Any:
    """``tree`` with the leaf dtypes of ``like``, and with `Parts` joined where ``like`` has complex leaves."""

    def cast(target: Any, leaf: Any) -> Array:
        whole: Array = joined(leaf)
        return whole.astype(jnp.result_type(target))

    return jax.tree.map(cast, like, tree)


def scaled(tree: chex.ArrayTree, factor: chex.Numeric) -> Any:
    """``factor * tree``, leaves in their own dtypes."""
    return jax.tree.map(lambda leaf: leaf * jnp.asarray(factor).astype(jnp.result_type(leaf)), tree)


def select(flag: Scalar, tree: chex.ArrayTree, other: chex.ArrayTree) -> Any:
    """``tree`` if the flag is set, else ``other``; numbers of the tree that is not selected, such as NaN, have no effect."""
    return jax.tree.map(lambda a, b: jnp.where(flag, a, b), tree, other)


def dot(a: chex.ArrayTree, b: chex.ArrayTree) -> Scalar:
    """The inner product of two vectors of real leaves.

    `between` would save two of the 382 kernels of a step of `jaxfisher.kfac`, but takes four products where this takes one.
    """
    products = jax.tree.map(lambda x, y: _inner(x, y, 0), a, b)
    return sum(jax.tree.leaves(products), start=jnp.zeros((), jnp.result_type(*jax.tree.leaves(a))))


def products(a: chex.ArrayTree, b: chex.ArrayTree) -> Float[Array, "k m"]:
    """The inner products of vectors stacked along a leading axis."""
    parts = [_inner(x, y, 1) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)]
    return sum(parts[1:], start=parts[0])


def between(*vectors: chex.ArrayTree) -> Callable[[int, int], Scalar]:
    """A function that gives the inner product of two of the vectors, which have real leaves, by their indices.

    All leaves with at most one axis go into one product of matrices: XLA would make several kernels for each of them, which
    take longer to compile than they ever run.
    """
    leaves = [jax.tree.leaves(vector) for vector in vectors]
    low, high = ([k for k, x in enumerate(leaves[0]) if (jnp.ndim(x) < 2) is flag] for flag in (True, False))
    # Concatenate everything and then reshape, which is one copy: stacking the vectors would be a kernel of its own.
    joined = [jnp.reshape(of[k], -1) for of in leaves for k in low]
    rows = jnp.concatenate(joined).reshape(len(leaves), -1) if joined else None
    small = None if rows is None else jax.lax.dot_general(rows, rows, (((1,), (1,)), ((), ())), precision=HIGHEST)

    def product(i: int, j: int) -> Scalar:
        parts = [_inner(leaves[i][k], leaves[j][k], 0) for k in high]
        return sum(parts if small is None else [*parts, small[i, j]], start=jnp.zeros((), leaves[0][0].dtype))

    return product


def unstacked(tree: chex.ArrayTree) -> list[Any]:
    """The vectors that are stacked along a leading axis."""
    leaves, treedef = jax.tree.flatten(tree)
    return [jax.tree.unflatten(treedef, [leaf[i] for leaf in leaves]) for i in range(leaves[0].shape[0])]


def _inner(x: Array, y: Array, stacked: int) -> Array:
    """The inner products over all but the first ``stacked`` axes.

    The leaves are not raveled: raveling would gather a leaf that is spread over devices.
    """
    axes = tuple(range(stacked, jnp.ndim(x)))
    found: Array = jax.lax.dot_general(x, y, ((axes, axes), ((), ())), precision=HIGHEST)
    return found


def all_finite(tree: chex.ArrayTree) -> Scalar:
    """Whether every number of the tree is finite."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def as_key(key: Any, caller: str) -> PRNGKeyArray:
    """A random key, typed or of the older untyped kind, as a typed one; a `TypeError` for anything else."""
    dtype = getattr(key, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key) and key.shape == ():
        return key
    # The shape depends on the implementation in use: two numbers for threefry, four for rbg.
    if dtype == jnp.uint32 and key.shape == jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape:
        return jax.random.wrap_key_data(key)
    raise TypeError(f"{caller}: `key` is {described(key)}; expected one random key, jax.random.key(seed).")


def threefry_key(key: PRNGKeyArray) -> PRNGKeyArray:
    """A threefry key made from the key's data: its draws are the same with and without `jax.vmap`, unlike those of rbg keys."""
    if str(jax.random.key_impl(key)) == "threefry2x32":
        return key
    words = jax.random.key_data(key).reshape(-1)
    made = jax.random.wrap_key_data(words[:2], impl="threefry2x32")
    for word in words[2:]:
        made = jax.random.fold_in(made, word)
    return made
