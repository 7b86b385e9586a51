"""`python -m benchmarks` measures what optimizer steps cost, here and elsewhere."""
