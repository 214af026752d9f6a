"""Benchmarks: run by hand through `make bench`; they print medians and ratios and assert nothing."""
