"""Benchmarks of Feinwerk beside its peers, run with `make bench` or `python -m benchmarks`."""
