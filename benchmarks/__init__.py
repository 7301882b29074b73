"""The benchmark suite. From the repository's root: ``python -m benchmarks.run``, then ``python -m benchmarks.report``."""
