"""The engine: from a gradient's program to the factors of every example's gradient."""
