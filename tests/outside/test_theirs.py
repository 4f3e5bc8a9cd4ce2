"""What a user's own repository would test of its extensions: each passes the laws by one call of `jf.check_laws`."""

import ast
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from theirs.family import Rayleigh
from theirs.form import PlusRankOne, plus_rank_one
from theirs.model import Mixed, Wind, WindSpeed
from theirs.solver import Elimination
from theirs.transformation import scale_by_sharpness
from theirs.view import Softened, soften

import jaxfisher as jf

# A user's code need not write out every promotion of ranks.
pytestmark = [pytest.mark.relaxed, pytest.mark.usefixtures("in_numpy")]
HERE = pathlib.Path(__file__).parent
PARAMS = {"b": jnp.array(0.2), "w": jnp.array([0.5, -0.3, 0.1])}
X = jnp.array([[1.0, 0.0, 2.0], [0.5, -1.0, 0.0], [0.0, 1.0, 1.0], [-1.0, 0.2, 0.4], [0.3, 0.3, -0.8]])
SPEEDS = jnp.array([0.8, 0.4, 1.0, 0.5, 0.3])


def test_only_public_names_are_used():
    for path in HERE.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
        names += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        assert not [name for name in names if name and name.startswith("jaxfisher.")], path
        of_jf = [node for node in nodes if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "jf"]
        assert not [node.attr for node in of_jf if node.attr.startswith("_") or not hasattr(jf, node.attr)], path


def test_a_family(key):
    laws = jf.check_laws(Rayleigh(jnp.array([0.4, -0.3])), key=key)
    assert laws.passed and not laws.undecided, laws


def test_a_form(key):
    F = jf.exact_fisher(Wind())(PARAMS, X)
    direction = jnp.array([0.3, -1.0, 0.5, 2.0])
    G = plus_rank_one(F, jnp.asarray(0.7), direction)
    laws = jf.check_laws(G, key=key, matrix=0.7 * np.eye(4) + np.outer(direction, direction))
    assert laws.passed and laws.undecided == ("(F + D)^-1 v",), laws
    part = G.restrict(lambda path: "w" in path)
    np.testing.assert_allclose(part.as_matrix(), G.as_matrix()[1:, 1:], rtol=1e-12)
    assert jf.check_laws(G + F, key=key).passed


def test_a_form_that_is_wrong(key):
    class Wrong(PlusRankOne):
        def trace(self):
            return self.level * self.spec.size

    wrong = jf.array_fields("level", "direction", repr=False)(Wrong)
    F = jf.exact_fisher(Wind())(PARAMS, X)
    G = jf.Operator(wrong(jnp.asarray(0.7), jnp.ones(4), F.spec), jf.Provenance("invented", 5))
    assert jf.check_laws(G, key=key).failed == ("the trace",)


def test_a_view(key):
    F = jf.exact_fisher(Wind())(PARAMS, X)
    dense = np.asarray(F)
    laws = jf.check_laws(soften(F), key=key, matrix=0.5 * dense + 0.5 * np.diag(np.diag(dense)))
    assert laws.passed, laws
    gradient = jax.grad(lambda p: -jnp.mean(jax.vmap(WindSpeed(), (None, 0, 0))(p, X, SPEEDS)))(PARAMS)
    d = jf.natural_grad(WindSpeed(), jf.exact_fisher(Wind()), damping=0.1, view=Softened(1.0))(PARAMS, X, SPEEDS)
    expected = np.linalg.solve(dense + 0.1 * np.eye(4), ravel_pytree(gradient)[0])
    np.testing.assert_allclose(ravel_pytree(d)[0], expected, rtol=1e-10)


def test_a_solver(key):
    laws = jf.check_laws(jf.exact_fisher(Wind())(PARAMS, X), key=key, solver=Elimination())
    assert laws.passed and laws.checks[-1].name == "the solver has converged", laws


def test_a_solver_that_is_wrong(key):
    def half(fisher, v, damping):
        x, info = Elimination()(fisher, v, damping)
        return jax.tree.map(lambda leaf: leaf / 2, x), info

    laws = jf.check_laws(jf.exact_fisher(Wind())(PARAMS, X), key=key, solver=half)
    assert laws.failed == ("the solver's residual, as reported",)


def test_a_model_and_a_log_density(key):
    assert jf.check_fisher(Wind())(PARAMS, key, X).passed
    ours, theirs = (jf.empirical_fisher(f)(PARAMS, X, SPEEDS) for f in (jf.log_likelihood(Wind()), WindSpeed()))
    np.testing.assert_allclose(ours.as_matrix(), theirs.as_matrix(), rtol=1e-12)


def test_a_fisher_function(key):
    F = Mixed(Wind())(PARAMS, X, SPEEDS)
    assert jf.check_laws(F, key=key).passed
    d = jf.natural_grad(WindSpeed(), Mixed(Wind()), damping=0.1)(PARAMS, X, SPEEDS)
    gradient = jax.grad(lambda p: -jnp.mean(jax.vmap(WindSpeed(), (None, 0, 0))(p, X, SPEEDS)))(PARAMS)
    expected = np.linalg.solve(np.asarray(F) + 0.1 * np.eye(4), ravel_pytree(gradient)[0])
    np.testing.assert_allclose(ravel_pytree(d)[0], expected, rtol=1e-10)


@pytest.mark.parametrize("mask", [{"b": True, "w": True}, {"b": False, "w": True}])
def test_a_transformation(mask):
    F = jf.exact_fisher(Wind())(PARAMS, X)
    opt = optax.masked(scale_by_sharpness(), mask)
    updates, _ = opt.update(PARAMS, opt.init(PARAMS), PARAMS, fisher=F)
    diagonal = np.diag(np.asarray(F))
    mean = np.mean(diagonal if mask["b"] else diagonal[1:])
    np.testing.assert_allclose(updates["w"], PARAMS["w"] / mean, rtol=1e-12)
    np.testing.assert_allclose(updates["b"], PARAMS["b"] / (mean if mask["b"] else 1), rtol=1e-12)
