"""Continuous batching: which tokens of which requests the next step computes.

Deterministic, reads no clock, knows no arrays, devices, text or models.
"""

from __future__ import annotations

from lineshaft.scheduler.batch import Batch, Limits, Row
from lineshaft.scheduler.cost import Score, StepCost, fit
from lineshaft.scheduler.estimate import Scores
from lineshaft.scheduler.policy import ADMISSION, PREEMPTION, Policy
from lineshaft.scheduler.request import FinishReason, Request, Status
from lineshaft.scheduler.scheduler import Counters, Scheduler, SchedulerStats

__all__ = [
    "ADMISSION",
    "PREEMPTION",
    "Batch",
    "Counters",
    "FinishReason",
    "Limits",
    "Policy",
    "Request",
    "Row",
    "Scheduler",
    "SchedulerStats",
    "Score",
    "Scores",
    "Status",
    "StepCost",
    "fit",
]
