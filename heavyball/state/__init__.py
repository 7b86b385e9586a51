"""State: what is declared, the formats in which it is kept, and their arithmetic."""
