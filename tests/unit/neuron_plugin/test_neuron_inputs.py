"""How a step's inputs travel to the device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lineshaft_contract.steps import (
    HostStep,
    InputLayout,
    StepShape,
    edit_inputs,
    forward_inputs,
    mask_inputs,
    sample_inputs,
)
from lineshaft_neuron.inputs import PackedInputs

CPU = torch.device("cpu")
LAYOUTS = [forward_inputs(StepShape(7, 3, (5, 2), 2, 7)), sample_inputs(3, True), mask_inputs(2, 70), edit_inputs(3, 4)]


def filled(layout: InputLayout) -> HostStep:
    rng, step = np.random.default_rng(7), HostStep(layout)
    for view in step.views.values():
        random = rng.random(view.shape) if view.dtype.kind == "f" else rng.integers(0, 2**32, view.shape, np.uint32)
        view[...] = random if view.dtype.kind in "fu" else (random >> 1)
    return step


@pytest.mark.parametrize("layout", LAYOUTS, ids=["forward", "sample", "mask", "edit"])
def test_every_value_arrives_bit_for_bit_in_as_many_transfers_as_there_are_dtypes(layout: InputLayout) -> None:
    inputs, step = PackedInputs(layout, CPU), filled(layout)
    kinds = {"int32" if field.dtype == "uint32" else field.dtype for field in layout.fields}
    assert inputs.arrays.keys() == kinds
    inputs.take(step)
    views = inputs.views()
    assert views.keys() == step.views.keys()
    for name, view in views.items():
        assert view.numpy().tobytes() == step[name].tobytes()
        assert tuple(view.shape) == step[name].shape


def test_inputs_are_zero_at_first_and_stay_where_they_are() -> None:
    layout = LAYOUTS[0]
    inputs = PackedInputs(layout, CPU)
    assert not any(array.any() for array in inputs.arrays.values())
    before = {dtype: array.data_ptr() for dtype, array in inputs.arrays.items()}
    inputs.take(filled(layout))
    inputs.take(HostStep(layout))
    assert not any(array.any() for array in inputs.arrays.values())
    assert before == {dtype: array.data_ptr() for dtype, array in inputs.arrays.items()}


def test_the_step_is_free_when_it_has_been_taken() -> None:
    layout, inputs = LAYOUTS[0], PackedInputs(LAYOUTS[0], CPU)
    step = filled(layout)
    inputs.take(step)
    kept = {name: view.clone() for name, view in inputs.views().items()}
    step.buffer[:] = 0
    assert all(torch.equal(view, kept[name]) for name, view in inputs.views().items())
