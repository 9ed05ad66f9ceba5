"""Ties of tunable kernels: what settles them, what the plan says of it, and what is kept of it on disk."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from lineshaft.errors import Ambiguous, Unsupported
from lineshaft.plan import Plan, Planned, ProgramSpec, Resolver, Workload, make_plan
from lineshaft.plan.tuning import keep, kept, settle
from lineshaft_contract.kernels import Kernel
from lineshaft_contract.ops import all_ops
from lineshaft_contract.problems import AttendProblem, CollectiveProblem, LinearProblem, NormProblem
from lineshaft_contract.reference.backend import reference_kernel
from lineshaft_contract.reference.session import ReferenceSession
from lineshaft_contract.steps import InputField, InputLayout, StepShape
from lineshaft_contract.timing import Choice
from lineshaft_contract.weights import Local, Param

OPS = all_ops()
ROWS, WIDTH = 3, 8
NORM = NormProblem(dtype="float32", width=WIDTH, eps=1e-5)
LINEAR = LinearProblem(dtype="float32", n=4, k=WIDTH)
TIE = f"rms_norm {replace(NORM, rows=ROWS).describe()}"
SLOW = 0.003


class Checkpoint:
    """A checkpoint that nobody may read."""


def unread(checkpoint: object, place: object) -> Local:
    raise AssertionError("the model's own values were read")


def kernel(op: str, name: str, seconds: float = 0.0, raises: str = "", **fields: Any) -> Kernel:
    """The reference of an op, later by so many seconds at each call."""
    made = reference_kernel(OPS[op])

    def bind(problem: Any, session: Any) -> Callable[..., Any]:
        if raises:
            raise RuntimeError(raises)
        run = made.bind(problem, session)
        return lambda *args, **kwargs: (time.sleep(seconds), run(*args, **kwargs))[1]

    return replace(made, name=name, bind=bind, **{"tunable": True, **fields})


def forward(ops: Any, w: Any, caches: Any, inputs: Any, arrays: Any) -> tuple[dict[str, Any], list[Any]]:
    return {"y": ops.linear(ops.rms_norm(inputs.arrays["x"], w["norm"]), w["proj"])}, caches


def plan(*norms: Kernel, settled: Mapping[str, Choice] | None = None, **named: str) -> Planned:
    """A plan of a norm, for which these kernels are there, and a product, which has but one."""
    params = {
        "norm": Param("norm", "norm", (WIDTH,), "float32", {"norm": NORM}, unread),
        "proj": Param("proj", "proj", (4, WIDTH), "float32", {"linear": LINEAR}, unread),
    }
    inputs = InputLayout([InputField("x", "float32", (ROWS, WIDTH))])
    work = Workload(params, [], {}, [ProgramSpec("run", forward, StepShape(ROWS, 1, (), 1, ROWS), inputs)], {})
    resolver = Resolver("numpy", [*norms, reference_kernel(OPS["linear"])], named, settled or {})
    return make_plan("numpy", work, resolver, OPS)


def measured(*norms: Kernel) -> Plan:
    """The plan once its ties are settled."""
    return plan(*norms, settled=settle(plan(*norms).ties, ReferenceSession, Checkpoint())).plan


def chosen(plan: Plan) -> str:
    return next(entry.kernel for entry in plan.entries if entry.op == "rms_norm")


def reasons(plan: Plan) -> dict[str, str]:
    return {r.kernel: r.reason for entry in plan.entries if entry.op == "rms_norm" for r in entry.rejected}


def test_until_it_is_settled_a_tie_goes_to_the_first_by_name_and_says_so() -> None:
    planned = plan(kernel("rms_norm", "b"), kernel("rms_norm", "a", SLOW))
    assert chosen(planned.plan) == "a"
    assert [contest.name for contest in planned.ties] == [TIE]
    assert str(planned.plan.choices[TIE]) == "not measured"
    assert reasons(planned.plan) == {"b": "a comes first by name: not measured"}


def test_the_fastest_is_chosen_and_the_plan_tells_every_time() -> None:
    made = measured(kernel("rms_norm", "a_slow", SLOW), kernel("rms_norm", "b_fast"))
    assert chosen(made) == "b_fast"
    choice = made.choices[TIE]
    assert choice.seconds["b_fast"] < SLOW <= choice.seconds["a_slow"]
    assert reasons(made) == {"a_slow": "b_fast was not slower"}
    assert TypeAdapter(Plan).validate_python(json.loads(json.dumps(made.to_json()))) == made
    assert made.to_json()["choices"][TIE]["seconds"] == dict(choice.seconds)


def test_the_hash_covers_the_choice_and_not_the_times() -> None:
    kernels = (kernel("rms_norm", "a"), kernel("rms_norm", "b"))

    def hash_of(choice: Choice) -> str:
        return plan(*kernels, settled={TIE: choice}).plan.hash

    a = hash_of(Choice("a", {"a": 1.0, "b": 2.0}))
    assert a == hash_of(Choice("a", {"a": 3.5, "b": 3.6})) == hash_of(Choice("a", {"a": 1.0}, {"b": "raises"}))
    assert a == plan(*kernels).plan.hash  # the same kernel, not measured
    assert a != hash_of(Choice("b", {"a": 2.0, "b": 1.0}))


def test_one_that_raises_is_dropped_with_its_reason() -> None:
    made = measured(
        kernel("rms_norm", "a", raises="no such unit"), kernel("rms_norm", "b", SLOW), kernel("rms_norm", "c")
    )
    assert chosen(made) == "c" and made.choices[TIE].seconds.keys() == {"b", "c"}
    assert "no such unit" in reasons(made)["a"] and reasons(made)["b"] == "c was not slower"


def test_where_all_raise_the_error_names_them() -> None:
    broken = [kernel("rms_norm", name, raises="no such unit") for name in ("a", "b")]
    with pytest.raises(Unsupported, match=r"rms_norm .*: a raises .*no such unit; b raises .*no such unit"):
        measured(*broken)


def test_a_lower_priority_does_not_compete() -> None:
    made = plan(kernel("rms_norm", "a", priority=1), kernel("rms_norm", "b", priority=1), kernel("rms_norm", "c"))
    (contest,) = made.ties
    assert [k.name for k in contest.kernels] == ["a", "b"]
    assert reasons(made.plan)["c"] == "priority 0 is below 1 of a"


def test_a_named_kernel_wins_without_a_measurement() -> None:
    made = plan(kernel("rms_norm", "a"), kernel("rms_norm", "b"), rms_norm="b")
    assert chosen(made.plan) == "b" and not made.ties and not made.plan.choices


def test_a_tie_with_a_kernel_that_is_not_tunable_is_ambiguous() -> None:
    with pytest.raises(Ambiguous, match=r"not tunable: b\); settle it with `\[kernels\] rms_norm = \"a\"`"):
        plan(kernel("rms_norm", "a"), kernel("rms_norm", "b", tunable=False))


PAGED = AttendProblem(
    dtype="float32", q_heads=2, kv_heads=1, qk_dim=4, v_dim=4, page_size=8, scale=0.5, kv_dtype="float32"
)
GATHER = CollectiveProblem(dtype="float32", axis=("tp",), size=1, shape=(4,))


@pytest.mark.parametrize(("op", "problem", "why"), [("attend", PAGED, "lengths"), ("all_gather", GATHER, "no rank")])
def test_what_cannot_be_measured_stays_ambiguous_with_the_reason(op: str, problem: Any, why: str) -> None:
    resolver = Resolver("numpy", [kernel(op, "a"), kernel(op, "b")], {})
    with pytest.raises(Ambiguous, match=rf"not measured \(.*{why}"):
        resolver.choose(op, problem)


def test_only_kernels_of_the_layout_that_was_chosen_jointly_compete() -> None:
    tiles = [kernel("rms_norm", name, layout="tiles", priority=2) for name in ("a", "b")]
    made = plan(*tiles, kernel("rms_norm", "c", layout="rows"))
    (contest,) = made.ties
    assert [k.name for k in contest.kernels] == ["a", "b"]
    assert reasons(made.plan)["c"] == "its layout 'rows' is not the one chosen jointly, 'tiles'"


@pytest.mark.parametrize(
    "known",
    [
        Choice("b"),
        Choice("b", {"b": 1.0}),
        Choice("b", {"a": 2.0, "b": 1.0, "c": 3.0}),
        Choice("c", {"a": 2.0, "b": 1.0}),
    ],
    ids=["not measured", "without a", "with another", "of another"],
)
def test_a_choice_among_other_kernels_settles_nothing(known: Choice) -> None:
    made = plan(kernel("rms_norm", "a"), kernel("rms_norm", "b"), settled={TIE: known})
    assert chosen(made.plan) == "a" and len(made.ties) == 1


def test_a_pair_is_measured_once_however_many_programs_have_it() -> None:
    planned = plan(kernel("rms_norm", "a"), kernel("rms_norm", "b"))
    made: list[ReferenceSession] = []

    def session() -> ReferenceSession:
        made.append(ReferenceSession())
        return made[-1]

    assert settle([*planned.ties, *planned.ties], session, Checkpoint()).keys() == {TIE}
    assert len(made) == 1


CHOICES = {"add x": Choice("b", {"a": 2e-5, "b": 1.1e-5}, {"c": "raises it"}), "add y": Choice("a", {"a": 1.0})}


def test_choices_are_kept_on_disk(tmp_path: Path) -> None:
    file = tmp_path / "new" / "folder" / "choices.json"
    assert kept(file) == {}
    keep(file, CHOICES)
    assert kept(file) == CHOICES
    assert [path.name for path in file.parent.iterdir()] == ["choices.json"]
    assert file.parent.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"add x": {"kernel": 3}}', b'{"add x": null}', b"\xff\xfe"])
def test_a_damaged_file_is_a_warning(tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "choices.json"
    file.write_bytes(damage)
    assert kept(file) == {}
    (record,) = caplog.records
    assert str(file) in record.getMessage() and "measured anew" in record.getMessage()
    keep(file, CHOICES)
    assert kept(file) == CHOICES


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "taken").write_text("a file where the folder should be")
    keep(tmp_path / "taken" / "choices.json", CHOICES)
    (record,) = caplog.records
    assert "measured at each start" in record.getMessage()


def test_what_was_kept_stays_whole_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "choices.json"
    keep(file, CHOICES)

    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as out:
            out.write(data[:7])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    keep(file, {})
    assert kept(file) == CHOICES
