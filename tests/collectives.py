"""What a device does and what devices send each other, read from a compiled program."""

from __future__ import annotations

import collections
import math
import re

KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


def collectives(text):
    """For every kind of collective operation in an HLO text, how many elements each one's results have."""
    found = collections.defaultdict(list)
    for shapes, kind in re.findall(rf"^.* = (.*?) ({'|'.join(KINDS)})(?:-start)?\(", text, re.M):
        found[kind].append(_elements(shapes))
    return dict(found)


def products(text):
    """How many elements the results of all matrix products have together, those in the body of a loop counted once."""
    return sum(_elements(shape) for shape in re.findall(r"^.* = (\S+) dot\(", text, re.M))


def largest(text):
    """The number of elements of the largest array of a program, on one device."""
    return max(
        math.prod(int(size) for size in sizes.split(",") if size) for sizes in re.findall(r"\b[a-z]+\d+\[([\d,]*)\]", text)
    )


def _elements(shapes):
    sizes = re.findall(r"\w+\[([\d,]*)\]", shapes)
    return sum(math.prod(int(size) for size in shape.split(",") if size) for shape in sizes)
