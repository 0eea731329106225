"""The benchmark suite: see README.md here; ``make bench``, ``make bench-quick``, ``make bench-report``."""
