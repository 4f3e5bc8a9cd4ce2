"""Frozen dataclasses as pytrees."""

import jax
import jax.numpy as jnp
import pytest

import jaxfisher as jf


@jf.array_fields("value")
class Doubled:
    """Twice its value."""

    value: jax.Array
    unit: str = "nats"

    def number(self):
        return 2 * self.value


@jf.array_fields("value")
class Tripled:
    """Three times its value; a class with the same fields."""

    value: jax.Array
    unit: str = "nats"

    def number(self):
        return 3 * self.value


def test_classes_of_the_same_fields_are_different_structures():
    """Otherwise a program compiled for one class would run for the other, as with `register_dataclass` in JAX 0.10."""
    assert jax.tree.structure(Doubled(1.0)) != jax.tree.structure(Tripled(1.0))
    program = jax.jit(lambda held: held.number())
    assert [program(cls(jnp.float32(1))) for cls in (Doubled, Tripled)] == [2, 3]


def test_static_fields_are_part_of_the_structure_and_arrays_are_leaves():
    assert jax.tree.structure(Doubled(1.0)) == jax.tree.structure(Doubled(2.0)) != jax.tree.structure(Doubled(1.0, "bits"))
    ((path, leaf),) = jax.tree_util.tree_leaves_with_path(Doubled(1.5))
    assert (jax.tree_util.keystr(path), leaf) == (".value", 1.5)
    assert jax.tree.map(lambda leaf: leaf + 1, Doubled(1.5, "bits")) == Doubled(2.5, "bits")


def test_a_name_that_is_no_field():
    with pytest.raises(TypeError, match="Wrong has no field `valeu`"):
        jf.array_fields("valeu")(type("Wrong", (), {"__annotations__": {"value": float}}))
