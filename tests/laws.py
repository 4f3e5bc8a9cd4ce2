"""The laws that every member of a kind must satisfy. One call tests a new member against all of them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import problems
from jax.flatten_util import ravel_pytree
from programs.evaluate import evaluated, traced

from jaxfisher._distributions.base import Distribution

EPS = float(np.finfo(np.float64).eps)
MAX32 = float(np.finfo(np.float32).max)


def close(actual, expected, law, factor=1e5, eps=EPS):
    """Within ``factor * eps`` of the largest entry (1e5 eps is 2e-11 in float64: the quadrature's own accuracy)."""
    actual, expected = np.asarray(actual, float), np.asarray(expected, float)
    assert actual.shape == expected.shape, f"{law}: shape {actual.shape}, expected {expected.shape}"
    scale = np.max(np.abs(expected), initial=0.0) or 1.0
    np.testing.assert_allclose(actual, expected, rtol=0, atol=factor * eps * scale, err_msg=law)


def check_family(case, key):
    """Check every law of a distribution; `families.Case` says what a row states."""
    check_information(case)
    check_transforms(case)
    check_narrow_dtype(case)
    check_extremes(case)
    check_samples(case, key)


# --- the density, the divergence and the three routes to the Fisher --------------------------------------------------------


def check_information(case):
    """Check normalisation, mean, KL, E[score] and the routes to the Fisher against sums over the support in float64."""
    p, q, rule = case.make(), case.make_other(), case.rule()
    seen = evaluated(_views, p, q, rule.nodes, rule.weights)
    mass = rule.weights * np.exp(seen["log_p"])

    close(np.sum(mass), 1.0, "the density sums to one")
    close(seen["mean"], np.tensordot(mass, np.asarray(rule.nodes, float), 1), "mean is the expectation of a draw")
    away = np.square(np.asarray(rule.nodes, float) - seen["mean"])
    if np.all(np.isfinite(seen["variance"])):
        close(seen["variance"], np.tensordot(mass, away, 1), "variance is the expected square of the distance to the mean")
    if seen["entropy"] is not None:
        close(seen["entropy"], -np.sum(mass * np.where(mass > 0, seen["log_p"], 0)), "entropy is -E[log p]")
    if not np.isnan(seen["log_p_at_mode"]):
        assert np.all(seen["log_p"] <= seen["log_p_at_mode"] + 100 * EPS * np.abs(seen["log_p_at_mode"])), (
            "nothing is more probable than the mode"
        )
    if case.reference is not None:
        _check_reference(case, rule, seen["log_p"])
    for value in case.outside:
        log_prob, gradient = log_prob_and_gradient(p, np.asarray(value, float))
        assert log_prob == -jnp.inf, f"log_prob outside the support, at {value}: {log_prob}"
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient)), f"gradient outside, at {value}"

    # Nodes far out may have log-densities of -1e80; where p is zero they add nothing.
    inside = mass > 0
    divergence = np.sum(mass[inside] * (seen["log_p"][inside] - seen["log_q"][inside]))
    close(seen["kl"], divergence, "kl is E[log p - log q]")
    assert seen["kl"] >= 0, "kl is not negative"
    assert seen["kl_self"] == 0, f"kl of a distribution to itself is zero, not {seen['kl_self']}"

    fisher = seen["fisher"]
    close(fisher, fisher.T, "the Fisher is symmetric", factor=10)
    close(seen["root"].T @ seen["root"], fisher, "B B^T is the Fisher", factor=100)
    _check_narrowed(p, fisher, seen["narrowed"])
    close(seen["fisher_mv"], fisher @ seen["direction"], "fisher_mv is the Fisher's product", factor=100)
    close(seen["root_mv"], seen["root"].T @ seen["noise"], "fisher_sqrt_mv is linear", factor=100)
    scores = np.where(inside[:, None], seen["scores"], 0)
    deviation = np.sqrt(np.max(np.diag(fisher)))
    close(mass @ scores / deviation + 1, np.ones(len(fisher)), "E[score] = 0")
    close(scores.T @ (mass[:, None] * scores), fisher, "E[score score^T] is the Fisher")
    close(seen["kl_hessian"], fisher, "the Hessian of kl at equal arguments is the Fisher")
    if case.regular:
        close(-seen["expected_hessian"], fisher, "minus the expected Hessian of log_prob is the Fisher")


@traced
def log_prob_and_gradient(p, x):
    return jax.value_and_grad(lambda p: p.log_prob(x))(p)


def expected_hessian(p, nodes, weights):
    """``E_p[d^2 log p / d fields^2]`` over the flattened fields, by the rule."""
    flat, unravel = ravel_pytree(p)
    mass = weights * jnp.exp(jax.vmap(p.log_prob)(nodes))
    return jax.hessian(lambda flat: jnp.sum(mass * jax.vmap(unravel(flat).log_prob)(nodes)))(flat)


def scores(p, nodes):
    """``d log p(x_i) / d fields`` over the flattened fields, one row per node."""
    flat, unravel = ravel_pytree(p)
    return jax.vmap(jax.grad(lambda flat, x: unravel(flat).log_prob(x)), (None, 0))(flat, nodes)


def _subsets(p):
    """All ways to flag the fields such that some move and some do not."""
    flags = itertools.product((False, True), repeat=len(jax.tree.leaves(p)))
    return [moving for moving in flags if any(moving) and not all(moving)]


def _narrowed(p, moving):
    """The root in the fields that move, a row for each of its columns."""
    noise, root = p.fisher_root(moving)
    flat, unravel = ravel_pytree(noise)

    def column(u):
        return jnp.concatenate([field.reshape(-1) for field, moves in zip(root(unravel(u)), moving, strict=True) if moves])

    return jax.vmap(column)(jnp.eye(flat.size))


def _check_narrowed(p, fisher, narrowed):
    """If only some fields move, the root gives the Fisher in these, with no more rows than they have numbers."""
    sizes = [field.size for field in jax.tree.leaves(p)]
    for moving, rows in narrowed.items():
        entries = np.flatnonzero(np.repeat(moving, sizes))
        close(rows.T @ rows, fisher[np.ix_(entries, entries)], f"the root in the fields {moving}", factor=100)
        assert len(rows) <= len(entries), f"the fields {moving} take {len(rows)} rows"


def _views(p, q, nodes, weights):
    """All that `check_information` compares, in one function."""
    flat, unravel = ravel_pytree(p)
    noise, unravel_noise = ravel_pytree(p.fisher_noise())
    noise, direction = jnp.cos(jnp.arange(1.0, noise.size + 1)), jnp.sin(jnp.arange(1.0, flat.size + 1))
    root_mv = lambda noise: ravel_pytree(p.fisher_sqrt_mv(unravel_noise(noise)))[0]  # noqa: E731

    def slopes(flat):
        """The expected score, with the density of ``p`` held fixed, and as auxiliary output all log-densities and scores."""
        log_p, rows = jax.vmap(jax.value_and_grad(lambda flat, x: unravel(flat).log_prob(x)), (None, 0))(flat, nodes)
        mass = jax.lax.stop_gradient(weights * jnp.exp(log_p))
        return jnp.sum(mass[:, None] * rows, 0), (log_p, rows)

    def slope_of_kl(flat):
        kl, gradient = jax.value_and_grad(lambda flat: p.kl(unravel(flat)))(flat)
        return gradient, kl

    # The computation of each Hessian also returns the values and the gradients.
    expected_hessian, (log_p, rows) = jax.jacfwd(slopes, has_aux=True)(flat)
    kl_hessian, kl_self = jax.jacfwd(slope_of_kl, has_aux=True)(flat)
    return {
        "log_p": log_p,
        "log_q": jax.vmap(q.log_prob)(nodes),
        "mean": p.mean,
        "variance": p.variance,
        "log_p_at_mode": p.log_prob(p.mode),
        "entropy": None if type(p).entropy is Distribution.entropy else p.entropy(),
        "kl": p.kl(q),
        "kl_self": kl_self,
        "kl_hessian": kl_hessian,
        "scores": rows,
        "expected_hessian": expected_hessian,
        "fisher": p.fisher_matrix(),
        "root": jax.vmap(root_mv)(jnp.eye(noise.size)),
        "noise": noise,
        "root_mv": root_mv(noise),
        "narrowed": {moving: _narrowed(p, moving) for moving in _subsets(p)},
        "direction": direction,
        "fisher_mv": ravel_pytree(p.fisher_mv(unravel(direction)))[0],
    }


def _check_reference(case, rule, log_p):
    """Check log_prob against scipy.stats where the density is not tiny (far out, scipy overflows)."""
    reference = case.scipy()
    log_density = reference.logpmf if hasattr(reference, "logpmf") else reference.logpdf
    there = log_p > -700
    # Both sides subtract terms of the size of log Gamma(x), a few thousand here.
    close(log_p[there], log_density(rule.nodes[there]), "log_prob is scipy's")


# --- the quantities that are compared between batches and between dtypes ----------------------------------------------------


def _ones(tree):
    return jax.tree.map(jnp.ones_like, tree)


def _values(p, q, x):
    """The quantities that a family computes at one point."""
    return {
        "log_prob": p.log_prob(x),
        "kl": p.kl(q),
        "mean": p.mean,
        "fisher_sqrt_mv": p.fisher_sqrt_mv(_ones(p.fisher_noise())),
        "fisher_mv": p.fisher_mv(p),
    }


def _values_and_gradients(p, q, x):
    """`_values`, and the gradients that training takes."""

    def sum_of_root(p):
        root = p.fisher_sqrt_mv(_ones(p.fisher_noise()))
        return sum(map(jnp.sum, jax.tree.leaves(root))), root

    log_prob, of_log_prob = jax.value_and_grad(lambda p: p.log_prob(x))(p)
    kl, of_kl = jax.value_and_grad(lambda p, q: p.kl(q), (0, 1))(p, q)
    of_root, root = jax.grad(sum_of_root, has_aux=True)(p)
    values = {"log_prob": log_prob, "kl": kl, "mean": p.mean, "fisher_sqrt_mv": root, "fisher_mv": p.fisher_mv(p)}
    return values, {"log_prob": of_log_prob, "kl": of_kl, "fisher_sqrt_mv": of_root}


by_numpy = traced(_values)
compiled, exact = jax.jit(_values_and_gradients), traced(_values_and_gradients)
"""In float32 XLA computes these quantities, with one program per family; in float64 NumPy does."""


# --- batches, pytrees and JAX's transformations ---------------------------------------------------------------------------


def check_transforms(case):
    """A batch is its members side by side, with one trace, under `vmap`, and after pytree flattening."""
    batch, other = case.make(batch=(2, 3)), case.make_other()
    x = np.broadcast_to(case.rule().nodes[1], batch.batch_shape + batch.event_shape)
    assert batch.batch_shape == (2, 3)
    assert jax.eval_shape(lambda p: p.fisher_matrix(), batch).shape == 2 * (ravel_pytree(batch)[0].size,)
    traces = 0

    @traced
    def members(p, q, x):
        nonlocal traces
        traces += 1
        return _values(p, q, x)

    # NumPy slices and stacks, since JAX would compile each slice.
    held = jax.tree.map(np.asarray, batch)
    singles = [
        members(jax.tree.map(lambda leaf, i=i, j=j: leaf[i, j], held), other, x[i, j]) for i in range(2) for j in range(3)
    ]
    assert traces == 1, f"one trace for six instances, not {traces}"
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves).reshape((2, 3, *leaves[0].shape)), *singles)
    wide = jax.tree.map(lambda leaf: np.broadcast_to(leaf, (2, 3, *leaf.shape)), other)
    one = lambda fields, q, x: _values(case.family(*fields), q, x)  # noqa: E731
    mapped = evaluated(jax.vmap(jax.vmap(one)), jax.tree.leaves(batch), wide, x)
    for name, whole in (("a batch", members(batch, wide, x)), ("vmap over construction", mapped)):
        for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(stacked), strict=True):
            close(a, b, f"{name} equals its members", factor=1000)

    leaves, structure = jax.tree.flatten(batch)
    again = jax.tree.unflatten(structure, leaves)
    assert type(again) is case.family
    assert jax.tree.structure(again) == structure
    assert all(a is b for a, b in zip(jax.tree.leaves(again), leaves, strict=True))


# --- precision and range --------------------------------------------------------------------------------------------------


def check_narrow_dtype(case):
    """Results have the dtype of the fields, and float32 and bfloat16 agree with float64 at the same rounded fields."""
    x = case.rule().nodes[len(case.rule().nodes) // 3]
    whole = np.issubdtype(x.dtype, np.integer)
    for dtype, values in ((jnp.float32, lambda *at: compiled(*at)[0]), (jnp.bfloat16, by_numpy)):
        p, q = case.make(dtype), case.make_other(dtype)
        point = x if whole else x.astype(dtype)
        narrow = values(p, q, point)
        assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(narrow)), f"{dtype.__name__} is kept"
        draw = jax.eval_shape(lambda p: p.sample(jax.random.key(0), (3,)), p)
        expected = jnp.int32 if whole else dtype
        assert (draw.dtype, draw.shape) == (expected, (3, *p.event_shape)), f"draws: {draw}"
        wide = by_numpy(*_doubled((p, q)), point.astype(x.dtype))
        for a, b in zip(jax.tree.leaves(narrow), jax.tree.leaves(wide), strict=True):
            assert b.dtype == jnp.float64, f"float64 is kept, not {b.dtype}"
            close(a, b, f"{dtype.__name__} is float64 rounded", factor=50, eps=float(jnp.finfo(dtype).eps))

    # Trust regions and line searches need divergences of 1e-6, of which a naive formula has no correct digit in float32.
    step = [a + 1e-3 * (b - a) for a, b in zip(*(jax.tree.leaves(v) for v in (case.make(), case.make_other())), strict=True)]
    near = [case.make(jnp.float32), case.family(*(leaf.astype(jnp.float32) for leaf in step))]
    kl32 = compiled(*near, x if whole else x.astype(np.float32))[0]["kl"]
    kl64 = by_numpy(*_doubled(near), x)["kl"]
    close(kl32, kl64, "kl keeps its digits near equality", factor=500, eps=float(jnp.finfo(jnp.float32).eps))


def _doubled(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def check_extremes(case):
    """At the ends of float32, values and gradients that fit are right, and those that do not are infinite, never NaN."""
    for fields, other, x in case.extremes:
        p, q = (case.family(*(np.asarray(value, np.float32) for value in point)) for point in (fields, other))
        x = np.asarray(x) if np.issubdtype(np.asarray(x).dtype, np.integer) else np.asarray(x, np.float32)
        x64 = x if x.dtype != np.float32 else x.astype(np.float64)
        (narrow, narrow_slopes), (wide, wide_slopes) = compiled(p, q, x), exact(*_doubled((p, q)), x64)
        _check_product(narrow["fisher_mv"], wide["fisher_mv"], _doubled(p), case.rtol32, f"{fields} fisher_mv")
        for name in ("log_prob", "kl", "mean", "fisher_sqrt_mv"):
            value = wide[name]
            where = f"{fields} {other} {name}"
            _check_range(narrow[name], value, case.rtol32, where)
            if name in wide_slopes:
                fits = np.all(np.abs(problems.flat(value)) < MAX32)
                gradient = wide_slopes[name] if fits else None
                _check_range(narrow_slopes[name], gradient, case.rtol32, f"gradient of {where}")
        values, slopes = compiled(p, p, x)
        assert values["kl"] <= case.self32**2, f"kl to itself at {fields}: {values['kl']}"
        change = np.abs((problems.flat(q) - problems.flat(p)) * np.split(problems.flat(slopes["kl"]), 2))
        assert np.all(change <= case.self32), f"gradient of kl to itself at {fields}: {slopes['kl']}"


@traced
def _root(p):
    """The root ``B``, with a row for each number of the fields."""
    noise, unravel = ravel_pytree(p.fisher_noise())
    return jax.vmap(lambda u: ravel_pytree(p.fisher_sqrt_mv(unravel(u)))[0])(jnp.eye(noise.size)).T


def _check_product(narrow, exact, p, rtol, where):
    """Check ``B (B^T p)`` up to the rounding errors of its two sums, which may cancel; zeros must come out as zeros."""
    found, expected, root = problems.flat(narrow), problems.flat(exact), np.abs(_root(p))
    assert not np.any(np.isnan(found)), f"NaN from finite input: {where}: {found}"
    size = root @ (root.T @ np.abs(problems.flat(p)))
    fits = size < MAX32 * (1 - rtol)
    np.testing.assert_array_less(np.abs(found - expected)[fits], rtol * size[fits] + float(jnp.finfo(jnp.float32).tiny), where)


def _check_range(narrow, exact, rtol, where):
    """If the value does not fit in float32, ``exact`` is None for its gradient, which then only must not be NaN."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(narrow):
        assert not np.any(np.isnan(leaf)), f"NaN from finite input: {where}{jax.tree_util.keystr(path)}: {leaf}"
    if exact is None:
        return
    paths = jax.tree_util.tree_leaves_with_path(narrow)
    for (path, a), b in zip(paths, map(np.asarray, jax.tree.leaves(exact)), strict=True):
        name = where + jax.tree_util.keystr(path)
        fits = np.abs(b) < MAX32 * (1 - rtol)
        np.testing.assert_array_equal(fits, np.isfinite(a), err_msg=f"{name}: {a} for {b}")
        # The error of entries that cancel is relative to the largest entry beside them that fits.
        atol = max(rtol * np.max(np.abs(b[fits]), initial=0.0), float(jnp.finfo(jnp.float32).tiny))
        np.testing.assert_allclose(np.asarray(a, float)[fits], b[fits], rtol=rtol, atol=atol, err_msg=name)


# --- draws ----------------------------------------------------------------------------------------------------------------

DRAWS = 20_000


@jax.jit
def _draws(p, key):
    return p.sample(key, (DRAWS,))


def check_samples(case, key):
    """Check first and second moments of draws by their z-scores, and independence along the batch."""
    p, rule = case.make(batch=(2,)), case.rule()
    draws = np.asarray(_draws(p, key), float).reshape(DRAWS, 2, -1)
    first, second = draws[:, 0], draws[:, 1]
    mass = rule.weights * np.exp(evaluated(jax.vmap(case.make().log_prob), rule.nodes))
    nodes = np.where(mass[:, None] > 0, np.asarray(rule.nodes, float).reshape(len(mass), -1), 0)

    _check_mean(first, nodes, mass, "the mean of draws")
    if case.second_moment:
        _check_mean(_products(first), _products(nodes), mass, "the second moment of draws")
        correlation = np.corrcoef(first[:, 0], second[:, 0])[0, 1] if np.ptp(first[:, 0]) and np.ptp(second[:, 0]) else 0.0
        assert abs(correlation) * np.sqrt(DRAWS) < 5, f"draws along the batch are independent, correlation {correlation}"


def _products(x):
    return (x[:, :, None] * x[:, None, :]).reshape(len(x), -1)


def _check_mean(draws, nodes, mass, law):
    expected = mass @ nodes
    error = np.sqrt(mass @ np.square(nodes - expected) / len(draws))
    z = (draws.mean(axis=0) - expected) / error
    assert np.all(np.abs(z) < 5), f"{law}: z-scores {z}"
