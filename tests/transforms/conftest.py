"""These tests look at the mathematics of the transforms, so they run them as written."""

from oracles import eager  # noqa: F401
