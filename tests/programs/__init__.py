"""Random programs: log-densities of one example, which are written, run and compared with plain per-example gradients.

`write` returns the program of a seed, `compare.compare` the faults in the library's scores of it, and `reduce.reduced` a
smaller program with the same fault.
"""

from programs import arrays as arrays
from programs import layers as layers
from programs import nested as nested
from programs.writing import write as write
