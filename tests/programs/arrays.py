"""Pieces of random programs that are one operation on arrays, as JAX and NumPy name them."""

from programs.pieces import piece

UNARY = """
jnp.tanh({0}); jnp.sin({0}); jnp.cos({0}); jax.nn.sigmoid({0}); jax.nn.softplus({0}); jnp.square({0}); jnp.abs({0})
jax.nn.relu({0}); jax.nn.gelu({0}); jax.nn.silu({0}); jax.nn.leaky_relu({0}); jax.nn.elu({0}); jnp.exp(jnp.tanh({0}))
jnp.log1p(jnp.square({0})); jnp.sqrt(1.0 + jnp.square({0})); lax.rsqrt(1.0 + jnp.square({0})); jax.scipy.special.erf({0})
jnp.arctan({0}); -{0}; 0.7 * {0}; {0} / 3.0; 1.5 * {0} - 0.2; lax.integer_pow({0}, 3); jnp.sign({0}) * {0}; {0} - jnp.round({0})
lax.stop_gradient({0}) * {0}; {0} + lax.stop_gradient(jnp.sin({0})); jnp.clip({0}, -0.5, 0.5); jnp.floor({0}) + {0}
jnp.logaddexp({0}, 0.3); jnp.where({0} > 0.1, {0}, 0.3 * {0}); jnp.maximum({0}, 0.2); 1.0 / (1.5 + jnp.square({0}))
jnp.expm1(jnp.tanh({0})); jnp.power(1.2 + jnp.square({0}), 0.7); jnp.arcsinh({0}); jnp.nan_to_num({0}); {0} * {0}; {0} + {0}
jnp.cbrt(1.0 + jnp.square({0})); jnp.sinc({0}); lax.optimization_barrier({0}); jax.scipy.special.gammaln(1.0 + jnp.square({0}))
"""
UNARY = [form for form in UNARY.replace("\n", ";").split(";") if form.strip()]
BINARY = """
{0} + {1}; {0} - {1}; {0} * {1}; {0} * {1}; {0} / (1.5 + jnp.square({1})); jnp.maximum({0}, {1}); jnp.minimum({0}, {1})
jnp.arctan2({0}, 2.0 + jnp.square({1})); jnp.hypot({0}, 1.0 + jnp.abs({1})); jnp.power(1.2 + jnp.square({0}), jnp.tanh({1}))
jnp.where({0} > {1}, {0}, {1}); jnp.logaddexp({0}, {1}); jnp.where(mask({2}, *jnp.shape({0})), {0}, {1}); jnp.tanh({0}) * {1}
"""
BINARY = [form.strip() for form in BINARY.replace("\n", ";").split(";") if form.strip()]
REDUCTIONS = ("sum", "mean", "max", "min", "prod", "var", "sum", "mean")


@piece(4)
def unary(w):
    w.say(w.one_of(*UNARY).strip().format(w.value().name))


@piece(5)
def binary(w):
    """An operation on two values whose shapes broadcast, perhaps after axes of length one are inserted."""
    a = w.any()
    b = w.any(0, a.rank)
    missing = a.rank - b.rank
    name = b.name
    if missing and w.chance(0.6):
        places = sorted(w.rng.sample(range(a.rank), missing))
        name = f"jnp.expand_dims({name}, {tuple(places)})"
    if w.chance(0.3):
        name = w.of_shape(*(1 if w.chance(0.4) else size for size in a.shape))
    pair = (a.name, name) if w.chance(0.6) else (name, a.name)
    w.say(w.one_of(*BINARY).format(*pair, w.seed()))


@piece(2)
def outer_product_by_broadcasting(w):
    a, b = w.any(1, 2), w.any(1, 2)
    form = w.one_of(
        "{0}[:, None] * {1}[None]", "{0}[None] * {1}[:, None]", "{0}[..., None] * {1}", "{0}[None, :] - {1}[:, None]"
    )
    w.say(form.format(a.name, b.name))


@piece(3)
def scaled(w):
    """An array times a number, which is an entry, a sum or a parameter."""
    a, b = w.any(), w.any()
    number = w.one_of("jnp.sum({0})", "jnp.mean(jnp.square({0}))", "jnp.ravel({0})[0]", "jnp.max({0})", "jnp.float64(0.3)")
    w.say(w.one_of("{0} * {1}", "{1} * {0}", "{0} / (2.0 + jnp.square({1}))").format(a.name, number.format(b.name)))


@piece(3)
def divided_by_a_reduction(w):
    a = w.value(1)
    b = w.value(1)
    axis, keep = w.axis(b), w.chance(0.5)
    below = w.one_of("jnp.sum", "jnp.mean", "jnp.max")
    positive = f"1.0 + jnp.square({b.name})"
    if w.chance(0.4):
        shape = (*w.shape(1, 1), *b.shape)
        positive = f"jnp.broadcast_to({positive}, {shape})"
        axis = w.one_of(0, -1)
    if w.chance(0.2):
        w.say(f"{a.name} / {below}({positive})")
        return
    if w.say(f"{a.name} / {below}({positive}, {axis}, keepdims={keep})") is None:
        w.say(f"{w.of_shape(*a.shape)} / {below}(1.0 + jnp.square({a.name}), {w.axis(a)}, keepdims=True)")


@piece(3)
def reduction(w):
    a = w.any(1)
    axes = tuple(sorted(w.rng.sample(range(a.rank), w.rng.randint(1, a.rank))))
    name, keep = w.one_of(*REDUCTIONS), w.chance(0.3)
    w.say(f"jnp.{name}({a.name}, {axes}, keepdims={keep})")


@piece()
def other_reduction(w):
    a = w.value(1)
    form = w.one_of(
        "jax.nn.logsumexp({0}, {1})",
        "jnp.sqrt(0.1 + jnp.sum(jnp.square({0}), {1}))",
        "jnp.linalg.norm({0} + 2.0, axis={1})",
        "jnp.median({0}, {1})",
        "jnp.average({0}, {1}, weights=1.0 + jnp.square({0}))",
        "jnp.sum({0}, {1}, where={0} > 0.0)",
        "jnp.trapezoid({0}, axis={1})",
        "lax.reduce({0}, 0.0, lax.add, ({1} % {2},))",
        "jnp.ptp({0}, {1})",
    )
    w.say(form.format(a.name, w.axis(a), a.rank))


@piece(2)
def cumulative(w):
    a = w.any(1)
    axis, reverse = w.axis(a, signed=False), w.chance(0.3)
    name = w.one_of("cumsum", "cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
    w.say(f"lax.{name}({a.name}, {axis}, reverse={reverse})")


@piece()
def associative_scan(w):
    a = w.value(1)
    w.say(f"lax.associative_scan({w.one_of('jnp.add', 'jnp.multiply')}, {a.name}, axis={w.axis(a, signed=False)})")


@piece()
def softmax(w):
    a = w.value(1)
    w.say(f"jax.nn.{w.one_of('softmax', 'log_softmax', 'standardize', 'glu')}({a.name}, axis={w.axis(a)})")


# Shapes.


@piece(3)
def reshape(w):
    a = w.any()
    sizes, rest = [], a.size
    while rest > 1:
        size = w.one_of(*(n for n in range(2, rest + 1) if rest % n == 0))
        sizes.append(size)
        rest //= size
    sizes += [1] * w.one_of(0, 0, 1, 2)
    w.say(f"jnp.reshape({a.name}, {tuple(w.rng.sample(sizes, len(sizes)))})")


@piece(2)
def transpose(w):
    a = w.any(2)
    w.say(w.one_of(f"jnp.transpose({a.name}, {w.order(a.rank)})", f"jnp.swapaxes({a.name}, 0, {w.axis(a)})", f"{a.name}.T"))


@piece(2)
def axes_of_length_one(w):
    a = w.any(0, 3)
    if 1 in a.shape and w.chance(0.5):
        w.say(f"jnp.squeeze({a.name}, {a.shape.index(1)})")
    else:
        w.say(f"jnp.expand_dims({a.name}, {w.rng.randint(0, a.rank)})")


@piece(2)
def repeated(w):
    a = w.any(0, 3)
    if a.rank == 0 or w.chance(0.4):
        w.say(f"jnp.broadcast_to({a.name}, {(*w.shape(1, 1), *a.shape)})")
    elif w.chance(0.3):
        shape = tuple(w.size() if size == 1 else size for size in a.shape)
        w.say(f"jnp.broadcast_to({a.name}, {shape})")
    else:
        w.say(f"jnp.{w.one_of('tile', 'repeat')}({a.name}, {w.one_of(1, 2)}{w.one_of('', ', 0') if w.chance(0.5) else ''})")


@piece(2)
def turned(w):
    a = w.any(1)
    axis = w.axis(a)
    w.say(w.one_of(f"jnp.flip({a.name}, {axis})", f"jnp.roll({a.name}, 1, {axis})", f"lax.rev({a.name}, ({axis % a.rank},))"))


@piece(2)
def padded(w):
    a = w.any(1, 3)
    if w.chance(0.5):
        widths = tuple((w.one_of(0, 1), w.one_of(0, 1)) for _ in a.shape)
        mode = w.one_of("constant", "edge", "reflect", "wrap")
        w.say(f"jnp.pad({a.name}, {widths}, mode='{mode}')")
    else:
        widths = tuple((w.one_of(-1, 0, 1), w.one_of(-1, 0, 1), w.one_of(0, 0, 1)) for _ in a.shape)
        w.say(f"lax.pad({a.name}, jnp.zeros((), {a.name}.dtype), {widths})")


@piece(3)
def sliced(w):
    a = w.any(1)
    parts = []
    for size in a.shape:
        start = w.rng.randrange(size)
        stop = w.rng.randint(start + 1, size)
        parts.append(w.one_of(":", f"{start}:{stop}", f"{start}:", f"{start}", "::-1", "::2"))
    w.say(f"{a.name}[{', '.join(parts)}]")


@piece(2)
def dynamic_slice(w):
    a = w.any(1, 3)
    sizes = tuple(w.rng.randint(1, size) for size in a.shape)
    starts = ", ".join(w.one_of("0", "1", "k[0] % 2", "k[1] % 3") for _ in sizes)
    if w.chance(0.6):
        w.say(f"lax.dynamic_slice({a.name}, ({starts},), {sizes})")
    else:
        w.say(f"lax.dynamic_update_slice({a.name}, {w.of_shape(*sizes, real=False)}.astype({a.name}.dtype), ({starts},))")


@piece(2)
def joined(w):
    a = w.any(1)
    axis = w.axis(a, signed=False)
    shape = (*a.shape[:axis], w.size(), *a.shape[axis + 1 :])
    if w.chance(0.7):
        pair = w.rng.sample([a.name, w.of_shape(*shape, real=False)], 2)
        w.say(f"jnp.concatenate([{', '.join(pair)}], {axis})")
    else:
        w.say(f"jnp.stack([{a.name}, {w.of_shape(*a.shape, real=False)}], {axis})")


@piece()
def split(w):
    a = w.any(1)
    axes = [i for i, size in enumerate(a.shape) if size > 1]
    if axes:
        axis = w.one_of(*axes)
        cut = w.rng.randrange(1, a.shape[axis])
        w.say(f"jnp.split({a.name}, [{cut}], {axis})", count=2)


@piece()
def of_a_matrix(w):
    a = w.any(2)
    form = w.one_of(
        "jnp.triu({})",
        "jnp.tril({})",
        "jnp.diagonal({})",
        "jnp.trace({})",
        "jnp.rot90({})",
        "jnp.tril({}, 1) - jnp.triu({}, 1)",
    )
    w.say(form.format(a.name, a.name))


@piece()
def made_a_matrix(w):
    a = w.value(1, 1)
    w.say(
        w.one_of(
            f"jnp.diag({a.name})", f"jnp.kron({a.name}, {w.value(1, 1).name})", f"jnp.outer({a.name}, {w.value(1, 2).name})"
        )
    )


# Places.


@piece(3)
def gather(w):
    a = w.any(1)
    index = w.index(a.shape[0])
    forms = [f"{a.name}[{index}]", f"jnp.take({a.name}, {index}, axis=0, mode='clip')"]
    if a.rank > 1:
        forms += [f"{a.name}[:, {w.index(a.shape[1])}]", f"{a.name}[{w.index(a.shape[0], 0)}, {w.index(a.shape[1], 1)}]"]
    forms += [f"jnp.take({a.name}, k[:2] + 1, axis=0, mode='fill', fill_value=0.5)", f"{a.name}[jnp.argmax({a.name}, 0)]"]
    w.say(w.one_of(*forms))


@piece(2)
def scatter(w):
    a = w.any(1)
    index = w.index(a.shape[0], 1)
    made = w.say(f"{a.name}[{index}]")
    if made is not None:
        method = w.one_of("add", "add", "set", "multiply", "max", "min")
        w.say(f"{w.of_shape(*a.shape, real=False)}.at[{index}].{method}(0.5 * {made.name})")


@piece()
def one_hot(w):
    a = w.any(1, 2)
    w.say(f"jax.nn.one_hot({w.index(a.shape[0])}, {a.shape[0]}) @ {a.name}")


@piece(2)
def segments(w):
    a = w.any(1, 3)
    name = w.one_of("sum", "sum", "max", "prod")
    index = w.one_of(f"ints({w.seed()}, 2, {a.shape[0]})", f"jnp.resize(k, ({a.shape[0]},)) % 3")
    made = w.say(f"jax.ops.segment_{name}({a.name}, {index}, num_segments=3)")
    if made is not None and name == "max":
        w.say(f"jnp.where(jnp.isfinite({made.name}), {made.name}, 0.0)")


@piece(2)
def sort(w):
    a = w.value(1)
    axis = w.axis(a)
    w.say(
        w.one_of(
            f"jnp.sort({a.name}, {axis})",
            f"lax.top_k({a.name}, {w.rng.randint(1, a.shape[-1])})[0]",
            f"lax.sort(({a.name}, {w.of_shape(*a.shape)}), dimension={axis % a.rank}, num_keys=1)[1]",
            f"jnp.take_along_axis({w.of_shape(*a.shape)}, jnp.argsort({a.name}, {axis}), {axis})",
        )
    )


@piece()
def chosen(w):
    """Masked by fixed booleans, by the example, or by the values themselves."""
    a = w.any(0)
    condition = w.one_of(f"mask({w.seed()}, *{a.shape})", "k[0] > 1", f"{a.name} > 0.0", "x.sum() > 0.0")
    w.say(f"jnp.where({condition}, {a.name}, {w.one_of('0.0', w.of_shape(*a.shape, real=False))})")


# Dtypes.


@piece(2)
def cast(w):
    a = w.value()
    if w.book.dtype:
        w.say(f"{a.name}.astype({w.one_of(f'jnp.{w.book.dtype}', f'jnp.{w.book.dtype}', 'float')})")
    else:
        form = w.one_of(
            "{}.astype(int).astype(float) + {}", "({} > 0.1).astype(float) * {}", "{}.astype(complex) * (1.0 + 2.0j) + {}"
        )
        w.say(form.format(a.name, a.name))


@piece(3)
def complex_product(w):
    a = w.value(0)
    shape = "".join(f", {size}" for size in a.shape)
    if w.chance(0.6):
        w.say(f"{a.name} * {w.one_of(f'complex_const({w.seed()}{shape})', '(0.3 + 1.0j)', '1.0j')}")
    else:
        w.say(f"lax.complex({a.name}.astype(float), {w.of_shape(*a.shape)}.astype(float))")


@piece(3)
def complex_matrix(w):
    """A complex linear map of real values, and real values made of the result."""
    a = w.any(1, 2)
    rows, columns = a.shape[0], a.shape[-1]
    out = w.size()
    form = w.one_of(
        "complex_const({s}, {o}, {r}) @ {a}", "{a} @ complex_const({s}, {c}, {o})", "jnp.fft.fft(jnp.eye({r})) @ {a}"
    )
    made = w.say(form.format(s=w.seed(), o=out, r=rows, c=columns, a=a.name))
    if made is not None and w.chance(0.5):
        w.say(w.one_of("jnp.square(jnp.abs({}))", "jnp.imag({})", "jnp.real({} * (0.5 + 1.0j))").format(made.name))


@piece(3)
def of_complex_values(w):
    found = [value for value in w.values if value.complex]
    if not found:
        return
    a = w.rng.choice(found)
    if w.chance(0.4):
        w.say(w.one_of(f"{a.name} * jnp.conj({w.rng.choice(found).name})", f"jnp.exp(0.3 * {a.name})", f"{a.name} ** 2"))
    else:
        w.say(
            w.one_of("jnp.real({})", "jnp.imag({})", "jnp.abs({})", "jnp.square(jnp.abs({}))", "jnp.angle({} + 3.0)").format(
                a.name
            )
        )


@piece(2)
def fourier_transform(w):
    a = w.value(1, real=False)
    axis = w.axis(a)
    if a.complex:
        w.say(w.one_of(f"jnp.fft.ifft({a.name}, axis={axis})", f"jnp.fft.irfft({a.name}, n={a.shape[axis] + 1}, axis={axis})"))
    else:
        w.say(f"jnp.fft.{w.one_of('fft', 'rfft')}({a.name}.astype(float), axis={axis})")
