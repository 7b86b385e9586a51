"""State: declarations, storage formats and their arithmetic."""
