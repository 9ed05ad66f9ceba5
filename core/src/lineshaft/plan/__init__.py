"""The planner: from a traced forward to a frozen choice of kernels."""

from lineshaft.plan.plan import Plan, PlanEntry
from lineshaft.plan.planner import Planned, make_plan
from lineshaft.plan.resolve import Rejection, Resolver
from lineshaft.plan.trace import ProgramSpec, Workload

__all__ = ["Plan", "PlanEntry", "Planned", "ProgramSpec", "Rejection", "Resolver", "Workload", "make_plan"]
