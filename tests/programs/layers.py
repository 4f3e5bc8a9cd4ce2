"""Pieces of random programs that are parts of models: layers, norms, attention, cells, linear algebra."""

from programs.pieces import piece


def _width(w, value):
    """The last axis of a value of rank at least one, and a new width."""
    return value.shape[-1], w.size()


@piece(6)
def dense(w):
    x = w.any(1, 3)
    inputs, outputs = _width(w, x)
    weight = w.of_shape(inputs, outputs, weight=True, real=False)
    if w.chance(0.2):
        weight = w.one_of("0.5 * ({})", "-({})", "({}) / 2.0", "jnp.tanh({})", "mask({1}, *jnp.shape({0})) * ({0})").format(
            weight, w.seed()
        )
    form = w.one_of("{x} @ {w}", "{x} @ {w}", "{x} @ {w} + {b}", "{x} @ {w} + {b}", "jnp.tanh({x} @ {w} + {b})", "{w}.T @ {x}")
    if w.chance(0.1):
        form = "jnp.sum({x}[..., None] * {w}, -2)"
    bias = w.of_shape(outputs, weight=True, real=False)
    w.say(form.format(x=x.name, w=f"({weight})", b=bias))


@piece(5)
def meeting(w):
    """An example meets an array made of parameters. Factors arise here, and pass backwards through what made the array."""
    made = [value for value in w.own if value.bare and value.rank] or [value for value in w.leaves() if value.rank]
    loose = [value for value in w.unused() if value.bare and value.rank]
    met = [value for value in w.values if not value.bare]
    if not made or not met:
        return
    weight, x = w.rng.choice(loose or made), w.rng.choice(met)
    shape, axis = weight.shape, w.rng.randrange(weight.rank)
    first, last = w.fit(x, shape[:1]), w.fit(x, shape[-1:])
    own = "abcd"[: weight.rank]
    form = w.one_of(
        "{first} @ jnp.reshape({w}, ({n}, -1))",
        "{w} @ {last}",
        f"jnp.einsum('{own[axis]},{own}->{own.replace(own[axis], '')}', {{some}}, {{w}})",
        f"jnp.einsum('e{own[axis]},{own}->e{own.replace(own[axis], '')}', {{two}}, {{w}})",
        "jnp.sum({along} * {w}, {axis})",
        "{w} * {last}",
        "jnp.tensordot({whole}, {w}, {rank})",
        "jnp.sum(jnp.expand_dims({last}, {places}) * {w}, -1)",
        "jnp.tanh({last}) * jnp.sum({w}, {axis}, keepdims=True)",
    )
    along = f"jnp.reshape({w.fit(x, (shape[axis],))}, {tuple(n if i == axis else 1 for i, n in enumerate(shape))})"
    parts = {"first": first, "last": last, "some": w.fit(x, (shape[axis],)), "two": w.fit(x, (w.size(), shape[axis]))}
    parts |= {"along": along, "whole": w.fit(x, shape), "places": tuple(range(weight.rank - 1)), "n": shape[0]}
    w.say(form.format(w=weight.name, axis=axis, rank=weight.rank, **parts))


@piece(2)
def adapted(w):
    """A layer plus a product of two thin ones, as in low-rank adapters."""
    x = w.any(1, 2)
    inputs, outputs = _width(w, x)
    rank = w.one_of(1, 1, 2)
    weight, a, b = (
        w.of_shape(*shape, weight=True, real=False) for shape in ((inputs, outputs), (inputs, rank), (rank, outputs))
    )
    form = w.one_of("{x} @ {w} + ({x} @ {a}) @ {b}", "{x} @ ({w} + {a} @ {b})", "{x} @ {w} + {x} @ {a} @ {b} * 0.5")
    w.say(form.format(x=x.name, w=weight, a=a, b=b))


@piece(2)
def tied(w):
    """A weight in both directions, or a matrix of itself."""
    x = w.any(1, 2)
    inputs, outputs = _width(w, x)
    weight = w.of_shape(inputs, outputs, weight=True, real=False)
    form = w.one_of(
        "jnp.tanh({x} @ {w}) @ {w}.T", "{x} @ ({w} @ {w}.T)", "{x} @ {w} @ {w}.T @ {w}", "jnp.sin({x}) @ {w} + {x} @ {w}"
    )
    w.say(form.format(x=x.name, w=weight))


@piece(4)
def einsum(w):
    """An einsum of one to three operands, with letters that are shared or not, contracted or repeated."""
    operands = [w.any(1, 3) for _ in range(w.one_of(1, 2, 2, 2, 3))]
    sizes, texts = {}, []
    for operand in operands:
        text = ""
        for size in operand.shape:
            same = [letter for letter, other in sizes.items() if other == size]
            letter = w.one_of(*same) if same and w.chance(0.7) else "abcdefghi"[len(sizes)]
            sizes[letter] = size
            text += letter
        texts.append(text)
    kept = [letter for letter in sizes if w.chance(0.5)]
    names = ", ".join(operand.name for operand in operands)
    w.say(f"jnp.einsum('{','.join(texts)}->{''.join(w.rng.sample(kept, len(kept)))}', {names})")


@piece(2)
def general_product(w):
    a = w.any(1, 3)
    axis = w.axis(a, signed=False)
    others = [i for i in range(a.rank) if i != axis]
    batch = [w.rng.choice(others)] if others and w.chance(0.4) else []
    b = w.of_shape(*(a.shape[i] for i in batch), *w.shape(0, 1), a.shape[axis], real=False)
    contract = f"(({axis},), (len(jnp.shape({b})) - 1,))"
    dims = f"({contract}, ({tuple(batch)}, {tuple(range(len(batch)))}))"
    dtype = "" if w.chance(0.8) else ", preferred_element_type=jnp.float64"
    w.say(f"lax.dot_general(*promoted({a.name}, {b}), {dims}{dtype})")


@piece()
def bilinear(w):
    a, b = w.any(1, 1), w.any(1, 1)
    shape = (a.shape[0], b.shape[0])
    weight = (
        w.of_shape(*shape, weight=True, real=False) if w.chance(0.6) else w.of_shape(*shape, w.size(), weight=True, real=False)
    )
    w.say(w.one_of(f"jnp.einsum('a,b,ab...->...', {a.name}, {b.name}, {weight})", f"{a.name} @ {weight} @ {b.name}"))


@piece()
def stacked_weights(w):
    """Experts: a stack of weights, which gates mix or of which one is chosen."""
    x = w.any(1, 1)
    inputs, outputs = _width(w, x)
    count = w.one_of(1, 2, 3)
    stack = w.of_shape(count, inputs, outputs, weight=True, real=False)
    gates = f"jax.nn.softmax({w.of_shape(count, real=False)})"
    form = w.one_of(
        "{g} @ jnp.einsum('i,eij->ej', {x}, {w})", "{x} @ {w}[jnp.argmax({g})]", "{x} @ {w}[0]", "{x} @ jnp.mean({w}, 0)"
    )
    w.say(form.format(g=gates, x=x.name, w=stack))


# Convolutions.

LAYOUTS = {
    1: (("NHC", "HIO", "NHC"), ("NCH", "OIH", "NCH"), ("NHC", "OIH", "NCH")),
    2: (("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")),
}


@piece(4)
def convolution(w):
    rank = w.one_of(1, 1, 2)
    layout = w.one_of(*LAYOUTS[rank])
    groups = w.one_of(1, 1, 1, 2)
    channels, out = groups * w.one_of(1, 1, 2), groups * w.one_of(1, 1, 2)
    space, window = [w.one_of(2, 3, 4) for _ in range(rank)], [w.one_of(1, 2, 2, 3) for _ in range(rank)]
    sizes = {"N": 1, "C": channels, **dict(zip("HW", space, strict=False))}
    image = [sizes[letter] for letter in layout[0]]
    sizes = {"I": channels // groups, "O": out, **dict(zip("HW", window, strict=False))}
    kernel = [sizes[letter] for letter in layout[1]]
    weight = w.of_shape(*kernel, weight=True)
    if w.chance(0.15):
        weight = f"jnp.flip({weight}, {layout[1].index('H')})"
    options = [
        f"{tuple(w.one_of(1, 1, 2) for _ in space)}",
        w.one_of("'SAME'", "'VALID'", f"{tuple((w.one_of(0, 1), w.one_of(0, 1, 2)) for _ in space)}"),
        f"lhs_dilation={tuple(w.one_of(1, 1, 1, 2) for _ in space)}",
        f"rhs_dilation={tuple(w.one_of(1, 1, 1, 2) for _ in space)}",
        f"dimension_numbers={layout}",
        f"feature_group_count={groups}",
    ]
    if "SAME" in options[1]:
        del options[2]
    operands = f"*promoted({w.of_shape(*image)}, {weight})"
    made = w.say(f"lax.conv_general_dilated({operands}, {', '.join(options)})")
    if made is not None and w.chance(0.3):
        shape = [n if letter == "C" else 1 for n, letter in zip(made.shape, layout[2], strict=True)]
        w.say(f"{made.name} + {w.of_shape(*shape, weight=True)}")


@piece()
def transposed_convolution(w):
    inputs, outputs = w.one_of(1, 2), w.one_of(1, 2)
    image, kernel = w.of_shape(1, w.one_of(2, 3), inputs), w.of_shape(w.one_of(1, 2, 3), inputs, outputs, weight=True)
    options = f"({w.one_of(1, 2)},), '{w.one_of('SAME', 'VALID')}', dimension_numbers=('NHC', 'HIO', 'NHC')"
    w.say(f"lax.conv_transpose(*promoted({image}, {kernel}), {options})")


@piece()
def convolution_of_many(w):
    """`jnp.convolve`, or the kernel of each example."""
    a, b = w.value(1, 1), w.value(1, 1)
    w.say(f"jnp.{w.one_of('convolve', 'correlate')}({a.name}, {b.name}, mode='{w.one_of('full', 'same', 'valid')}')")


@piece(2)
def pooling(w):
    a = w.value(1, 3)
    window = tuple(w.rng.randint(1, size) for size in a.shape)
    form = w.one_of("0.0, lax.add", "-jnp.inf, lax.max", "0.0, lax.add")
    w.say(
        f"lax.reduce_window({a.name}, {form}, {window}, {tuple(w.one_of(1, 2) for _ in window)}, '{w.one_of('SAME', 'VALID')}')"
    )


# Norms.


@piece(3)
def normalised(w):
    """Layer norm, norms over positions and root mean square norm, with a scale and a shift."""
    x = w.value(1, 3)
    axis = w.one_of(-1, -1, 0)
    mean = f"jnp.mean({x.name}, {axis}, keepdims=True)"
    centre = w.one_of(f"({x.name} - {mean})", x.name)
    below = f"jnp.mean(jnp.square({centre}), {axis}, keepdims=True) + 0.1"
    form = w.one_of(f"{centre} / jnp.sqrt({below})", f"{centre} * lax.rsqrt({below})")
    scale, shift = (w.of_shape(x.shape[-1], weight=True) for _ in range(2))
    w.say(form + w.one_of("", f" * {scale}", f" * {scale} + {shift}", f" * (1.0 + {scale})"))


@piece(2)
def normalised_weight(w):
    """Weight norm, spectral norm and unit vectors."""
    x = w.value(1, 2)
    inputs, outputs = _width(w, x)
    weight, scale = w.of_shape(inputs, outputs, weight=True), w.of_shape(outputs, weight=True)
    form = w.one_of(
        "{w} / jnp.sqrt(0.1 + jnp.sum(jnp.square({w}), 0, keepdims=True))",
        "{s} * {w} / jnp.linalg.norm({w}, axis=0)",
        "{w} / (1.0 + jnp.linalg.norm({w}))",
        "({w} - jnp.mean({w}, 0)) * {s}",
        "jax.nn.softmax({w}, 0)",
        "{w} * mask({r}, {i}, {o}) / (1.0 + jnp.sum(jnp.abs({w})))",
    )
    w.say(f"{x.name} @ ({form.format(w=weight, s=scale, r=w.seed(), i=inputs, o=outputs)})")


# Attention, cells, embeddings.


@piece(2)
def attention(w):
    x = w.value(2, 2)
    width, inner = x.shape[-1], w.size()
    if w.chance(0.3):
        heads = w.one_of(1, 2)
        q, k, v = (w.of_shape(width, heads, inner, weight=True) for _ in range(3))
        parts = ", ".join(f"jnp.einsum('td,dhk->thk', {x.name}, {name})[None].astype(float)" for name in (q, k, v))
        w.say(f"jax.nn.dot_product_attention({parts}, is_causal={w.chance(0.5)})[0]")
        return
    q, k, v = (w.of_shape(width, inner, weight=True) for _ in range(3))
    scores = f"({x.name} @ {q}) @ ({x.name} @ {k}).T"
    if w.chance(0.4):
        scores = f"jnp.where(jnp.tril(jnp.ones(({x.shape[0]}, {x.shape[0]}), bool)), {scores}, -1e9)"
    w.say(f"jax.nn.softmax({scores}) @ ({x.name} @ {v})")


@piece(3)
def recurrent(w):
    """A plain, gated or long short-term memory cell over time, of which the outputs or the last state are used."""
    xs = w.value(2, 2)
    inputs, width = xs.shape[-1], w.one_of(1, 1, 2)
    kind = w.one_of("rnn", "rnn", "gru", "lstm")
    gates = {"rnn": 1, "gru": 3, "lstm": 4}[kind]
    own, back = w.of_shape(inputs, gates * width, weight=True), w.of_shape(width, gates * width, weight=True)
    bias = w.of_shape(gates * width, weight=True)
    step, start = w.name("f"), f"jnp.full(({width},), 0.5)"
    cells = {
        "rnn": [f"h = jnp.tanh(x @ {own} + c @ {back} + {bias})"],
        "gru": [
            f"r, u, n = jnp.split(x @ {own} + {bias}, 3)",
            f"r, u = jax.nn.sigmoid(r + c @ {back}[:, :{width}]), jax.nn.sigmoid(u + c @ {back}[:, {width}:{2 * width}])",
            f"h = (1.0 - u) * jnp.tanh(n + r * (c @ {back}[:, {2 * width}:])) + u * c",
        ],
        "lstm": [
            "h, c = c",
            f"i, f, g, o = jnp.split(x @ {own} + h @ {back} + {bias}, 4)",
            "c = (jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)).astype(float)",
            "h = jax.nn.sigmoid(o) * jnp.tanh(c)",
        ],
    }
    carry = "(h, c)" if kind == "lstm" else "h"
    body = [*cells[kind], "h = h.astype(float)", f"return {carry}, h"]
    w.write([f"def {step}(c, x):", *("    " + line for line in body)])
    start = f"({start}, {start})" if kind == "lstm" else start
    options = w.one_of("", "", ", reverse=True", ", unroll=2", ", unroll=True")
    wrapped = w.one_of(step, step, f"jax.checkpoint({step})")
    part = w.one_of("[1]", "[0][0]" if kind == "lstm" else "[0]")
    w.say(f"lax.scan({wrapped}, {start}, {xs.name}{options}){part}")


@piece(3)
def embedding(w):
    width, high = w.size(), w.one_of(2, 3, 4)
    table = w.of_shape(high, width, weight=True)
    form = w.one_of(
        "{t}[k % {n}]",
        "{t}[k[0] % {n}]",
        "jnp.take({t}, k % {n}, axis=0)",
        "{t}[k % {n}].sum(0)",
        "jax.nn.one_hot(k % {n}, {n}) @ {t}",
        "{t}[k % {n}] @ {t}.T",
        "{t}[:2][k % 2]",
        "{t}[k % {n}] + {p}",
        "{t}[jnp.stack([k, k + 1]) % {n}]",
    )
    w.say(form.format(t=table, n=high, p=w.of_shape(width, weight=True)))


# Linear algebra.


@piece(3)
def linear_algebra(w):
    size = w.one_of(1, 2, 2, 3)
    matrix = f"2.5 * jnp.eye({size}) + 0.3 * jnp.tanh({w.of_shape(size, size)})"
    b = w.of_shape(size) if w.chance(0.6) else w.of_shape(size, w.size())
    made = w.say(f"({matrix}).astype(float)")
    if made is None:
        return
    a = made.name
    form = w.one_of(
        "jnp.linalg.solve({a}, {b})",
        "jnp.linalg.inv({a}) @ {b}",
        "jnp.linalg.det({a})",
        "jnp.linalg.slogdet({a})[1]",
        "jnp.linalg.cholesky({a} @ {a}.T)",
        "jax.scipy.linalg.solve_triangular(jnp.tril({a}), {b}, lower=True)",
        "lax.linalg.triangular_solve(jnp.tril({a}), jnp.reshape({b}, ({n}, -1)), left_side=True, lower=True)",
        "jnp.linalg.eigh(jnp.diag(jnp.arange({n}) * 1.0) + {a} + {a}.T)[0]",
        "jnp.linalg.svd(jnp.diag(jnp.arange({n}) * 1.0) + {a}, compute_uv=False)",
        "jnp.linalg.norm({a}, {o})",
        "jax.scipy.linalg.expm(0.3 * {a})",
        "jax.scipy.linalg.cho_solve((jnp.linalg.cholesky({a} @ {a}.T), True), {b})",
        "jnp.linalg.matrix_power({a}, {p})",
        "jnp.linalg.qr({a})[1]",
        "jnp.linalg.multi_dot([{a}, {a}.T, {b}])",
        "lax.custom_linear_solve(lambda v: {a} @ v, {b}, lambda f, v: jnp.linalg.solve({a}, v), "
        "lambda f, v: jnp.linalg.solve({a}.T, v))",
    )
    w.say(
        form.format(
            a=a, b=f"({b}).astype(float)", n=size, o=w.one_of("'fro'", "2", "1", "jnp.inf", "'nuc'"), p=w.one_of(-1, 2, 3)
        )
    )
