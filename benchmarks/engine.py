"""The costs of the engine, as ratios to plain gradients and to plain per-example gradients: see README.md beside this file.

python benchmarks/engine.py [--check] [workload ...]
"""

from __future__ import annotations

import os

# JAX uses the LAPACK of SciPy's BLAS. If it has several threads, they compete with XLA's and slow every Cholesky factor.
os.environ["OPENBLAS_NUM_THREADS"] = "1"
# Some runs are in a fresh process, which shares the device with this one.
os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"

import argparse
import dataclasses
import functools
import itertools
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, Scalar

import jaxfisher as jf

MEGABYTE = 1e6

# ------------------------------------------------------------------------------------------------------------ sizes


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of the measured problems: those of the goals, or tiny ones, for a check that every line works."""

    repeats: int = 11
    shrink: int = 1

    def widths(self, *widths: int) -> tuple[int, ...]:
        """Layer widths, the hidden ones shrunk."""
        return (widths[0], *(max(8, width // self.shrink) for width in widths[1:-1]), widths[-1])

    def examples(self, n: int) -> int:
        """A number of examples, shrunk."""
        return max(8, n // self.shrink)

    @property
    def big(self) -> tuple[int, ...]:
        """The MLP with 1.13 M parameters."""
        return self.widths(64, 1024, 1024, 10)

    @property
    def small(self) -> tuple[int, ...]:
        """The MLP with 84 k parameters."""
        return self.widths(64, 256, 256, 10)


FULL = Sizes()
CHECK = Sizes(repeats=3, shrink=16)

# --------------------------------------------------------------------------------------------------- models and data


def digits(n: int) -> tuple[Float[Array, "n 64"], Int[Array, " n"]]:
    """The first n of scikit-learn's digits, standardised; random numbers of that shape without scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        rng = np.random.default_rng(0)
        images, labels = rng.standard_normal((1797, 64)), rng.integers(0, 10, 1797)
    else:
        images, labels = load_digits(return_X_y=True)
        images = (images - images.mean(0)) / np.where(images.std(0) > 0, images.std(0), 1)
    return jnp.asarray(images[:n], jnp.float32), jnp.asarray(labels[:n], jnp.int32)


def dense_layers(widths: Sequence[int], seed: int = 0) -> list[tuple[Array, Array]]:
    """Weights and biases of an MLP."""
    keys = jax.random.split(jax.random.key(seed), len(widths) - 1)
    shapes = list(itertools.pairwise(widths))
    return [
        (jax.random.normal(key, shape) / shape[0] ** 0.5, jnp.zeros(shape[1])) for key, shape in zip(keys, shapes, strict=True)
    ]


def mlp_logits(params: Any, x: Array) -> Array:
    """A tanh MLP of one example."""
    *hidden, (weight, bias) = params
    for inner, shift in hidden:
        x = jnp.tanh(x @ inner + shift)
    return x @ weight + bias


def mlp_log_prob(params: Any, x: Array, y: Array) -> Scalar:
    """Log-probability of one label."""
    return jax.nn.log_softmax(mlp_logits(params, x))[y]


def mlp_model(params: Any, x: Array) -> jf.Categorical:
    """The same MLP as a model."""
    return jf.Categorical(logits=mlp_logits(params, x))


@dataclasses.dataclass(frozen=True)
class Transformer:
    """A causal character transformer, pre-norm, learned positions, output not tied."""

    width: int = 256
    length: int = 64
    layers: int = 2
    heads: int = 4
    vocabulary: int = 64

    def init(self) -> Any:
        """The parameters."""
        width = self.width
        block = {"qkv": (width, 3 * width), "out": (width, width), "up": (width, 4 * width), "down": (4 * width, width)}
        shapes = {
            "embed": (self.vocabulary, width),
            "position": (self.length, width),
            "head": (width, self.vocabulary),
            "blocks": [dict(block) for _ in range(self.layers)],
        }
        flat, treedef = jax.tree.flatten(shapes, is_leaf=lambda s: isinstance(s, tuple))
        keys = jax.random.split(jax.random.key(1), len(flat))
        params = treedef.unflatten([jax.random.normal(k, s) / s[0] ** 0.5 for k, s in zip(keys, flat, strict=True)])
        for layer in params["blocks"]:
            layer.update({name: (jnp.ones(width), jnp.zeros(width)) for name in ("norm1", "norm2")})
        return params

    def data(self, n: int) -> tuple[Array, Array]:
        """Random characters, and the character that follows each."""
        text = jax.random.randint(jax.random.key(2), (n, self.length + 1), 0, self.vocabulary)
        return text[:, :-1], text[:, 1:]

    def log_prob(self, params: Any, tokens: Int[Array, " T"], following: Int[Array, " T"]) -> Scalar:
        """Log-probability of the next characters of one text."""
        x = params["embed"][tokens] + params["position"]
        for layer in params["blocks"]:
            x = x + self._attention(layer, _normalised(x, *layer["norm1"]))
            x = x + jax.nn.gelu(_normalised(x, *layer["norm2"]) @ layer["up"]) @ layer["down"]
        logits = jax.nn.log_softmax(x @ params["head"])
        return jnp.sum(jnp.take_along_axis(logits, following[:, None], axis=1))

    def _attention(self, layer: Any, x: Float[Array, "T width"]) -> Float[Array, "T width"]:
        query, key, value = (part.reshape(self.length, self.heads, -1) for part in jnp.split(x @ layer["qkv"], 3, axis=1))
        weights = jnp.einsum("shd,thd->hst", query, key) * query.shape[-1] ** -0.5
        causal = jnp.tril(jnp.ones((self.length, self.length), bool))
        weights = jax.nn.softmax(jnp.where(causal, weights, -jnp.inf), axis=-1)
        return jnp.einsum("hst,thd->shd", weights, value).reshape(self.length, -1) @ layer["out"]


def _normalised(x: Array, scale: Array, shift: Array) -> Array:
    centred = x - jnp.mean(x, -1, keepdims=True)
    return scale * centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), -1, keepdims=True) + 1e-6) + shift


# --------------------------------------------------------------------------------------------- the plain computations

LogProb = Callable[..., Scalar]


def plain_loss(log_prob: LogProb) -> Callable[..., Scalar]:
    """The mean negative log-likelihood of a batch."""
    return lambda params, x, y: -jnp.mean(jax.vmap(log_prob, (None, 0, 0))(params, x, y))


def plain_gradient(log_prob: LogProb) -> Callable[..., Any]:
    """The gradient of that loss: the unit of most ratios."""
    return jax.grad(plain_loss(log_prob))


def plain_scores(log_prob: LogProb) -> Callable[..., Float[Array, "n p"]]:
    """Per-example gradients, all formed and in memory."""

    def matrix(params: Any, x: Array, y: Array) -> Array:
        rows = jax.vmap(jax.grad(log_prob), (None, 0, 0))(params, x, y)
        return jax.vmap(lambda row: ravel_pytree(row)[0])(rows)

    return matrix


def plain_gram(log_prob: LogProb) -> Callable[..., Array]:
    """Inner products of per-example gradients in memory."""

    def gram(params: Any, x: Array, y: Array) -> Array:
        rows = plain_scores(log_prob)(params, x, y)
        return jnp.matmul(rows, rows.T, precision=jax.lax.Precision.HIGHEST)

    return gram


def plain_step(log_prob: LogProb) -> Callable[..., Array]:
    """The damped natural gradient by an n x n solve, from per-example gradients in memory; raveled."""

    def step(params: Any, x: Array, y: Array, damping: Scalar) -> Array:
        rows = plain_scores(log_prob)(params, x, y)
        n = rows.shape[0]
        kernel = jnp.matmul(rows, rows.T, precision=jax.lax.Precision.HIGHEST) / n + damping * jnp.eye(n)
        # -(S^T S / n + damping)^-1 S^T 1 / n = -S^T (S S^T / n + damping)^-1 1 / n
        return -jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(kernel), jnp.full(n, 1 / n)) @ rows

    return step


def natural_step(log_prob: LogProb) -> Callable[..., Any]:
    """The same by the library; damping is an argument, so that one program serves every damping."""
    return lambda params, x, y, damping: jf.natural_grad(log_prob, damping=damping)(params, x, y)


def largest_eigenvalue(log_prob: LogProb, params: Any, x: Array, y: Array) -> float:
    """The largest eigenvalue of the empirical Fisher."""
    gram = jax.jit(lambda *args: jf.scores(log_prob)(*args).gram())(params, x, y)
    return float(jnp.max(jnp.linalg.eigvalsh(gram)) / x.shape[0])


def residual(log_prob: LogProb, damping: float) -> Callable[..., Scalar]:
    """``|(F + damping) d - g| / |g|`` by JAX's own products with the scores, without the library."""

    def relative(params: Any, x: Array, y: Array, direction: Any) -> Scalar:
        def values(p: Any) -> Array:
            return jax.vmap(log_prob, (None, 0, 0))(p, x, y)

        _, along = jax.jvp(values, (params,), (direction,))
        _, pull_back = jax.vjp(values, params)
        (image,) = pull_back(along / x.shape[0])
        flat, gradient = ravel_pytree(image)[0], ravel_pytree(plain_gradient(log_prob)(params, x, y))[0]
        off = flat + damping * ravel_pytree(direction)[0] - gradient
        return jnp.linalg.norm(off) / jnp.linalg.norm(gradient)

    return relative


def difference(mine: Any, reference: Any) -> str:
    """The largest difference relative to the largest entry, as words.

    Both sides are float32 and may share rounding errors where they form the same numbers. So this shows that both computed the
    same quantity, and not how accurately. The tests measure accuracy, in float64.
    """
    a, b = (np.asarray(ravel_pytree(x)[0], np.float64) for x in (mine, reference))
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return "NOT FINITE"
    if np.array_equal(a, b):
        return "identical in float32"
    return f"relative difference {np.max(np.abs(a - b)) / np.max(np.abs(b)):.0e}"


# ---------------------------------------------------------------------------------------------------------- measuring


@dataclasses.dataclass(frozen=True)
class Case:
    """A compiled program and its arguments."""

    program: Any
    arguments: tuple[Any, ...]

    def __call__(self) -> Any:
        """Run the program and wait for its results."""
        return jax.block_until_ready(self.program(*self.arguments))

    @property
    def temporary(self) -> int:
        """Bytes of temporary memory the compiled program asks for."""
        return int(self.program.memory_analysis().temp_size_in_bytes)


def compiled(function: Callable[..., Any], *arguments: Any) -> Case:
    """A function compiled for these arguments."""
    return Case(jax.jit(function).lower(*arguments).compile(), arguments)


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of every repeat."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median."""
        return statistics.median(self.seconds)

    def __str__(self) -> str:
        low, _, high = statistics.quantiles(self.seconds, n=4)
        unit, word = (1.0, "s") if self.median >= 1 else (1e-3, "ms")
        return f"{self.median / unit:.3g} {word} ({low / unit:.3g} to {high / unit:.3g})"


def time_in_turn(cases: Sequence[Case], repeats: int) -> list[Times]:
    """Times of several programs, run in turn so that a slow spell of the machine affects all; the first runs warm up."""
    for case in cases:
        case()
    seconds: list[list[float]] = [[] for _ in cases]
    for _ in range(repeats):
        for case, own in zip(cases, seconds, strict=True):
            start = time.perf_counter()
            case()
            own.append(time.perf_counter() - start)
    return [Times(tuple(own)) for own in seconds]


def alone(what: str, sizes: Sizes) -> dict[str, Any]:
    """The measurements of this script run in a fresh process, for one entry of `ALONE`."""
    command = [sys.executable, __file__, "--alone", what, *(["--check"] if sizes is CHECK else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


def peak_bytes() -> int:
    """The peak of memory so far: of the accelerator if there is one, else of this process."""
    stats = jax.devices()[0].memory_stats()
    if stats:
        return int(stats["peak_bytes_in_use"])
    status = Path("/proc/self/status")
    if status.exists():
        # On Linux a child inherits its parent's ru_maxrss; VmHWM is the process's own peak.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


# ------------------------------------------------------------------------------------------------------------- tables


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table, in words."""

    case: str
    plain: str
    ours: str
    ratio: str
    goal: str
    reached: str
    note: str = ""


def _verdict(reached: bool) -> str:
    return "yes" if reached else "NO"


def costs(case: str, plain: Times, ours: Times, goal: float | None, note: str = "") -> Row:
    """A row with our time in units of the plain one; a goal is an upper limit."""
    ratio = ours.median / plain.median
    limit, reached = ("", "") if goal is None else (f"at most {goal:g}", _verdict(ratio <= goal))
    return Row(case, str(plain), str(ours), f"{ratio:.2f}", limit, reached, note)


def gains(case: str, plain: Times, ours: Times, goal: float, note: str = "") -> Row:
    """A row with the number of times by which the library is faster; a goal is a lower limit."""
    ratio = plain.median / ours.median
    return Row(case, str(plain), str(ours), f"{ratio:.3g}", f"at least {goal:g}", _verdict(ratio >= goal), note)


def megabytes(size: float) -> str:
    """A size in words."""
    return f"{size / MEGABYTE:,.1f} MB"


def saves(case: str, plain: Case, ours: Case, goal: float) -> Row:
    """A row with the number of times by which the library takes less temporary memory."""
    ratio = plain.temporary / ours.temporary
    words = megabytes(plain.temporary), megabytes(ours.temporary)
    return Row(case, *words, f"{ratio:.2f}", f"at least {goal:g}", _verdict(ratio >= goal))


def stays_below(case: str, plain: Case, ours: Case, n: int) -> Row:
    """Temporary memory against twice the plain gradient's, three n x n arrays and four vectors; the ratio is to that bound."""
    size = sum(leaf.size for leaf in jax.tree.leaves(plain.arguments[0]))
    bound = 2 * plain.temporary + 3 * n * n * 4 + 4 * size * 4
    ratio = ours.temporary / bound
    words = megabytes(plain.temporary), megabytes(ours.temporary)
    return Row(case, *words, f"{ratio:.2f} of bound", megabytes(bound), _verdict(ratio <= 1))


def print_table(title: str, rows: Sequence[Any]) -> None:
    """Print a heading and an aligned table; rows are dataclasses of strings, whose fields are the columns."""
    names = [field.name for field in dataclasses.fields(rows[0])]
    lines = [names, *([getattr(row, name) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    lines.insert(1, ["-" * width for width in widths])
    print(f"\n### {title}\n")
    for line in lines:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")
    sys.stdout.flush()


# ---------------------------------------------------------------------------------------------------------- workloads


def mlp(widths: tuple[int, ...], n: int) -> tuple[Any, Array, Array]:
    """Parameters and a batch."""
    return (dense_layers(widths), *digits(n))


def shape_name(widths: Sequence[int], n: int) -> str:
    """An MLP and its batch, in words."""
    return f"{'-'.join(map(str, widths))}, n = {n}"


def gram(sizes: Sizes) -> list[Row]:
    """Gram matrix of the scores against per-example gradients and a matmul."""
    arguments = mlp(sizes.big, sizes.examples(256))
    plain = compiled(plain_gram(mlp_log_prob), *arguments)
    ours = compiled(lambda *args: jf.scores(mlp_log_prob)(*args).gram(), *arguments)
    note = difference(ours(), plain())
    theirs, own = time_in_turn([plain, ours], sizes.repeats)
    return [gains(shape_name(sizes.big, sizes.examples(256)), theirs, own, 50, note)]


def step(sizes: Sizes) -> list[Row]:
    """Damped natural-gradient step (empirical Fisher) against the plain gradient of the same batch."""
    goals = [(sizes.big, {128: 1.2, 256: 1.4, 512: 1.7, 1024: 2.3}), (sizes.small, {128: 1.8, 512: 2.9})]
    return [
        row for widths, table in goals for n, goal in table.items() for row in _step(widths, sizes.examples(n), goal, sizes)
    ]


def _step(widths: tuple[int, ...], n: int, goal: float, sizes: Sizes) -> list[Row]:
    arguments = mlp(widths, n)
    largest = largest_eigenvalue(mlp_log_prob, *arguments)
    dampings = {f"damping {share:g} of the largest eigenvalue": largest * share for share in (1e-2, 1e-6)} | {
        "damping 1e-3": 1e-3
    }
    plain = compiled(plain_gradient(mlp_log_prob), *arguments)
    first = compiled(natural_step(mlp_log_prob), *arguments, jnp.asarray(largest * 1e-2))
    ours = [Case(first.program, (*arguments, jnp.asarray(damping))) for damping in dampings.values()]
    times = time_in_turn([plain, *ours], sizes.repeats)
    name = shape_name(widths, n)
    rows = []
    for (label, damping), case, own in zip(dampings.items(), ours, times[1:], strict=True):
        left = jax.jit(residual(mlp_log_prob, damping))(*arguments, case())
        note = f"{damping / largest:.1g} of the largest eigenvalue, residual {float(left):.0e}"
        rows.append(costs(f"{name}, {label}", times[0], own, goal, note))
    rows.append(stays_below(f"{name}, temporary memory", plain, first, n))
    return rows


def solve(sizes: Sizes) -> list[Row]:
    """Solves for any vector, from scores in memory, against a solve whose damping is an array that may be zero."""
    rows = []
    for n in (sizes.examples(256), sizes.examples(512)):
        arguments = mlp(sizes.small, n)
        fisher = jax.jit(jf.empirical_fisher(mlp_log_prob))(*arguments)
        gradient = jax.jit(plain_gradient(mlp_log_prob))(*arguments)
        damping = 1e-3 * largest_eigenvalue(mlp_log_prob, *arguments)
        path = damping * jnp.geomspace(0.01, 1000, 20)
        unknown = compiled(jf.solve, fisher, gradient, jnp.asarray(damping))
        known = compiled(lambda F, g, damping=damping: jf.solve(F, g, damping), fisher, gradient)
        training = compiled(functools.partial(jf.solve, solver=jf.Cholesky(1e-3)), fisher, gradient, jnp.asarray(damping))
        many = compiled(jf.solve_path, fisher, gradient, path)
        times = time_in_turn([unknown, known, training, many], sizes.repeats)
        name = shape_name(sizes.small, n)
        cases = {"a known damping": 1, "jf.Cholesky(1e-3)": 1, "jf.solve_path over 20 dampings": 2}
        rows += [
            costs(f"{name}, {case}", times[0], own, goal) for (case, goal), own in zip(cases.items(), times[1:], strict=True)
        ]
    return rows


def first_call(sizes: Sizes) -> list[Row]:
    """First call of a jitted training step: tracing, compiling, running; each in a fresh process."""
    kinds = ("gradient", "adam", "natural")
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(max(sizes.repeats, 2)):
        for kind in kinds:
            seconds[kind].append(alone(kind, sizes)["seconds"])
    gradient, adam, natural = (Times(tuple(seconds[kind])) for kind in kinds)
    name = shape_name(sizes.big, sizes.examples(256))
    return [costs(f"{name}, against SGD", gradient, natural, 2.5), costs(f"{name}, against Adam", adam, natural, 2.5)]


def _first_call_alone(kind: str, sizes: Sizes) -> dict[str, Any]:
    params, x, y = jax.block_until_ready(mlp(sizes.big, sizes.examples(256)))
    adam = optax.adam(1e-3)
    state = jax.block_until_ready(adam.init(params))

    def descend(loss: Scalar, params: Any, direction: Any) -> tuple[Scalar, Any]:
        return loss, jax.tree.map(lambda a, b: a - 0.1 * b, params, direction)

    def by_gradient(params: Any, state: Any, x: Array, y: Array) -> Any:
        loss, gradient = jax.value_and_grad(plain_loss(mlp_log_prob))(params, x, y)
        return *descend(loss, params, gradient), state

    def by_adam(params: Any, state: Any, x: Array, y: Array) -> Any:
        loss, gradient = jax.value_and_grad(plain_loss(mlp_log_prob))(params, x, y)
        updates, state = adam.update(gradient, state, params)
        return loss, optax.apply_updates(params, updates), state

    def by_natural_gradient(params: Any, state: Any, x: Array, y: Array) -> Any:
        loss, direction = jf.value_and_natural_grad(mlp_log_prob, damping=0.1)(params, x, y)
        return *descend(loss, params, direction), state

    steps = {"gradient": by_gradient, "adam": by_adam, "natural": by_natural_gradient}
    start = time.perf_counter()
    jax.block_until_ready(jax.jit(steps[kind])(params, state, x, y))
    return {"seconds": time.perf_counter() - start}


def _against_gradient(ours: Callable[..., Any], goal: float, sizes: Sizes, *shapes: tuple[tuple[int, ...], int]) -> list[Row]:
    """The time of a function of ``(params, x, y)``, in plain gradients."""
    rows = []
    for widths, n in shapes:
        arguments = mlp(widths, sizes.examples(n))
        cases = [compiled(function, *arguments) for function in (plain_gradient(mlp_log_prob), ours)]
        note = f"temporary memory {megabytes(cases[1].temporary)} against {megabytes(cases[0].temporary)}"
        gradient, own = time_in_turn(cases, sizes.repeats)
        rows.append(costs(shape_name(widths, sizes.examples(n)), gradient, own, goal, note))
    return rows


def diagonal(sizes: Sizes) -> list[Row]:
    """Diagonal of the empirical Fisher in plain gradients."""
    shapes = (sizes.big, 256), (sizes.small, 512)
    return _against_gradient(lambda *args: jf.scores(mlp_log_prob)(*args).diagonal(), 1.3, sizes, *shapes)


def kfac(sizes: Sizes) -> list[Row]:
    """Kronecker moments of every layer in plain gradients."""

    def moments(*args: Any) -> Any:
        made = jf.scores(mlp_log_prob)(*args).expanded_moments()
        return [(own.inputs, own.outputs) for own in made if own is not None]

    return _against_gradient(moments, 1.6, sizes, (sizes.big, 256), (sizes.small, 512))


def product(sizes: Sizes) -> list[Row]:
    """Fisher-vector products in plain gradients: the factors made for one product, and one more from held factors."""
    rows = []
    for widths, n in ((sizes.big, sizes.examples(256)), (sizes.small, sizes.examples(512))):
        arguments = mlp(widths, n)
        vector = dense_layers(widths, seed=3)
        fisher = jax.jit(jf.empirical_fisher(mlp_log_prob))(*arguments)

        def once(params: Any, x: Array, y: Array, v: Any) -> Any:
            scores = jf.scores(mlp_log_prob)(params, x, y)
            return scores.rmv(scores.weights * scores.mv(v))

        cases = [
            compiled(plain_gradient(mlp_log_prob), *arguments),
            compiled(once, *arguments, vector),
            compiled(lambda fisher, v: fisher.mv(v), fisher, vector),
        ]
        gradient, whole, further = time_in_turn(cases, sizes.repeats)
        name = shape_name(widths, n)
        rows.append(costs(f"{name}, factors made and applied once", gradient, whole, 1.8))
        rows.append(costs(f"{name}, one more product", gradient, further, 0.9))
    return rows


def dense(sizes: Sizes) -> list[Row]:
    """Dense exact Fisher of softmax regression on the digits."""
    widths, n = (64, 10), sizes.examples(1797)
    params, x, _ = mlp(widths, n)

    def per_class(params: Any, x: Array) -> Array:
        def rows(x: Array) -> Float[Array, "classes p"]:
            probabilities = jax.nn.softmax(mlp_logits(params, x))

            def score(k: Array) -> Array:
                gradient = jax.grad(mlp_log_prob)(params, x, k)
                return jnp.sqrt(probabilities[k]) * ravel_pytree(gradient)[0]

            return jax.vmap(score)(jnp.arange(10))

        flat = jax.vmap(rows)(x).reshape(n * 10, -1)
        return jnp.matmul(flat.T, flat, precision=jax.lax.Precision.HIGHEST) / n

    hessian = compiled(lambda *args: jf.kl_hessian(mlp_model)(*args).as_matrix(), params, x)
    scores = compiled(per_class, params, x)
    ours = compiled(lambda *args: jf.exact_fisher(mlp_model)(*args).as_matrix(), params, x)
    notes = [difference(ours(), other()) for other in (hessian, scores)]
    by_hessian, by_scores, own = time_in_turn([hessian, scores, ours], sizes.repeats)
    name = f"softmax regression, p = 650, n = {n}"
    return [
        gains(f"{name}, against jax.hessian of the KL", by_hessian, own, 8, notes[0]),
        gains(f"{name}, against per-class scores", by_scores, own, 10, notes[1]),
    ]


def transformer(sizes: Sizes) -> list[Row]:
    """A small transformer against plain per-example gradients that are held."""
    model = Transformer(width=max(16, 256 // sizes.shrink), length=max(8, 64 // sizes.shrink))
    n = sizes.examples(64)
    arguments = model.init(), *model.data(n)
    log_prob = model.log_prob
    damping = jnp.asarray(largest_eigenvalue(log_prob, *arguments) * 1e-2)

    def plain_diagonal(*args: Any) -> Any:
        return jnp.mean(jnp.square(plain_scores(log_prob)(*args)), 0)

    pairs: dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]] = {
        "Gram": (plain_gram(log_prob), lambda *args: jf.scores(log_prob)(*args).gram(), ()),
        "diagonal": (plain_diagonal, lambda *args: jf.scores(log_prob)(*args).diagonal(), ()),
        "natural step": (plain_step(log_prob), natural_step(log_prob), (damping,)),
    }
    gradient = compiled(plain_gradient(log_prob), *arguments)
    rows = []
    for what, (theirs, mine, more) in pairs.items():
        cases = [compiled(function, *arguments, *more) for function in (theirs, mine)]
        note = difference(cases[1](), cases[0]())
        unit, plain, own = time_in_turn([gradient, *cases], sizes.repeats)
        name = f"width {model.width}, T = {model.length}, n = {n}, {what}"
        rows.append(costs(f"{name}, time", plain, own, 1, f"{own.median / unit.median:.1f} plain gradients; {note}"))
        rows.append(saves(f"{name}, temporary memory", cases[0], cases[1], 4))
    return rows


def scale(sizes: Sizes) -> list[Row]:
    """A natural-gradient step at p = 20 M, in a fresh process so that the peak of memory is its own."""
    done = alone("scale", sizes)
    gradient, step = Times(tuple(done["gradient"])), Times(tuple(done["step"]))
    name = shape_name(done["widths"], done["n"])
    rows_bytes = 4 * done["n"] * done["p"]
    before, after = done["peak_gradient"], done["peak_step"]
    note = f"p = {done['p']:,}, residual {done['residual']:.0e}; n x p in float32 would take {megabytes(rows_bytes)}"
    return [
        costs(f"{name}, natural step", gradient, step, None, note),
        Row(f"{name}, temporary memory", megabytes(done["temporary"][0]), megabytes(done["temporary"][1]), "", "", ""),
        Row(f"{name}, peak of the process", megabytes(before), megabytes(after), f"{after / before:.2f}", "", ""),
    ]


def _scale_alone(sizes: Sizes) -> dict[str, Any]:
    widths, n = sizes.widths(64, 3072, 3072, 3072, 10), sizes.examples(512)
    arguments = mlp(widths, n)
    plain = compiled(plain_gradient(mlp_log_prob), *arguments)
    plain()
    peak_gradient = peak_bytes()
    damping = largest_eigenvalue(mlp_log_prob, *arguments) * 1e-2
    ours = compiled(natural_step(mlp_log_prob), *arguments, jnp.asarray(damping))
    left = jax.jit(residual(mlp_log_prob, damping))(*arguments, ours())
    gradient, step = time_in_turn([plain, ours], sizes.repeats)
    return {
        "widths": widths,
        "n": n,
        "p": sum(leaf.size for leaf in jax.tree.leaves(arguments[0])),
        "gradient": gradient.seconds,
        "step": step.seconds,
        "temporary": [plain.temporary, ours.temporary],
        "peak_gradient": peak_gradient,
        "peak_step": peak_bytes(),
        "residual": float(left),
    }


WORKLOADS: dict[str, Callable[[Sizes], list[Row]]] = {
    function.__name__: function
    for function in (gram, step, solve, first_call, diagonal, kfac, product, dense, transformer, scale)
}
ALONE: dict[str, Callable[[Sizes], dict[str, Any]]] = {
    "scale": _scale_alone,
    **{kind: functools.partial(_first_call_alone, kind) for kind in ("gradient", "adam", "natural")},
}


def head_line(sizes: Sizes, *more: str) -> str:
    """The device, the load and the versions of this run."""
    device = jax.devices()[0]
    words = [
        f"{device.device_kind} ({device.platform})",
        f"{os.cpu_count()} CPU cores, load {os.getloadavg()[0]:.1f}",
        f"Python {platform.python_version()}, jax {jax.__version__}, jaxfisher {jf.__version__}",
        f"OPENBLAS_NUM_THREADS={os.environ['OPENBLAS_NUM_THREADS']}",
        *more,
    ]
    return "; ".join(words) + ("; CHECK RUN: the figures mean nothing" if sizes is CHECK else "")


def workload_parser(description: str | None, workloads: Iterable[str]) -> argparse.ArgumentParser:
    """The command line of a script with these workloads."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("workload", nargs="*", help=", ".join(workloads))
    parser.add_argument("--check", action="store_true", help="tiny shapes: shows that every line runs, nothing else")
    return parser


def measure(
    parser: argparse.ArgumentParser, workloads: Mapping[str, Callable[[Sizes], Sequence[Any]]], head: Callable[[Sizes], str]
) -> None:
    """Measure the workloads given on the command line, or all of them, and print the tables."""
    given = parser.parse_args()
    sizes = CHECK if given.check else FULL
    unknown = [name for name in given.workload if name not in workloads]
    if unknown:
        parser.error(f"no workload {unknown[0]!r}; there are {', '.join(workloads)}")
    print(head(sizes))
    for name in given.workload or workloads:
        function = workloads[name]
        rows = function(sizes)
        if sizes is CHECK:
            rows = [dataclasses.replace(row, goal="", reached="") if hasattr(row, "goal") else row for row in rows]
        print_table(f"{name}: {str(function.__doc__).rstrip('.')}", rows)


def quick_check(
    parser: argparse.ArgumentParser, workloads: Mapping[str, Callable[[Sizes], Sequence[Any]]], head: Callable[[Sizes], str]
) -> None:
    """`measure`, but a check runs without XLA's optimisations, which take most of the time of many small programs."""
    if parser.parse_args().check:
        jax.config.update("jax_disable_most_optimizations", True)
    measure(parser, workloads, head)


def timed_head(sizes: Sizes) -> str:
    """`head_line`, and what the times of the tables are."""
    return head_line(sizes, f"medians (and quartiles) of {sizes.repeats} repeats in turn")


def main() -> None:
    """Measure the workloads given on the command line, or all of them."""
    parser = workload_parser(__doc__, WORKLOADS)
    parser.add_argument("--alone", choices=list(ALONE), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.alone:
        print(json.dumps(ALONE[given.alone](CHECK if given.check else FULL)))
        return
    measure(parser, WORKLOADS, timed_head)


if __name__ == "__main__":
    main()
