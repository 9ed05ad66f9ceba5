"""The planner: from a traced forward to a frozen choice of kernels."""

from lineshaft.plan.plan import Plan, PlanEntry
from lineshaft.plan.planner import Planned, ProgramSpec, Workload, make_plan
from lineshaft.plan.resolve import Rejection, Resolver

__all__ = ["Plan", "PlanEntry", "Planned", "ProgramSpec", "Rejection", "Resolver", "Workload", "make_plan"]
