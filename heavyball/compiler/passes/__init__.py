"""Graph in, graph or schedule out."""
