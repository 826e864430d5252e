"""Triton kernels of the ``apack`` ops. Import only where Triton is installed."""
