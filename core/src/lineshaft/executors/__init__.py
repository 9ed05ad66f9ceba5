"""Where workers run: in this process, or each in a process of its own."""

from lineshaft.executors.base import Executor, ExecutorInfo, agree, make_executor

__all__ = ["Executor", "ExecutorInfo", "agree", "make_executor"]
