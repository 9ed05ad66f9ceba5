"""What a plugin author reads: ops, problems, kernels, sessions, backends and hooks. Imports nothing of the rest."""
