"""What a request asks of sampling, and the host's half of it: draws, edits and masks of logits, grammars, stop strings.

Knows nothing of models, devices or the scheduler. The parts that need NumPy are imported from their own modules.
"""

from __future__ import annotations

from lineshaft.sampling.params import SamplingParams
from lineshaft.sampling.stop import StopStrings
from lineshaft.sampling.structured import Structured

__all__ = ["SamplingParams", "StopStrings", "Structured"]
