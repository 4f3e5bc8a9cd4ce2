"""The parts of the demo ``python -m jaxfisher``: the digits, three routes to one Fisher, training, the tables, the figure.

scikit-learn, matplotlib and tqdm are imported inside the functions that use them, so the package itself never needs them.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, Scalar

import jaxfisher as jf

CLASSES = 10
HIDDEN = 20
TRAIN = 1437
BATCH = 256
TARGET = 0.01
MAX_STEPS = 300
CHUNK = 5
"""The number of steps in one compiled scan, which is timed as a whole and followed by one update of the progress bar."""

ADAM_RATES = (0.01, 0.03, 0.1, 0.3)
SGD_RATES = (0.5, 1.0, 2.0, 4.0)
LEARNING_RATE = 0.5
DAMPING = 3e-3
DECAY = 0.9
RADIUS = 0.3
DRAWS = 2


def missing_extras() -> list[str]:
    """Those optional packages of the demo that are not installed, by their names on PyPI."""
    packages = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "threadpoolctl": "threadpoolctl", "tqdm": "tqdm"}
    return [name for module, name in packages.items() if importlib.util.find_spec(module) is None]


# The data.


class Digits(NamedTuple):
    """Images as rows of 64 pixels in [0, 1] in float32, and their classes in int32."""

    train_x: Float[np.ndarray, "train 64"]
    train_y: Int[np.ndarray, " train"]
    test_x: Float[np.ndarray, "test 64"]
    test_y: Int[np.ndarray, " test"]


def load_digits() -> Digits:
    """scikit-learn's 1797 handwritten digits, split into 1437 and 360 by a permutation with a fixed seed."""
    from sklearn.datasets import load_digits as load

    pixels, labels = load(return_X_y=True)
    shuffled = np.random.default_rng(0).permutation(len(labels))
    x = (pixels[shuffled] / 16).astype(np.float32)
    y = labels[shuffled].astype(np.int32)
    return Digits(x[:TRAIN], y[:TRAIN], x[TRAIN:], y[TRAIN:])


# The models: functions of ONE image.


def softmax_regression(params: Any, x: Float[Array, " pixels"]) -> jf.Categorical:
    """A linear map to the logits."""
    return jf.Categorical(x @ params["w"] + params["b"])


def softmax_params(key: PRNGKeyArray, pixels: int, dtype: Any) -> Any:
    """Random parameters, since the three routes agree at any parameters, not only at a fit."""
    w, b = jax.random.split(key)
    return {"b": jax.random.normal(b, (CLASSES,), dtype), "w": jax.random.normal(w, (pixels, CLASSES), dtype)}


def mlp(params: Any, x: Float[Array, " 64"]) -> jf.Categorical:
    """One hidden layer of tanh units."""
    hidden = jnp.tanh(x @ params["w1"] + params["b1"])
    return jf.Categorical(hidden @ params["w2"] + params["b2"])


def mlp_params(key: PRNGKeyArray) -> Any:
    """Random weights with variance one over the number of inputs, and zero biases, in float32."""
    first, second = jax.random.split(key)
    return {
        "b1": jnp.zeros(HIDDEN, jnp.float32),
        "b2": jnp.zeros(CLASSES, jnp.float32),
        "w1": jax.random.normal(first, (64, HIDDEN), jnp.float32) * 64**-0.5,
        "w2": jax.random.normal(second, (HIDDEN, CLASSES), jnp.float32) * HIDDEN**-0.5,
    }


log_prob = jf.log_likelihood(mlp)


@jax.jit
def mean_loss(params: Any, x: Float[Array, "n 64"], y: Int[Array, " n"]) -> Scalar:
    """The mean negative log-likelihood in nats."""
    return -jnp.mean(jax.vmap(log_prob, in_axes=(None, 0, 0))(params, x, y))


@jax.jit
def accuracy(params: Any, x: Float[Array, "n 64"], y: Int[Array, " n"]) -> Scalar:
    """The share of images whose most probable class is the true one."""
    logits = jax.vmap(lambda image: mlp(params, image).logits)(x)
    return jnp.mean((jnp.argmax(logits, axis=-1).astype(y.dtype) == y).astype(jnp.float32))


# The three routes to one Fisher.


class Routes(NamedTuple):
    """The same Fisher computed in three ways, each a matrix ``[p, p]``."""

    kl_hessian: Float[np.ndarray, "p p"]
    score_covariance: Float[np.ndarray, "p p"]
    expected_hessian: Float[np.ndarray, "p p"]


def three_routes(params: Any, x: Float[Array, "n pixels"]) -> Routes:
    """The Fisher of softmax regression on these images: from the KL, from the scores, and from the log-density's Hessian.

    The third is a sum over the ten classes. The term of a class is the observed information with that class as the label of all
    images, a mean weighted by the images' probabilities of the class, times the mean of these probabilities.
    """
    information = jax.jit(jf.observed_information(jf.log_likelihood(softmax_regression)))
    probabilities = jax.vmap(lambda image: softmax_regression(params, image).probs)(x)
    expected = sum(
        jnp.mean(weights) * information(params, x, jnp.full(len(x), outcome), weights=weights).as_matrix()
        for outcome, weights in enumerate(probabilities.T)
    )
    hessian = jax.jit(jf.kl_hessian(softmax_regression))(params, x).as_matrix()
    covariance = jax.jit(lambda *args: jf.exact_fisher(softmax_regression)(*args).as_matrix())(params, x)
    return Routes(*(np.asarray(matrix) for matrix in (hessian, covariance, expected)))


def routes_table(routes: Routes) -> str:
    """The trace and the Frobenius norm of each route, and the largest difference between the entries of each two."""
    names = ("Hessian of the KL", "covariance of the score", "minus expected Hessian")
    rows = [
        (name, f"{np.trace(matrix):.12f}", f"{np.linalg.norm(matrix):.12f}") for name, matrix in zip(names, routes, strict=True)
    ]
    pairs = [(0, 1), (0, 2), (1, 2)]
    largest = np.max(np.abs(routes.score_covariance))
    gaps = [
        (f"{names[i]} - {names[j]}", f"{gap:.1e}", f"{gap / largest:.1e}")
        for i, j in pairs
        for gap in [np.max(np.abs(routes[i] - routes[j]))]
    ]
    return "\n".join(
        [
            text_table(("route", "trace", "Frobenius norm"), rows),
            "",
            text_table(("largest difference of entries", "absolute", "of the largest entry"), gaps),
        ]
    )


# Training.

Fisher = Callable[[PRNGKeyArray], Callable[..., jf.Operator] | None]
"""From the key of a step to the ``fisher`` of `jf.training_step`: None if the optimiser needs no Fisher or chooses its own."""


def unasked(key: PRNGKeyArray) -> None:
    """No Fisher: Adam and SGD need none, and `jf.kfac` chooses its own."""


def exact(key: PRNGKeyArray) -> Callable[..., jf.Operator]:
    """The exact Fisher, an expectation over the model's own predictions."""
    return jf.exact_fisher(mlp)


def sampled(key: PRNGKeyArray) -> Callable[..., jf.Operator]:
    """The Fisher from labels that are drawn from the model."""
    return lambda params, x: jf.sampled_fisher(mlp, DRAWS)(params, key, x)


def empirical(key: PRNGKeyArray) -> Callable[..., jf.Operator]:
    """The empirical Fisher, at the labels of the data: it is not an expectation under the model."""
    return jf.empirical_fisher(log_prob)


class Recipe(NamedTuple):
    """An optimiser, and the Fisher that it is given."""

    name: str
    optimiser: optax.GradientTransformation
    fisher: Fisher


def first_order(name: str, make: Callable[[float], optax.GradientTransformation], rates: Sequence[float]) -> list[Recipe]:
    """One recipe for each learning rate."""
    return [Recipe(f"{name}, rate {rate:g}", make(rate), unasked) for rate in rates]


def natural_recipes() -> list[Recipe]:
    """`jf.kfac` with its defaults, and natural gradients with the same settings but different Fishers and running means."""
    setting = partial(jf.natural_gradient, LEARNING_RATE, DAMPING, radius=RADIUS)
    running = setting(view=jf.dense, decay=DECAY)
    return [
        Recipe("jf.kfac", jf.kfac(), unasked),
        Recipe("natural, exact", running, exact),
        Recipe("natural, sampled", running, sampled),
        Recipe("natural, empirical", running, empirical),
        Recipe("natural, exact, batch alone", setting(view=jf.dense), exact),
        Recipe("natural, empirical, batch alone", setting(), empirical),
    ]


class Run(NamedTuple):
    """The course of one training: the loss on all training images and the seconds spent stepping after 0, 1, 2, ... steps."""

    name: str
    losses: Float[np.ndarray, " steps_and_start"]
    seconds: Float[np.ndarray, " steps_and_start"]
    compile_seconds: float
    accuracy: float

    @property
    def steps(self) -> int:
        """The number of steps."""
        return len(self.losses) - 1

    @property
    def reached(self) -> bool:
        """Whether the loss after the last step is at the target. Training stops at the first such step."""
        return bool(self.losses[-1] <= TARGET)


def batch_order(seed: int, steps: int) -> Int[Array, "steps batch"]:
    """The indices of the training images in each batch: one permutation after another, split into batches."""
    rng = np.random.default_rng(seed)
    epochs = -(-steps * BATCH // TRAIN)
    indices = np.concatenate([rng.permutation(TRAIN) for _ in range(epochs)])
    return jnp.asarray(indices[: steps * BATCH].reshape(steps, BATCH))


def stepper(recipe: Recipe, digits: Digits) -> Callable[..., tuple[Any, Any]]:
    """The function ``(carry, batches, keys) -> (carry, params after each step)``: a scan that the caller compiles."""
    x, y = jnp.asarray(digits.train_x), jnp.asarray(digits.train_y)

    def step(carry: tuple[Any, Any], batch: tuple[Array, PRNGKeyArray]) -> tuple[tuple[Any, Any], Any]:
        params, state = carry
        indices, key = batch
        params, state, _ = jf.training_step(mlp, recipe.optimiser, recipe.fisher(key))(params, state, x[indices], y[indices])
        return (params, state), params

    return lambda carry, batches, keys: jax.lax.scan(step, carry, (batches, keys))


def train(recipe: Recipe, digits: Digits, seed: int, show: Callable[[int, float], object], max_steps: int = MAX_STEPS) -> Run:
    """Train until the loss on all training images, evaluated after every step, is at the target, or for ``max_steps`` steps.

    Initial parameters, batches and draws depend on the seed only, so they are the same for every recipe. The time is that of
    the steps, without compilation and without the evaluations of the loss.

    Args:
        recipe: the optimiser and its Fisher.
        digits: the data.
        seed: the seed of the initial parameters, the batches and the draws.
        show: called after each chunk of steps with their number and the loss.
        max_steps: the limit, a multiple of `CHUNK`.
    """
    init_key, draw_key = jax.random.split(jax.random.key(seed))
    params = mlp_params(init_key)
    batches, keys = batch_order(seed, max_steps), jax.random.split(draw_key, max_steps)
    x, y = jnp.asarray(digits.train_x), jnp.asarray(digits.train_y)
    first = jf.training_step(mlp, recipe.optimiser, recipe.fisher(keys[0]))
    carry = (params, first.init(params, x[batches[0]], y[batches[0]]))
    evaluate = jax.jit(jax.vmap(mean_loss, in_axes=(0, None, None)))

    start = time.perf_counter()
    chunk = jax.jit(stepper(recipe, digits)).lower(carry, batches[:CHUNK], keys[:CHUNK]).compile()
    compile_seconds = time.perf_counter() - start

    losses, seconds = [np.asarray(mean_loss(params, x, y))[None]], [np.zeros(1)]
    for done in range(0, max_steps, CHUNK):
        piece = slice(done, done + CHUNK)
        start = time.perf_counter()
        carry, path = jax.block_until_ready(chunk(carry, batches[piece], keys[piece]))
        # The steps of a chunk do equal work, so each gets an equal share of the chunk's time.
        seconds.append(seconds[-1][-1] + (time.perf_counter() - start) * np.arange(1, CHUNK + 1) / CHUNK)
        losses.append(np.asarray(evaluate(path, x, y)))
        show(CHUNK, float(losses[-1][-1]))
        if np.any(losses[-1] <= TARGET) or not np.isfinite(losses[-1][-1]):
            break
    all_losses, all_seconds = np.concatenate(losses), np.concatenate(seconds)
    hits = np.flatnonzero(all_losses <= TARGET)
    last = int(hits[0]) if hits.size else len(all_losses) - 1
    params = jax.tree.map(lambda leaf: leaf[(last - 1) % CHUNK], path)
    score = float(accuracy(params, jnp.asarray(digits.test_x), jnp.asarray(digits.test_y)))
    return Run(recipe.name, all_losses[: last + 1], all_seconds[: last + 1], compile_seconds, score)


def best(runs: Sequence[Run]) -> Run:
    """The run that reaches the target in the fewest steps; if none does, the run with the lowest last loss."""
    return min(
        runs, key=lambda run: (not run.reached, run.steps if run.reached else 0, np.nan_to_num(run.losses[-1], nan=np.inf))
    )


# The printed text.


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns are as wide as their widest entries: the first is left-aligned, the others are right-aligned."""
    lines = [tuple(header), *map(tuple, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        rest = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
        return "  ".join([cells[0].ljust(widths[0]), *rest])

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def training_intro() -> str:
    """What was trained, and when a training stopped."""
    size = 64 * HIDDEN + HIDDEN + HIDDEN * CLASSES + CLASSES
    return f"""
Training a 64-{HIDDEN}-{CLASSES} tanh network, p = {size}, float32, batches of {BATCH} of {TRAIN} digits.
"steps": the first step after which the loss on all training digits is at most {TARGET} nats, checked after every step,
at most {MAX_STEPS}. All start at the same parameters and see the same batches. Adam is the best of the rates
{_listed(ADAM_RATES)}; SGD of {_listed(SGD_RATES)}.
jf.kfac has its defaults. The other natural gradients share one setting: rate {LEARNING_RATE:g}, damping {DAMPING:g},
trust region {RADIUS:g} nats, {DRAWS} draws for the sampled Fisher, and a running mean of the Fisher
over batches (decay {DECAY:g}) except for "batch alone".
"""


def _listed(rates: Sequence[float]) -> str:
    return ", ".join(f"{rate:g}" for rate in rates)


def training_table(runs: Sequence[Run]) -> str:
    """The table of steps, seconds, losses and accuracies, with a line for each run."""
    header = ("optimiser", "steps", "seconds", "compiling", "training loss", "test accuracy")
    rows = [
        (
            run.name,
            str(run.steps) if run.reached else f"not in {run.steps}",
            f"{run.seconds[-1]:.2f}",
            f"{run.compile_seconds:.2f}",
            f"{run.losses[-1]:.4f}",
            f"{run.accuracy:.3f}",
        )
        for run in runs
    ]
    return text_table(header, rows)


def remarks(adam: Run, natural: Sequence[Run]) -> str:
    """A summary of the table: who was first in steps and in seconds, and which runs did not reach the target."""
    arrived = [run for run in natural if run.reached]
    lines = [
        f"{run.name} did not reach {TARGET} in {run.steps} steps: its loss is {run.losses[-1]:.4f}."
        for run in natural
        if not run.reached
    ]
    if not adam.reached:
        return "\n".join([f"Adam did not reach {TARGET} in {adam.steps} steps at any of its rates.", *lines])
    if arrived:
        fewest = min(arrived, key=lambda run: run.steps)
        lines = [
            f"In steps: {fewest.name} takes {fewest.steps}, the best Adam {adam.steps}: "
            f"{fewest.steps / adam.steps:.2f} of them.",
            _in_seconds(adam, min(arrived, key=lambda run: run.seconds[-1])),
            *lines,
        ]
    return "\n".join(lines)


def _in_seconds(adam: Run, natural: Run) -> str:
    ours, theirs = natural.seconds[-1], adam.seconds[-1]
    if ours < theirs:
        return f"In seconds: {natural.name} takes {ours:.2f}, Adam {theirs:.2f}."
    return (
        f"In seconds: Adam takes {theirs:.2f}, the fastest natural gradient ({natural.name}) {ours:.2f}. "
        "On a task this easy Adam is hard to beat in seconds."
    )


# The figure.

_LOOKS = (
    ("#000000", "-", "o"),
    ("#0072B2", "--", "s"),
    ("#D55E00", "-.", "^"),
    ("#009E73", (0, (1, 1)), "D"),
    ("#CC79A7", (0, (5, 1, 1, 1, 1, 1)), "v"),
    ("#E69F00", (0, (8, 2)), "P"),
    ("#56B4E9", (0, (3, 1, 1, 1)), "X"),
    ("#999999", (0, (2, 2)), "*"),
)
"""Colours that colour-blind readers can tell apart (Okabe and Ito), each with its own dash and marker for prints in grey."""


def draw_losses(runs: Sequence[Run], path: Path) -> None:
    """Write a picture with two panels: the losses against steps, and the losses against seconds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    by_steps, by_seconds = figure.subplots(1, 2, sharey=True)
    for run, (colour, dash, marker) in zip(runs, _LOOKS, strict=False):
        look = {"color": colour, "linestyle": dash, "linewidth": 1.6, "marker": marker, "markevery": [-1], "label": run.name}
        by_steps.plot(np.arange(1, run.steps + 1), run.losses[1:], **look)
        by_seconds.plot(run.seconds[1:], run.losses[1:], **look)
    for axes in (by_steps, by_seconds):
        axes.axhline(TARGET, color="0.5", linewidth=0.8, zorder=1)
        axes.set(yscale="log", xscale="log")
        axes.grid(True, color="0.9", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    by_steps.set(xlabel="steps", ylabel="loss on all training images (nats)")
    by_seconds.set(xlabel="seconds of stepping, compiling apart")
    by_steps.text(0.02, TARGET, f"target {TARGET:g}", transform=by_steps.get_yaxis_transform(), color="0.35", va="bottom")
    figure.legend(*by_steps.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False, handlelength=4)
    figure.savefig(path, dpi=110)
