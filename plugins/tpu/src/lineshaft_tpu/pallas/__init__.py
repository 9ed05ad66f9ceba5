"""Kernels of this plugin's own, written in Pallas for the matrix and vector units, and what reads their reports."""
