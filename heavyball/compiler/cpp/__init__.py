"""C++ kernels: printing and building."""
