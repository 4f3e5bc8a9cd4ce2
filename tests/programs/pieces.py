"""The kinds of pieces a random program is made of, and how often each is tried."""

PIECES = {}
WEIGHTS = {}


def piece(weight=1.0):
    """Register a function that writes a piece with a writer, tried in proportion to ``weight``."""

    def register(function):
        PIECES[function.__name__] = function
        WEIGHTS[function.__name__] = weight
        return function

    return register


def grow(writer, steps, only=None):
    """Write ``steps`` pieces. If the statements of a piece are refused, it is counted as refused and another one is tried."""
    names = list(only or PIECES)
    weights = [WEIGHTS[name] for name in names]
    book = writer.book
    for _ in range(steps):
        for _ in range(6):
            (name,) = writer.rng.choices(names, weights)
            before = len(writer.lines)
            PIECES[name](writer)
            tally = book.accepted if len(writer.lines) > before else book.refused
            tally[name] = tally.get(name, 0) + 1
            if len(writer.lines) > before:
                break
