"""The library's scores of sixty fixed random programs are per-example gradients. `random_programs.py` runs more programs."""

import ast

import jax
import jax.numpy as jnp
import pytest
import random_programs
from programs import compare, write
from programs.pieces import PIECES
from programs.reduce import smallest
from programs.writing import written

import jaxfisher as jf

pytestmark = pytest.mark.relaxed

FIXED = range(60)
NO_GRADIENT = frozenset({33})
"""Seeds of programs that JAX cannot differentiate, or whose gradients are not finite."""


@pytest.mark.parametrize("seed", FIXED)
def test_scores_of_a_random_program(seed):
    try:
        program, faults = random_programs.failure(seed)
    except compare.Skipped:
        assert seed in NO_GRADIENT
        return
    assert not faults, "\n".join([*map(str, faults), str(program)])


@pytest.mark.parametrize("name", PIECES)
def test_every_kind_of_piece_is_written(name):
    """Each kind of piece writes statements that JAX accepts and that are kept."""
    books = [written(seed, only=(name, "unary", "complex_product"), steps=5)[1] for seed in range(6)]
    assert sum(book.accepted.get(name, 0) for book in books) >= 2, books


def test_a_seed_gives_one_program():
    first, again = write(7), write(7)
    assert first == again
    assert first != write(8)
    assert all(map(jnp.array_equal, jax.tree.leaves(first.params()), jax.tree.leaves(again.params())))


def frozen(p, x, z, k):
    """The second use of the weight has no gradient."""
    return -jnp.sum((jnp.tanh(x @ p["w1"]) @ jax.lax.stop_gradient(p["w1"]).T - x) ** 2)


SOURCE = """
def log_prob(p, x, z, k):
    v1 = jnp.tanh(x @ p['w1'])
    v2 = jnp.sort(v1) * jnp.sum(p['w2'])
    return -jnp.sum((v1 @ p['w1'].T - x) ** 2) + jnp.sum(v2) * 0.0
"""
PROGRAM = write(0).__class__(
    3,
    SOURCE,
    {"w1": ((3, 2), "float64"), "w2": ((2,), "float64")},
    (((3,), "float64"), ((), "float64"), ((2,), "int64")),
    2.2e-16,
    {},
)


@pytest.mark.parametrize("way", [way for way in compare.WAYS if way != "kronecker"])
def test_the_comparison_sees_one_lost_use_of_a_leaf(way, monkeypatch):
    assert compare.compare(PROGRAM, ways=(way,)) == []
    make = compare._MAKERS[way]
    monkeypatch.setitem(compare._MAKERS, way, lambda log_prob: make(frozen))
    found = {fault.where for fault in compare.compare(PROGRAM, ways=(way,))}
    wrong = {
        f"{way} {name}" for name in ("as_matrix of w1", "gram", "mv", "rmv of w1", "diagonal of w1", "second_moment of w1")
    }
    assert len(found & wrong) >= (2 if way.startswith("streamed") else 6)


def test_the_comparison_sees_a_wrong_block(monkeypatch):
    assert compare.compare(PROGRAM, ways=("kronecker",)) == []
    monkeypatch.setattr(compare.jf, "empirical_fisher", lambda _, make=jf.empirical_fisher: make(frozen))
    assert "EKFAC trace" in str(compare.compare(PROGRAM, ways=("kronecker",))[0])


def test_a_program_is_made_smaller():
    small = smallest(PROGRAM, lambda program: "jnp.sort" in program.source, seconds=20.0)
    assert len(ast.parse(small.source).body[0].body) <= 2, small.source
