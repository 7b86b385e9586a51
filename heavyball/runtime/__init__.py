"""Runs programs eagerly, tensor by tensor: the reference."""
