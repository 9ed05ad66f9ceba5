"""Continuous batching: which tokens of which requests the next step computes.

Deterministic, reads no clock, knows no arrays, devices, text or models.
"""

from __future__ import annotations

from lineshaft.scheduler.batch import Batch, Limits, Row
from lineshaft.scheduler.request import FinishReason, Request, Status
from lineshaft.scheduler.scheduler import Scheduler, SchedulerStats

__all__ = ["Batch", "FinishReason", "Limits", "Request", "Row", "Scheduler", "SchedulerStats", "Status"]
