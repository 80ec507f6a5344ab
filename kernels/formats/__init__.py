"""Model files: readers that trust nothing they read."""
