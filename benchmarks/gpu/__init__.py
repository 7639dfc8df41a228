"""`make bench-gpu`: every op's correctness, then its speed, on one real GPU in one command."""
