"""One-pass loops on the CPU, compiled by numba, each beside its twin in torch operations.

Nothing else imports numba. Where it is not installed, on other devices and while torch.compile traces,
the twins run; the results are the same.
"""
