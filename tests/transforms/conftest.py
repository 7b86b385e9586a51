"""These tests look at the mathematics of the transforms, so they run them as written."""

from helpers import eager  # noqa: F401
