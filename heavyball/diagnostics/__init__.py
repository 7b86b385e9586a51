"""Reports about an optimizer, and its warnings."""
