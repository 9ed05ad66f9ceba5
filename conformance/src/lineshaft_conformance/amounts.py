"""Large numbers in words; knows nothing of what they mean."""

from __future__ import annotations


def human(size: int) -> str:
    """Bytes in the largest unit of which there is a whole one: "1.50 GiB"."""
    for unit, bytes_of in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= bytes_of:
            return f"{size / bytes_of:.2f} {unit}"
    return f"{size} B"


def amount(count: int) -> str:
    """A large number with a decimal prefix: "1.50 G"."""
    for unit, worth in (("P", 10**15), ("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= worth:
            return f"{count / worth:.2f} {unit}"
    return str(count)
