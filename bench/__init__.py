"""Benchmarks: ``pytest bench/`` times every operation, ``python bench/report.py`` also writes the results down."""
