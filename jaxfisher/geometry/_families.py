"""Matching two distributions of one family with the family's entry in a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from jaxfisher._distributions.foreign import as_distribution

T = TypeVar("T")


def matched(p: Any, q: Any, table: Mapping[type, T], caller: str, remedy: str) -> tuple[Any, Any, T]:
    """Both arguments as distributions of the library, and the entry of their family in ``table``."""
    first, second = as_distribution(p), as_distribution(q)
    kinds = [type(made).__name__ for made in (first, second)]
    if type(first) is not type(second):
        raise TypeError(f"{caller}: `p` is a {kinds[0]} and `q` a {kinds[1]}; expected two distributions of one family.")
    if type(first) not in table:
        known = ", ".join(sorted(family.__name__ for family in table))
        raise TypeError(f"{caller}: a {kinds[0]} has no closed form here; expected one of {known}. {remedy}")
    if first._own_shapes() != second._own_shapes():
        raise ValueError(
            f"{caller}: the two are over different spaces: {first} and {second}. Give both the same number of classes or "
            "dimensions."
        )
    return first, second, table[type(first)]
