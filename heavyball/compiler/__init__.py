"""Prints programs as kernels and runs them, see docs/compiler.md."""
