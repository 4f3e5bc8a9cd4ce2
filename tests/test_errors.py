"""Bad input raises an error at trace time that names the argument, what was seen, what was expected, and the fix."""

import re

import jax
import jax.numpy as jnp
import lineax
import numpy as np
import optax
import pandas
import pytest
import scipy.sparse
from jax.experimental import sparse

import jaxfisher as jf
from jaxfisher import statistics

PARAMS = {"b": np.zeros(()), "w": np.ones(3)}
GRADIENT = {"b": np.ones(()), "w": np.full(3, 2.0)}
X, Y = np.linspace(-1.0, 1.0, 15).reshape(5, 3), np.linspace(0.0, 1.0, 5)
KEY = jax.random.key(0)


def model(params, x):
    return jf.Normal(x @ params["w"] + params["b"], jnp.ones(()))


def line(theta, x):
    return jf.Normal(theta * x, jnp.ones(()))


def log_psi(params, x):
    return jnp.sum(x.astype(complex) * params["w"].astype(complex))


def density(params, x, y):
    return -jnp.square(x @ params["w"] - y)


def adapting():
    return jf.adapt_damping(jf.natural_gradient(1.0, 0.1), 0.1)


def five(count):
    """A schedule that returns five numbers at once."""
    return jnp.full(5, count.astype(float))


def batch_mean(params, x, y):
    """A log-density of a whole batch, in which `x` must be a matrix."""
    return jnp.mean(jnp.square(jnp.einsum("ij,j->i", x, params["w"]) - y))


log_prob = jf.log_likelihood(model)
exact = jf.exact_fisher(model)
empirical = jf.empirical_fisher(log_prob)


def traced(function, *args, **kwargs):
    """Only trace, so that errors are raised before any number is computed."""
    return jax.eval_shape(lambda: function(*args, **kwargs))


def fisher():
    return exact(PARAMS, X)


def with_leaf(leaf):
    return {**PARAMS, "w": leaf}


KINDS = jf.residuals({"inside": model})


def one_update(optimiser, updates=GRADIENT, params=PARAMS, **extra):
    return optimiser.update(updates, optimiser.init(params), params, **extra)


def sparse_array(dense):
    """A sparse array that stores all of its entries, made without `fromdense`, which compiles tens of programs."""
    return sparse.BCOO((dense.reshape(-1), np.argwhere(np.ones(dense.shape))), shape=dense.shape)


SPARSE_X, SPARSE_W = sparse_array(X), sparse_array(PARAMS["w"])
OTHERS = {"w": np.ones(2)}


def foreign_state(optimiser, **extra):
    """An update with the state for other parameters."""
    return optimiser.update(GRADIENT, optimiser.init(OTHERS), PARAMS, fisher=fisher(), grad=GRADIENT, **extra)


def looked(optimiser, **extra):
    """An update of a transformation that evaluates the loss."""
    return one_update(optimiser, **{"fisher": fisher(), "value_fn": lambda params: jnp.sum(params["w"]), **extra})


def trained(like):
    """A step of `kfac`."""
    opt = jf.kfac(like)
    return jf.training_step(model, opt)(PARAMS, opt.init(PARAMS), X, Y)


def large():
    """An implicit Fisher over more parameters than the library forms a dense matrix for by default, and a vector for it."""
    params = {"w": jnp.ones(4097)}
    return jf.implicit_fisher(lambda p, x: jf.Normal(jnp.sum(p["w"]) * x, 1.0))(params, Y), params


# (id, the call, the error, words that the message must contain, in any order). All calls are only traced.
MISTAKES = [
    # Vectors.
    ("missing leaf", lambda: fisher().mv({"w": PARAMS["w"]}), ValueError, ["`v`", "no leaf at ['b']", "a gradient"]),
    ("extra leaf", lambda: fisher().mv({**GRADIENT, "c": 1.0}), ValueError, ["`v`", "a leaf at ['c']", "parameters have none"]),
    ("wrong shape", lambda: fisher().solve(with_leaf(np.ones(4)), 0.1), ValueError, ["`v`", "['w']", "(4,)", "(3,)"]),
    ("flat vector", lambda: fisher().quadratic(np.ones(4)), ValueError, ["`v`", "no leaf at ['b']"]),
    (
        "other container",
        lambda: jf.exact_fisher(lambda p, x: line(p[0], x))([1.0], Y).mv((1.0,)),
        ValueError,
        ["`v`", "containers differ", "PyTreeDef((*,))", "PyTreeDef([*])"],
    ),
    ("integer vector", lambda: fisher().mv(with_leaf(np.ones(3, int))), TypeError, ["`v` at ['w']", "int64", "real floating"]),
    ("complex vector", lambda: fisher().solve(with_leaf(np.ones(3, complex)), 0.1), TypeError, ["`v` at ['w']", "complex128"]),
    ("string in a vector", lambda: fisher().mv(with_leaf("a")), TypeError, ["`v` at ['w']", "'a'", "real floating"]),
    ("row vector", lambda: jf.scores(log_prob)(PARAMS, X, Y).rmv(np.ones(4)), ValueError, ["`w`", "(4,)", "(5,)", "each row"]),
    (
        "row vector, streamed",
        lambda: jf.scores(log_prob, batch_size=2)(PARAMS, X, Y).rmv([1.0] * 5),
        ValueError,
        ["`w`", "a list", "(5,)"],
    ),
    (
        "stacked vectors of two lengths",
        lambda: jf.scores(log_prob)(PARAMS, X, Y).cross_gram(GRADIENT),
        ValueError,
        ["`other`", "(3,)", "leading axis"],
    ),
    (
        "stacked vectors of another shape",
        lambda: jf.scores(log_prob)(PARAMS, X, Y).cross_gram({"b": Y, "w": X[:, :2]}),
        ValueError,
        ["`other`", "['w']", "(2,)"],
    ),
    (
        "inner products over other parameters",
        lambda: jf.scores(log_prob)(PARAMS, X, Y).cross_gram(jf.scores(jf.log_likelihood(line))(1.0, Y, Y)),
        ValueError,
        ["cross_gram", "other parameters"],
    ),
    # Influence.
    (
        "influence of a view",
        lambda: jf.influence(log_prob, jf.diagonal),
        TypeError,
        ["influence: `fisher`", "function", "Call"],
    ),
    (
        "influence of no number of examples",
        lambda: jf.influence(log_prob, fisher(), n="all"),
        TypeError,
        ["`n`", "'all'", "fitted to"],
    ),
    (
        "influence of a list as test",
        lambda: jf.influence(log_prob, fisher())(PARAMS, (X, Y), [X, Y], 0.1),
        TypeError,
        ["`test`", "a list", "(x, y)"],
    ),
    (
        "influence of a number",
        lambda: jf.influence(log_prob, fisher())(PARAMS, 3, (X, Y), 0.1),
        ValueError,
        ["data[0]", "a scalar", "leading axis"],
    ),
    (
        "influence of nothing",
        lambda: jf.influence(log_prob, fisher())(PARAMS, None, (X, Y), 0.1),
        TypeError,
        ["`train`", "None", "iterable"],
    ),
    (
        "influence of no batch",
        lambda: jf.influence(log_prob, fisher())(PARAMS, [], (X, Y), 0.1),
        ValueError,
        ["`train`", "no batch"],
    ),
    (
        "influence at other parameters",
        lambda: jf.influence(log_prob, fisher())({"w": np.ones(3), "b": np.zeros(1)}, (X, Y), (X, Y), 0.1),
        ValueError,
        ["`fisher`", "['b']", "(1,)"],
    ),
    (
        "influence, a negative damping",
        lambda: jf.self_influence(log_prob, fisher())(PARAMS, (X, Y), -0.1),
        ValueError,
        ["`damping`", "-0.1"],
    ),
    (
        "self-influence in pieces of none",
        lambda: jf.self_influence(log_prob, fisher(), batch_size=0),
        ValueError,
        ["`batch_size`", "0"],
    ),
    (
        "checkpoints that are one",
        lambda: jf.tracin(log_prob)(PARAMS, (X, Y), (X, Y)),
        TypeError,
        ["`checkpoints`", "a dict", "list"],
    ),
    ("no checkpoints", lambda: jf.tracin(log_prob)([], (X, Y), (X, Y)), ValueError, ["`checkpoints`", "at least one"]),
    (
        "too few rates",
        lambda: jf.tracin(log_prob)([PARAMS, PARAMS], (X, Y), (X, Y), [0.1]),
        ValueError,
        ["`rates`", "one for each"],
    ),
    (
        "too many rates",
        lambda: jf.tracin(log_prob)([PARAMS], (X, Y), (X, Y), [0.1, 0.2]),
        ValueError,
        ["2 `rates`", "1 checkpoints"],
    ),
    (
        "rates of no numbers",
        lambda: jf.tracin(log_prob)([PARAMS], (X, Y), (X, Y), None),
        TypeError,
        ["`rates`", "None", "one number"],
    ),
    # Continual learning.
    ("penalty of a view", lambda: jf.ewc_penalty(jf.diagonal, PARAMS), TypeError, ["ewc_penalty: `fisher`", "Call"]),
    ("penalty of another anchor", lambda: jf.ewc_penalty(fisher(), OTHERS), ValueError, ["`anchor`", "['b']"]),
    ("penalty of other parameters", lambda: jf.ewc_penalty(fisher(), PARAMS)(OTHERS), ValueError, ["`params`", "['b']"]),
    ("negative strength", lambda: jf.ewc_penalty(fisher(), PARAMS, -1.0), ValueError, ["`strength`", "-1.0"]),
    ("merging nothing", lambda: jf.fisher_average([], []), ValueError, ["`models`", "at least one"]),
    ("merging one model", lambda: jf.fisher_average(PARAMS, fisher()), ValueError, ["`models`", "a dict", "a list"]),
    ("merging two with one", lambda: jf.fisher_average([PARAMS] * 2, [fisher()]), ValueError, ["2 `models`", "1 `fishers`"]),
    ("merging a function", lambda: jf.fisher_average([PARAMS], [exact]), TypeError, ["`fishers[0]`", "Call"]),
    ("merging other models", lambda: jf.fisher_average([PARAMS, OTHERS], [fisher()] * 2), ValueError, ["models[1]", "['b']"]),
    (
        "merging other Fishers",
        lambda: jf.fisher_average([PARAMS] * 2, [fisher(), jf.scaled_identity(OTHERS, 1.0)]),
        ValueError,
        ["`fishers[1]`", "other parameters"],
    ),
    ("merging with no view", lambda: jf.fisher_average([PARAMS], [fisher()], view=0.1), TypeError, ["`view`", "0.1"]),
    # Parameters.
    (
        "integer parameter",
        lambda: empirical(with_leaf(np.ones(3, int)), X, Y),
        TypeError,
        ["['w']", "int64", "Make it floating"],
    ),
    ("integer parameter, exact", lambda: exact(with_leaf(np.ones(3, int)), X), TypeError, ["['w']", "int64"]),
    (
        "real vector for a complex parameter",
        lambda: jf.empirical_fisher(log_psi)(with_leaf(np.ones(3, complex)), X).mv(with_leaf(np.ones(3))),
        TypeError,
        ["`v` at ['w']", "float64", "the parameter is complex", "x + 0j"],
    ),
    (
        "complex log-density",
        lambda: jf.natural_grad(log_psi, damping=0.1)(with_leaf(np.ones(3, complex)), X),
        TypeError,
        ["`log_prob`", "complex128", "no likelihood", "jf.energy_gradient", "2 * log_psi(params, x).real"],
    ),
    (
        "complex log-density, with a Fisher",
        lambda: jf.natural_grad(log_psi, jf.empirical_fisher(log_psi), damping=0.1)(with_leaf(np.ones(3, complex)), X),
        TypeError,
        ["`log_prob`", "complex128", "jf.energy_gradient"],
    ),
    *[
        (
            f"complex log-density, {name}",
            lambda call=call: call(with_leaf(np.ones(3, complex))),
            TypeError,
            [name, "several rows per example", "Give a real log-density"],
        )
        for name, call in [
            ("clipped_sum", lambda p: jf.scores(log_psi)(p, X).clipped_sum(1.0)),
            ("influence", lambda p: jf.influence(log_psi, jf.empirical_fisher(log_psi)(p, X))(p, (X,), (X,), 0.1)),
            ("self_influence", lambda p: jf.self_influence(log_psi, jf.empirical_fisher(log_psi)(p, X))(p, (X,), 0.1)),
            ("tracin", lambda p: jf.tracin(log_psi)([p], (X,), (X,))),
            ("meat", lambda p: statistics.meat(log_psi)(p, X, groups=np.arange(5))),
        ]
    ],
    ("energies missing", lambda: jf.energy_gradient(log_psi)(PARAMS, X), TypeError, ["energy_gradient", "local_energies"]),
    (
        "energies of another shape",
        lambda: jf.energy_gradient(log_psi)(PARAMS, X, np.ones((5, 1))),
        ValueError,
        ["`local_energies`", "(5, 1)", "(5,)", "after the samples"],
    ),
    (
        "energies too few",
        lambda: jf.energy_gradient(log_psi)(PARAMS, X, np.ones(4)),
        ValueError,
        ["data[0]", "5", "data[1]", "4"],
    ),
    ("direction of another shape", lambda: jf.acceleration(model)(PARAMS, {"w": 1.0}, X), ValueError, ["`direction`", "['b']"]),
    (
        "acceleration missing",
        lambda: one_update(jf.geodesic_acceleration(0.1), fisher=fisher()),
        ValueError,
        ["geodesic_acceleration", "`acceleration_fn`", "jf.acceleration(model)"],
    ),
    (
        "acceleration of another shape",
        lambda: one_update(jf.geodesic_acceleration(0.1), fisher=fisher(), acceleration_fn=lambda d: d["w"]),
        ValueError,
        ["`acceleration_fn(updates)`", "no leaf at ['b']"],
    ),
    ("residuals of no dict", lambda: jf.residuals(model), TypeError, ["`kinds`", "a dict of functions"]),
    ("residuals of nothing", lambda: jf.residuals({}), ValueError, ["`kinds` is empty"]),
    ("a kind that is no function", lambda: jf.residuals({"edge": 1.0}), TypeError, ["`kinds['edge']`", "ONE point"]),
    ("a kind without points", lambda: KINDS.loss(PARAMS, {}), ValueError, ["`points` has no 'inside'", "['inside']"]),
    ("an unknown kind", lambda: KINDS.loss(PARAMS, {"inside": X}, {"edge": 2.0}), ValueError, ["`scales` has 'edge'"]),
    ("a negative scale", lambda: KINDS.loss(PARAMS, {"inside": X}, {"inside": -2.0}), ValueError, ["scales['inside']", "-2.0"]),
    ("points of no dict", lambda: KINDS.gauss_newton(PARAMS, X), TypeError, ["`points`", "a dict by the kinds ['inside']"]),
    (
        "a residual that is a model",
        lambda: KINDS.loss(PARAMS, {"inside": X}),
        TypeError,
        ["a residual returned", "expected a real floating array"],
    ),
    (
        "a loss beside residuals",
        lambda: jf.training_step(KINDS, optax.sgd(0.1), loss=lambda p: 0.0),
        ValueError,
        ["`loss` is given beside residuals"],
    ),
    (
        "residuals without points",
        lambda: jf.training_step(KINDS, optax.sgd(0.1))(PARAMS, (), *5 * [{"inside": X}]),
        TypeError,
        ["5 entries of data", "step(params, state, points, scales)"],
    ),
    (
        "residuals with a key",
        lambda: jf.training_step(KINDS, optax.sgd(0.1))(PARAMS, (), {"inside": X}, key=jax.random.key(0)),
        ValueError,
        ["`key` is given", "residuals take none"],
    ),
    ("no ratio", lambda: jf.geodesic_acceleration(0.1, max_ratio=-1.0), ValueError, ["`max_ratio`", "-1.0", "at least zero"]),
    (
        "damping of zero",
        lambda: jf.levenberg_marquardt(jf.natural_gradient(1.0), 0.0),
        ValueError,
        ["`damping` is 0.0", "above"],
    ),
    *[
        (f"observations {n}", lambda n=n: jf.covariance(fisher(), n), ValueError, [f"`n` is {n}", "above zero"])
        for n in (0, -4, np.nan)
    ],
    ("observations of an influence", lambda: jf.influence(log_prob, fisher(), -1), ValueError, ["`n` is -1", "above zero"]),
    *[
        (
            f"draws {shape!r}",
            lambda shape=shape: jf.Normal(0.0, 1.0).sample(KEY, shape),
            TypeError,
            ["Normal.sample", repr(shape)],
        )
        for shape in (3, "a", (2.5,), (-1,), None)
    ],
    ("draws of parts", lambda: jf.Joint({"a": jf.Normal(0.0, 1.0)}).sample(KEY, 3), TypeError, ["Joint.sample", "3", "(100,)"]),
    ("seed for a key", lambda: jf.Poisson(0.0).sample(0), TypeError, ["Poisson.sample", "`key` is 0", "jax.random.key"]),
    *[
        (
            f"outputs {outputs!r}",
            lambda outputs=outputs: jf.gauss_newton(lambda p, x: outputs, lambda z, y: 0.0)(PARAMS, X, Y),
            TypeError,
            ["gauss_newton: the model returned", seen, "real floating outputs"],
        )
        for outputs, seen in (("a", "'a'"), (None, "None"), ({}, "a dict"), (1, "1"))
    ],
    ("amplitude that is no function", lambda: jf.energy_gradient(1.0), TypeError, ["`log_psi`", "1.0", "ONE sample"]),
    ("boolean parameter", lambda: exact(with_leaf(np.ones(3, bool)), X), TypeError, ["['w']", "bool", "floating"]),
    ("string parameter", lambda: exact(with_leaf("relu"), X), TypeError, ["['w']", "str", "close over", "equinox.partition"]),
    ("function parameter", lambda: exact(with_leaf(jnp.tanh), X), TypeError, ["['w']", "not an array", "close over"]),
    ("string array parameter", lambda: exact(with_leaf(np.array(["a"])), X), TypeError, ["['w']", "<U1", "floating"]),
    ("key parameter", lambda: jf.kl(model)(with_leaf(KEY), PARAMS, X), TypeError, ["['w']", "key<fry>"]),
    ("no parameters", lambda: exact({}, X), ValueError, ["`params`", "no leaves", "at least one"]),
    ("no parameters, empirical", lambda: empirical(None, X, Y), ValueError, ["`params`", "no leaves", "PyTreeDef(None)"]),
    (
        "integer parameter, optax",
        lambda: jf.scale_by_fisher(0.1).init(with_leaf(np.ones(3, int))),
        TypeError,
        ["['w']", "int64", "nnx.split"],
    ),
    # Data.
    ("lengths", lambda: empirical(PARAMS, X, Y[:4]), ValueError, ["data[0] has 5", "data[1] has 4", "same leading axis"]),
    (
        "lengths, nested",
        lambda: jf.exact_fisher(lambda p, i: model(p, i["x"]))(PARAMS, {"x": X, "aux": {"t": Y[:4]}}),
        ValueError,
        ["data[0]['aux']['t'] has 4", "data[0]['x'] has 5"],
    ),
    ("scalar data", lambda: empirical(PARAMS, 1.0, 1.0), ValueError, ["data[0] is a scalar", "leading axis", "ONE example"]),
    ("lists", lambda: empirical(PARAMS, X.tolist(), Y.tolist()), ValueError, ["data[0][0][0]", "Python list", "jnp.asarray"]),
    ("no examples", lambda: exact(PARAMS, X[:0]), ValueError, ["data[0] has no examples", "(0, 3)", "at least one"]),
    ("strings as data", lambda: empirical(PARAMS, X, np.array(["a"] * 5)), TypeError, ["data[1]", "<U1", "array of numbers"]),
    ("a string as data", lambda: exact(PARAMS, "abc"), TypeError, ["data[0] is 'abc'", "array of numbers"]),
    ("None as data", lambda: empirical(PARAMS, X, None), TypeError, ["data[1] is None", "leading axis", "close over"]),
    ("None as inputs", lambda: exact(PARAMS, None), TypeError, ["data[0] is None", "leading axis"]),
    *[
        (f"{kind} of data", lambda x=x: exact(PARAMS, x), TypeError, ["data[0] is", *words])
        for kind, x, words in [
            ("sparse array", SPARSE_X, ["BCOO", "(5, 3)", "dense", "x.todense()"]),
            ("sparse matrix", scipy.sparse.csr_matrix(X), ["csr_matrix", "dense", "x.toarray()"]),
            ("frame", pandas.DataFrame(X), ["pandas DataFrame", "(5, 3)", "x.to_numpy(float)"]),
            (
                "nullable column",
                pandas.Series([1, 2, None, 4, 5], dtype="Int64"),
                ["pandas Series", "Int64", "to_numpy(float)"],
            ),
            ("big-endian array", X.astype(">f4"), ["(5, 3)", ">f4", "other order", "newbyteorder('=')"]),
            ("long double", X.astype(np.longdouble), [str(np.dtype(np.longdouble)), "float64 or narrower", "x.astype('<f8')"]),
            ("masked array", np.ma.masked_array(X, X > 0), ["masked array of shape (5, 3)", "without a mask", "weight zero"]),
            ("complex long double", X.astype(np.clongdouble), ["complex128 or narrower", "x.astype('<c16')"]),
        ]
    ],
    *[
        (f"{where}, {kind}", lambda call=call, bad=bad: call(bad), TypeError, [name, seen, remedy])
        for where, name, call in [
            ("parameters", "the parameter at ['w']", lambda w: exact(with_leaf(w), X)),
            ("vector", "`v` at ['w']", lambda w: fisher().mv(with_leaf(w))),
            ("gradient", "`updates` at ['w']", lambda w: one_update(jf.scale_by_fisher(0.1), with_leaf(w), fisher=fisher())),
        ]
        for kind, bad, seen, remedy in [
            ("big-endian", np.ones(3, ">f8"), ">f8", "newbyteorder"),
            ("long double", np.ones(3, np.longdouble), "float64 or narrower", "astype"),
            ("masked", np.ma.masked_array(np.ones(3)), "masked array of shape (3,)", "x.filled(0)"),
            ("sparse", SPARSE_W, "sparse BCOO of shape (3,)", "x.todense()"),
        ]
    ],
    (
        "column as a parameter",
        lambda: exact(with_leaf(pandas.Series(np.ones(3))), X),
        TypeError,
        ["['w']", "Series", "not an array"],
    ),
    (
        "big-endian weights",
        lambda: exact(PARAMS, X, weights=np.ones(5, ">f8")),
        TypeError,
        ["`weights`", ">f8", "newbyteorder"],
    ),
    *[
        (f"{kind} {what}", lambda call=call, bad=bad: call(bad), TypeError, [name, *words])
        for kind, bad, words in [
            ("big-endian", np.ones(5, ">f8"), [">f8", "newbyteorder"]),
            ("long double", np.ones(5, np.longdouble), ["float64 or narrower"]),
            ("masked", np.ma.masked_array(np.ones(5)), ["masked array of shape (5,)"]),
        ]
        for what, name, call in [
            ("weights", "`weights` is", lambda w: exact(PARAMS, X, weights=w)),
            ("factors", "meat: `factors` is", lambda f: statistics.meat(log_prob)(PARAMS, X, Y, factors=f)),
            ("row vector", "`w` is", lambda w: jf.scores(log_prob)(PARAMS, X, Y).rmv(w)),
            ("path", "solve_path: `dampings` is", lambda d: jf.solve_path(fisher(), GRADIENT, d)),
            ("field", "Normal: `loc` is", lambda loc: jf.Normal(loc, 1.0)),
            ("target", "Normal.log_prob: `x` is", lambda x: jf.Normal(0.0, 1.0).log_prob(x)),
        ]
    ],
    # A wrong number of arguments: some are missing, or are in the wrong place.
    *[
        (f"{name} of {what}", lambda call=call, data=data: call(*data), TypeError, [*seen, *words])
        for what, data, words in [
            ("no target", (X,), ["1 entry of data", "missing a required argument", "(params, *"]),
            ("weights by position", (X, Y, np.ones(5)), ["3 entries of data", "too many", "weights=w"]),
        ]
        for name, call, seen in [
            ("log-likelihood", lambda *data: empirical(PARAMS, *data), ["`log_prob`", "(params, x), and then the target"]),
            ("log-density", lambda *data: jf.scores(density)(PARAMS, *data), ["`log_prob` takes (params, x, y)"]),
            ("natural gradient", lambda *data: jf.natural_grad(log_prob, damping=1.0)(PARAMS, *data), ["`log_prob`"]),
            ("training step", lambda *data: jf.training_step(model, optax.sgd(1.0))(PARAMS, (), *data), ["then the target"]),
        ]
    ],
    *[
        (
            f"targets, {name}",
            lambda call=call: call(X, Y),
            TypeError,
            ["`model` takes (params, x)", "2 entries", "own predictions", "weights=w"],
        )
        for name, call in [
            ("exact", lambda *data: exact(PARAMS, *data)),
            ("implicit", lambda *data: jf.implicit_fisher(model)(PARAMS, *data)),
            ("sampled", lambda *data: jf.sampled_fisher(model)(PARAMS, KEY, *data)),
            ("divergence", lambda *data: jf.kl(model)(PARAMS, PARAMS, *data)),
        ]
    ],
    ("no data", lambda: empirical(PARAMS), TypeError, ["empirical_fisher", "without data", "batch mean", "(params, *data)"]),
    ("no data, scores", lambda: jf.scores(log_prob)(PARAMS), TypeError, ["jaxfisher.scores", "ONE example", "batch mean"]),
    ("no data, gradient", lambda: jf.natural_grad(log_prob, damping=1.0)(PARAMS), TypeError, ["natural_grad", "batch mean"]),
    ("no data, Hessian", lambda: jf.observed_information(log_prob)(PARAMS), TypeError, ["observed_information", "batch mean"]),
    ("no samples", lambda: jf.monte_carlo_kl(log_prob)(PARAMS, PARAMS, ()), TypeError, ["(params_p, params_q, samples)"]),
    ("no inputs", lambda: exact(PARAMS), TypeError, ["missing a required", "`model` takes (params, x)", "0 entries of data"]),
    ("weights' shape", lambda: exact(PARAMS, X, weights=np.ones((5, 1))), ValueError, ["`weights`", "(5, 1)", "(5,)"]),
    ("complex weights", lambda: exact(PARAMS, X, weights=np.ones(5, complex)), TypeError, ["`weights`", "complex", "real"]),
    *[
        (f"weights {name}", lambda w=w: exact(PARAMS, X, weights=w), ValueError, ["`weights`", *words])
        for name, w, words in [
            (
                "negative",
                np.array([1.0, 0.0, -0.5, 2.0, -1.0]),
                ["-0.5 at entry 2", "at least zero", "advantage", "log-density"],
            ),
            ("negative, a list", [1, 0, -1, 2, 3], ["-1 at entry 2", "at least zero"]),
            ("negative, on a device", jnp.array([1.0, 0.0, -0.5, 2.0, -1.0]), ["-0.5 at entry 2"]),
            ("infinite", np.array([1.0, np.inf, 1.0, 1.0, 1.0]), ["inf at entry 1", "finite"]),
            ("NaN", np.array([1.0, 1.0, 1.0, np.nan, 1.0]), ["nan at entry 3", "finite"]),
            ("all zero", np.zeros(5, bool), ["all zero", "at least one positive"]),
        ]
    ],
    *[
        (f"a list of weights with {bad!r}", lambda w=w: exact(PARAMS, X, weights=w), TypeError, ["`weights` holds", seen, "5"])
        for bad, w, seen in [
            (None, [1.0, None, 1.0, 1.0, 1.0], "None at entry 1"),
            ("a", ["a"] * 5, "'a' at entry 0"),
            ([1.0], [[1.0]] * 5, "a list at entry 0"),
        ]
    ],
    ("a string as weights", lambda: exact(PARAMS, X, weights="a"), TypeError, ["`weights`", "'a'", "array of numbers"]),
    # Settings.
    *[
        (f"batch_size {size!r}", lambda size=size: jf.exact_fisher(model, batch_size=size)(PARAMS, X), error, words)
        for size, error, words in [
            (0, ValueError, ["`batch_size` is 0", "positive", "None"]),
            (-1, ValueError, ["`batch_size` is -1", "positive"]),
            (2.5, TypeError, ["`batch_size` is 2.5", "whole number"]),
            (True, TypeError, ["`batch_size` is True", "whole number"]),
        ]
    ],
    *[
        (f"max_bytes {size!r}", lambda size=size: jf.scores(log_prob, max_bytes=size)(PARAMS, X, Y), error, words)
        for size, error, words in [
            (0, ValueError, ["`max_bytes` is 0", "positive", "2**30"]),
            (1e9, TypeError, ["`max_bytes` is 1000000000.0", "whole number", "2**30"]),
            (8, ValueError, ["`max_bytes` is 8", "one example take", "jf.explain"]),
        ]
    ],
    (
        "batch_size and max_bytes",
        lambda: jf.exact_fisher(model, batch_size=2, max_bytes=10**6)(PARAMS, X),
        ValueError,
        ["`batch_size` (2)", "`max_bytes` (1000000)", "Give one"],
    ),
    (
        "max_bytes for a fisher that has its own",
        lambda: jf.natural_grad(log_prob, lambda p, x, y: exact(p, x), damping=1.0, max_bytes=10**6),
        ValueError,
        ["`max_bytes`", "`fisher`", "jf.exact_fisher(model, max_bytes=...)"],
    ),
    *[
        (
            f"center {bad!r} of {make.__name__}",
            lambda m=make, b=bad: m(log_prob, center=b),
            TypeError,
            ["`center` is", "True or"],
        )
        for make in (jf.scores, jf.empirical_fisher)
        for bad in ("yes", 1, None)
    ],
    ("explain no function", lambda: jf.explain(3)(PARAMS, X), TypeError, ["`function` is 3", "log_prob", "model"]),
    *[
        (f"num_samples {m!r}", lambda m=m: jf.sampled_fisher(model, m), ValueError, [f"`num_samples` is {m!r}", "at least 1"])
        for m in (0, 1.5, True)
    ],
    (
        "integer key",
        lambda: jf.sampled_fisher(model)(PARAMS, 0, X),
        TypeError,
        ["`key` is 0", "jax.random.key", "(params, key, *inputs)"],
    ),
    (
        "spread_solves, another axis",
        lambda: jf.spread_solves(fisher(), jax.make_mesh((1,), ("a",)), "b"),
        ValueError,
        ["spread_solves: `mesh` has no axis 'b'", "['a']"],
    ),
    (
        "spread_solves, a block of layers",
        lambda: jf.spread_solves(jf.kronecker(fisher()), jax.make_mesh((1,), ("a",)), "a", block=8),
        ValueError,
        ["spread_solves: `block` is 8", "which has no rows"],
    ),
    (
        "spread_solves, an explicit axis",
        lambda: jf.spread_solves(fisher(), jax.make_mesh((1,), ("a",), axis_types=(jax.sharding.AxisType.Explicit,)), "a"),
        ValueError,
        ["the axis 'a' of `mesh` is explicit", "AxisType.Auto"],
    ),
    (
        "spread_solves, of a view",
        lambda: jf.spread_solves(jf.diagonal(fisher()), jax.make_mesh((1,), ("a",)), "a"),
        TypeError,
        ["spread_solves", "diagonal) has neither scores nor layers", "jf.exact_fisher"],
    ),
    (
        "spread_solves, of a sum of views",
        lambda: jf.spread_solves(jf.kronecker(fisher()) + jf.kronecker(fisher()), jax.make_mesh((1,), ("a",)), "a"),
        TypeError,
        ["spread_solves", "a sum of several products over a layer", "jf.spread_solves(jf.kronecker(fisher), mesh, axis)"],
    ),
    (
        "spread_solves, of a sum with scores in pieces",
        lambda: jf.spread_solves(fisher() + jf.exact_fisher(model, batch_size=2)(PARAMS, X), jax.make_mesh((1,), ("a",)), "a"),
        TypeError,
        ["exact as scores + exact as scores) has neither", "held whole (without `batch_size=`"],
    ),
    (
        "spread_solves, a block of no columns",
        lambda: jf.spread_solves(fisher(), jax.make_mesh((1,), ("a",)), "a", block=0),
        TypeError,
        ["spread_solves: `block` is 0", "at least one"],
    ),
    ("nystrom, a number for a key", lambda: jf.nystrom(fisher(), 0, 2), TypeError, ["nystrom: `key` is 0", "jax.random.key"]),
    ("data as key", lambda: jf.sampled_fisher(model)(PARAMS, X), TypeError, ["`key`", "(5, 3)", "jax.random.key"]),
    (
        "many keys",
        lambda: jf.sampled_fisher(model)(PARAMS, jax.random.split(KEY), X),
        TypeError,
        ["`key`", "(2,)", "one random"],
    ),
    *[
        (
            f"center {bad!r} of {make.__name__}",
            lambda make=make, bad=bad: make(log_prob, center=bad),
            TypeError,
            [f"{make.__name__}: `center` is {bad!r}", "True or False"],
        )
        for make in (jf.scores, jf.empirical_fisher)
        for bad in ("yes", 1, None)
    ],
    # log_prob.
    ("no function", lambda: jf.scores(3.0), TypeError, ["`log_prob` is 3.0", "(params, *example)"]),
    (
        "vector",
        lambda: jf.scores(lambda p, x, y: p["w"] * y)(PARAMS, X, Y),
        ValueError,
        ["`log_prob`", "(3,)", "scalar", "sum"],
    ),
    ("integer", lambda: jf.scores(lambda p, x, y: jnp.array(1))(PARAMS, X, Y), TypeError, ["`log_prob`", "int64", "floating"]),
    ("None", lambda: jf.scores(lambda p, x, y: None)(PARAMS, X, Y), TypeError, ["`log_prob`", "NoneType", "scalar"]),
    ("tuple", lambda: jf.scores(lambda p, x, y: (y, y))(PARAMS, X, Y), TypeError, ["`log_prob`", "tuple", "scalar"]),
    (
        "distribution",
        lambda: jf.scores(lambda p, x, y: model(p, x))(PARAMS, X, Y),
        TypeError,
        ["`log_prob`", "Normal", "scalar"],
    ),
    ("wrong key", lambda: jf.scores(lambda p, x, y: p["v"])(PARAMS, X, Y), KeyError, ["'v'", "`log_prob`", "ONE example"]),
    *[
        (f"a single example, {made.__name__}", lambda made=made: made(model)(PARAMS, X[0]), ValueError, ["`model`", "x[None]"])
        for made in (jf.exact_fisher, jf.implicit_fisher)
    ],
    *[
        (
            f"batch mean, {name}",
            lambda call=call: call(batch_mean),
            ValueError,
            ["`log_prob`", "float64[3]", "batch mean", "ONE"],
        )
        for name, call in [
            ("scores", lambda f: jf.scores(f)(PARAMS, X, Y)),
            ("streamed", lambda f: jf.scores(f, batch_size=2)(PARAMS, X, Y)),
            ("Fisher", lambda f: jf.empirical_fisher(f)(PARAMS, X, Y)),
            ("gradient", lambda f: jf.natural_grad(f, damping=1.0)(PARAMS, X, Y)),
            ("gradient, exact", lambda f: jf.natural_grad(f, lambda p, x, y: exact(p, x), damping=1.0)(PARAMS, X, Y)),
            ("Hessian", lambda f: jf.observed_information(f)(PARAMS, X, Y)),
            ("KL", lambda f: jf.monte_carlo_kl(f)(PARAMS, PARAMS, (X, Y))),
        ]
    ],
    # Models.
    ("model, no function", lambda: jf.exact_fisher(None), TypeError, ["`model` is None", "(params, *inputs)"]),
    ("model, array", lambda: jf.exact_fisher(lambda p, x: x @ p["w"])(PARAMS, X), TypeError, ["shape ()", "jf.Normal"]),
    ("model, tuple", lambda: jf.implicit_fisher(lambda p, x: (x, x))(PARAMS, X), TypeError, ["a tuple", "distribution"]),
    (
        "views of a function",
        lambda: jf.implicit_fisher(line)(1.0, X[:, 0], views_of=jf.exact_fisher(line)),
        TypeError,
        ["`views_of`", "Call the function"],
    ),
    (
        "views of another",
        lambda: jf.implicit_fisher(line)(1.0, X[:, 0], views_of=exact(PARAMS, X)),
        ValueError,
        ["`views_of`", "other parameters", "no leaf at params"],
    ),
    ("model, None", lambda: jf.kl(lambda p, x: None)(PARAMS, PARAMS, X), TypeError, ["None", "missing `return`"]),
    ("model, class", lambda: jf.sampled_fisher(lambda p, x: jf.Normal)(PARAMS, KEY, X), TypeError, ["class Normal itself"]),
    ("target (n, 1)", lambda: empirical(PARAMS, X, Y[:, None]), ValueError, ["target", "(1,)", "Normal", "()", "reshape"]),
    ("no target", lambda: jf.scores(jf.log_likelihood(lambda p: line(p, 1.0)))(0.0, ()), TypeError, ["without data"]),
    ("no target, direct", lambda: log_prob(PARAMS), TypeError, ["needs a target", "(params, *inputs, target)"]),
    # Damping, powers, radii, decays.
    *[
        (f"damping {name}, {where}", lambda call=call, bad=bad: call(bad), error, [f"`{argument}`", seen, "at least zero"])
        for name, bad, error, seen in [
            ("negative", -1.0, ValueError, "-1.0"),
            ("negative NumPy", np.array(-2.0), ValueError, "-2.0"),
            ("NaN", float("nan"), ValueError, "nan"),
            ("complex", 1j, TypeError, "1j"),
            ("string", "a", TypeError, "'a'"),
            ("None", None, TypeError, "None"),
            ("vector", np.ones(2), TypeError, "shape (2,)"),
            ("list", [1.0], TypeError, "a list"),
            ("boolean", True, TypeError, "True"),
        ]
        for where, argument, call in [
            ("natural_grad", "damping", lambda d: jf.natural_grad(log_prob, damping=d)(PARAMS, X, Y)),
            ("solve", "damping", lambda d: fisher().solve(GRADIENT, d)),
            ("CG", "damping", lambda d: jf.solve(fisher(), GRADIENT, d, solver=jf.CG())),
            ("logdet", "damping", lambda d: fisher().logdet(d)),
            ("scale_by_fisher", "damping", lambda d: jf.scale_by_fisher(d)),
            ("schedule", "damping", lambda d: one_update(jf.scale_by_fisher(lambda count: d), fisher=fisher())),
            ("scale_to_kl", "radius", lambda d: jf.scale_to_kl(d)),
            ("c * F", "c` in `c * F", lambda d: fisher() * d),
        ]
        # A transformation without a damping takes the damping of each update.
        if not (bad is None and where == "scale_by_fisher")
    ],
    *[
        (f"damping {bad!r}, injected", lambda bad=bad: inject(bad), TypeError, ["`damping`", seen, "at least zero"])
        for bad, seen in [("a", "'a'"), (1j, "1j")]
    ],
    ("no damping", lambda: jf.natural_grad(log_prob), TypeError, ["natural_grad", "'damping'"]),
    ("power", lambda: jf.scale_by_fisher(0.1, power="half"), TypeError, ["`power` is 'half'", "one real number"]),
    ("power_mv", lambda: fisher().power_mv(GRADIENT, np.ones(2)), TypeError, ["`power`", "shape (2,)", "one real number"]),
    ("learning rate", lambda: jf.natural_gradient("a", 0.1), TypeError, ["`learning_rate` is 'a'", "schedule"]),
    ("rtol", lambda: jf.CG(rtol=-1.0), ValueError, ["`rtol` is -1.0", "at least zero"]),
    ("max_steps", lambda: jf.CG(max_steps=0), ValueError, ["`max_steps` is 0", "at least one"]),
    *[
        (
            f"decay {d}",
            lambda d=d: jf.scale_by_fisher(0.1, view=jf.diagonal, decay=d),
            ValueError,
            [f"`decay` is {d}", "[0, 1)"],
        )
        for d in (1.0, -0.1, float("nan"))
    ],
    *[
        (f"{name} {bad} of kfac", lambda given=given: jf.kfac(**given), ValueError, [f"`{name}` is {bad}", expected])
        for name, bad, expected in [("decay", 1.5, "[0, 1)"), ("update_every", 0, "at least one")]
        for given in [{name: bad}]
    ],
    *[
        (
            f"keep that gives {seen}, {caller}",
            lambda call=call, flag=flag: call(lambda path: flag),
            TypeError,
            [caller, "`keep` of ['b']", seen, "expected True or False"],
        )
        for flag, seen in [("no", "'no'"), (None, "None"), (1, "is 1")]
        for caller, call in [
            ("restrict", lambda keep: fisher().restrict(keep)),
            ("marginal", lambda keep: fisher().marginal(keep)),
            ("laplace", lambda keep: jf.laplace(model, PARAMS, X, Y, prior=1.0, keep=keep)),
        ]
    ],
    *[
        (
            f"damping by leaf, {name}",
            lambda solver=solver, view=view: jf.solve(view(fisher()), GRADIENT, {"b": 0.1, "w": 1.0}, solver),
            TypeError,
            [f"{name}: `damping`", "a dict", "one number", "Leave the solver out"],
        )
        for name, solver, view in [
            ("Cholesky", jf.Cholesky(), lambda F: F),
            ("LSMR", jf.LSMR(), lambda F: F),
            ("factored_solve", jf.factored_solve, jf.kronecker),
        ]
    ],
    ("decay 'a'", lambda: jf.scale_by_fisher(0.1, view=jf.diagonal, decay="a"), TypeError, ["`decay` is 'a'", "[0, 1)"]),
    ("decay, no view", lambda: jf.scale_by_fisher(0.1, decay=0.9), ValueError, ["`decay`", "view=None", "view=jf.diagonal"]),
    (
        "decay of scores",
        lambda: one_update(jf.scale_by_fisher(0.1, view=lambda f: f, decay=0.9), fisher=fisher()),
        ValueError,
        ["`decay`", "exact as scores", "view=jf.diagonal"],
    ),
    # The curvature.
    *[
        (f"no fisher=, {name}", lambda make=make: one_update(make()), ValueError, [caller, "fisher=fisher", "opt.update"])
        for name, caller, make in [
            ("scale_by_fisher", "scale_by_fisher", lambda: jf.scale_by_fisher(0.1)),
            ("scale_to_kl", "scale_to_kl", lambda: jf.scale_to_kl(0.1)),
            ("natural_gradient", "scale_by_fisher", lambda: jf.natural_gradient(1.0, 0.1)),
            ("chain", "scale_by_fisher", lambda: optax.chain(jf.scale_by_fisher(0.1), optax.scale(-1.0))),
        ]
    ],
    *[
        (f"fisher= {name}", lambda bad=bad: one_update(jf.scale_by_fisher(0.1), fisher=bad()), TypeError, ["`fisher`", *words])
        for name, bad, words in [
            ("matrix", lambda: np.eye(4), ["(4, 4)", "operator", "jf.exact_fisher(model)(params, x)"]),
            ("uncalled", lambda: exact, ["needs arguments", "'params'", "jf.exact_fisher(model)(params, x)"]),
            ("makes a matrix", lambda: lambda: np.eye(4), ["(4, 4)", "operator"]),
            ("scores", lambda: jf.scores(log_prob)(PARAMS, X, Y), ["HeldScores", "operator"]),
        ]
    ],
    (
        "fisher= over others",
        lambda: one_update(jf.scale_by_fisher(0.1), fisher=jf.exact_fisher(line)(1.0, Y)),
        ValueError,
        ["scale_by_fisher", "`fisher`", "params 1", "no leaf at params", "Make the Fisher"],
    ),
    (
        "fisher= over other shapes",
        lambda: one_update(jf.scale_to_kl(0.1), with_leaf(np.ones(4)), fisher=fisher()),
        ValueError,
        ["scale_to_kl", "['w']", "(4,)", "(3,)"],
    ),
    *[
        (f"kfac of {what}", call, ValueError, ["kfac", "empirical", "jf.exact_fisher(model)(params, x)"])
        for what, call in [
            ("an empirical Fisher", lambda: trained(lambda: empirical(PARAMS, X, Y))),
            ("a part empirical", lambda: trained(lambda: fisher() + empirical(PARAMS, X, Y))),
            (
                "empirical views",
                lambda: trained(lambda: jf.implicit_fisher(model)(PARAMS, X, views_of=empirical(PARAMS, X, Y))),
            ),
            ("one at an update", lambda: looked(jf.kfac(fisher), fisher=empirical(PARAMS, X, Y))),
        ]
    ],
    *[
        (f"{name} of {what}", lambda call=call, **k: call(), TypeError, [*words, "one real number"])
        for name, what, call, words in [
            (
                "value_fn",
                "adapt_damping",
                lambda: looked(adapting(), value_fn=lambda p: p["w"]),
                ["adapt_damping: `value_fn` returned", "(3,)"],
            ),
            ("value", "adapt_damping", lambda: looked(adapting(), value=np.ones(5)), ["adapt_damping: `value` is", "(5,)"]),
            (
                "value_fn",
                "backtrack_kl",
                lambda: looked(jf.backtrack_kl(1.0), value_fn=lambda p: p["w"], kl_fn=len),
                ["`value_fn` returned"],
            ),
            (
                "kl_fn",
                "backtrack_kl",
                lambda: looked(jf.backtrack_kl(1.0), kl_fn=lambda p: p["w"]),
                ["`kl_fn` returned", "(3,)"],
            ),
            (
                "schedule",
                "damping",
                lambda: one_update(jf.scale_by_fisher(five), fisher=fisher()),
                ["schedule `damping`", "(5,)"],
            ),
            (
                "schedule",
                "quadratic_model",
                lambda: one_update(jf.quadratic_model(five), fisher=fisher(), grad=GRADIENT),
                ["schedule `damping`"],
            ),
            (
                "schedule",
                "learning_rate",
                lambda: one_update(jf.natural_gradient(five, 0.1), fisher=fisher()),
                ["schedule `learning_rate`", "(5,)"],
            ),
        ]
    ],
    *[
        (f"state for others, {name}", lambda make=make: foreign_state(make()), ValueError, ["state", "(2,)", "(3,)", *words])
        for name, make, words in [
            ("momentum", lambda: jf.scale_by_fisher(0.1, momentum=0.9), ["scale_by_fisher", "opt.init(params)"]),
            ("decay", lambda: jf.scale_by_fisher(0.1, view=jf.diagonal, decay=0.9), ["other parameters", "opt.init(params)"]),
            ("update_every", lambda: jf.scale_by_fisher(0.1, view=jf.diagonal, update_every=2), ["same parameters"]),
            ("step", lambda: jf.quadratic_model(0.1), ["quadratic_model", "opt.init(params)"]),
        ]
    ],
    *[
        (
            f"state of another, {name}",
            lambda opt=opt: opt.update(GRADIENT, (), PARAMS, fisher=fisher(), grad=GRADIENT),
            TypeError,
            [name, "a tuple", "State", "opt.update(grads, state, params"],
        )
        for name, opt in [
            ("scale_by_fisher", jf.scale_by_fisher(0.1)),
            ("quadratic_model", jf.quadratic_model(0.1)),
            ("adapt_damping", jf.adapt_damping(jf.natural_gradient(1.0, 0.1), 0.1)),
            ("backtrack_kl", jf.backtrack_kl(0.1)),
        ]
    ],
    *[
        (
            f"training_step of {what}",
            lambda opt=opt: jf.training_step(model, opt),
            TypeError,
            ["training_step: `optimiser`", *words],
        )
        for what, opt, words in [
            ("MultiSteps", optax.MultiSteps(optax.sgd(1.0), 2), ["MultiSteps", ".gradient_transformation()"]),
            ("a function", jf.kfac, ["a function", "Call the function that makes it"]),
            ("a number", 0.1, ["0.1", "jf.natural_gradient"]),
        ]
    ],
    ("view, a word", lambda: jf.scale_by_fisher(0.1, view="diagonal"), TypeError, ["`view` is 'diagonal'", "jf.diagonal"]),
    (
        "view, no operator",
        lambda: one_update(jf.scale_by_fisher(0.1, view=lambda f: f.as_matrix()), fisher=fisher()),
        TypeError,
        ["scale_by_fisher: `view`", "(4, 4)", "operator"],
    ),
    (
        "view, None",
        lambda: jf.natural_grad(log_prob, damping=0.1, view=lambda f: None)(PARAMS, X, Y),
        TypeError,
        ["natural_grad: `view`", "None", "operator"],
    ),
    (
        "operator for a function",
        lambda: jf.natural_grad(log_prob, fisher(), damping=0.1),
        TypeError,
        ["`fisher`", "an Operator", "(params, *data) -> operator", "jf.solve"],
    ),
    (
        "function of inputs given targets",
        lambda: jf.natural_grad(log_prob, lambda p, x: exact(p, x), damping=0.1)(PARAMS, X, Y),
        TypeError,
        ["`fisher`", "no targets", "lambda params, x, y"],
    ),
    (
        "Fisher of other parameters",
        lambda: jf.natural_grad(log_prob, lambda p, x, y: jf.exact_fisher(line)(1.0, y), damping=0.1)(PARAMS, X, Y),
        ValueError,
        ["natural_grad: `fisher`", "`params`", "no leaf at ['b']"],
    ),
    # Operators.
    (
        "F + G",
        lambda: fisher() + jf.exact_fisher(line)(1.0, Y),
        ValueError,
        ["cannot add", "params 1", "no leaf at ['b']", "same"],
    ),
    ("F + 1", lambda: fisher() + 1, TypeError, ["cannot add", "Fisher and 1", "two Fishers", "`damping`"]),
    ("1 + F", lambda: 1 + fisher(), TypeError, ["cannot add", "Fisher and 1", "two Fishers"]),
    ("matrix + F", lambda: np.eye(4) + fisher(), TypeError, ["cannot add", "(4, 4)", "two Fishers"]),
    ("vector * F", lambda: np.ones(4) * fisher(), TypeError, ["`c * F`", "(4,)", "one real number"]),
    ("F * F", lambda: fisher() * fisher(), TypeError, ["`c * F`", "an Operator", "one real number"]),
    *[
        (f"{name} of {what}", lambda call=call, bad=bad: call(bad), TypeError, [f"{name}: expected", "operator", *words])
        for what, bad, words in [
            ("a matrix", np.eye(4), ["(4, 4)"]),
            ("a function", exact, ["a function", "Call the function"]),
        ]
        for name, call in [
            ("dense", jf.dense),
            ("diagonal", jf.diagonal),
            ("as_lineax", jf.as_lineax),
            ("solve", lambda f: jf.solve(f, GRADIENT, 0.1)),
        ]
    ],
    (
        "preconditioner of others",
        lambda: jf.solve(fisher(), GRADIENT, 0.1, jf.CG(preconditioner=jf.exact_fisher(line)(1.0, Y))),
        ValueError,
        ["CG", "`preconditioner`", "params 1", "no leaf at ['b']", "same parameters"],
    ),
    *[
        (
            f"preconditioner, {what}",
            lambda bad=bad: jf.solve(fisher(), GRADIENT, 0.1, jf.CG(preconditioner=bad)),
            TypeError,
            ["CG: `preconditioner`", "Fisher operator", seen],
        )
        for what, bad, seen in [
            ("a word", "diagonal", "'diagonal'"),
            ("a matrix", np.eye(4), "(4, 4)"),
            ("a view of nothing", lambda f: None, "None"),
        ]
    ],
    (
        "basis of others",
        lambda: jf.eigen_kronecker(fisher(), basis=jf.block_diagonal(jf.exact_fisher(line)(1.0, Y))),
        ValueError,
        ["eigen_kronecker", "`basis`", "params 1", "same parameters"],
    ),
    (
        "path of a list",
        lambda: jf.solve_path(fisher(), GRADIENT, [0.1, 1.0]),
        ValueError,
        ["`dampings` is a list", "jnp.array("],
    ),
    (
        "path through a negative damping",
        lambda: jf.solve_path(fisher(), GRADIENT, np.array([1.0, -1.0])),
        ValueError,
        ["`dampings` holds -1.0", "at least zero"],
    ),
    ("path of a number", lambda: jf.solve_path(fisher(), GRADIENT, 0.1), ValueError, ["`dampings` is 0.1", "jnp.array("]),
    *[
        (f"solver {name}", lambda s=s: jf.solve(fisher(), GRADIENT, 0.1, solver=s), TypeError, ["`solver`", seen, "jf.CG()"])
        for name, s, seen in [
            ("word", "cg", "'cg'"),
            ("class", jf.CG, "CG"),
            ("lineax", lineax.CG(1e-5, 1e-5), "CG(rtol=1e-05"),
        ]
    ],
    *[
        (f"large {name}", lambda call=call: call(*large()), ValueError, ["implicit", "4097 x 4097", "jf.CG()", "jf.dense(F)"])
        for name, call in [
            ("solve", lambda f, v: jf.solve(f, v, 0.1)),
            ("eigvalsh", lambda f, v: f.eigvalsh()),
            ("logdet", lambda f, v: f.logdet(0.1)),
            ("power_mv", lambda f, v: f.power_mv(v, 0.5, 0.1)),
            ("sum", lambda f, v: (f + f).solve(v, 0.1)),
        ]
    ],
    # Divergences and distributions.
    ("kl, structure", lambda: jf.kl(model)(PARAMS, {"w": PARAMS["w"]}, X), ValueError, ["`params_q`", "no leaf at ['b']"]),
    ("kl, dtype", lambda: jf.kl(model)(PARAMS, with_leaf(np.ones(3, int)), X), TypeError, ["`params_q` at ['w']", "int64"]),
    (
        "kl, families",
        lambda: jf.kl_divergence(jf.Normal(0, 1), jf.Laplace(0, 1)),
        TypeError,
        ["Normal", "Laplace", "monte_carlo"],
    ),
    ("kl, array", lambda: jf.kl_divergence(np.ones(3), jf.Normal(0, 1)), TypeError, ["distribution", "shape (3,)"]),
    ("fields", lambda: jf.Normal(np.ones(2), np.ones(3)), ValueError, ["Normal", "loc (2,)", "scale (3,)", "equal shape"]),
    ("complex field", lambda: jf.Poisson(1j), TypeError, ["Poisson", "`log_rate`", "complex", "real"]),
    ("missing axis", lambda: jf.Categorical(1.0), ValueError, ["Categorical", "`logits`", "()", "at least 1"]),
    (
        "hyperparameters that are functions",
        lambda: one_update(optax.inject_hyperparams(jf.kfac)(damping=0.1), fisher=exact(PARAMS, X)),
        TypeError,
        ["expected a Fisher operator", "static_args", "inject_hyperparams"],
    ),
    # Unknown keywords.
    *[
        (f"keyword {word} of {name}", lambda f=f, word=word: f(**{word: 1}), TypeError, ["unexpected keyword", f"'{word}'"])
        for name, f, word in [
            ("scores", lambda **k: jf.scores(log_prob, **k), "centre"),
            ("empirical_fisher", lambda **k: jf.empirical_fisher(log_prob, **k), "batchsize"),
            ("exact_fisher", lambda **k: jf.exact_fisher(model, **k), "num_samples"),
            ("its function", lambda **k: exact(PARAMS, X, **k), "wieghts"),
            ("sampled_fisher", lambda **k: jf.sampled_fisher(model, **k), "samples"),
            ("natural_grad", lambda **k: jf.natural_grad(log_prob, damping=0.1, **k), "tol"),
            ("solve", lambda **k: jf.solve(None, None, 0.1, **k), "rtol"),
            ("scale_by_fisher", lambda **k: jf.scale_by_fisher(0.1, **k), "eps"),
            ("scale_to_kl", lambda **k: jf.scale_to_kl(0.1, **k), "max_kl"),
            ("natural_gradient", lambda **k: jf.natural_gradient(1.0, 0.1, **k), "betas"),
            ("kl", lambda **k: jf.kl(model, **k), "reduction"),
            ("Normal", lambda **k: jf.Normal(loc=0.0, **k), "sigma"),
        ]
    ],
]


def inject(damping):
    """One step with the damping as a hyperparameter."""
    return one_update(optax.inject_hyperparams(jf.scale_by_fisher)(damping=damping), fisher=fisher())


@pytest.mark.parametrize(("call", "error", "words"), [case[1:] for case in MISTAKES], ids=[case[0] for case in MISTAKES])
def test_a_mistake_is_named_at_trace_time(call, error, words):
    with pytest.raises(error) as caught:
        traced(call)
    message = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (lambda p, x, y: empirical(p, x, y), (PARAMS, X, Y[:4]), r"data\[1\] has 4"),
        (lambda p, x, y: jf.scores(batch_mean)(p, x, y), (PARAMS, X, Y), "batch mean"),
        (lambda p, x, v: jf.solve(exact(p, x), v, 0.1)[0], (PARAMS, X, {"w": PARAMS["w"]}), r"no leaf at \['b'\]"),
        (lambda p, x, g: one_update(jf.scale_by_fisher(0.1), g), (PARAMS, X, GRADIENT), "`update` needs the curvature"),
        (lambda p, x, d: jf.solve(exact(p, x), p, d)[0], (PARAMS, X, np.ones(2)), r"`damping` is an array of shape \(2,\)"),
    ],
)
def test_under_jit_too(function, arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        jax.jit(function)(*arguments)


# --- unusual input that is right ------------------------------------------------------------------------------------------


def test_numpy_floats_and_scalars_are_parameters():
    """The Fisher of a line through the origin is the mean of x^2, whatever kind of number the slope is."""
    for slope in (1.0, np.float64(1.0), np.ones(()), jnp.ones(())):
        for weights in (None, np.ones(5), np.ones(5, int), np.ones(5, bool), [1.0] * 5):
            matrix = jf.exact_fisher(line)(slope, Y, weights=weights).as_matrix()
            np.testing.assert_allclose(matrix, [[np.mean(Y**2)]], rtol=50 * np.finfo(np.float32).eps)


def test_numpy_whole_numbers_count_examples_rows_and_draws():
    for four in (np.int64(4), np.uint8(4)):
        assert jf.exact_fisher(model, batch_size=four)(PARAMS, X).form.scores.batch_size == 4
        assert jf.sampled_fisher(model, four)(PARAMS, KEY, X).form.scores.num_rows == 20
        assert jf.low_rank(fisher(), np.int64(2)).form.vectors.shape == (4, 2)


def test_a_column_of_plain_numbers_is_data():
    expected = empirical(PARAMS, X, Y).as_matrix()
    np.testing.assert_array_equal(empirical(PARAMS, X, pandas.Series(Y)).as_matrix(), expected)


@pytest.mark.parametrize("damping", [0, 1, 0.5, np.float32(0.5), np.array(0.5), jnp.float32(0.5), jnp.array(1)])
def test_any_real_scalar_is_a_damping(damping):
    operator = jf.exact_fisher(line)(np.ones(()), Y)
    expected = 1 / (np.mean(Y**2) + float(damping))
    np.testing.assert_allclose(jf.solve(operator, np.ones(()), damping)[0], expected, rtol=50 * np.finfo(np.float64).eps)
    updates, _ = one_update(jf.scale_by_fisher(damping), np.ones(()), np.ones(()), fisher=operator)
    np.testing.assert_allclose(updates, expected, rtol=50 * np.finfo(np.float64).eps)


def test_a_jax_array_is_a_run_time_number_and_is_not_clamped():
    """A run-time damping is not read: if it is negative, the result is NaN in every function, and has not converged."""
    operator = jf.exact_fisher(line)(np.ones(()), Y)
    for solve in (jf.solve, jax.jit(jf.solve)):
        solution, info = solve(operator, np.ones(()), jnp.array(-1.0))
        assert np.isnan(solution)
        assert not info.converged
    step = jf.natural_grad(log_prob, damping=jnp.array(-1.0))(PARAMS, X, Y)
    assert all(np.all(np.isnan(leaf)) for leaf in jax.tree.leaves(step))


@pytest.mark.parametrize("factor", [2, 2.0, np.float64(2), np.array(2.0), jnp.array(2.0)])
def test_any_real_scalar_multiplies_from_either_side(factor):
    operator = jf.exact_fisher(line)(np.ones(()), Y)
    for product in (factor * operator, operator * factor):
        assert re.match(r"Fisher\(exact, scaled mean over 5", repr(product))
        np.testing.assert_allclose(product.as_matrix(), [[2 * np.mean(Y**2)]], rtol=50 * np.finfo(np.float64).eps)


# --- stacks of objects from `vmap` or a loop ----------------------------------------------------------------------------------

VIEWS = {
    "scores": lambda f: f,
    "dense": jf.dense,
    "diagonal": jf.diagonal,
    "blocks": jf.block_diagonal,
    "Kronecker": jf.kronecker,
    "eigen-Kronecker": jf.eigen_kronecker,
    "low rank": lambda f: jf.low_rank(f, 2),
    "identity": lambda f: jf.scaled_identity(f, 2.0),
    "shifted": lambda f: f + jf.scaled_identity(f, 2.0),
    "sum": lambda f: f + jf.diagonal(f),
    "implicit": lambda f: jf.implicit_fisher(model)(PARAMS, X),
}
ASKED = {
    "trace": lambda f: f.trace(),
    "mv": lambda f: f.mv(GRADIENT),
    "as_matrix": lambda f: f.as_matrix(),
    "logdet": lambda f: f.logdet(0.1),
    "solve": lambda f: jf.solve(f, GRADIENT, 0.1),
    "diagonal": jf.diagonal,
}


@pytest.mark.parametrize("view", VIEWS)
def test_a_stack_of_operators_is_told_from_one(view):
    """`jax.vmap` and `jax.lax.scan` return one object that holds many; its numbers would be silently wrong."""
    mapped = lambda: jax.vmap(lambda c: c * VIEWS[view](fisher()))(jnp.ones(2))  # noqa: E731
    looped = lambda: jax.lax.scan(lambda _, c: (None, c * VIEWS[view](fisher())), None, jnp.ones(2))[1]  # noqa: E731
    for stack in (mapped, looped):
        for name, ask in ASKED.items():
            match = rf"{name}: this \w+ came out of jax.vmap .* stack of shape \(2,\).*jax.vmap\(lambda one"
            with pytest.raises(ValueError, match=match):
                jax.eval_shape(lambda stack=stack, ask=ask: ask(stack()))
    inside = jax.eval_shape(lambda: jax.vmap(lambda f: f.trace())(mapped()))
    assert inside.shape == (2,)


def test_a_stack_of_scores_is_told_from_one():
    stack = lambda: jax.vmap(lambda y: jf.scores(log_prob)(PARAMS, X, y))(jnp.stack([Y, Y]))  # noqa: E731
    for name, ask in [
        ("mv", lambda s: s.mv(GRADIENT)),
        ("squared_norms", lambda s: s.squared_norms()),
        ("gram", lambda s: s.gram()),
    ]:
        with pytest.raises(ValueError, match=rf"{name}\w*: this HeldScores came out of jax.vmap .* stack of shape \(2,\)"):
            jax.eval_shape(lambda ask=ask: ask(stack()))


def test_a_running_mean_that_a_loop_carries():
    """A sum of Fishers has another structure than its terms. JAX's error shows what to do instead, which then works."""

    def run(mean_of):
        return jax.eval_shape(
            lambda: jax.lax.scan(lambda f, _: (mean_of(f, jf.diagonal(fisher())), None), start(), jnp.arange(2))
        )

    start = lambda: jf.diagonal(fisher())  # noqa: E731
    with pytest.raises(TypeError, match=r"scaled mean.*must average their arrays.*jax\.tree\.map\(lambda mean, new"):
        run(lambda mean, new: 0.9 * mean + 0.1 * new)
    carried, _ = run(lambda mean, new: jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, mean, new))
    assert repr(carried) == repr(jax.eval_shape(start))
