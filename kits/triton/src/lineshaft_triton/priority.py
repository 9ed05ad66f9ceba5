"""What outranks what on a GPU; the torch kit's portable kernels have 0, and anyone's may go above."""

from __future__ import annotations

TRITON = 20
"""A kernel of this kit."""
SPECIAL = 25
"""One of this kit for part of the problems that another of its kernels takes, and better on them."""
DECLARED = 10
"""A kernel of another package that is installed beside: it is taken where none of this kit is, or by name, since none
of its results have been seen here."""
