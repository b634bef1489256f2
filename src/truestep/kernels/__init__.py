"""One-pass loops on the CPU, compiled by numba, each beside its twin in torch operations.

Only the files in loops/ import numba. Where it is not installed and on other devices
the twins run; the results are the same.
"""
