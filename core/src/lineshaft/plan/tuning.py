"""Settles ties of tunable kernels before anything is captured, and keeps how in a file for later starts.

Knows neither the configuration nor other ranks. How kernels are measured is in `lineshaft_contract.timing`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from pydantic import TypeAdapter

from lineshaft_contract.sessions import Session
from lineshaft_contract.timing import Choice, Contest, measure
from lineshaft_contract.weights import Checkpoint

log = logging.getLogger(__name__)
CHOICES = TypeAdapter(dict[str, Choice])


def settle(ties: Iterable[Contest], session: Callable[[], Session], checkpoint: Checkpoint) -> dict[str, Choice]:
    """The kernel of each tie, by op and described problem, measured in sessions that `session` makes.

    Raises Unsupported where all kernels of a tie fail.
    """
    choices = {}
    for name, contest in {contest.name: contest for contest in ties}.items():
        choices[name] = choice = measure(contest, session, checkpoint)
        log.info("%s: %s is taken (%s)", name, choice.kernel, choice)
    return choices


def kept(file: Path) -> dict[str, Choice]:
    """The choices that earlier starts have kept; none, and a warning, where the file cannot be used."""
    try:
        return CHOICES.validate_json(file.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("%s cannot be used (%s): kernels are measured anew", file, " ".join(str(error).split()))
        return {}


def keep(file: Path, choices: Mapping[str, Choice]) -> None:
    """Keep choices, all or, with a warning, none."""
    part = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        part.write_bytes(CHOICES.dump_json({**choices}))
        part.replace(file)
    except OSError as error:
        log.warning("%s cannot be written (%s): kernels are measured at each start", file, error.strerror)
