"""The backend of lineshaft for AMD GPUs: kernels of the Triton kit, graphs and collectives of the torch kit."""
