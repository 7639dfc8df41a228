"""Optimizers whose states are quantized: plain, sharded, and resumable at any world size."""
