"""Tables of static sizes: how often each length occurs, what a table pads, and which table pads least."""

from __future__ import annotations

from lineshaft_bench.padding.lengths import Lengths, read_lengths
from lineshaft_bench.padding.tables import MOST_BUCKETS, Choice, best_table, choose, powers_table

__all__ = ["MOST_BUCKETS", "Choice", "Lengths", "best_table", "choose", "powers_table", "read_lengths"]
