"""A user's own package, with one extension of each kind that `jaxfisher` supports, made with public names alone."""
