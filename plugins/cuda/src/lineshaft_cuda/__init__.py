"""The backend of lineshaft for NVIDIA GPUs: kernels of the Triton kit, graphs and collectives of the torch kit."""
