"""The configurations of other programs, translated into ours."""
