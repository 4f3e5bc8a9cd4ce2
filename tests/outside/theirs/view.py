"""A view: a function from operator to operator."""

import dataclasses

import jaxfisher as jf


@dataclasses.dataclass(frozen=True)
class Softened:
    """A share of the Fisher plus the other share of its diagonal."""

    part: float

    def __call__(self, fisher: jf.Operator) -> jf.Operator:
        return self.part * jf.dense(fisher) + (1 - self.part) * jf.diagonal(fisher)


soften: jf.View = Softened(0.5)
