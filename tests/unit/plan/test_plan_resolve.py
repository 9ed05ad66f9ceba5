"""No kernel is chosen silently: every decline has a reason, every tie an answer, every named kernel runs or raises."""

from dataclasses import replace

import pytest

from lineshaft.errors import Ambiguous, Unsupported
from lineshaft.plan.resolve import Resolver, joint_layout
from lineshaft_contract.kernels import Kernel
from lineshaft_contract.problems import AttendProblem, LinearProblem

LINEAR = LinearProblem(dtype="float32", n=8, k=4, m=2)
ATTEND = AttendProblem(
    dtype="float32", q_heads=2, kv_heads=1, qk_dim=4, v_dim=4, page_size=8, scale=0.5, kv_dtype="float32"
)


def kernel(name: str, op: str = "linear", **fields: object) -> Kernel:
    return Kernel(name=name, op=op, backend="test", bind=lambda problem, session: None, **fields)  # type: ignore[arg-type]


def resolver(*kernels: Kernel, **named: str) -> Resolver:
    return Resolver("test", kernels, named)


def test_the_highest_priority_wins_and_the_loser_is_listed() -> None:
    found = resolver(kernel("slow"), kernel("fast", priority=5)).candidates("linear", LINEAR)
    assert found.best().name == "fast"
    assert [(r.kernel, r.reason) for r in found.rejections(found.best())] == [("slow", "priority 0 is below 5 of fast")]


def test_a_kernel_is_never_chosen_for_a_feature_it_never_heard_of() -> None:
    plain, knowing = kernel("plain", "attend", priority=9), kernel("knowing", "attend", handles=frozenset({"window"}))
    found = resolver(plain, knowing).candidates("attend", replace(ATTEND, window=16))
    assert found.best().name == "knowing"
    assert found.rejected[0].reason == "does not handle window"


def test_unsupported_lists_every_reason() -> None:
    declines = kernel("narrow", supports=lambda problem: "n must be a multiple of 16")
    old = kernel("old", api=7)
    with pytest.raises(Unsupported) as error:
        resolver(declines, old).candidates("linear", LINEAR).best()
    assert "narrow: n must be a multiple of 16" in str(error.value)
    assert "old: written for contract version 7" in str(error.value)
    with pytest.raises(Unsupported, match="registers no kernel"):
        resolver().candidates("linear", LINEAR).best()


def test_a_tie_prints_the_line_that_settles_it_and_the_line_does() -> None:
    twins = (kernel("a", priority=1), kernel("b", priority=1))
    with pytest.raises(Ambiguous, match=r'\[kernels\] linear = "a"'):
        resolver(*twins).candidates("linear", LINEAR).best()
    found = resolver(*twins, linear="b").candidates("linear", LINEAR)
    assert found.best().name == "b" and found.rejected[0].reason == "[kernels] linear names b"


def test_a_named_kernel_that_declines_raises_instead_of_another_being_taken() -> None:
    named = kernel("named", supports=lambda problem: "not today")
    with pytest.raises(Unsupported, match="not today"):
        resolver(named, kernel("other"), linear="named").candidates("linear", LINEAR).best()
    with pytest.raises(Unsupported, match="no such kernel"):
        resolver(kernel("other"), linear="nmaed")


def test_all_uses_of_a_weight_get_one_packing() -> None:
    wide, narrow = replace(LINEAR, m=512), replace(LINEAR, m=1)
    tiled = kernel("tiled", priority=5, layout="tiles", supports=lambda p: None if p.m >= 16 else "m below 16")
    tiled_slow = kernel("tiled_slow", priority=1, layout="tiles")
    plain = kernel("plain", priority=2, layout="rows")
    found = resolver(tiled, tiled_slow, plain)
    both = [found.candidates("linear", wide), found.candidates("linear", narrow)]
    assert joint_layout(both, "w") == "tiles"  # 5 + 1 against 2 + 2
    assert both[1].best("tiles").name == "tiled_slow"
    assert [r.reason for r in both[1].rejections(both[1].best("tiles")) if r.kernel == "plain"] == [
        "its layout 'rows' is not the one chosen jointly, 'tiles'"
    ]


def test_no_common_packing_is_an_error() -> None:
    only_wide = kernel("only_wide", layout="tiles", supports=lambda p: None if p.m > 1 else "m is 1")
    only_narrow = kernel("only_narrow", layout="rows", supports=lambda p: None if p.m == 1 else "m above 1")
    found = resolver(only_wide, only_narrow)
    uses = [found.candidates("linear", replace(LINEAR, m=m)) for m in (1, 8)]
    with pytest.raises(Unsupported, match="no packing of w serves all its uses"):
        joint_layout(uses, "w")


def test_equally_good_packings_are_a_tie() -> None:
    found = resolver(kernel("a", layout="x"), kernel("b", layout="y")).candidates("linear", LINEAR)
    with pytest.raises(Ambiguous, match="x, y"):
        joint_layout([found], "w")
