"""The CPU backend: the PyTorch kit's portable kernels on the host, and kernels made for it."""
