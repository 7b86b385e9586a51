"""Tables of tensors, and the engine that steps with them."""
