"""Compiles every GPU kernel for every architecture, without a GPU, and reads what it became: ``python -m benchmarks.audit``."""
