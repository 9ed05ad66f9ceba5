"""What a request asks of sampling, and the host-side halves of it: random draws and stop strings.

Knows nothing of models, devices or the scheduler. `draw` (the only part that needs NumPy) is imported from
`lineshaft.sampling.draw`.
"""

from __future__ import annotations

from lineshaft.sampling.params import SamplingParams
from lineshaft.sampling.stop import StopStrings

__all__ = ["SamplingParams", "StopStrings"]
