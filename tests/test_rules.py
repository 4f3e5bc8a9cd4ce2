"""The law of every rule of the engine: the terms that it returns, once formed, are the primitive of the formed operands.

Every rule needs a generator of equations here; a rule without one fails. The operands are random sums of terms, formed by
NumPy's einsum in double precision, without the engine. Their factors have own, shared, contracted, repeated and length-one
axes, positions in a table and windows of a convolution, in every class of dtypes.
"""

import dataclasses
import itertools
import math

import catalogue
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from models import compiled
from problems import assert_close, flat
from programs.evaluate import evaluated

import jaxfisher as jf
from jaxfisher._engine import parts, rules, terms
from jaxfisher._engine.axes import Axis, dim
from jaxfisher._engine.forms import Leaf
from jaxfisher._engine.machine import Output
from jaxfisher._engine.program import flatten
from jaxfisher._engine.rule import EXAMPLE, Operand, Rule, each
from jaxfisher._engine.rules import RULES
from jaxfisher._engine.terms import Factor, Term, Unformed
from jaxfisher._engine.windows import Windows

REAL = ("float64", "float32", "bfloat16", "float16")
COMPLEX = ("complex128", "complex64")
CASES = 24

pytestmark = [
    pytest.mark.relaxed,  # factors differ in their dtypes, as casts on the way to a gradient are put off
    pytest.mark.usefixtures("in_numpy"),
]

EPS = {"bfloat16": 2**-7, "float16": 2**-10, "float32": 2**-23, "complex64": 2**-23}
"""The relative precision of dtypes; other dtypes have that of float64."""


# --- random terms ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Draw:
    """A source of random choices, numbers and terms; ``eps`` is the precision of the narrowest dtype that it has drawn."""

    rng: np.random.Generator
    eps: float = 2.0**-52

    def one_of(self, choices):
        return choices[self.rng.integers(len(choices))]

    def maybe(self, share=0.5):
        return bool(self.rng.random() < share)

    def dtype(self, choices=REAL):
        name = self.one_of(choices)
        self.eps = max(self.eps, EPS.get(name, 2.0**-52))
        return jnp.dtype(name)

    def shape(self, least=0, most=3, sizes=(1, 2, 3, 4, 6)):
        return tuple(int(self.one_of(sizes)) for _ in range(self.rng.integers(least, most + 1)))

    def array(self, shape, dtype):
        numbers = self.rng.uniform(0.5, 1.5, shape) * self.rng.choice([-1, 1], shape)
        if np.issubdtype(dtype, np.complexfloating):
            numbers = numbers + 1j * self.rng.uniform(0.5, 1.5, shape)
        return jnp.asarray(numbers, dtype)

    def value(self, shape, dtype, most=2):
        """An operand whose value has this shape: a sum of terms, or an ordinary array."""
        if self.maybe(0.2):
            return Operand(self.array(shape, dtype), self.one_of((0, EXAMPLE)))
        found = tuple(self.term(shape, dtype) for _ in range(self.rng.integers(1, most + 1)))
        if len(found) == 1 and self.maybe():
            found = (self.plain(shape, dtype),)
        formed = as_dtype(dense(found, shape), dtype)
        return Operand(Unformed(found, lambda: formed), EXAMPLE)

    def outer(self, shape, dtype):
        """An operand that is a sum of outer products with real factors, like the gradient of a weight."""
        axes, shared = [Axis(size) for size in shape], (Axis(2),) * self.maybe()
        cut, own = self.rng.integers(len(shape) + 1), self.dtype(REAL)
        sides = ((*shared, *axes[:cut]), (*shared, *axes[cut:]))
        factors = (Factor(self.array([axis.size for axis in side], own), side, EXAMPLE) for side in sides)
        term = Term(tuple(factors), tuple(map(dim, axes)))
        return Operand(Unformed((term,), lambda: as_dtype(dense((term,), shape), dtype)), EXAMPLE)

    def plain(self, shape, dtype):
        """A term with a single factor, some of whose axes may be repeated or contracted."""
        return self.term(shape, dtype, factors=1, hot=False)

    def term(self, shape, dtype, factors=None, hot=True):
        """A term with up to three factors whose value has this shape. For a real dtype all factors are real."""
        dims = [self.split(size) for size in shape]
        kept = [axis for axes in dims for axis in axes]
        pool = [*kept, *(Axis(int(self.one_of((1, 2, 3)))) for _ in range(self.rng.integers(0, 3)))]
        made = []
        wide = np.issubdtype(dtype, np.complexfloating)
        if hot and kept and self.maybe(0.2):
            axis = self.one_of(kept)
            over = tuple(a for a in pool if a is not axis and self.maybe(0.5))
            positions = jnp.asarray(self.rng.integers(0, axis.size, [a.size for a in over]), jnp.int32)
            place = int(positions) if not over else None
            made.append(Factor(positions, over, self.one_of((0, EXAMPLE)), hot=axis, place=place))
            pool.remove(axis)
        for _ in range(factors or self.rng.integers(1, 4)):
            axes = [axis for axis in pool if self.maybe(0.7)]
            self.rng.shuffle(axes)
            own = self.dtype(COMPLEX if wide and self.maybe() else REAL) if self.maybe(0.3) else dtype
            made.append(Factor(self.array([axis.size for axis in axes], own), tuple(axes), self.one_of((0, EXAMPLE))))
        return Term(tuple(made), tuple(map(tuple, dims)))

    def table(self, shape):
        """The shape of a table, perhaps with more rows than a narrow integer can count, and the axis of its rows."""
        along = int(self.rng.integers(len(shape)))
        return (*shape[:along], 300 if self.maybe() else shape[along], *shape[along + 1 :]), along

    def indices(self, size, shape):
        """Positions along an axis of this size, of any integer dtype; some are out of range."""
        dtype = jnp.dtype(self.one_of(("int8", "uint8") if size > 255 else ("int16", "int32", "uint32", "int64")))
        known = jnp.iinfo(dtype)
        return jnp.asarray(self.rng.integers(max(-2, known.min), min(size + 2, known.max + 1), shape), dtype)

    def split(self, size):
        """The axes of a dimension: none if its length is one, else one or two."""
        cuts = [d for d in range(2, size) if size % d == 0]
        if cuts and self.maybe(0.3):
            first = self.one_of(cuts)
            return [Axis(first), Axis(size // first)]
        return list(dim(Axis(size)))


def as_dtype(array, dtype):
    """A complex array converted to a dtype; for a real dtype, without its imaginary part."""
    return jnp.asarray(array if np.issubdtype(dtype, np.complexfloating) else array.real, dtype)


def dense(found, shape):
    """The value of a sum of terms, by an einsum in double precision over all axes at once."""
    total = np.zeros(shape, complex)
    for term in found:
        axes = list(dict.fromkeys(a for f in term.factors for a in f.over))
        kept = [axis for made in term.dims for axis in made]
        axes += [axis for axis in kept if axis not in axes]
        letters = {axis: chr(ord("a") + i) for i, axis in enumerate(axes)}
        operands, names = [np.ones([axis.size for axis in kept])], ["".join(letters[axis] for axis in kept)]
        for factor in term.factors:
            array = factor.array.array() if isinstance(factor.array, Windows) else factor.array
            array = np.asarray(array).astype(complex)
            if factor.hot is not None:
                array = np.eye(factor.hot.size)[array.real.astype(int)]
            operands.append(array)
            names.append("".join(letters[axis] for axis in factor.over))
        # The array of ones has all kept axes, for those that no factor has.
        total = total + np.einsum(",".join(names) + "->" + names[0], *operands).reshape(shape)
    return total


# --- equations of every primitive --------------------------------------------------------------------------------------------


def _one(draw, function, shape=None, dtypes=REAL + COMPLEX):
    """A function with one operand, and that operand."""
    return function, [draw.value(draw.shape() if shape is None else shape, draw.dtype(dtypes))]


def _elementwise(function):
    def made(draw):
        dtype, shape = draw.dtype(REAL + COMPLEX), draw.shape(1)
        # A dimension of length one meets any length, and, where JAX allows it, a number any array.
        other = tuple(1 if draw.maybe(0.2) else size for size in shape)
        operands = [draw.value(shape, dtype, most=1), draw.value(other, dtype, most=1)]
        if draw.maybe(0.25):
            operands[1] = Operand(draw.array((), dtype), draw.one_of((0, EXAMPLE)))
        return function, operands if function is lax.div else operands[:: draw.one_of((1, -1))]

    return made


def _add_any(draw):
    dtype, shape = draw.dtype(REAL + COMPLEX), draw.shape()
    # Cotangents of two uses of a value are added with the primitive that is meant.
    return lambda x, y: jax.vjp(lambda z: (z, z), x)[1]((x, y))[0], [draw.value(shape, dtype), draw.value(shape, dtype)]


def _dot(draw):
    dtype = draw.dtype(REAL + COMPLEX)
    by_matrix, stacked = draw.maybe(0.6), draw.maybe()
    batch = draw.shape(1, 1, (2, 3)) if by_matrix and stacked else draw.shape(0, draw.one_of((0, 0, 1)), (1, 2))
    over = draw.shape(int(by_matrix), 2, (1, 2, 3, 3))
    left, right = draw.shape(0, 1), draw.shape(0, 1)
    shapes = [(*batch, *over, *left), (*right, *over, *batch)]
    places = [range(len(batch)), range(len(right) + len(over), len(shapes[1]))]
    sums = [range(len(batch), len(batch) + len(over)), range(len(right), len(right) + len(over))]
    operands = [draw.value(shape, dtype, most=1) for shape in shapes]
    if by_matrix:
        # A matrix that is the same for every example, perhaps of a dtype that holds more than the factors'.
        side = draw.one_of((0, 1))
        operands[side] = Operand(draw.array(shapes[side], dtype), 0)
        operands[1 - side] = draw.outer(shapes[1 - side], dtype)
    numbers = (tuple(map(tuple, sums)), tuple(map(tuple, places)))
    return lambda x, y: lax.dot_general(x, y, numbers, precision="highest", preferred_element_type=dtype), operands


def _convolution(draw):
    dtype, spatial = draw.dtype(REAL), draw.one_of((1, 2))
    groups, batches = draw.one_of(((1, 1), (2, 1), (1, 2)))
    image = (2 * batches, 2 * groups, *(draw.one_of((4, 5)) for _ in range(spatial)))
    window = (2 * groups * batches, 2, *(draw.one_of((1, 2, 3)) for _ in range(spatial)))
    sides = "HW"[:spatial]
    names = draw.one_of((("NC" + sides, "OI" + sides, "NC" + sides), ("N" + sides + "C", sides + "IO", "N" + sides + "C")))
    numbers = lax.conv_dimension_numbers(image, window, ("NC" + sides, "OI" + sides, "NC" + sides))
    numbers = lax.conv_dimension_numbers(_permuted(image, names[0], "NC"), _permuted(window, names[1], "OI"), names)
    options = {
        "window_strides": [int(draw.one_of((1, 2))) for _ in range(spatial)],
        "padding": [(int(draw.one_of((0, 1))), int(draw.one_of((0, 2)))) for _ in range(spatial)],
        "lhs_dilation": [int(draw.one_of((1, 2))) for _ in range(spatial)],
        "rhs_dilation": [int(draw.one_of((1, 2))) for _ in range(spatial)],
        "dimension_numbers": numbers,
        "feature_group_count": groups,
        "batch_group_count": batches,
        "precision": "highest",
    }
    arrays = [draw.array(_permuted(image, names[0], "NC"), dtype), draw.array(_permuted(window, names[1], "OI"), dtype)]
    return lambda x, y: lax.conv_general_dilated(x, y, **options), [Operand(array, EXAMPLE) for array in arrays]


def _permuted(shape, spec, first):
    """A shape given with these two letters first, in the order of a specification."""
    order = first + "HW"[: len(shape) - 2]
    return tuple(shape[order.index(letter)] for letter in spec)


def _scatter_add(draw):
    dtype = draw.dtype(REAL + COMPLEX)
    shape, along = draw.table(draw.shape(1, 3, (1, 2, 3, 3)))
    positions = draw.shape(0, 2, (1, 2, 3))
    rest = [size for i, size in enumerate(shape) if i != along]
    numbers = lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(len(positions), len(positions) + len(rest))),
        inserted_window_dims=(along,),
        scatter_dims_to_operand_dims=(along,),
    )
    mode = draw.one_of((lax.GatherScatterMode.CLIP, lax.GatherScatterMode.FILL_OR_DROP))
    table = draw.value(shape, dtype) if draw.maybe() else zeros(shape, dtype)
    operands = [
        table,
        Operand(draw.indices(shape[along], (*positions, 1)), EXAMPLE),
        Operand(draw.array((*positions, *rest), dtype), EXAMPLE),
    ]
    return lambda x, i, u: lax.scatter_add(x, i, u, numbers, mode=mode), operands


def zeros(shape, dtype):
    """Zero as a sum of no terms, as it is before anything is added to it."""
    return Operand(Unformed((), lambda: jnp.zeros(shape, dtype)), 0)


def _update_slice(draw):
    dtype, (shape, along) = draw.dtype(REAL + COMPLEX), draw.table(draw.shape(1, 3, (1, 2, 3, 3)))
    update = tuple(1 if i == along or draw.maybe(0.1) else size for i, size in enumerate(shape))
    starts = [Operand(draw.indices(size, ()), EXAMPLE) for size in shape]
    starts = [dataclasses.replace(start, value=start.value.astype(starts[along].value.dtype)) for start in starts]
    function = lambda x, u, *s: lax.dynamic_update_slice_p.bind(x, u, *s)  # noqa: E731
    return function, [zeros(shape, dtype), Operand(draw.array(update, dtype), EXAMPLE), *starts]


def _broadcast(draw):
    shape = draw.shape(0, 4)
    source = [(i, size if draw.maybe(0.7) else 1) for i, size in enumerate(shape) if draw.maybe()]
    made = draw.value(tuple(size for _, size in source), draw.dtype(REAL + COMPLEX))
    return lambda x: lax.broadcast_in_dim(x, shape, [i for i, _ in source]), [made]


def _transpose(draw):
    shape = draw.shape(2, 4)
    permutation = draw.rng.permutation(len(shape)).tolist()
    return _one(draw, lambda x: lax.transpose_p.bind(x, permutation=tuple(permutation)), shape)


def _reshape(draw):
    shape = draw.shape(0, 4)
    flat, new = [d for size in shape for d in _primes(size)], []
    while flat:
        count = draw.rng.integers(1, len(flat) + 1)
        new.append(math.prod(flat[:count]))
        flat = flat[count:]
    for _ in range(draw.rng.integers(0, 3)):
        new.insert(draw.rng.integers(len(new) + 1), 1)
    # Where nothing changes, JAX leaves the operation out.
    new = new if tuple(new) != shape else [1, *new]
    return _one(draw, lambda x: lax.reshape(x, new), shape)


def _primes(size):
    return [2, *_primes(size // 2)] if size % 2 == 0 else [size] if size > 1 else []


def _reduce_sum(draw):
    shape = draw.shape(1, 4)
    axes = [i for i in range(len(shape)) if draw.maybe()] or [0]
    return _one(draw, lambda x: lax.reduce_sum_p.bind(x, axes=tuple(axes), out_sharding=None), shape)


def _cast(draw):
    old = draw.dtype(REAL + COMPLEX)
    new = jnp.dtype(draw.one_of((*REAL, *COMPLEX, "int32", "bool", "float8_e4m3fn", "float8_e5m2")))
    draw.eps = max(draw.eps, EPS.get(new.name, 0))
    new = new if new != old else jnp.dtype("float8_e5m2")
    cast = lambda x: lax.convert_element_type_p.bind(x, new_dtype=new, weak_type=False, sharding=None)  # noqa: E731
    return cast, [draw.value(draw.shape(), old)]


def _pad(draw):
    shape, dtype = draw.shape(1), draw.dtype(REAL + COMPLEX)
    config = [(int(draw.one_of((0, 0, 1, 3, -1))), int(draw.one_of((0, 0, 2, -1))), int(draw.one_of((0, 0, 1)))) for _ in shape]
    config = [c if size + c[0] + c[1] > 0 else (0, 0, 0) for c, size in zip(config, shape, strict=True)]
    filler = Operand(np.asarray(0 if draw.maybe(0.8) else 1, dtype), 0)
    filler = dataclasses.replace(filler, is_zero=not filler.value)
    return lambda x, f: lax.pad(x, f, config), [draw.value(shape, dtype), filler]


def _concatenate(draw):
    shape, dtype = draw.shape(1), draw.dtype(REAL + COMPLEX)
    axis = int(draw.rng.integers(len(shape)))
    shapes = [tuple(int(draw.one_of((1, 2, 3))) if i == axis else s for i, s in enumerate(shape)) for _ in range(2)]
    return lambda *x: lax.concatenate(x, axis), [draw.value(shape, dtype) for shape in shapes]


def _split(draw):
    shape = (*draw.shape(0, 1), int(draw.one_of((2, 3, 4, 6))), *draw.shape(0, 1))
    axis = int(draw.one_of([i for i, size in enumerate(shape) if size > 1]))
    first = int(draw.rng.integers(1, shape[axis]))
    return _one(draw, lambda x: lax.split(x, (first, shape[axis] - first), axis), shape)


def _reverse(draw):
    shape = draw.shape(1)
    dimensions = [i for i in range(len(shape)) if draw.maybe()] or [0]
    return _one(draw, lambda x: lax.rev(x, dimensions), shape)


def _sharding(draw):
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("x",))
    here = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return _one(draw, lambda x: lax.with_sharding_constraint(x, here))


EQUATIONS = {
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "scatter-add": _scatter_add,
    "dynamic_update_slice": _update_slice,
    "broadcast_in_dim": _broadcast,
    "add_any": _add_any,
    "mul": _elementwise(lax.mul),
    "div": _elementwise(lax.div),
    "neg": lambda draw: _one(draw, lax.neg),
    "transpose": _transpose,
    "reshape": _reshape,
    "reduce_sum": _reduce_sum,
    "convert_element_type": _cast,
    "real": lambda draw: _one(draw, lax.real, dtypes=COMPLEX),
    "imag": lambda draw: _one(draw, lax.imag, dtypes=COMPLEX),
    "pad": _pad,
    "concatenate": _concatenate,
    "split": _split,
    "rev": _reverse,
    "sharding_constraint": _sharding,
}
"""For every rule a function from a `Draw` to a function that uses the rule's primitive, and to operands of that function."""


def equation_of(name, function, operands):
    """The equation of this primitive in the traced function; None if there is none, or if JAX refuses the operands."""
    shapes = [jax.ShapeDtypeStruct(operand.array().shape, operand.array().dtype) for operand in operands]
    try:
        program = flatten(jax.make_jaxpr(function)(*shapes))
    except (TypeError, ValueError):
        return None
    return next((equation for equation in program.equations if equation.primitive.name == name), None)


def check(rule, name, seed):
    """Draw an equation with this seed. Return whether the rule accepts it; if it does, check the result."""
    draw = Draw(np.random.default_rng([seed, *name.encode()]))
    function, operands = EQUATIONS[name](draw)
    equation = equation_of(name, function, operands)
    made = None if equation is None else rule(equation, operands)
    if made is None:
        return False
    formed = equation.bind([operand.array() for operand in operands])
    for terms_made, right in zip(made, formed, strict=True):
        wrong = np.abs(dense(terms_made, right.shape) - np.asarray(right).astype(complex)).max(initial=0.0)
        size = max(1.0, *(np.abs(np.asarray(operand.array()).astype(complex)).max(initial=0.0) for operand in operands))
        # The factor of 2000 allows for the number of rounded products in a sum.
        assert wrong <= 2000 * draw.eps * size**2, f"{name}, seed {seed}: off by {wrong:.3g}\n{equation.source}"
    return True


def test_every_rule_has_equations():
    assert set(EQUATIONS) == set(RULES)


@pytest.mark.parametrize("name", sorted(RULES))
def test_terms_after_the_rule_are_the_primitive_of_the_value(name):
    taken = sum(check(RULES[name], name, seed) for seed in range(CASES))
    assert taken >= 4, f"{taken} of {CASES} equations were taken: the generator does not reach the rule"


# --- the law fails for broken rules ------------------------------------------------------------------------------------------


def _inverse_of_each_term(equation, operands):
    """A former bug: division by a sum as the sum of divisions by its terms."""
    value, by = operands
    (divisor,) = by.terms()
    factors = tuple(dataclasses.replace(f, array=1 / f.array) for f in divisor.factors if f.plain is not None)
    made = [terms.multiply(term, dataclasses.replace(divisor, factors=factors)) for term in value.terms()]
    return None if None in made else (tuple(made),)


@pytest.mark.parametrize(
    "name, broken",
    [
        ("div", dataclasses.replace(RULES["div"], apply=_inverse_of_each_term)),
        ("convert_element_type", lambda equation, operands: RULES["convert_element_type"].apply(equation, operands)),
        ("mul", dataclasses.replace(RULES["mul"], apply=lambda _, o: ((*o[0].terms(), *o[1].terms()),))),
        ("transpose", dataclasses.replace(RULES["transpose"], apply=lambda _, o: (o[0].terms(),))),
        ("neg", dataclasses.replace(RULES["neg"], apply=lambda _, o: (o[0].terms(),))),
        ("real", dataclasses.replace(RULES["real"], apply=lambda _, o: (o[0].terms(),))),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_law_sees_a_rule_applied_where_it_does_not_hold(name, broken):
    with pytest.raises(AssertionError, match="off by"):
        for seed in range(10 * CASES):
            check(broken, name, seed)


def test_the_law_sees_a_matrix_cast_to_the_dtype_of_a_factor(monkeypatch):
    """A former bug: a complex matrix lost its imaginary part."""
    contract = terms.contract

    def broken(term, dims, matrix, over, *rest):
        gone = [axis for i in dims for axis in term.dims[i]]
        narrow = [f.array.dtype for f in term.factors if any(axis in f.over for axis in gone)]
        return contract(term, dims, as_dtype(np.asarray(matrix), narrow[0]) if narrow else matrix, over, *rest)

    monkeypatch.setattr(rules, "contract", broken)
    with pytest.raises(AssertionError, match="off by"):
        for seed in range(10 * CASES):
            check(RULES["dot_general"], "dot_general", seed)


def test_a_product_of_one_value_in_two_arrangements_is_no_diagonal():
    """A column times a row of the same factor is an outer product, since the axes are in different dimensions."""
    axis = Axis(3)
    factor = Factor(jnp.asarray([1.0, 2.0, 3.0]), (axis,), EXAMPLE)
    column, row = Term((factor,), ((axis,), ())), Term((factor,), ((), (axis,)))
    product = terms.multiply(column, row)
    np.testing.assert_array_equal(dense((product,), (3, 3)).real, np.outer([1, 2, 3], [1, 2, 3]))


# --- from terms to the forms of a leaf ---------------------------------------------------------------------------------------


def test_the_forms_of_a_leaf_are_its_terms():
    """The gradient that the forms represent is the value of the terms, for any terms."""
    for seed in range(CASES):
        draw = Draw(np.random.default_rng(seed))
        shape = draw.shape(0, 3)
        found = tuple(draw.term(shape, jnp.dtype("float64")) for _ in range(draw.rng.integers(1, 4)))
        right = dense(found, shape).real
        formed = jnp.asarray(right)
        output = Output(Unformed(found, lambda formed=formed: formed), EXAMPLE, None)
        check_forms(output, shape, right, 100 * draw.eps, f"seed {seed}")


def check_forms(output, shape, right, tolerance, where):
    made = parts.leaf_parts(output, shape, jnp.dtype("float64"))
    forms = jax.tree.map(lambda x: x[None, None], tuple(part.form for part in made.parts))
    gradient = Leaf(forms, shape, jnp.dtype("float64"), 1, 1).gradient()[0, 0]
    size = max(1.0, np.abs(right).max(initial=0.0))
    np.testing.assert_allclose(gradient, right, rtol=0, atol=tolerance * size, err_msg=where)


def test_the_forms_of_a_sum_of_a_convolution_are_its_terms():
    """A kernel may be shared along any axis of what the rule returns, such as the groups of the convolution."""
    for seed in range(CASES):
        draw = Draw(np.random.default_rng(seed))
        function, operands = _convolution(draw)
        ((found,),) = RULES["conv_general_dilated"](equation_of("conv_general_dilated", function, operands), operands)
        axes = [axis for axes in found.dims for axis in axes]
        axes.remove(draw.one_of(axes))
        shape = tuple(axis.size for axis in axes)
        summed = (Term(found.factors, tuple(map(dim, axes))),)
        right = dense(summed, shape).real
        output = Output(Unformed(summed, lambda right=right: jnp.asarray(right)), EXAMPLE, None)
        check_forms(output, shape, right, 2000 * draw.eps, f"seed {seed}")


# --- a bias joined to its weight ---------------------------------------------------------------------------------------------


def _head(hidden):
    return jnp.sum(jnp.tanh(hidden))


def _loop(step, xs, like):
    return lax.scan(lambda h, x: (jnp.tanh(step(h, x)), None), jnp.ones_like(like), xs)[0]


NOT_BIASES = {
    "twice the bias": lambda p, x: _head(x @ p["w"] + 2.0 * p["b"]),
    "a bias at some positions": lambda p, x: _head((x @ p["w"]).at[:2].add(p["b"])),
    "a bias at every position twice": lambda p, x: _head(x @ p["w"] + jnp.stack([p["b"]] * 2).sum(0)),
    "of another layer that shares the cotangent": lambda p, x: _head(x @ p["w"] + (x @ p["v"]) @ p["u"]),
    "turned round": lambda p, x: _head(x @ p["w"] + p["b"][::-1]),
    "one number for all outputs": lambda p, x: _head(x @ p["w"] + p["b"][0]),
    "positions summed before the weight": lambda p, x: _head(jnp.sum(x, 0) @ p["w"] + p["b"]) + _head(x @ p["v"] + p["b"]),
    "weights over one position, biases over all": lambda p, x: _head(x[:1] @ p["w"] + p["b"]) + _head(x @ p["v"]),
    "columns and rows": lambda p, x: _head((x @ p["w"]).T + (x @ p["v"]).T[:, ::-1] + p["b"][:, None]),
    "in a loop and after it": lambda p, x: _head(_loop(lambda h, x: h + x @ p["w"] + p["b"], x, p["b"]) + p["b"]),
    "at some steps of a loop": lambda p, x: _head(_loop(lambda h, x: h + x @ p["w"] + (x[0] > 0) * p["b"], x, p["b"])),
    "in a loop beside a weight after it": lambda p, x: _head(_loop(lambda h, x: h * x[0] + p["b"], x, p["b"]) + x @ p["w"]),
    "turned round in a loop": lambda p, x: _head(_loop(lambda h, x: h + x @ p["w"] + p["b"][::-1], x, p["b"])),
    "rows of columns": lambda p, x: _head(jax.vmap(lambda x: p["w"].T @ x, out_axes=1)(x)[:, : len(p["b"])] + p["b"]),
    "inputs that are the same for all": lambda p, x: jnp.sum(
        x[0, 0] * jnp.tanh(jnp.sum(jnp.ones_like(x) @ p["w"], 0) + p["b"])
    ),
}
"""Leaves that are almost, but not quite, the bias of a weight; at a width of one they are hardest to tell apart."""


@pytest.mark.parametrize("width, inputs, positions", [(3, 2, 4), (1, 1, 1), (2, 1, 2), (1, 3, 2), (3, 3, 3)])
def test_a_leaf_joined_or_not_has_the_gram_of_its_matrix(width, inputs, positions):
    import jaxfisher as jf

    rng = np.random.default_rng(0)
    shapes = {"w": (inputs, width), "v": (inputs, width), "u": (width, width), "b": (width,)}
    params = {name: jnp.asarray(rng.standard_normal(shape)) for name, shape in shapes.items()}
    x = jnp.asarray(rng.standard_normal((4, positions, inputs)))

    def both(params, x):
        made = [jf.scores(model)(params, x) for model in NOT_BIASES.values()]
        return [(scores.gram(), scores.as_matrix(), scores.squared_norms()) for scores in made]

    found = evaluated(both, params, x)
    for name, (gram, matrix, norms) in zip(NOT_BIASES, found, strict=True):
        dense_gram = np.asarray(matrix) @ np.asarray(matrix).T
        tolerance = 1e-12 * np.abs(dense_gram).max()
        np.testing.assert_allclose(gram, dense_gram, rtol=0, atol=tolerance, err_msg=name)
        np.testing.assert_allclose(norms, np.diag(dense_gram), rtol=0, atol=tolerance, err_msg=name)


CONVOLVED = {"window_strides": (1,), "padding": "VALID", "dimension_numbers": ("NWC", "WIO", "NWC")}
MIXED = {
    "promoted": ((4, 3), lambda x, w, b: x @ w + b),
    "the bias added to a cast": ((4, 3), lambda x, w, b: (x.astype(w.dtype) @ w).astype(jnp.float32) + b),
    "all in the weight's dtype": ((4, 3), lambda x, w, b: x.astype(w.dtype) @ w + b.astype(w.dtype)),
    "outputs by inputs": ((3, 4), lambda x, w, b: jnp.einsum("ti,oi->to", x.astype(w.dtype), w).astype(jnp.float32) + b),
    "a convolution": ((1, 4, 3), lambda x, w, b: lax.conv_general_dilated(x[None].astype(w.dtype), w, **CONVOLVED) + b),
}
"""Layers with a bias at two positions. Their weight, bias and input may each be in bfloat16."""


@pytest.mark.parametrize("name", MIXED)
def test_a_bias_is_joined_to_a_weight_of_any_precision(name):
    """The two are one Kronecker product, and the scores are those of `jax.grad` to the precision of each leaf."""
    rng = np.random.default_rng(0)
    shape, layer = MIXED[name]
    b, w, x = (rng.standard_normal(shape) for shape in ((3,), shape, (5, 2, 4)))

    def log_prob(p, x):
        return jnp.sum(jnp.sin(layer(x, p["w"], p["b"]).astype(jnp.float32)))

    def log_choice(p, x):
        """Its cotangent is a sum, of which the cast for the weight is taken."""
        chosen = jax.nn.log_softmax(layer(x, p["w"], p["b"]).astype(jnp.float32))
        return jnp.sum(jnp.take_along_axis(chosen.reshape(2, 3), jnp.argmax(x[:, :3], 1, keepdims=True), 1))

    def both(params, x):
        fisher = jf.empirical_fisher(log_prob)(params, x)
        return fisher.form.scores.as_matrix(), jax.vmap(jax.grad(log_prob), (None, 0))(params, x)

    for dtypes in itertools.product((jnp.bfloat16, jnp.float32), repeat=3):
        *leaves, data = map(jnp.asarray, (b, w, x), dtypes)
        params = dict(zip("bw", leaves, strict=True))
        for function in (log_prob, log_choice):
            view = jax.eval_shape(lambda p, x, f=function: jf.kronecker(jf.empirical_fisher(f)(p, x)), params, data)
            assert "1 Kronecker" in str(view) and "diagonal:" in str(view) and ", 1 diagonal" not in str(view), dtypes
        matrix, rows = evaluated(both, params, data)
        for found, leaf in ((matrix[:, :3], "b"), (matrix[:, 3:], "w")):
            expected = np.asarray(rows[leaf], np.float64).reshape(5, -1)
            narrowest = leaves[1].dtype if name == "all in the weight's dtype" else rows[leaf].dtype
            atol = 4 * max(float(jnp.finfo(dtype).eps) for dtype in (narrowest, rows[leaf].dtype)) * np.abs(expected).max()
            np.testing.assert_allclose(found, expected, rtol=0, atol=atol, err_msg=str(dtypes))


def _conv(x, w, layout, groups=1):
    strides = (1,) * (w.ndim - 2)
    return lax.conv_general_dilated(x[None], w, strides, "VALID", dimension_numbers=layout, feature_group_count=groups)[0]


def _stacked(layer):
    """One layer after the other, by a scan over the stacked parameters."""
    return lambda x, w, b: lax.scan(lambda x, p: (jnp.sin(layer(x, *p)), None), x, (w, b))[0]


def _sent(x, to, w, b):
    """Each position is sent to one of two layers, and the layer's output back to it."""
    return jnp.einsum("te,eto->to", to, jnp.sin(jnp.einsum("eti,eio->eto", jnp.einsum("te,ti->eti", to, x), w) + b[:, None]))


ARRANGED = {
    "vmapped": ((3, 4), (3,), (2, 4), lambda x, w, b: jax.vmap(lambda x: w @ x + b)(x)),
    "vmapped twice": ((3, 4), (3,), (2, 2, 4), lambda x, w, b: jax.vmap(jax.vmap(lambda x: w @ x + b))(x)),
    "vmapped over columns": ((3, 4), (3,), (4, 2), lambda x, w, b: jax.vmap(lambda x: w @ x + b, 1, 1)(x)),
    "heads after the bias": (
        (4, 3),
        (4,),
        (3, 3),
        lambda x, w, b: jax.vmap(lambda x: w @ x + b)(x).reshape(3, 2, 2).swapaxes(0, 1),
    ),
    "heads before the bias": ((4, 2, 3), (2, 3), (2, 4), lambda x, w, b: (x @ w.reshape(4, 6)).reshape(2, 2, 3) + b),
    "positions between heads": ((3, 2, 4), (3, 2), (2, 4), lambda x, w, b: jnp.einsum("ohi,ti->oth", w, x) + b[:, None]),
    "a convolution": ((2, 2, 3), (3,), (4, 2), lambda x, w, b: _conv(x, w, ("NWC", "WIO", "NWC")) + b),
    "channels first": ((3, 2, 2, 2), (3, 1, 1), (2, 3, 3), lambda x, w, b: _conv(x, w, ("NCHW", "OIHW", "NCHW")) + b),
    "grouped channels": ((2, 1, 4), (4,), (4, 2), lambda x, w, b: _conv(x, w, ("NWC", "WIO", "NWC"), 2) + b),
    "a volume": ((1, 2, 2, 2, 3), (1, 1, 1, 3), (2, 3, 2, 2), lambda x, w, b: _conv(x, w, ("NDHWC", "DHWIO", "NDHWC")) + b),
    "a stack": ((2, 3, 3), (2, 3), (3,), _stacked(lambda x, w, b: x @ w + b)),
    "a stack over positions": ((2, 3, 3), (2, 3), (2, 3), _stacked(lambda x, w, b: x @ w + b)),
    "a stack of outputs by inputs": ((2, 3, 3), (2, 3), (3,), _stacked(lambda x, w, b: w @ x + b)),
    "a stack of heads": ((2, 2, 3, 3), (2, 2, 3), (2, 3), _stacked(lambda x, w, b: jnp.einsum("hi,hio->ho", x, w) + b)),
    "a stack of checkpoints": ((2, 3, 3), (2, 3), (3,), _stacked(jax.checkpoint(lambda x, w, b: x @ w + b))),
    "layers side by side": ((2, 3, 4), (2, 4), (2, 3), lambda x, w, b: jnp.einsum("ei,eio->eo", x, w) + b),
    "layers side by side at two positions": (
        (2, 3, 4),
        (2, 4),
        (2, 2, 3),
        lambda x, w, b: jnp.einsum("tei,eio->eto", x, w) + b[:, None],
    ),
    "a stack by index": ((2, 3, 3), (2, 3), (3,), lambda x, w, b: jnp.sin(x @ w[1] + b[1]) @ w[0] + b[0]),
    "a stack by index, outputs by inputs": (
        (2, 3, 3),
        (2, 3),
        (2, 3),
        lambda x, w, b: jnp.sin(x @ w[0].T + b[0]) @ w[1].T + b[1],
    ),
    "a layer of a stack used twice": (
        (2, 3, 3),
        (2, 3),
        (3,),
        lambda x, w, b: jnp.sin(jnp.sin(x @ w[1] + b[1]) @ w[0] + b[0]) @ w[1] + b[1],
    ),
    "queries": ((3, 3), (3,), (2, 3), lambda x, w, b: (x @ w + b) @ x.T),
    "one choice": ((3, 3), (3,), (3,), lambda x, w, b: jax.nn.log_softmax(x @ w + b)[1]),
    "used twice": ((3, 3), (3,), (3,), lambda x, w, b: jnp.sin(x @ w + b) @ w + b),
    "used at every step": (
        (3, 3),
        (3,),
        (2, 3),
        lambda x, w, b: lax.scan(lambda h, x: (jnp.sin(h @ w + b) + x, None), x[0], x)[0],
    ),
    "used at every step at two positions": (
        (3, 3),
        (3,),
        (2, 2, 3),
        lambda x, w, b: lax.scan(lambda h, x: (jnp.sin(jax.vmap(lambda h: w @ h + b)(h)) + x, None), x[0], x)[0],
    ),
    "mapped": ((3, 4), (3,), (2, 4), lambda x, w, b: lax.map(lambda x: w @ x + b, x)),
    "before a mean over positions": ((4, 3), (3,), (2, 4), lambda x, w, b: jnp.mean(x @ w + b, 0)),
    "before a global pooling": ((2, 2, 3), (3,), (4, 2), lambda x, w, b: jnp.mean(_conv(x, w, ("NWC", "WIO", "NWC")) + b, 0)),
    "before a mean over outputs": ((3, 4), (3,), (2, 4), lambda x, w, b: jnp.mean(jax.vmap(lambda x: w @ x + b)(x), 1)),
    "some outputs": ((4, 6), (6,), (2, 4), lambda x, w, b: (x @ w + b)[:, np.array([0, 2, 2, 5])]),
    "an outer product of inputs": ((3, 4, 2), (2,), (4,), lambda x, w, b: jnp.einsum("i,j,ijk->k", x[:3], x, w) + b),
    "positions sent to two layers": (
        (2, 4, 3),
        (2, 3),
        (2, 4),
        lambda x, w, b: _sent(x, jnp.stack([x[:, 0] > 0, x[:, 0] <= 0], 1) * 1.0, w, b),
    ),
}
"""Layers whose cotangent is transposed, reshaped, stacked or gets axes of length one on its way to the weight or the bias."""


@pytest.mark.parametrize("name", ARRANGED)
def test_a_bias_is_joined_however_its_layer_is_arranged(name):
    """The two are one Kronecker product, and inner products of the joined factors are those of the gradients."""
    rng = np.random.default_rng(0)
    *shapes, data, layer = ARRANGED[name]
    params = {k: jnp.asarray(rng.standard_normal(shape)) for k, shape in zip("wb", shapes, strict=True)}
    x = jnp.asarray(rng.standard_normal((3, *data)))

    def log_prob(p, x):
        return jnp.sum(jnp.sin(layer(x, p["w"], p["b"])))

    def both(params, x):
        scores = jf.scores(log_prob)(params, x)
        rows = jax.vmap(jax.grad(log_prob), (None, 0))(params, x)
        matrix = jnp.concatenate([leaf.reshape(3, -1) for leaf in jax.tree.leaves(rows)], 1)
        trace = jf.kronecker(jf.fisher_from_scores(scores)).trace()
        return (scores.gram(), trace, scores.mv(params), scores.as_matrix()), matrix

    assert set(jax.tree.leaves(jf.layers(jax.eval_shape(jf.empirical_fisher(log_prob), params, x)))) == {"['w']"}
    assert not jf.explain(log_prob)(params, x).plain
    (gram, trace, along, found), matrix = evaluated(both, params, x)
    vector = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])
    for got, expected in ((gram, matrix @ matrix.T), (trace, np.sum(matrix**2) / 3), (along, matrix @ vector), (found, matrix)):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-13 * np.abs(expected).max() * matrix.size)


def _side_by_side(x, weights, biases):
    return jnp.concatenate(weights, 1).T @ x + jnp.concatenate(biases)


SIDE_BY_SIDE = {
    "in order": ("wv", lambda x, w, v, b, c: _side_by_side(x, (w, v), (b, c))),
    "turned round": ("vw", lambda x, w, v, b, c: _side_by_side(x, (w, v), (c, b))),
    "at every step": (
        "wv",
        lambda x, w, v, b, c: lax.scan(lambda h, x: (jnp.tanh(h + _side_by_side(x, (w, v), (b, c))), None), jnp.ones(6), x)[0],
    ),
    "not at the same outputs": ("bc", lambda x, w, v, b, c: _side_by_side(x, (w, v), (b[:2], c, b[2:]))),
    "one bias for both": ("bc", lambda x, w, v, b, c: _side_by_side(x, (w, v), (b, b)) + c[0]),
}
"""Two layers in one product, as the gates of a recurrent cell, and the weights whose biases b and c are, or b and c if none."""


@pytest.mark.parametrize("name", SIDE_BY_SIDE)
def test_biases_of_layers_in_one_product_are_joined_to_their_weights(name):
    rng = np.random.default_rng(0)
    weights, layer = SIDE_BY_SIDE[name]
    shapes = {"w": (4, 3), "v": (4, 3), "b": (3,), "c": (3,)}
    params = {k: jnp.asarray(rng.standard_normal(shape)) for k, shape in shapes.items()}
    x = jnp.asarray(rng.standard_normal((3, *((2, 4) if "step" in name else (4,)))))

    def log_prob(p, x):
        return jnp.sum(jnp.sin(layer(x, *(p[k] for k in "wvbc"))))

    def both(params, x):
        scores = jf.scores(log_prob)(params, x)
        rows = jax.vmap(jax.grad(log_prob), (None, 0))(params, x)
        return (scores.gram(), scores.as_matrix()), jnp.concatenate([leaf.reshape(3, -1) for leaf in jax.tree.leaves(rows)], 1)

    owners = jf.layers(jax.eval_shape(jf.empirical_fisher(log_prob), params, x))
    assert [owners[k] for k in "bc"] == [f"['{k}']" for k in weights]
    (gram, found), matrix = evaluated(both, params, x)
    np.testing.assert_allclose(found, matrix, rtol=0, atol=1e-13 * np.abs(matrix).max())
    np.testing.assert_allclose(gram, matrix @ matrix.T, rtol=0, atol=1e-12 * np.abs(matrix @ matrix.T).max())


OTHER_LAYERS = {
    "the bias of another layer": lambda x, w, b: jnp.sin(x @ w[0] + b[1]) @ w[1] + b[0],
    "the bias at one layer only": lambda x, w, b: jnp.sin(x @ w[0] + b[0]) @ w[1],
    "a stack along the last axis": lambda x, w, b: jnp.sin(x @ w[0] + b[:3, 0]) @ w[1] + b[:3, 1],
    "few of many": lambda x, w, b: jnp.sin(x @ w[1] + b[6]) + b[6],
    "one entry at a time": lambda x, w, b: jnp.sin(x @ w[1] + b[6, 0]) + b[2, 1],
}
"""Uses of a stack that are no biases of the weights beside them, or not all of them."""


@pytest.mark.parametrize("name", OTHER_LAYERS)
def test_a_stack_used_in_part_has_the_gradients_of_its_uses(name):
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.standard_normal((2, 3, 3))), "b": jnp.asarray(rng.standard_normal((7, 3)))}
    x = jnp.asarray(rng.standard_normal((4, 3)))

    def log_prob(p, x):
        return jnp.sum(jnp.sin(OTHER_LAYERS[name](x, p["w"], p["b"])))

    def both(params, x):
        scores = jf.scores(log_prob)(params, x)
        assert "few" not in name or scores.leaves[0].bytes < 4 * 7 * 3 * 8, "two rows of the table are stored, not seven"
        rows = jax.vmap(jax.grad(log_prob), (None, 0))(params, x)
        return (scores.gram(), scores.as_matrix()), jnp.concatenate([leaf.reshape(4, -1) for leaf in jax.tree.leaves(rows)], 1)

    (gram, found), matrix = evaluated(both, params, x)
    np.testing.assert_allclose(found, matrix, rtol=0, atol=1e-13 * np.abs(matrix).max())
    np.testing.assert_allclose(gram, matrix @ matrix.T, rtol=0, atol=1e-12 * np.abs(matrix @ matrix.T).max())


def test_terms_of_every_kind_are_drawn():
    """The generator draws contracted, repeated, shared, length-one and hot axes, and one to three factors."""
    draw = Draw(np.random.default_rng(0))
    seen = set()
    for _ in range(300):
        term = draw.term(draw.shape(1), jnp.dtype("float64"))
        kept = [axis for axes in term.dims for axis in axes]
        over = list(itertools.chain.from_iterable(factor.over for factor in term.factors))
        seen |= {"contracted"} if any(axis not in kept and axis.size > 1 for axis in over) else set()
        seen |= {"repeated"} if any(axis not in over for axis in kept) else set()
        seen |= {"shared"} if any(over.count(axis) > 1 for axis in kept) else set()
        seen |= {"length one"} if any(axis.size == 1 for axis in over) else set()
        seen |= {"hot"} if any(factor.hot is not None for factor in term.factors) else set()
        seen |= {f"{len(term.factors)} factors"}
    assert seen >= {"contracted", "repeated", "shared", "length one", "hot", "1 factors", "2 factors", "3 factors"}


def test_a_rule_of_your_own(monkeypatch):
    """A primitive that doubles and reverses its input. With a rule for it the weight before it is held as factors."""
    row = catalogue.row("invented_primitive_on_a_weight")
    explained = lambda: jf.explain(row.log_prob)(row.params, *row.data)  # noqa: E731
    assert explained().plain == ("['w']",)

    def doubled_and_reversed(term, params):
        last = len(term.dims) - 1
        size = math.prod(axis.size for axis in term.dims[last])
        reversed_ = terms.along(term, last, lambda array, axis: jnp.flip(array, axis), size)
        return None if reversed_ is None else terms.scale(reversed_, 2)

    monkeypatch.setitem(RULES, "invented", Rule("invented", each(doubled_and_reversed)))
    assert not explained().plain and explained().leaves[-1].form == "outer product"
    moment = compiled(lambda params, *data: jf.scores(row.log_prob)(params, *data).second_moment())(row.params, *row.data)
    rows = compiled(jax.vmap(jax.grad(row.log_prob), (None, *(0 for _ in row.data))))(row.params, *row.data)
    dense = np.stack([flat(jax.tree.map(lambda leaf, i=i: leaf[i], rows)) for i in range(len(row.data[0]))])
    assert_close(moment, dense.T @ dense / len(dense))
