"""Scripts that print our figures: `python -m benchmarks.NAME`, from the root of the repository."""
