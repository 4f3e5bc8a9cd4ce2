"""The program of a seed."""

import random
import re

import jax
import jax.numpy as jnp

from programs.pieces import PIECES, grow
from programs.writer import SIZES, Book, Leaves, Program, Value, Writer, new_scope

NARROW = (*(None,) * 14, "float32", "float32", "float32", "float32", "float16", "bfloat16")
"""Choices for the second dtype of a program beside float64; most programs have none."""
LINEAR = """
scaled outer_product_by_broadcasting divided_by_a_reduction reduction cumulative reshape transpose axes_of_length_one repeated
turned padded sliced dynamic_slice joined split gather scatter segments cast complex_product complex_matrix of_complex_values
meeting fourier_transform dense adapted tied einsum general_product bilinear convolution embedding custom_vjp custom_dense
vmap scan normalised_weight binary chosen
""".split()
"""Pieces that a product of factors can pass through unformed. Half of the programs consist of these alone, since factors
survive longest along a chain of them."""


def write(seed, only=None, steps=None):
    """The program of this seed, with ``steps`` pieces that have names in ``only``, if these are given."""
    return written(seed, only, steps)[0]


def written(seed, only=None, steps=None):
    """The program of `write`, and its `Book`, which counts accepted and refused pieces."""
    rng = random.Random(seed)
    book = Book(rng, rng.choice(NARROW), rng.choice((SIZES[0], *SIZES)))
    if only is None and rng.random() < 0.5:
        only, steps = LINEAR, steps or rng.randint(1, 4)
    real = book.dtype if book.dtype and rng.random() < 0.6 else "float64"
    size = lambda: rng.choice((1, 2, 3))  # noqa: E731
    x = (size(),) if rng.random() < 0.5 else (size(), size())
    z = tuple(size() for _ in range(rng.randint(0, 2)))
    data = ((x, real), (z, "float64"), ((rng.choice((2, 3)),), "int64"))
    lines = []

    def build(x, z, k):
        scope = {**new_scope(), "p": Leaves(book.leaves), "x": x, "z": z, "k": k}
        writer = Writer(book, scope, [Value(name, a.shape, a.dtype) for name, a in (("x", x), ("z", z))])
        writer.before_data = rng.random() < 0.7
        grow(writer, rng.randint(1, 3) * writer.before_data, only or PIECES)
        writer.before_data = False
        grow(writer, rng.randint(1, 2), ("meeting", "meeting", "convolution", "dense"))
        grow(writer, steps or rng.randint(1, 5), only or PIECES)
        for _ in range(20):
            if book.leaves and writer.own:
                break
            grow(writer, 1, only or ("dense",))
        density = writer.density()
        assert eval(f"({density})", scope).shape == ()
        lines.extend([*writer.lines, f"return ({density})"])
        return ()

    jax.eval_shape(build, *(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape, dtype in data))
    body = "\n".join(lines).replace("\n", "\n    ")
    # Casts are linear only up to the rounding of the narrowest dtype in the program, even if only gradients have it.
    named = [dtype for dtype in ("float32", "float16", "bfloat16") if re.search(rf"\b{dtype}\b", body)]
    eps = max(float(jnp.finfo(dtype).eps) for dtype in (book.dtype or "float64", *named))
    return Program(seed, f"def log_prob(p, x, z, k):\n    {body}\n", dict(book.leaves), data, eps, dict(book.shapes)), book
