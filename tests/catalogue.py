"""Models the engine must store as factors: every way in which we have seen a parameter enter a log-density, at tiny shapes.

A row is built when a test uses it, so that collecting tests traces and compiles nothing. It states how each parameter leaf must
be stored: the paths in `Row.factored` as factors of their per-example gradients (outer products and sums of them, convolutions,
embeddings), those in `Row.plain` as plain per-example gradients, and every other leaf elementwise (biases, scales) or as zero.
A row that wraps another, in `jit` say, names it: both must be stored in the same way.

Most widths are 2 to 5, so that compiling takes nearly all of the time. At such widths forming a leaf's gradient is cheaper than
contracting the factors of several positions; the rows called `wide` are those where contracting is cheaper.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

N = 5
"""Examples in every row's data."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A log-density of one example, the parameters and data for its scores, and how its leaves must be stored."""

    name: str
    log_prob: Callable[..., Any]
    params: Any
    data: tuple[Any, ...]
    factored: tuple[str, ...]
    plain: tuple[str, ...] = ()
    like: str | None = None
    """The row that this one wraps."""
    eps: float = 2.2e-16
    """Precision of the least precise number on the way to a score."""


_BUILDERS: dict[str, Callable[[], Row]] = {}
RELAXED: set[str] = set()
"""Rows of other libraries' code, which promotes ranks and dtypes."""
WRAPPED: set[str] = set()
"""Rows that wrap another."""


def _row(
    factored: str | tuple[str, ...] = "",
    *,
    plain: str = "",
    like: str | None = None,
    eps: float = 2.2e-16,
    relaxed: bool = False,
):
    """Register a function that returns ``(log_prob, params, data)``. ``"w b"`` stands for the paths ``['w']`` and ``['b']``."""

    def register(build):
        name = build.__name__.removeprefix("_")

        def make():
            log_prob, params, data = build()
            return Row(name, log_prob, params, data, _paths(factored), _paths(plain), like, eps)

        _BUILDERS[name] = functools.cache(make)
        if relaxed:
            RELAXED.add(name)
        if like:
            WRAPPED.add(name)
        return build

    return register


def _paths(names):
    if isinstance(names, tuple):
        return names
    return tuple("".join(f"['{part}']" for part in name.split(".")) for name in names.split())


def names() -> tuple[str, ...]:
    """The names of all rows, in the order they are written here."""
    return tuple(_BUILDERS)


def row(name: str) -> Row:
    """The row of this name, which is made on first use."""
    return _BUILDERS[name]()


# Numbers, heads and layers.


def _array(seed, *shape, dtype=np.float64, scale=0.7):
    return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape), dtype)


def _inputs(*shape, dtype=np.float64):
    return _array(100, N, *shape, dtype=dtype)


def _targets(*shape, dtype=np.float64):
    return _array(101, N, *shape, dtype=dtype)


def _integers(high, *shape, seed=102):
    return jnp.asarray(np.random.default_rng(seed).integers(0, high, (N, *shape)))


def _filled(shapes, seed=0):
    """Random numbers for every shape of a tree, in place of a library's initialiser, which would be compiled."""
    leaves, treedef = jax.tree.flatten(shapes)
    return jax.tree.unflatten(treedef, [_array((seed, i), *leaf.shape, dtype=leaf.dtype) for i, leaf in enumerate(leaves)])


def _gaussian(mean, y):
    return -0.5 * jnp.sum((y - mean) ** 2)


def _choice(logits, label):
    return jax.nn.log_softmax(logits)[label]


def _weights(**shapes):
    """A dictionary of random parameters."""
    return {name: _array((1, i), *shape) for i, (name, shape) in enumerate(shapes.items())}


def _dense(x, w, b):
    return x @ w + b


def _along(x, b):
    """A bias or scale for the last axis, with the rank of ``x``."""
    return b.reshape((1,) * (x.ndim - 1) + b.shape)


# Linear maps and networks in plain JAX.


@_row("w")
def _linear():
    return lambda p, x, y: _gaussian(_dense(x, p["w"], p["b"]), y), _weights(w=(3, 2), b=(2,)), (_inputs(3), _targets(2))


@_row(("params",))
def _bare_array():
    return lambda w, x, y: _gaussian(x @ w, y), _array(0, 3, 2), (_inputs(3), _targets(2))


@_row("w")
def _vector_weight():
    def log_prob(p, x, y):
        return jax.nn.log_sigmoid((2.0 * y - 1.0) * (jnp.dot(x, p["w"]) + p["b"]))

    return log_prob, _weights(w=(4,), b=()), (_inputs(4), _integers(2).astype(float))


@_row()
def _scalar_parameters():
    def log_prob(p, x):
        return -0.5 * ((x - p["loc"]) * jnp.exp(-p["log_scale"])) ** 2 - p["log_scale"]

    return log_prob, _weights(loc=(), log_scale=()), (_inputs(),)


MLP = {"w1": (3, 4), "b1": (4,), "w2": (4, 3), "b2": (3,)}


def _mlp_params():
    return _weights(**MLP)


def _mlp_data():
    return _inputs(3), _integers(3)


def _mlp_log_prob(dense=_dense, activation=jnp.tanh):
    def log_prob(p, x, y):
        return _choice(dense(activation(dense(x, p["w1"], p["b1"])), p["w2"], p["b2"]), y)

    return log_prob


@_row("w1 w2")
def _mlp():
    return _mlp_log_prob(), _mlp_params(), _mlp_data()


@_row(("[0]", "[1]", "[2]"))
def _deep_linear():
    def log_prob(ws, x, y):
        return _gaussian(functools.reduce(jnp.matmul, ws, x), y)

    return log_prob, [_array(i, *shape) for i, shape in enumerate([(3, 4), (4, 5), (5, 2)])], (_inputs(3), _targets(2))


@_row("w1 w2")
def _weight_on_the_left():
    def log_prob(p, x, y):
        return _gaussian(p["w2"] @ jnp.tanh(p["w1"] @ x), y)

    return log_prob, _weights(w1=(4, 3), w2=(2, 4)), (_inputs(3), _targets(2))


@_row("w")
def _multiply_and_sum():
    """A matrix product written as a broadcast product: the outer product comes from `mul`, not from `dot_general`."""
    return lambda p, x, y: _gaussian(jnp.sum(x[:, None] * p["w"], axis=0), y), _weights(w=(3, 2)), (_inputs(3), _targets(2))


@_row("w")
def _bilinear():
    return lambda p, x, z: jax.nn.log_sigmoid(x @ p["w"] @ z), _weights(w=(3, 4)), (_inputs(3), _targets(4))


@_row("first second third")
def _scaled_weights():
    def log_prob(p, x, y):
        hidden = jnp.tanh(x @ (0.5 * p["first"]))
        return _gaussian(jnp.tanh(hidden @ -p["second"]) @ (p["third"] / 3.0), y)

    return log_prob, _weights(first=(3, 4), second=(4, 3), third=(3, 2)), (_inputs(3), _targets(2))


@_row("flat cube")
def _reshaped_weights():
    def log_prob(p, x, y):
        hidden = jnp.tanh(x @ p["flat"].reshape(4, 3).T)
        return _gaussian(hidden @ p["cube"].transpose(1, 0, 2).reshape(4, 3), y)

    return log_prob, _weights(flat=(12,), cube=(2, 2, 3)), (_inputs(3), _targets(3))


@_row("left right")
def _concatenated_weights():
    def log_prob(p, x, y):
        return _gaussian(x @ jnp.concatenate([p["left"], p["right"]], axis=1), y)

    return log_prob, _weights(left=(3, 2), right=(3, 3)), (_inputs(3), _targets(5))


@_row("stack")
def _indexed_stack():
    def log_prob(p, x, y):
        return _gaussian(jnp.tanh(x @ p["stack"][0]) @ p["stack"][1], y)

    return log_prob, _weights(stack=(2, 3, 3)), (_inputs(3), _targets(3))


@_row("w")
def _float_weight_integer_input():
    def log_prob(p, x, y):
        return _gaussian(x.astype(float) @ p["w"], y)

    return log_prob, _weights(w=(3, 2)), (_integers(4, 3), _targets(2))


@_row("encode.w decode.w")
def _dictionary_data():
    def log_prob(p, example):
        hidden = jnp.tanh(example["x"] @ p["encode"]["w"])
        return jnp.sum(example["mask"] * -((hidden @ p["decode"]["w"] - example["y"]) ** 2))

    params = {"encode": _weights(w=(3, 4)), "decode": _weights(w=(4, 2))}
    mask = jnp.asarray(np.random.default_rng(3).integers(0, 2, (N, 2)).astype(float))
    return log_prob, params, ({"x": _inputs(3), "y": _targets(2), "mask": mask},)


# Leaves that are used several times, in unusual ways, or not at all.


def _autoencoder(p, x):
    return jnp.tanh(x @ p["w"] + p["b"]) @ p["w"].T


@_row("w")
def _tied_autoencoder():
    return lambda p, x: _gaussian(_autoencoder(p, x), x), _weights(w=(4, 2), b=(2,)), (_inputs(4),)


@_row("w")
def _tied_autoencoder_wide():
    return lambda p, x: _gaussian(_autoencoder(p, x), x), _weights(w=(16, 12), b=(12,)), (_inputs(16),)


@_row("w")
def _repeated_weight():
    def log_prob(p, x, y):
        for _ in range(3):
            x = jnp.tanh(x @ p["w"])
        return _gaussian(x, y)

    return log_prob, _weights(w=(3, 3)), (_inputs(3), _targets(3))


@_row("w")
def _both_factors():
    return lambda p, x, y: _gaussian(x @ p["w"] @ p["w"].T, y), _weights(w=(3, 2)), (_inputs(3), _targets(3))


@_row("w")
def _quadratic_form():
    """The matrix ``W^T W`` is made before it meets the example."""
    return lambda p, x, y: _gaussian((p["w"].T @ p["w"]) @ x, y), _weights(w=(2, 3)), (_inputs(3), _targets(3))


@_row("a b")
def _low_rank_adapter():
    frozen = np.random.default_rng(9).standard_normal((4, 3))

    def log_prob(p, x, y):
        return _gaussian(x @ (jnp.asarray(frozen) + p["a"] @ p["b"]), y)

    return log_prob, _weights(a=(4, 2), b=(2, 3)), (_inputs(4), _targets(3))


@_row("a b")
def _low_rank_adapters_of_heads():
    def log_prob(p, x, y):
        heads = jnp.einsum("ti,hio->hto", x, jnp.einsum("hir,hro->hio", p["a"], p["b"]))
        return _gaussian(jnp.tanh(heads).sum((0, 1)), y)

    return log_prob, _weights(a=(2, 6, 2), b=(2, 2, 5)), (_inputs(3, 6), _targets(5))


@_row("w")
def _unused_leaf():
    def log_prob(p, x, y):
        return _gaussian(x @ p["w"], y)

    return log_prob, _weights(unused=(3, 3), w=(3, 2)), (_inputs(3), _targets(2))


@_row("w2")
def _frozen_leaf():
    def log_prob(p, x, y):
        return _gaussian(jnp.tanh(x @ jax.lax.stop_gradient(p["w1"])) @ p["w2"], y)

    return log_prob, _weights(w1=(3, 4), w2=(4, 2)), (_inputs(3), _targets(2))


@_row("out", plain="direction")
def _weight_norm():
    def log_prob(p, x, y):
        norm = jnp.sqrt(jnp.sum(p["direction"] ** 2, axis=0, keepdims=True))
        return _gaussian(jnp.tanh(x @ (p["size"][None] * p["direction"] / norm)) @ p["out"], y)

    return log_prob, _weights(direction=(3, 4), size=(4,), out=(4, 2)), (_inputs(3), _targets(2))


@_row("out", plain="direction")
def _weight_norm_of_vectors():
    def log_prob(p, x, y):
        unit = p["direction"] / jnp.linalg.norm(p["direction"], axis=0)[None]
        return _gaussian(jnp.tanh(x @ unit) @ p["out"], y)

    return log_prob, _weights(direction=(6, 8), out=(8, 2)), (_inputs(6), _targets(2))


@_row("out", plain="w")
def _masked_weight():
    mask = np.tril(np.ones((6, 6)))

    def log_prob(p, x, y):
        return _gaussian(jnp.tanh(x @ (jnp.asarray(mask) * p["w"])) @ p["out"], y)

    return log_prob, _weights(w=(6, 6), out=(6, 2)), (_inputs(6), _targets(2))


@_row("w")
def _prior_on_the_weight():
    def log_prob(p, x, y):
        return _gaussian(x @ p["w"], y) - 0.1 * jnp.sum(p["w"] ** 2)

    return log_prob, _weights(w=(3, 2)), (_inputs(3), _targets(2))


@_row("hyper")
def _hypernetwork():
    def log_prob(p, x, z, y):
        return _gaussian(x @ (z @ p["hyper"]).reshape(3, 2), y)

    return log_prob, _weights(hyper=(2, 6)), (_inputs(3), _array(5, N, 2), _targets(2))


@_row("w")
def _inner_gradient_step():
    """The weight after one step on another example: its gradient passes through an example's own outer product."""

    def log_prob(p, x, y, x_inner, y_inner):
        adapted = p["w"] + 0.3 * jax.grad(lambda w: _gaussian(jnp.tanh(x_inner @ w), y_inner))(p["w"])
        return _gaussian(x @ adapted, y)

    return log_prob, _weights(w=(3, 2)), (_inputs(3), _targets(2), _array(7, N, 3), _array(8, N, 2))


# Other libraries' layers.


@_row("params.Dense_0.kernel params.Dense_1.kernel", relaxed=True)
def _linen_mlp():
    from flax import linen

    class Network(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.tanh(linen.Dense(4, param_dtype=float)(x))
            return linen.Dense(3, param_dtype=float)(x)

    network = Network()
    params = _filled(jax.eval_shape(network.init, jax.random.key(0), jnp.zeros(3)))
    return lambda p, x, y: _choice(network.apply(p, x), y), params, _mlp_data()


@_row("params.Conv_0.kernel params.Conv_1.kernel params.Dense_0.kernel", relaxed=True)
def _linen_cnn():
    from flax import linen

    class Network(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.tanh(linen.Conv(2, (3, 3), param_dtype=float)(x))
            x = linen.avg_pool(x, (2, 2), strides=(2, 2))
            x = linen.tanh(linen.Conv(2, (2, 2), strides=2, padding="VALID", param_dtype=float)(x))
            x = linen.max_pool(x, (1, 1))
            return linen.Dense(3, param_dtype=float)(x.reshape(-1))

    network = Network()
    params = _filled(jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((4, 4, 1))))
    return lambda p, x, y: _choice(network.apply(p, x), y), params, (_inputs(4, 4, 1), _integers(3))


@_row(tuple(f"['params']['{name}']['kernel']" for name in ("query", "key", "value", "out")), relaxed=True)
def _linen_attention():
    from flax import linen

    network = linen.MultiHeadDotProductAttention(num_heads=2, param_dtype=float)
    params = _filled(jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((3, 4))))
    return lambda p, x, y: _gaussian(network.apply(p, x), y), params, (_inputs(3, 4), _targets(3, 4))


@_row(tuple(f"['params']['cell']['{gate}']['kernel']" for gate in ("h", "i")), relaxed=True)
def _linen_rnn():
    from flax import linen

    network = linen.RNN(linen.SimpleCell(3, param_dtype=float))
    params = _filled(jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 4, 2))))
    return lambda p, x, y: _gaussian(network.apply(p, x[None])[0], y), params, (_inputs(4, 2), _targets(4, 3))


@_row(("['first']['kernel'].value", "['second']['kernel'].value"), relaxed=True)
def _nnx_mlp():
    from flax import nnx

    class Network(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(3, 4, param_dtype=float, rngs=rngs)
            self.second = nnx.Linear(4, 3, param_dtype=float, rngs=rngs)

        def __call__(self, x):
            return self.second(nnx.tanh(self.first(x)))

    graph, shapes = nnx.split(nnx.eval_shape(lambda: Network(nnx.Rngs(0))))
    return lambda p, x, y: _choice(nnx.merge(graph, p)(x), y), _filled(shapes), _mlp_data()


@_row((".layers[0].weight", ".layers[1].weight"), relaxed=True)
def _equinox_mlp():
    import equinox as eqx

    shapes = eqx.filter_eval_shape(lambda: eqx.nn.MLP(3, 3, 4, 1, jnp.tanh, key=jax.random.key(0), dtype=float))
    shapes, static = eqx.partition(shapes, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    return lambda p, x, y: _choice(eqx.combine(p, static)(x), y), _filled(shapes), _mlp_data()


@_row(("[0].weight_hh", "[0].weight_ih", "[1].weight"), relaxed=True)
def _equinox_gru_and_conv():
    import equinox as eqx

    def layers():
        cell = eqx.nn.GRUCell(2, 3, key=jax.random.key(0), dtype=float)
        return cell, eqx.nn.Conv1d(2, 2, 2, key=jax.random.key(1), dtype=float)

    shapes = eqx.filter_eval_shape(layers)
    shapes, static = eqx.partition(shapes, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))

    def log_prob(p, x, y):
        cell, conv = eqx.combine(p, static)
        last, _ = jax.lax.scan(lambda h, x: (cell(x, h), None), jnp.zeros(3), jnp.tanh(conv(x)).T)
        return _gaussian(last, y)

    return log_prob, _filled(shapes), (_inputs(2, 4), _targets(3))


@_row("linear.w linear_1.w", relaxed=True)
def _haiku_mlp():
    import haiku as hk

    def network(x):
        return hk.Linear(3)(jnp.tanh(hk.Linear(4)(x)))

    init, apply = hk.without_apply_rng(hk.transform(network))
    params = _filled(jax.eval_shape(init, jax.random.key(0), jnp.zeros(3)))
    return lambda p, x, y: _choice(apply(p, x), y), params, _mlp_data()


# Convolutions.


def _convolution(x, w, layout, stride=1, padding="VALID", **options):
    """`jax.lax.conv_general_dilated` of one example, whose batch axis of length one goes first."""
    strides = (stride,) * (w.ndim - 2)
    out = jax.lax.conv_general_dilated(x[None], w, strides, padding, dimension_numbers=layout, **options)
    return out[0]


NHWC = ("NHWC", "HWIO", "NHWC")


def _convolution_row(kernel, image, layout=NHWC, **options):
    def log_prob(p, x, y):
        return _gaussian(jnp.tanh(_convolution(x, p["w"], layout, **options)).reshape(-1)[:4], y)

    return log_prob, _weights(w=kernel), (_inputs(*image), _targets(4))


@_row("w v")
def _conv_2d():
    def log_prob(p, x, y):
        hidden = _convolution(x, p["w"], NHWC)
        return _choice(jnp.tanh(hidden + _along(hidden, p["b"])).reshape(-1) @ p["v"], y)

    return log_prob, _weights(w=(2, 3, 2, 3), b=(3,), v=(18, 3)), (_inputs(4, 4, 2), _integers(3))


@_row("w")
def _conv_nchw():
    return _convolution_row((3, 2, 2, 3), (2, 4, 4), ("NCHW", "OIHW", "NCHW"), padding="SAME")


@_row("w")
def _conv_strided():
    return _convolution_row((2, 3, 2, 2), (5, 4, 2), stride=2, padding=((1, 0), (2, 1)))


@_row("w")
def _conv_grouped():
    return _convolution_row((2, 2, 2, 4), (3, 3, 4), feature_group_count=2)


@_row("w")
def _conv_depthwise():
    return _convolution_row((2, 2, 1, 6), (3, 3, 3), feature_group_count=3)


@_row("w")
def _conv_dilated():
    return _convolution_row((2, 2, 2, 2), (4, 5, 2), rhs_dilation=(2, 3))


@_row("w")
def _conv_1d():
    return _convolution_row((3, 2, 2), (5, 2), ("NHC", "HIO", "NHC"), padding="SAME")


@_row("w")
def _conv_1d_wide():
    return _convolution_row((3, 8, 16), (4, 8), ("NHC", "HIO", "NHC"))


@_row("w")
def _conv_3d():
    return _convolution_row((2, 1, 2, 2, 2), (2, 2, 3, 2), ("NDHWC", "DHWIO", "NDHWC"))


@_row("w")
def _conv_transposed():
    def log_prob(p, x, y):
        out = jax.lax.conv_transpose(x[None], p["w"], (2, 2), "SAME", dimension_numbers=NHWC)
        return _gaussian(jnp.tanh(out).reshape(-1)[:6], y)

    return log_prob, _weights(w=(3, 2, 2, 2)), (_inputs(2, 2, 2), _targets(6))


@_row("w")
def _conv_flipped():
    def log_prob(p, x, y):
        return _gaussian(_convolution(x, p["w"][::-1, ::-1], NHWC).reshape(-1), y)

    return log_prob, _weights(w=(2, 2, 1, 2)), (_inputs(3, 3, 1), _targets(8))


@_row("w")
def _conv_repeated():
    def log_prob(p, x, y):
        x = jnp.tanh(_convolution(x, p["w"], NHWC, padding="SAME"))
        return _gaussian(_convolution(x, p["w"], NHWC, padding="SAME").reshape(-1), y)

    return log_prob, _weights(w=(2, 2, 2, 2)), (_inputs(2, 2, 2), _targets(8))


def _group_norm(x, scale, shift, groups):
    grouped = x.reshape(-1, groups, x.shape[-1] // groups)
    mean = grouped.mean((0, 2), keepdims=True)
    variance = jnp.square(grouped - mean).mean((0, 2), keepdims=True)
    x = ((grouped - mean) / jnp.sqrt(variance + 1e-3)).reshape(x.shape)
    return x * _along(x, scale) + _along(x, shift)


@_row("w1 w2 shortcut")
def _resnet_block():
    def log_prob(p, x, y):
        hidden = _group_norm(_convolution(x, p["w1"], NHWC, 2, "SAME"), p["scale1"], p["shift1"], 2)
        hidden = _group_norm(_convolution(jax.nn.relu(hidden), p["w2"], NHWC, 1, "SAME"), p["scale2"], p["shift2"], 2)
        out = jax.nn.relu(hidden + _convolution(x, p["shortcut"], NHWC, 2, "SAME"))
        return _choice(out.mean((0, 1)), y)

    norms = {"scale1": (4,), "shift1": (4,), "scale2": (4,), "shift2": (4,)}
    params = _weights(w1=(3, 3, 2, 4), w2=(3, 3, 4, 4), shortcut=(1, 1, 2, 4), **norms)
    return log_prob, params, (_inputs(4, 4, 2), _integers(4))


# Norms.


def _layer_norm(x, scale, shift):
    centred = x - x.mean(-1, keepdims=True)
    normal = centred / jnp.sqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-3)
    return normal * _along(x, scale) + _along(x, shift)


@_row("w1 w2")
def _layer_norm_mlp():
    def log_prob(p, x, y):
        return _choice(jax.nn.gelu(_layer_norm(x @ p["w1"], p["scale"], p["shift"])) @ p["w2"], y)

    return log_prob, _weights(w1=(3, 4), scale=(4,), shift=(4,), w2=(4, 3)), _mlp_data()


@_row("w1 w2")
def _rms_norm_mlp():
    def log_prob(p, x, y):
        hidden = x @ p["w1"]
        hidden = hidden / jnp.sqrt(jnp.mean(hidden**2) + 1e-3) * p["scale"]
        return _choice(jax.nn.silu(hidden) @ p["w2"], y)

    return log_prob, _weights(w1=(3, 4), scale=(4,), w2=(4, 3)), _mlp_data()


# Loops over time, over layers and over positions.


def _rnn_log_prob(scan=jax.lax.scan, wrap=lambda step: step):
    def log_prob(p, xs, y):
        @wrap
        def step(h, x):
            return jnp.tanh(x @ p["wx"] + h @ p["wh"] + p["b"]), None

        # From a state of zero, the first step would have no gradient in the recurrent weight.
        last, _ = scan(step, jnp.full(p["b"].shape, 0.5), xs)
        return _gaussian(last @ p["out"], y)

    return log_prob


def _rnn_params(width=3):
    return _weights(wx=(2, width), wh=(width, width), b=(width,), out=(width, 2))


def _rnn_data(length=4):
    return _inputs(length, 2), _targets(2)


def _python_scan(step, carry, xs):
    for x in xs:
        carry, _ = step(carry, x)
    return carry, None


@_row("wx wh out")
def _rnn_scan():
    return _rnn_log_prob(), _rnn_params(), _rnn_data()


@_row("wx wh out")
def _rnn_scan_wide():
    return _rnn_log_prob(), _rnn_params(16), _rnn_data(2)


@_row("wx wh out")
def _rnn_unrolled():
    return _rnn_log_prob(_python_scan), _rnn_params(), _rnn_data()


@_row("wx wh out", like="rnn_scan")
def _rnn_scan_checkpointed_step():
    return _rnn_log_prob(wrap=jax.checkpoint), _rnn_params(), _rnn_data()


@_row("wx wh out", like="rnn_scan")
def _rnn_scan_in_jit():
    return jax.jit(_rnn_log_prob()), _rnn_params(), _rnn_data()


@_row("wx wh out", like="rnn_scan")
def _rnn_scan_in_checkpoint():
    return jax.checkpoint(_rnn_log_prob()), _rnn_params(), _rnn_data()


@_row("wx wh out", like="rnn_scan")
def _rnn_scan_partly_unrolled():
    return _rnn_log_prob(functools.partial(jax.lax.scan, unroll=2)), _rnn_params(), _rnn_data()


@_row("wx wh out")
def _rnn_reversed():
    return _rnn_log_prob(functools.partial(jax.lax.scan, reverse=True)), _rnn_params(), _rnn_data()


@_row("wx wh out")
def _gru_scan():
    def log_prob(p, xs, y):
        def step(h, x):
            gates, candidate = jnp.split(x @ p["wx"] + p["b"], [6])
            reset, update = jnp.split(jax.nn.sigmoid(gates + h @ p["wh"][:, :6]), 2)
            candidate = jnp.tanh(candidate + reset * (h @ p["wh"][:, 6:]))
            return (1.0 - update) * candidate + update * h, None

        return _gaussian(jax.lax.scan(step, jnp.zeros(3), xs)[0] @ p["out"], y)

    return log_prob, _weights(wx=(2, 9), wh=(3, 9), b=(9,), out=(3, 2)), _rnn_data()


@_row("wx wh out")
def _lstm_scan():
    """Every output enters the density, so the outputs of the scan have cotangents too."""

    def log_prob(p, xs, ys):
        def step(carry, x):
            h, cell = carry
            i, f, g, o = jnp.split(x @ p["wx"] + h @ p["wh"] + p["b"], 4)
            cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(cell)
            return (h, cell), h @ p["out"]

        return _gaussian(jax.lax.scan(step, (jnp.zeros(2), jnp.zeros(2)), xs)[1], ys)

    return log_prob, _weights(wx=(2, 8), wh=(2, 8), b=(8,), out=(2, 2)), (_inputs(3, 2), _targets(3, 2))


@_row("w")
def _scan_in_scan():
    def log_prob(p, xs, y):
        def inner(h, x):
            return jnp.tanh(h @ p["w"] + x), None

        def outer(h, row):
            return jax.lax.scan(inner, h, row)[0], None

        return _gaussian(jax.lax.scan(outer, jnp.zeros(3), xs)[0], y)

    return log_prob, _weights(w=(3, 3)), (_inputs(2, 2, 3), _targets(3))


def _stack_log_prob(wrap=lambda step: step):
    def log_prob(p, x, y):
        @wrap
        def layer(h, weights):
            w, b = weights
            return h + jnp.tanh(h @ w + b), None

        return _gaussian(jax.lax.scan(layer, x, (p["w"], p["b"]))[0], y)

    return log_prob


@_row("w")
def _scanned_layers():
    return _stack_log_prob(), _weights(w=(3, 4, 4), b=(3, 4)), (_inputs(4), _targets(4))


@_row("w", like="scanned_layers")
def _scanned_layers_checkpointed():
    return _stack_log_prob(jax.checkpoint), _weights(w=(3, 4, 4), b=(3, 4)), (_inputs(4), _targets(4))


def _stack_over_positions(p, x, y):
    def layer(h, w):
        return h + jnp.tanh(h @ w), None

    return _gaussian(jax.lax.scan(layer, x, p["w"])[0], y)


@_row("w")
def _scanned_layers_over_positions():
    return _stack_over_positions, _weights(w=(2, 3, 3)), (_inputs(4, 3), _targets(4, 3))


@_row("w")
def _scanned_layers_over_positions_wide():
    return _stack_over_positions, _weights(w=(2, 12, 12)), (_inputs(2, 12), _targets(2, 12))


@_row("w")
def _weight_in_the_carry():
    def log_prob(p, x, y):
        def step(carry, _):
            w, h = carry
            return (w, jnp.tanh(h @ w)), None

        return _gaussian(jax.lax.scan(step, (p["w"], x), length=3)[0][1], y)

    return log_prob, _weights(w=(3, 3)), (_inputs(3), _targets(3))


@_row("w1 w2")
def _fori_loop():
    """Three Euler steps of an ordinary differential equation, the number of steps static."""

    def log_prob(p, x, y):
        def step(_, z):
            return z + 0.3 * jnp.tanh(z @ p["w1"]) @ p["w2"]

        return _gaussian(jax.lax.fori_loop(0, 3, step, x), y)

    return log_prob, _weights(w1=(3, 4), w2=(4, 3)), (_inputs(3), _targets(3))


@_row("w")
def _while_loop_on_the_data():
    """A while loop of as many steps as the example needs, before the example meets a parameter."""

    def log_prob(p, x, y):
        halved = jax.lax.while_loop(lambda z: jnp.max(jnp.abs(z)) > 0.5, lambda z: 0.5 * z, x)
        return _gaussian(halved @ p["w"], y)

    return log_prob, _weights(w=(3, 2)), (_inputs(3), _targets(2))


@_row("w out")
def _lax_map_over_positions():
    def log_prob(p, xs, y):
        return _gaussian(jax.lax.map(lambda x: jnp.tanh(x @ p["w"]) @ p["out"], xs), y)

    return log_prob, _weights(w=(2, 3), out=(3, 2)), (_inputs(4, 2), _targets(4, 2))


@_row("w out")
def _vmap_over_positions():
    def log_prob(p, xs, y):
        return _gaussian(jax.vmap(lambda x: jnp.tanh(_dense(x, p["w"], p["b"])) @ p["out"])(xs), y)

    return log_prob, _weights(w=(2, 3), b=(3,), out=(3, 2)), (_inputs(4, 2), _targets(4, 2))


@_row("w out")
def _positions():
    def log_prob(p, xs, y):
        hidden = xs @ p["w"]
        return _gaussian(jnp.tanh(hidden + _along(hidden, p["b"])) @ p["out"], y)

    return log_prob, _weights(w=(2, 3), b=(3,), out=(3, 2)), (_inputs(4, 2), _targets(4, 2))


@_row("w out")
def _positions_wide():
    def log_prob(p, xs, y):
        return _gaussian(jnp.tanh(xs @ p["w"]) @ p["out"], y)

    return log_prob, _weights(w=(12, 16), out=(16, 12)), (_inputs(2, 12), _targets(2, 12))


@_row("w")
def _vmap_over_stacked_weights():
    def log_prob(p, x, y):
        return _gaussian(jax.vmap(lambda w: jnp.tanh(x @ w))(p["w"]).mean(0), y)

    return log_prob, _weights(w=(2, 3, 4)), (_inputs(3), _targets(4))


@_row("w out")
def _graph():
    """Messages along the edges of each example's own graph."""

    def log_prob(p, nodes, senders, receivers, y):
        messages = jnp.tanh(nodes[senders] @ p["w"])
        return _gaussian(jax.ops.segment_sum(messages, receivers, num_segments=3).sum(0) @ p["out"], y)

    edges = _integers(3, 4, seed=11), _integers(3, 4, seed=12)
    return log_prob, _weights(w=(2, 3), out=(3, 2)), (_inputs(3, 2), *edges, _targets(2))


# Attention, transformers, embeddings, experts.


def _attend(q, k, v):
    """Attention of positions by heads by width, each position looking back."""
    scores = jnp.einsum("thk,shk->hts", q, k) / np.sqrt(q.shape[-1])
    mask = jnp.tril(jnp.ones((1, len(q), len(q)), bool))
    return jnp.einsum("hts,shk->thk", jax.nn.softmax(jnp.where(mask, scores, -1e9)), v)


def _attention_log_prob(p, x, y):
    q, k, v = (jnp.einsum("td,dhk->thk", x, p[name]) for name in "qkv")
    return _gaussian(jnp.einsum("thk,hkd->td", _attend(q, k, v), p["o"]), y)


def _attention_params(width, heads, size):
    return _weights(**dict.fromkeys("qkv", (width, heads, size)), o=(heads, size, width))


@_row("q k v o")
def _attention():
    return _attention_log_prob, _attention_params(4, 2, 2), (_inputs(3, 4), _targets(3, 4))


@_row("q k v o")
def _attention_wide():
    return _attention_log_prob, _attention_params(12, 2, 6), (_inputs(2, 12), _targets(2, 12))


@_row("qkv o")
def _fused_attention():
    def log_prob(p, x, y):
        q, k, v = (part.reshape(3, 2, 2) for part in jnp.split(x @ p["qkv"], 3, axis=1))
        return _gaussian(_attend(q, k, v).reshape(3, 4) @ p["o"], y)

    return log_prob, _weights(qkv=(4, 12), o=(4, 4)), (_inputs(3, 4), _targets(3, 4))


@_row("qkv")
def _split_weight():
    def log_prob(p, x, y):
        q, k, v = (x @ part for part in jnp.split(p["qkv"], 3, axis=1))
        return _gaussian(jax.nn.softmax(q @ k.T) @ v, y)

    return log_prob, _weights(qkv=(3, 6)), (_inputs(3, 3), _targets(3, 2))


def _transformer_log_prob(p, tokens, targets):
    """One pre-norm block: sliced positions, attention, a network, and the embedding again as the output."""
    x = p["embedding"][tokens] + p["positions"][: len(tokens)]
    normal = _layer_norm(x, p["scale1"], p["shift1"])
    q, k, v = (jnp.einsum("td,dhk->thk", normal, p[name]) for name in "qkv")
    x = x + jnp.einsum("thk,hkd->td", _attend(q, k, v), p["o"])
    hidden = _layer_norm(x, p["scale2"], p["shift2"]) @ p["w1"]
    x = x + jax.nn.gelu(hidden + _along(hidden, p["b1"])) @ p["w2"]
    return jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(x @ p["embedding"].T), targets[:, None], axis=1))


def _transformer_params():
    attention = _attention_params(4, 2, 2)
    rest = {"embedding": (5, 4), "positions": (6, 4), "w1": (4, 5), "b1": (5,), "w2": (5, 4)}
    norms = {"scale1": (4,), "shift1": (4,), "scale2": (4,), "shift2": (4,)}
    return {**attention, **_weights(**rest, **norms)}


def _transformer_data():
    return _integers(5, 3), _integers(5, 3, seed=103)


TRANSFORMER = "q k v o embedding positions w1 w2"
"""A table of positions too, of which only the rows that a sequence uses are stored."""


@_row(TRANSFORMER)
def _transformer():
    return _transformer_log_prob, _transformer_params(), _transformer_data()


@_row(TRANSFORMER, like="transformer")
def _transformer_in_checkpoint_and_jit():
    return jax.jit(jax.checkpoint(_transformer_log_prob)), _transformer_params(), _transformer_data()


@_row("table")
def _embedding():
    def log_prob(p, token, y):
        return _gaussian(jnp.tanh(p["table"][token]), y)

    return log_prob, _weights(table=(4, 3)), (_integers(4), _targets(3))


@_row("table w")
def _embedding_bag():
    def log_prob(p, tokens, weights, y):
        bag = weights @ jnp.take(p["table"], tokens, axis=0, mode="clip")
        return _gaussian(jnp.tanh(bag) @ p["w"], y)

    return log_prob, _weights(table=(5, 3), w=(3, 2)), (_integers(5, 4), _inputs(4), _targets(2))


@_row("table")
def _embedding_of_a_grid():
    """Two-dimensional indices, with tokens that occur more than once."""

    def log_prob(p, tokens, y):
        return _gaussian(jnp.tanh(p["table"][tokens]).sum((0, 1)), y)

    return log_prob, _weights(table=(3, 2)), (_integers(3, 2, 4), _targets(2))


@_row("table")
def _embedding_wide():
    def log_prob(p, tokens, y):
        return _gaussian(jnp.tanh(p["table"][tokens]), y)

    # Only a few tokens occur, so that examples share them.
    return log_prob, _weights(table=(30, 8)), (_integers(3, 2), _targets(2, 8))


def _tied_embedding_log_prob(p, token, y):
    return _choice(jnp.tanh(p["table"][token]) @ p["table"].T, y)


@_row("table")
def _embedding_tied_to_the_output():
    return _tied_embedding_log_prob, _weights(table=(4, 3)), (_integers(4), _integers(4, seed=103))


@_row("table")
def _embedding_tied_to_the_output_wide():
    return _tied_embedding_log_prob, _weights(table=(24, 12)), (_integers(3), _integers(24, seed=103))


@_row("table w")
def _positional_table():
    def log_prob(p, tokens, y):
        return _gaussian((p["table"][tokens] + p["positions"][1:4]) @ p["w"], y)

    return log_prob, _weights(table=(4, 2), positions=(5, 2), w=(2, 2)), (_integers(4, 3), _targets(3, 2))


@_row("gate w1 w2")
def _mixture_of_experts():
    def log_prob(p, x, y):
        hidden = jnp.tanh(jnp.einsum("i,eij->ej", x, p["w1"]))
        experts = jnp.einsum("ej,ejk->ek", hidden, p["w2"])
        return _gaussian(jax.nn.softmax(x @ p["gate"]) @ experts, y)

    return log_prob, _weights(gate=(3, 2), w1=(2, 3, 4), w2=(2, 4, 2)), (_inputs(3), _targets(2))


@_row("experts gate")
def _chosen_expert():
    """A gate picks one expert for each example: a gather of a matrix."""

    def log_prob(p, x, y):
        gates = jax.nn.softmax(x @ p["gate"])
        best = jnp.argmax(gates)
        return _gaussian(gates[best] * (x @ p["experts"][best]), y)

    return log_prob, _weights(experts=(3, 3, 2), gate=(3, 3)), (_inputs(3), _targets(2))


@_row("cube out")
def _rank_three_einsum():
    def log_prob(p, x, z, y):
        return _gaussian(jnp.tanh(jnp.einsum("i,j,ijk->k", x, z, p["cube"])) @ p["out"], y)

    return log_prob, _weights(cube=(2, 3, 2), out=(2, 2)), (_inputs(2), _array(5, N, 3), _targets(2))


# Heads and losses.


@_row("w logits loc log_scale")
def _mixture_density():
    def log_prob(p, x, y):
        hidden = jnp.tanh(x @ p["w"])
        loc, log_scale = hidden @ p["loc"], hidden @ p["log_scale"]
        parts = -0.5 * ((y - loc) * jnp.exp(-log_scale)) ** 2 - log_scale
        return jax.nn.logsumexp(jax.nn.log_softmax(hidden @ p["logits"]) + parts)

    return log_prob, _weights(w=(3, 4), logits=(4, 2), loc=(4, 2), log_scale=(4, 2)), (_inputs(3), _targets())


@_row("w")
def _normal_with_learned_scale():
    def log_prob(p, x, y):
        return _gaussian((x @ p["w"]) * jnp.exp(-p["log_scale"]), y * jnp.exp(-p["log_scale"])) - 2.0 * p["log_scale"]

    return log_prob, _weights(w=(3, 2), log_scale=()), (_inputs(3), _targets(2))


@_row("w")
def _poisson():
    def log_prob(p, x, y):
        log_rate = x @ p["w"] + p["b"]
        return jnp.sum(y * log_rate - jnp.exp(log_rate) - jax.lax.lgamma(y + 1.0))

    return log_prob, _weights(w=(3, 2), b=(2,)), (_inputs(3), _integers(5, 2).astype(float))


@_row("w1 w2")
def _huber():
    def log_prob(p, x, y):
        error = jnp.abs(jax.nn.leaky_relu(x @ p["w1"]) @ p["w2"] - y)
        return -jnp.sum(jnp.where(error < 0.5, error**2, error - 0.25))

    return log_prob, _weights(w1=(3, 4), w2=(4, 2)), (_inputs(3), _targets(2))


@_row("w1 w2")
def _dropout_mask():
    def log_prob(p, x, mask, y):
        return _gaussian((mask * jax.nn.relu(x @ p["w1"])) @ p["w2"], y)

    return log_prob, _weights(w1=(3, 4), w2=(4, 2)), (_inputs(3), _integers(2, 4).astype(float), _targets(2))


@_row("w1 w2")
def _dropout_key():
    """The example brings its own random key."""

    def log_prob(p, x, key, y):
        mask = jax.random.bernoulli(key, 0.7, (4,)).astype(float)
        return _gaussian((mask * jax.nn.relu(x @ p["w1"])) @ p["w2"], y)

    keys = jax.random.split(jax.random.key(0), N)
    return log_prob, _weights(w1=(3, 4), w2=(4, 2)), (_inputs(3), keys, _targets(2))


@_row("w")
def _derivatives_in_the_density():
    """A residual of ``u'' + u = y`` for a network u, as physics-informed networks have it."""

    def log_prob(p, x, y):
        def u(x):
            return jnp.dot(jnp.tanh(jnp.tanh(x * p["first"] + p["b"]) @ p["w"]), p["last"])

        return -0.5 * (jax.grad(jax.grad(u))(x) + u(x) - y) ** 2

    return log_prob, _weights(first=(4,), b=(4,), w=(4, 3), last=(3,)), (_inputs(), _targets())


@_row("w1 w2")
def _forces():
    """The gradient of an energy with respect to the input is compared with data."""

    def log_prob(p, x, y):
        return _gaussian(jax.grad(lambda x: jnp.sum(jnp.tanh(x @ p["w1"]) @ p["w2"]))(x), y)

    return log_prob, _weights(w1=(3, 4), w2=(4, 2)), (_inputs(3), _targets(3))


@_row("w matrix")
def _linear_solve():
    """A solve with a matrix that depends on the example and on a parameter."""

    def log_prob(p, x, y):
        matrix = 3.0 * jnp.eye(3) + jnp.outer(x, x) + p["matrix"]
        return _gaussian(jnp.linalg.solve(matrix, x @ p["w"]), y)

    return log_prob, {"w": _array(0, 3, 3), "matrix": _array(1, 3, 3, scale=0.1)}, (_inputs(3), _targets(3))


# Dtypes.

_BFLOAT16, _FLOAT32 = float(jnp.finfo(jnp.bfloat16).eps), float(jnp.finfo(jnp.float32).eps)


@_row("w1 w2", eps=_BFLOAT16)
def _bfloat16_compute():
    def dense(x, w, b):
        half = jnp.matmul(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), preferred_element_type=jnp.float32)
        return half + b

    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), _mlp_params())
    return _mlp_log_prob(dense), params, (_inputs(3, dtype=jnp.float32), _integers(3))


@_row("w1 w2", eps=_BFLOAT16)
def _bfloat16_weights():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), _mlp_params())
    return _mlp_log_prob(), params, (_inputs(3, dtype=jnp.bfloat16), _integers(3))


@_row("w1 w2", eps=_FLOAT32)
def _float32():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), _mlp_params())
    return _mlp_log_prob(), params, (_inputs(3, dtype=jnp.float32), _integers(3))


@_row("w1 w2", eps=_FLOAT32)
def _float64_inputs_float32_weights():
    def dense(x, w, b):
        return x @ w.astype(float) + b.astype(float)

    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), _mlp_params())
    return _mlp_log_prob(dense), params, _mlp_data()


@_row("w")
def _complex_input():
    def log_prob(p, re, im, y):
        out = jax.lax.complex(re, im) @ p["w"].astype(complex)
        return _gaussian(jnp.abs(out) ** 2 + jnp.real(out * (1.0 + 2.0j)), y)

    return log_prob, _weights(w=(3, 2)), (_inputs(3), _array(5, N, 3), _targets(2))


@_row("re im")
def _complex_weight():
    """A spectral convolution: a complex matrix for each frequency, stored as two real leaves."""

    def log_prob(p, x, y):
        spectrum = jnp.einsum("mi,mio->mo", jnp.fft.rfft(x, axis=0), jax.lax.complex(p["re"], p["im"]))
        return _gaussian(jnp.fft.irfft(spectrum, n=4, axis=0), y)

    return log_prob, _weights(re=(3, 2, 2), im=(3, 2, 2)), (_inputs(4, 2), _targets(4, 2))


@_row("w")
def _fourier_transform():
    def log_prob(p, x, y):
        return _gaussian(jnp.abs(jnp.fft.fft(x @ p["w"])), y)

    return log_prob, _weights(w=(3, 4)), (_inputs(3), _targets(4))


# Wrapped models, which must be stored as the model inside.


@_row("w1 w2", like="mlp")
def _in_jit():
    return jax.jit(_mlp_log_prob()), _mlp_params(), _mlp_data()


@_row("w1 w2", like="mlp")
def _nested_jit():
    return jax.jit(_mlp_log_prob(jax.jit(_dense), jax.jit(jnp.tanh))), _mlp_params(), _mlp_data()


@_row("w1 w2", like="mlp")
def _in_checkpoint():
    return jax.checkpoint(_mlp_log_prob()), _mlp_params(), _mlp_data()


@_row("w1 w2", like="mlp")
def _jit_in_checkpoint():
    return jax.checkpoint(jax.jit(_mlp_log_prob(jax.jit(_dense)))), _mlp_params(), _mlp_data()


@_row("w1 w2", like="mlp")
def _checkpointed_layers():
    return _mlp_log_prob(jax.checkpoint(_dense), jax.checkpoint(jnp.tanh)), _mlp_params(), _mlp_data()


@_row("w1 w2", like="mlp")
def _checkpoint_policy():
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(_mlp_log_prob(), policy=policy), _mlp_params(), _mlp_data()


def _custom_dense(outer):
    """A dense layer with its own backward pass, which makes the weight's gradient with ``outer``."""

    @jax.custom_vjp
    def dense(x, w, b):
        return _dense(x, w, b)

    def backward(residuals, g):
        x, w = residuals
        return g @ w.T, outer(x, g), g

    dense.defvjp(lambda x, w, b: (_dense(x, w, b), (x, w)), backward)
    return dense


@_row("w1 w2", like="mlp")
def _custom_vjp_dense():
    return _mlp_log_prob(_custom_dense(lambda x, g: jnp.tensordot(x, g, axes=0))), _mlp_params(), _mlp_data()


@_row("w1 w2")
def _custom_vjp_outer():
    return _mlp_log_prob(_custom_dense(jnp.outer)), _mlp_params(), _mlp_data()


@_row("w1 w2", like="mlp")
def _custom_jvp_activation():
    @jax.custom_jvp
    def activation(x):
        return jnp.tanh(x)

    @activation.defjvp
    def _(primals, tangents):
        y = jnp.tanh(primals[0])
        return y, (1.0 - y**2) * tangents[0]

    return _mlp_log_prob(activation=activation), _mlp_params(), _mlp_data()


@_row("w1 w2", like="mlp")
def _custom_vjp_activation():
    @jax.custom_vjp
    def activation(x):
        return jnp.tanh(x)

    activation.defvjp(lambda x: (jnp.tanh(x), jnp.tanh(x)), lambda y, g: ((1.0 - y**2) * g,))
    return _mlp_log_prob(activation=activation), _mlp_params(), _mlp_data()


# Operations that the engine cannot see through.


@_row("w1", plain="w2 w3")
def _cond():
    def log_prob(p, x, y):
        hidden = jnp.tanh(x @ p["w1"])
        out = jax.lax.cond(x[2] > 0.0, lambda h: h @ p["w2"], lambda h: jnp.sin(h @ p["w3"]), hidden)
        return _gaussian(out, y)

    return log_prob, _weights(w1=(3, 4), w2=(4, 2), w3=(4, 2)), (_inputs(3), _targets(2))


@_row("w2 w3")
def _select():
    def log_prob(p, x, y):
        return _gaussian(jnp.where(x[2] > 0.0, x @ p["w2"], jnp.sin(x @ p["w3"])), y)

    return log_prob, _weights(w2=(3, 2), w3=(3, 2)), (_inputs(3), _targets(2))


@functools.cache
def _invented():
    """A linear primitive of our own, twice the input with its last axis reversed, which is its own transpose."""
    primitive = Primitive("invented")

    def implementation(x):
        return 2.0 * x[..., ::-1]

    primitive.def_impl(implementation)
    primitive.def_abstract_eval(lambda x: x)
    mlir.register_lowering(primitive, mlir.lower_fun(implementation, multiple_results=False))
    ad.primitive_jvps[primitive] = lambda primals, tangents: (
        primitive.bind(*primals),
        ad.Zero(primals[0].aval) if isinstance(tangents[0], ad.Zero) else primitive.bind(*tangents),
    )
    ad.primitive_transposes[primitive] = lambda cotangent, _: (primitive.bind(cotangent),)
    batching.primitive_batchers[primitive] = lambda args, axes: (primitive.bind(jnp.moveaxis(args[0], axes[0], 0)), 0)
    return primitive.bind


@_row("out", plain="w")
def _invented_primitive_on_a_weight():
    def log_prob(p, x, y):
        return _gaussian(jnp.tanh(x @ _invented()(p["w"])) @ p["out"], y)

    return log_prob, _weights(w=(3, 4), out=(4, 2)), (_inputs(3), _targets(2))


@_row("w out")
def _invented_primitive_on_an_activation():
    def log_prob(p, x, y):
        return _gaussian(_invented()(jnp.tanh(x @ p["w"])) @ p["out"], y)

    return log_prob, _weights(w=(3, 4), out=(4, 2)), (_inputs(3), _targets(2))


# Programs to which a rule does not apply, or to which one was once applied by mistake.


@_row("w", eps=1.2e-7, relaxed=True)
def _complex_constant_after_a_real_weight():
    mix = jax.lax.complex(_array(1, 4, 3, dtype=np.float32), _array(2, 4, 3, dtype=np.float32))

    def log_prob(p, x):
        return -jnp.sum((jnp.imag(x @ (mix @ p["w"])) - 1) ** 2)

    return log_prob, {"w": _array(3, 3, dtype=np.float32)}, (_inputs(4, dtype=np.float32),)


@_row()
def _power_spectrum():
    return lambda p, x: -jnp.sum(jnp.abs(jnp.fft.rfft(p["w"] * x)) ** 2), {"w": _array(1, 6)}, (_inputs(6),)


@_row()
def _divided_by_a_mean_over_a_broadcast():
    def log_prob(p, x):
        wide = jnp.broadcast_to(x[:, None, None] ** 2 + jnp.arange(3.0)[None, :, None] + 1, (4, 3, 2))
        return jnp.sum(p["w"] / jnp.mean(wide, 1))

    return log_prob, {"w": _array(1, 4, 2)}, (_inputs(4),)


def _rounded_backwards(dtype):
    """The identity, whose cotangent is rounded to a narrow dtype, as quantised training does it."""

    @jax.custom_vjp
    def rounded(w):
        return w

    rounded.defvjp(lambda w: (w, None), lambda _, g: ((4 * g).astype(dtype).astype(g.dtype) / 4,))
    return rounded


@_row(plain="w")
def _gradient_cast_to_integers():
    rounded = _rounded_backwards(jnp.int8)
    return lambda p, x: 9 * jnp.sum(jnp.tanh(x @ rounded(p["w"]))), {"w": _array(1, 3, 2)}, (_inputs(3),)


@_row(plain="w")
def _gradient_cast_to_float8():
    rounded = _rounded_backwards(jnp.float8_e4m3fn)
    return lambda p, x: jnp.sum(jnp.tanh(x @ rounded(p["w"]))), {"w": _array(1, 3, 2)}, (_inputs(3),)


@_row()
def _number_of_a_sum_times_an_array():
    return lambda p, x: jnp.sum(jnp.tanh(jnp.sum(p["w"][None] * x[:, None]) * x)), {"w": _array(1, 4)}, (_inputs(4),)


@_row("w b")
def _layer_beside_two_layers_of_width_one():
    params = {"w": _array(1, 1, 4), "a": _array(2, 1, 1), "b": _array(3, 1, 4)}
    return lambda p, x: jnp.sum(jnp.tanh(x @ p["w"] + (x @ p["a"]) @ p["b"])), params, (_inputs(1),)


@_row()
def _square_of_one_value_in_two_arrangements():
    return lambda p, x: jnp.sum((x[:, None] * x[None, :]) * jnp.tanh(p["w"])), {"w": _array(1, 3, 3)}, (_inputs(3),)
