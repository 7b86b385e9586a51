"""Triton kernels: printing, and running them on a device."""
