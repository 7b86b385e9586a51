"""Transforms, chains of them, and the programs that they make."""
