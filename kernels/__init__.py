"""What the ``apack`` ops compute: plain PyTorch for every op, beside it the GPU kernels."""
