"""Where workers run: in this process, or each in a process of its own."""

from lineshaft.executors.base import Executor, ExecutorInfo, Forwarding, agree, make_executor

__all__ = ["Executor", "ExecutorInfo", "Forwarding", "agree", "make_executor"]
