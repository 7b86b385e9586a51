"""Records the real runner as a graph."""
