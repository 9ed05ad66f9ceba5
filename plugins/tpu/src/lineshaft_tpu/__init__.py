"""The TPU backend of lineshaft: plain JAX, Pallas kernels, and a compiler that needs no TPU."""
