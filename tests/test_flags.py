"""The public surface under JAX's debugging flags; strict promotion of dtypes and ranks is on in all tests.

`jax_debug_nans` and `jax_debug_infs` examine numbers, so they are on in `test_eager.py`, which computes some.
"""

import gc
import inspect

import jax
import jax.numpy as jnp
import pytest
import rooms
from calls import DISTRIBUTIONS, FISHERS, METHODS, NUMBERS, OTHERS, SCORES, everything, fisher, key

import jaxfisher as jf


def stumbles(calls, errors):
    """The names of calls that raise one of these errors, and what they say."""
    found = {}
    for name, call in calls.items():
        # While JAX checks for leaks, some of its versions search all objects for references to a trace, again and again. Any
        # leaked tracer is made in this call, so objects that existed before need not be searched.
        gc.freeze()
        try:
            jax.block_until_ready(jax.tree.leaves(call()))
        except errors as error:
            found[name] = str(error)
    return found


def abstractly(calls):
    """The calls, which are traced and neither compiled nor run, without those that read numbers or return none."""
    concrete = {
        "check_fisher",
        "check_laws",
        "check_laws of a family",
        "explain",
        "layers",
        *(name for name in calls if name[0] == "null_space"),
    }
    return {name: lambda f=f: jax.eval_shape(lambda: jax.tree.leaves(f())) for name, f in calls.items() if name not in concrete}


def test_every_public_function_is_in_the_table():
    # Decorators of classes compute nothing.
    types = {"array_fields", "family"} | {
        name for name in vars(jf) if inspect.isclass(getattr(jf, name)) and name not in {*DISTRIBUTIONS, "CG", "LSMR"}
    }
    public = {name for name, value in vars(jf).items() if callable(value) and not name.startswith("_")} - types
    called = {str(name).split(",")[0] for name in everything()}
    rooms = {
        f"{room}.{name}"
        for room in ("statistics", "geometry", "forecasts", "design")
        for name, value in vars(getattr(jf, room)).items()
        if inspect.isfunction(value) and not name.startswith("_")
    }
    assert len(rooms) > 30
    assert (public | rooms) - called == set()


PARTS = {
    jf.Operator: set(),
    jf.Scores: {
        *("bound", "centered", "gram_upper", "product", "rescaled", "restrict", "reweighted", "scaled_moment"),
        "squares_along",
    },
}
"""Methods for use inside other programs, which the table leaves out: they check, select parts, or return functions."""


@pytest.mark.parametrize(("owner", "called"), [(jf.Operator, METHODS), (jf.Scores, SCORES)])
def test_every_method_is_in_the_table(owner, called):
    public = {name for name, _ in inspect.getmembers(owner, inspect.isfunction) if not name.startswith("_")}
    assert public == {*called, *PARTS[owner]}


THEIRS = ("LSMR", "LSMR, least squares") if jax.__version_info__ >= (0, 11) else ()
"""Under JAX 0.12 `lineax.linear_solve` of any `FunctionLinearOperator` by LSMR leaks a tracer (lineax 0.1.1)."""


def test_no_tracer_is_left_behind_and_nothing_needs_float64():
    """JAX without float64, as most people run it. A request for float64 would warn, which pytest turns into an error.

    JAX keeps no trace while it checks for leaks: each call is traced anew.
    """
    kept = []
    leaky = lambda: jax.lax.map(lambda x: kept.append(x) or x, jnp.ones(2))  # noqa: E731
    wide = lambda: jnp.ones(2, jnp.float64)  # noqa: E731
    with jax.enable_x64(False):
        calls = abstractly(everything())
        theirs = {name: calls.pop(name) for name in THEIRS}
        assert stumbles({"wide": wide}, Exception)
        assert stumbles(theirs, Exception) == {}
        with jax.checking_leaks():
            assert stumbles({"leaky": leaky}, Exception)
            assert stumbles(calls, Exception) == {}


def test_without_jit():
    """No function needs a compiled program: loops run as Python loops."""
    calls = abstractly(everything(("scores",)))
    # Newton's steps with their derivatives are loops nested three deep, which take a minute when run eagerly.
    for name in ("geometry.geodesic", "statistics.likelihood_interval", "statistics.score_interval"):
        del calls[name]
    with jax.disable_jit():
        assert stumbles(calls, Exception) == {}


def test_parameters_and_data_in_bfloat16(monkeypatch):
    """Strict promotion of dtypes shows whether a number of another dtype enters."""
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), rooms.observed())
    monkeypatch.setattr(rooms, "observed", lambda: narrow)
    kept = (rooms.information, rooms.covariance, rooms.candidates)
    for made in kept:
        made.cache_clear()
    try:
        assert stumbles(abstractly(rooms.ROOMS), Exception) == {}
    finally:  # the cached traces are of these numbers
        for made in kept:
            made.cache_clear()


@pytest.mark.parametrize("implementation", ["rbg", "unsafe_rbg"])
def test_keys_of_any_implementation(implementation):
    """Functions that take a key take one of every kind, typed or not."""
    calls = {
        name: call
        for name, call in (FISHERS | NUMBERS | OTHERS).items()
        if name.split("_")[0] in ("sampled", "estimate", "nystrom")
    }
    assert len(calls) >= 5
    with jax.default_prng_impl(implementation):
        assert str(jax.random.key_impl(key())) == implementation
        assert stumbles(calls | {"raw": lambda: jf.nystrom(fisher(), jax.random.key_data(key()), 2)}, Exception) == {}
