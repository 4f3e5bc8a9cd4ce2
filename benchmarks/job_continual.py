"""Continual learning: the diagonal of a task's Fisher, beside per-example gradients and beside squared gradients of batches."""

from __future__ import annotations

from engine import (
    Case,
    Row,
    Sizes,
    compiled,
    gains,
    mlp,
    mlp_log_prob,
    mlp_logits,
    mlp_model,
    plain_gradient,
    plain_loss,
    shape_name,
    time_in_turn,
)

# isort: split

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxfisher as jf


def plain_diagonal(params: Any, x: jax.Array) -> Any:
    """The mean over examples of the expectation over labels of squared gradients, computed one class after the other."""

    def of_class(label: jax.Array) -> Any:
        gradients = jax.vmap(jax.grad(mlp_log_prob), (None, 0, None))(params, x, label)
        share = jax.vmap(lambda x: jax.nn.softmax(mlp_logits(params, x))[label])(x) / len(x)
        return jax.tree.map(lambda leaf: jnp.tensordot(share, leaf**2, 1), gradients)

    classes = jnp.arange(params[-1][1].shape[0])
    return jax.tree.map(lambda leaf: jnp.sum(leaf, 0), jax.lax.map(of_class, classes))


BATCH, STEPS = 32, 100


def batch_score(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """The mean log-probability of a batch. Two libraries take the square of its gradient for the diagonal of a Fisher."""
    return -plain_loss(mlp_log_prob)(params, x, y)


def squared_batches(params: Any, x: jax.Array, y: jax.Array) -> Any:
    """The mean over batches of the squared gradient of each batch, which is no Fisher."""
    size = min(BATCH, len(y))
    cut = [array[: len(y) // size * size].reshape(-1, size, *array.shape[1:]) for array in (x, y)]
    return jf.empirical_fisher(batch_score)(params, *cut).diagonal()


def trained(params: Any, x: jax.Array, y: jax.Array) -> Any:
    """The parameters at the end of a task: some steps of Adam on the batch."""
    opt = optax.adam(1e-3)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        params, state = carry
        updates, state = opt.update(plain_gradient(mlp_log_prob)(params, x, y), state)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, opt.init(params)), length=STEPS)[0][0]


def flops(case: Case) -> float:
    """The number of operations of a compiled program without loops, as XLA counts them."""
    assert " while(" not in case.program.as_text()
    counted = case.program.cost_analysis()
    return float((counted[0] if isinstance(counted, list) else counted)["flops"])


def counted_rows(sizes: Sizes) -> list[Row]:
    """What each diagonal costs in operations of one gradient, and how near it is to the exact one after training."""
    params, x, y = mlp(sizes.small, sizes.examples(512))
    params = jax.jit(trained)(params, x, y)
    gradient = flops(compiled(plain_gradient(mlp_log_prob), params, x, y))
    drawn = jax.random.categorical(jax.random.key(0), jax.vmap(mlp_logits, (None, 0))(params, x))
    empirical = lambda params, x, y: jf.empirical_fisher(mlp_log_prob)(params, x, y).diagonal()  # noqa: E731
    kinds = {
        "exact": (lambda params, x, y: jf.exact_fisher(mlp_model)(params, x).diagonal(), y),
        "at labels drawn from the model": (empirical, drawn),
        "empirical": (empirical, y),
        f"squared gradients of batches of {BATCH}": (squared_batches, y),
    }
    lines, exact = [], None
    for name, (kind, labels) in kinds.items():
        case = compiled(kind, params, x, labels)
        found = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(case())]).astype(float)
        exact = found if exact is None else exact
        share, alike = found.sum() / exact.sum(), np.corrcoef(found, exact)[0, 1]
        own = flops(case)
        note = f"trace {share:.3f} of the exact one's, correlation of entries {alike:.2f}"
        words = f"{gradient / 1e6:,.0f} Mflop", f"{own / 1e6:,.0f} Mflop", f"{own / gradient:.2f}"
        lines.append(Row(f"{name}, {shape_name(sizes.small, len(y))}", *words, "", "", note))
    return lines


def rows(sizes: Sizes) -> list[Row]:
    """The exact diagonal against per-example gradients of each class; operations of each diagonal, in plain gradients."""
    params, x, y = mlp(sizes.small, sizes.examples(512))
    plain = compiled(plain_diagonal, params, x)
    exact = compiled(lambda params, x: jf.exact_fisher(mlp_model)(params, x).diagonal(), params, x)
    differences = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)), exact(), plain())
    note = f"relative difference {max(map(float, jax.tree.leaves(differences))):.0e}"
    timed = gains(
        f"exact diagonal, {shape_name(sizes.small, len(y))}", *time_in_turn([plain, exact], sizes.repeats), goal=5, note=note
    )
    return [timed, *counted_rows(sizes)]
