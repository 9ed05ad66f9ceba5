"""The states that sessions share: what each forbids, and that none leaks from one session into another."""

from __future__ import annotations

import pytest

from lineshaft.errors import SessionClosed, SessionFrozen, SessionPoisoned
from lineshaft_contract.reference.session import ReferenceSession
from lineshaft_contract.sessions import SessionState


def test_a_frozen_session_runs_and_does_not_change_until_it_is_thawed() -> None:
    session = SessionState()
    session.freeze()
    session.require_usable()
    with pytest.raises(SessionFrozen, match="capture on a frozen session"):
        session.require_changeable("capture")
    SessionState().require_changeable("capture")
    session.thaw()
    session.require_changeable("capture")


def test_a_failure_poisons_and_is_raised() -> None:
    session = SessionState()
    with pytest.raises(ZeroDivisionError), session.poison_on_failure():
        raise ZeroDivisionError("of a kernel")
    for call in (session.require_usable, session.freeze, session.thaw):
        with pytest.raises(SessionPoisoned, match="of a kernel"):
            call()
    SessionState().require_usable()


def test_after_close_the_reference_session_refuses_every_call() -> None:
    session = ReferenceSession()
    session.freeze()
    with pytest.raises(SessionFrozen):
        session.alloc_caches([], [], "")
    session.close()
    session.close()
    for call in (session.freeze, session.thaw, lambda: session.alloc_caches([], [], ""), lambda: session.update({})):
        with pytest.raises(SessionClosed):
            call()
