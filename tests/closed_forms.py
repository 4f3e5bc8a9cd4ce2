"""The families in closed form, in mpmath: what tests of digits compare with. Never imports jaxfisher.

A family is a class of functions of flat lists of numbers: the fields of a distribution, in the order of its pytree, and a draw.
A family whose divergence, entropy or information has no closed form lacks the function.
"""

# ruff: noqa: E731

import mpmath
from mpmath import mpf

exp, log, log1p = mpmath.exp, mpmath.log, mpmath.log1p
lgamma, digamma, trigamma = mpmath.loggamma, mpmath.digamma, lambda a: mpmath.polygamma(1, a)
TAU = 2 * mpmath.pi


def diagonal(entries):
    return [[entry if i == j else mpf(0) for j in range(len(entries))] for i, entry in enumerate(entries)]


def flat(rows):
    return [entry for row in rows for entry in row]


class Normal:
    def log_prob(f, x):
        (m, s), (x,) = f, x
        return [-(((x - m) / s) ** 2) / 2 - log(s) - log(TAU) / 2]

    def kl(f, g):
        (m, s), (n, t) = f, g
        return [((s / t) ** 2 - 1 + ((m - n) / t) ** 2) / 2 - log(s / t)]

    entropy = lambda f: [log(f[1]) + (log(TAU) + 1) / 2]
    mean = mode = lambda f: [f[0]]
    variance = lambda f: [f[1] ** 2]
    fisher = lambda f: flat(diagonal([1 / f[1] ** 2, 2 / f[1] ** 2]))


class Laplace:
    def log_prob(f, x):
        (m, s), (x,) = f, x
        return [-abs(x - m) / s - log(2 * s)]

    def kl(f, g):
        (m, s), (n, t) = f, g
        d = abs(m - n)
        return [d / t + s / t * exp(-d / s) - 1 - log(s / t)]

    entropy = lambda f: [log(2 * f[1]) + 1]
    mean = mode = lambda f: [f[0]]
    variance = lambda f: [2 * f[1] ** 2]
    fisher = lambda f: flat(diagonal([1 / f[1] ** 2, 1 / f[1] ** 2]))


def log_softmax(z):
    top = max(z)
    whole = log1p(mpmath.fsum([exp(v - top) for v in z]) - 1)
    return [v - top - whole for v in z]


class Categorical:
    log_prob = lambda f, x: [log_softmax(f)[int(x[0])]]

    def kl(f, g):
        p, q = log_softmax(f), log_softmax(g)
        return [mpmath.fsum(exp(a) * (a - b) for a, b in zip(p, q, strict=True))]

    entropy = lambda f: [-mpmath.fsum(exp(a) * a for a in log_softmax(f))]
    mean = lambda f: [mpmath.fsum(c * exp(a) for c, a in enumerate(log_softmax(f)))]
    mode = lambda f: [mpf(max(range(len(f)), key=lambda c: f[c]))]

    def variance(f):
        p, (mean,) = list(map(exp, log_softmax(f))), Categorical.mean(f)
        return [mpmath.fsum(a * (c - mean) ** 2 for c, a in enumerate(p))]

    def fisher(f):
        p = list(map(exp, log_softmax(f)))
        rest = [mpmath.fsum(b for j, b in enumerate(p) if j != i) for i in range(len(p))]
        return [a * rest[i] if i == j else -a * b for i, a in enumerate(p) for j, b in enumerate(p)]


class Bernoulli:
    log_prob = lambda f, x: Categorical.log_prob([mpf(0), f[0]], x)
    kl = lambda f, g: Categorical.kl([mpf(0), f[0]], [mpf(0), g[0]])
    entropy = lambda f: Categorical.entropy([mpf(0), f[0]])
    mean = lambda f: [exp(log_softmax([mpf(0), f[0]])[1])]
    variance = lambda f: [exp(sum(log_softmax([mpf(0), f[0]])))]
    mode = lambda f: [mpf(f[0] > 0)]
    fisher = variance


class Poisson:
    log_prob = lambda f, x: [(x[0] * f[0] if x[0] else 0) - exp(f[0]) - lgamma(x[0] + 1)]
    kl = lambda f, g: [exp(f[0]) * (f[0] - g[0]) - exp(f[0]) + exp(g[0])]
    mean = variance = fisher = lambda f: [exp(f[0])]
    mode = lambda f: [mpmath.floor(exp(f[0]))]


class Exponential:
    log_prob = lambda f, x: [f[0] - x[0] * exp(f[0])]
    kl = lambda f, g: [exp(g[0] - f[0]) - 1 - (g[0] - f[0])]
    entropy = lambda f: [1 - f[0]]
    mean = lambda f: [exp(-f[0])]
    variance = lambda f: [exp(-2 * f[0])]
    mode = lambda f: [mpf(0)]
    fisher = lambda f: [mpf(1)]


class Gamma:
    def log_prob(f, x):
        (a, b), (x,) = f, x
        return [a * log(b) + (a - 1) * log(x) - b * x - lgamma(a)]

    def kl(f, g):
        (a, b), (c, d) = f, g
        return [(a - c) * digamma(a) - lgamma(a) + lgamma(c) + c * log(b / d) + a * (d - b) / b]

    entropy = lambda f: [f[0] - log(f[1]) + lgamma(f[0]) + (1 - f[0]) * digamma(f[0])]
    mean = lambda f: [f[0] / f[1]]
    variance = lambda f: [f[0] / f[1] ** 2]
    mode = lambda f: [max(f[0] - 1, mpf(0)) / f[1]]
    fisher = lambda f: [trigamma(f[0]), -1 / f[1], -1 / f[1], f[0] / f[1] ** 2]


def log_beta(a):
    return sum(map(lgamma, a)) - lgamma(sum(a))


class Dirichlet:
    log_prob = lambda f, x: [sum((a - 1) * log(v) for a, v in zip(f, x, strict=True)) - log_beta(f)]

    def kl(f, g):
        slope = digamma(sum(f))
        return [log_beta(g) - log_beta(f) + sum((a - b) * (digamma(a) - slope) for a, b in zip(f, g, strict=True))]

    entropy = lambda f: [log_beta(f) + (sum(f) - len(f)) * digamma(sum(f)) - sum((a - 1) * digamma(a) for a in f)]
    mean = lambda f: [a / sum(f) for a in f]
    variance = lambda f: [a * (sum(f) - a) / sum(f) ** 2 / (sum(f) + 1) for a in f]
    mode = lambda f: [(a - 1) / (sum(f) - len(f)) for a in f] if min(f) > 1 else [mpf("nan")] * len(f)
    fisher = lambda f: [entry - trigamma(sum(f)) for entry in flat(diagonal([trigamma(a) for a in f]))]


class Beta:
    log_prob = lambda f, x: Dirichlet.log_prob(f, [x[0], 1 - x[0]])
    kl, entropy, fisher = Dirichlet.kl, Dirichlet.entropy, Dirichlet.fisher
    mean = lambda f: Dirichlet.mean(f)[:1]
    variance = lambda f: Dirichlet.variance(f)[:1]

    def mode(f):
        a, b = f
        return [(a - 1) / (a + b - 2)] if min(f) > 1 else [mpf(a > 1) if (a > 1) != (b > 1) else mpf("nan")]


class StudentT:
    def log_prob(f, x):
        (v, m, s), (x,) = f, x
        scale = lgamma((v + 1) / 2) - lgamma(v / 2) - log(mpmath.pi * v) / 2 - log(s)
        return [scale - (v + 1) / 2 * log1p(((x - m) / s) ** 2 / v)]

    def entropy(f):
        v, _, s = f
        step = digamma((v + 1) / 2) - digamma(v / 2)
        return [(v + 1) / 2 * step + log(v) / 2 + log(s) + log_beta([v / 2, mpf("0.5")])]

    mean = lambda f: [f[1] if f[0] > 1 else mpf("nan")]
    mode = lambda f: [f[1]]
    variance = lambda f: [f[2] ** 2 * f[0] / (f[0] - 2) if f[0] > 2 else mpf("inf" if f[0] > 1 else "nan")]

    def fisher(f):
        v, _, s = f
        of_df = (trigamma(v / 2) - trigamma((v + 1) / 2)) / 4 - (v + 5) / (2 * v * (v + 1) * (v + 3))
        both = -2 / (s * (v + 1) * (v + 3))
        return [of_df, mpf(0), both, mpf(0), (v + 1) / (v + 3) / s**2, mpf(0), both, mpf(0), 2 * v / (v + 3) / s**2]


class NegativeBinomial:
    def log_prob(f, x):
        (m, r), (k,) = (exp(f[0]), exp(-f[1])), x
        return [lgamma(k + r) - lgamma(r) - lgamma(k + 1) - r * log1p(m / r) - (k * log1p(r / m) if k else 0)]

    mean = lambda f: [exp(f[0])]
    variance = lambda f: [exp(f[0]) + exp(2 * f[0] + f[1])]
    mode = lambda f: [mpmath.floor(exp(f[0]) * max(1 - exp(f[1]), mpf(0)))]


class MultivariateNormal:
    """Of two axes: the fields are the mean and the four entries of the factor."""

    def log_prob(f, x):
        first, second = whitened(f, [x[0] - f[0], x[1] - f[1]])
        return [-(first**2 + second**2) / 2 - log(f[2]) - log(f[5]) - log(TAU)]

    def kl(f, g):
        columns = [f[2], f[4]], [mpf(0), f[5]], [f[0] - g[0], f[1] - g[1]]
        total = sum(v**2 for column in columns for v in whitened(g, column))
        return [(total - 2) / 2 + log(g[2] / f[2]) + log(g[5] / f[5])]

    entropy = lambda f: [log(f[2]) + log(f[5]) + log(TAU) + 1]
    mean = mode = lambda f: f[:2]
    variance = lambda f: [f[2] ** 2, f[4] ** 2 + f[5] ** 2]

    def fisher(f):
        columns = [whitened(f, [mpf(1), mpf(0)]), whitened(f, [mpf(0), mpf(1)])]
        of_loc = [[a[0] * b[0] + a[1] * b[1] for b in columns] for a in columns]
        rows = [[mpf(0)] * 6 for _ in range(6)]
        for i in range(2):
            rows[i][:2] = of_loc[i]
        # A = L^-1 dL: its first column is moved by dL_00 and dL_10, its last entry by dL_11.
        for i, a in ((2, columns[0]), (4, columns[1])):
            for j, b in ((2, columns[0]), (4, columns[1])):
                rows[i][j] = 2 * a[0] * b[0] + a[1] * b[1]
        rows[5][5] = 2 * columns[1][1] ** 2
        return flat(rows)


def whitened(f, v):
    first = v[0] / f[2]
    return [first, (v[1] - f[4] * first) / f[5]]
