"""One-pass loops on the CPU, compiled by numba, each beside its twin in torch operations.

Only the files loops*.py import numba. Where it is not installed, on other devices and while
torch.compile traces, the twins run; the results are the same.
"""
