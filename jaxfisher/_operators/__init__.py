"""Fisher matrices as linear operators on parameter pytrees, one stored form per file."""
