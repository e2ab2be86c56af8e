"""Probes and checks for a machine with a GPU; run by benchmarks/gpu_check.sh."""
