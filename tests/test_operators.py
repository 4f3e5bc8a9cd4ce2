"""One law suite for every form of operator, seen to fail on broken ones; sums, multiples, restriction, lineax, one trace."""

import dataclasses
import pickle

import jax
import jax.flatten_util
import jax.numpy as jnp
import lineax
import numpy as np
import pytest
from problems import assert_close, class_sum_fisher, classifier, flat, reference

import jaxfisher as jf

LOG_PROB = jf.log_likelihood(classifier)


def forms():
    """Every form, with the dense matrix it must equal, from a loop over examples and classes."""
    params, x, y, weights, rows = reference()
    empirical, exact = rows.T @ rows / len(rows), class_sum_fisher(params, x)
    omega = np.asarray(weights) / np.sum(weights)
    F = jf.empirical_fisher(LOG_PROB)(params, x, y)
    E = jf.exact_fisher(classifier)(params, x)
    implicit = jf.implicit_fisher(classifier)(params, x)
    return {
        "scores, fewer rows": (F, empirical),
        "scores, more rows": (jf.exact_fisher(classifier)(params, jnp.tile(x, (2, 1))), exact),
        "scores, weighted": (
            jf.empirical_fisher(LOG_PROB)(params, x, y, weights=weights),
            rows.T @ (omega[:, None] * rows),
        ),
        "scores, streamed": (jf.empirical_fisher(LOG_PROB, batch_size=3)(params, x, y), empirical),
        "dense": (jf.dense(E), exact),
        "diagonal": (jf.diagonal(E), np.diag(np.diag(exact))),
        "implicit": (implicit, exact),
        "implicit, streamed": (
            jf.implicit_fisher(classifier, batch_size=2)(params, x, weights=weights),
            class_sum_fisher(params, x, omega),
        ),
        "multiple of scores": (0.25 * F, 0.25 * empirical),
        "multiple of implicit": (implicit * 3.0, 3 * exact),
        "sum of scores": (F + E, empirical + exact),
        "sum of dense": (jf.dense(F) + jf.dense(E), empirical + exact),
        "sum of diagonals": (jf.diagonal(F) + jf.diagonal(E), np.diag(np.diag(empirical + exact))),
        "sum of forms": (2 * (F + implicit) + jf.diagonal(E), 2 * (empirical + exact) + np.diag(np.diag(exact))),
    }


FORMS = forms()


def check_operator(F, dense, key, damping=0.1):
    """Every law, against the dense float64 matrix."""
    vectors = [F.spec.unravel(jax.random.normal(k, (F.size,), F.spec.dtype)) for k in jax.random.split(key, 2)]
    identity = np.eye(len(dense))

    @jax.jit
    def views(F, v, w):
        both = jax.tree.map(lambda a, b: 2 * a - b, v, w)
        return {
            "mv": flat_jax(F.mv(v)),
            "linear": flat_jax(F.mv(both)) - 2 * flat_jax(F.mv(v)) + flat_jax(F.mv(w)),
            "matrix": F.as_matrix(),
            "diagonal": flat_jax(F.diagonal()),
            "trace": F.trace(),
            "quadratic": F.quadratic(v),
            "solve": flat_jax(F.solve(v, damping)),
            "logdet": F.logdet(damping),
            "eigenvalues": F.eigvalsh(),
            "root": flat_jax(F.power_mv(v, -0.5, damping)),
        }

    v = flat(vectors[0])
    seen = views(F, *vectors)
    close = assert_close
    close(seen["matrix"], dense)
    close(seen["matrix"], np.asarray(seen["matrix"]).T, factor=1)
    close(seen["mv"], dense @ v)
    close(1 + seen["linear"], np.ones(len(v)), factor=1e3)
    close(seen["diagonal"], np.diag(dense))
    close(seen["trace"], np.trace(dense))
    close(seen["quadratic"], v @ dense @ v)
    assert seen["quadratic"] >= 0, "positive semi-definite"
    close(seen["solve"], np.linalg.solve(dense + damping * identity, v), factor=1e4)
    close(seen["logdet"], np.linalg.slogdet(dense + damping * identity)[1], factor=1e3)
    values, basis = np.linalg.eigh(dense)
    close(seen["eigenvalues"], values)
    assert np.all(np.diff(seen["eigenvalues"]) >= 0), "ascending"
    close(seen["root"], basis @ ((values + damping) ** -0.5 * (basis.T @ v)), factor=1e4)


def flat_jax(tree):
    return jax.flatten_util.ravel_pytree(tree)[0]


@pytest.mark.parametrize("name", FORMS)
def test_every_law_for_every_form(name, key):
    check_operator(*FORMS[name], key)


def broken_operators():
    """Dense operators, each wrong in one way."""
    good, dense = FORMS["dense"]

    def broken(**methods):
        return dataclasses.dataclass(frozen=True, repr=False)(type("Broken", (type(good),), methods))

    def make(**methods):
        cls = broken(**methods)
        jax.tree_util.register_dataclass(cls, data_fields=("matrix",), meta_fields=("spec", "provenance"))
        return cls(good.matrix, good.spec, good.provenance)

    matrix = good.matrix
    return {
        "scaled product": make(linearised=lambda self: lambda v: jax.tree.map(lambda leaf: 2 * leaf, v)),
        "not symmetric": dataclasses.replace(good, matrix=matrix.at[0, 1].add(0.01)),
        "indefinite": dataclasses.replace(good, matrix=matrix - 0.5 * jnp.eye(len(matrix))),
        "affine": make(linearised=lambda self: lambda v: jax.tree.map(lambda leaf: leaf + 1, v)),
        "wrong diagonal": make(diagonal=lambda self: good.spec.unravel(jnp.diagonal(self.matrix) + 1e-3)),
        "wrong trace": make(trace=lambda self: 1.001 * jnp.trace(self.matrix)),
        "half the form": make(_quadratic=lambda self, v: 0.5 * type(good)._quadratic(self, v)),
        "relative damping": make(_solve=lambda self, v, damping: type(good)._solve(self, v, damping * jnp.trace(self.matrix))),
        "sum of eigenvalues": make(logdet=lambda self, damping: jnp.sum(self.eigvalsh() + damping)),
        "descending": make(eigvalsh=lambda self: type(good).eigvalsh(self)[::-1]),
        "inverse for root": make(_power_mv=lambda self, v, power, damping: type(good)._power_mv(self, v, 2 * power, damping)),
    }, dense


@pytest.mark.parametrize("name", broken_operators()[0])
def test_the_laws_see_a_broken_operator(name, key):
    operators, dense = broken_operators()
    with pytest.raises(AssertionError):
        check_operator(operators[name], dense, key)


@pytest.mark.parametrize("name", FORMS)
def test_restriction_is_the_principal_submatrix(name):
    F, dense = FORMS[name]
    paths = F.spec.paths
    keep = tuple("hidden" in path for path in paths)
    index = np.flatnonzero(np.repeat(keep, F.spec.sizes))
    part = F.restrict(keep, jax.tree.structure({"hidden": {"b": 0, "w": 0}}))
    assert_close(jax.jit(lambda part: part.as_matrix())(part), dense[np.ix_(index, index)])
    v = {"hidden": {"b": jnp.ones(4), "w": jnp.ones((3, 4))}}
    assert_close(flat(jax.jit(lambda part, v: part.mv(v))(part, v)), dense[np.ix_(index, index)] @ np.ones(16))
    again = part.restrict((True, False), jax.tree.structure({"b": 0}))
    assert_close(flat(jax.jit(lambda part: part.diagonal())(again)), np.diag(dense)[index[:4]])


@pytest.mark.parametrize("name", FORMS)
def test_crosses_jit_with_one_trace(name):
    F, _ = FORMS[name]
    traces = []

    @jax.jit
    def product(F, v):
        traces.append(1)
        return F.mv(v)

    v = F.spec.zeros()
    product(F, v)
    product(jax.tree.map(lambda leaf: leaf * 2 if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, F), v)
    assert len(traces) == 1


def test_operators_made_anew_cause_no_second_trace():
    """Also streamed and implicit ones, which hold their functions: equal functions make equal static parts."""
    params, x, y, _, _ = reference()
    traces = []

    @jax.jit
    def trace_of(F):
        traces.append(type(F))
        return F.diagonal()

    for shift in (0.0, 0.1):
        moved = jax.tree.map(lambda leaf, shift=shift: leaf + shift, params)
        trace_of(jf.empirical_fisher(LOG_PROB, batch_size=3)(moved, x, y))
        trace_of(jf.implicit_fisher(classifier)(moved, x))
        trace_of(jf.exact_fisher(classifier)(moved, x))
    assert len(traces) == 3


def test_results_take_the_vector_s_dtype_and_matrices_the_statistics_dtype():
    F, _ = FORMS["scores, fewer rows"]
    v = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), F.spec.zeros())
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(F.mv(v)))
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(F.solve(v, 0.1)))
    assert F.as_matrix().dtype == F.trace().dtype == jnp.float64


def test_vmap_over_vectors_and_dampings(key):
    F, dense = FORMS["scores, fewer rows"]
    v = jax.random.normal(key, (3, F.size))
    dampings = jnp.array([0.01, 0.1, 1.0])
    solved = jax.jit(jax.vmap(lambda v, d: flat_jax(F.solve(F.spec.unravel(v), d))))(v, dampings)
    for row, vector, damping in zip(solved, np.asarray(v), np.asarray(dampings), strict=True):
        assert_close(row, np.linalg.solve(dense + damping * np.eye(F.size), vector), factor=1e5)


def test_gradient_through_a_solve_and_a_logdet():
    """Derivatives in the damping against the closed form: -v^T (F + d)^-2 v and tr (F + d)^-1."""
    for name in ("scores, fewer rows", "scores, more rows", "dense", "diagonal"):
        F, dense = FORMS[name]
        v = np.cos(np.arange(F.size))

        @jax.jit
        def both(d, F=F, v=v):
            return v @ flat_jax(F.solve(F.spec.unravel(jnp.asarray(v)), d)), F.logdet(d)

        inverse = np.linalg.inv(dense + 0.3 * np.eye(F.size))
        slopes = jax.jacrev(both)(0.3)
        np.testing.assert_allclose(slopes[0], -v @ inverse @ inverse @ v, rtol=1e-8, err_msg=name)
        np.testing.assert_allclose(slopes[1], np.trace(inverse), rtol=1e-8, err_msg=name)


def test_round_trips():
    for F, _ in FORMS.values():
        leaves, treedef = jax.tree.flatten(F)
        again = jax.tree.unflatten(treedef, leaves)
        assert repr(again) == repr(F) and again.spec == F.spec
    F, dense = FORMS["scores, weighted"]
    assert_close(pickle.loads(pickle.dumps(jf.dense(F))).as_matrix(), dense)


def test_as_lineax_solves_with_any_lineax_solver():
    F, dense = FORMS["implicit"]
    v = F.spec.unravel(jnp.cos(jnp.arange(F.size, dtype=float)))
    operator = jf.as_lineax(F)
    assert lineax.is_positive_semidefinite(operator)
    damped = operator + 0.1 * lineax.IdentityLinearOperator(jax.eval_shape(lambda: v))
    tagged = lineax.TaggedLinearOperator(damped, lineax.positive_semidefinite_tag)
    solution = lineax.linear_solve(tagged, v, lineax.CG(rtol=1e-12, atol=1e-12)).value
    np.testing.assert_allclose(flat(solution), np.linalg.solve(dense + 0.1 * np.eye(F.size), flat(v)), rtol=1e-8)
    assert_close(operator.as_matrix(), dense)
