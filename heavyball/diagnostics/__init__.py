"""What an optimizer says of itself, and what it warns of."""
