"""Engines of several ranks, whose workers start the subject as the suite does, mutants and all."""

from __future__ import annotations

import sys

from lineshaft.config import EngineConfig
from lineshaft.executors import Executor
from lineshaft.executors.child import main
from lineshaft.executors.inproc import InprocExecutor
from lineshaft.executors.process import ProcessExecutor
from lineshaft.runner.worker import Worker
from lineshaft_conformance.subject import Subject, Target


def mesh_executor(subject: Subject, config: EngineConfig) -> Executor:
    """Core's executor of the configured ranks over the subject: in this process where it runs them in one program, else
    a process each, which finds the plugin as any process does, by its entry point."""
    if subject.info.single_program:
        return InprocExecutor(config, subject.registry, subject.start)
    return ProcessExecutor(config, subject.registry, (__name__, f"mutant={subject.target.mutant}"))


def make_worker(mutant: str, config: EngineConfig, rank: int, rendezvous: str) -> Worker:
    """A worker over the subject that the configuration names."""
    subject = Subject(Target(config.backend, config.backend_options, mutant))
    return Worker(config, rank, rendezvous, subject.registry, subject.start)


if __name__ == "__main__":
    named, *rest = sys.argv[1:]
    main(rest, lambda *place: make_worker(named.removeprefix("mutant="), *place))
