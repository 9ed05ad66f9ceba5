"""The key `quantization` on whole engines: one model on two backends, what it changes, and what is refused."""

from __future__ import annotations

import shutil
from math import gcd
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tests.integration.checkpoints import VARIANTS
from tests.integration.conftest import Llama
from tests.integration.driving import config, drive, follow, greedy
from tests.integration.gguf_files import convert
from tests.integration.oracle import Oracle, make_model

from lineshaft.config import EngineConfig
from lineshaft.engine import Engine
from lineshaft.errors import InvalidValue, Unsupported
from lineshaft.explain import explain
from lineshaft.models import BuildContext, ModelFamily, builtin_families
from lineshaft.models.family import STORED
from lineshaft.registry import discover
from lineshaft.runner import setup
from lineshaft_bench.simulator.model import model_figures
from lineshaft_contract.ops.quantize import ACTIVATION_SCHEMES, INT4, LINEAR_SCHEMES, quantize_groups, quantize_rows

SCHEMES = ("int8", "fp8", "int4")
"""Those of weights alone, which a checkpoint of rounded weights stands for."""
SMALL: dict[str, Any] = {
    "scheduler.token_budget": 16, "scheduler.max_rows": 2, "max_model_len": 40, "cache.pages": 12, "cache.page_size": 4,
}  # fmt: skip
LENGTHS, TOKENS = (2, 9, 30), 4
OFF = {"int8": (1e-3, 0.05), "fp8": (1e-2, 0.5), "int4": (0.05, 1.5), "w8a8_int8": (1e-3, 0.1), "w8a8_fp8": (1e-2, 0.8)}
"""Least and most that the logits of a random model differ by, as a share of their spread: a code is off by up to 1/254
of its row's largest weight, in fp8 by 1/32 of itself, in int4 by 1/16 of its group's largest, and the random models'
attention is sharp."""


def followed(path: Path, oracle: Oracle, **more: Any) -> list[Any]:
    """Logits at the likeliest tokens of the unquantized model, whatever this engine would take."""
    expected = [oracle.expect(prompt, TOKENS) for prompt in oracle.prompts(0, LENGTHS)]
    with Engine(config(path, **{**SMALL, **more})) as engine:
        return follow(engine, expected).logits


def rounded_checkpoint(source: Path, folder: Path, scheme: str) -> Path:
    """A copy of a checkpoint whose linear layers hold what their codes and scales stand for."""
    tensors = load_file(source / "model.safetensors")
    for name, w in tensors.items():
        if name.endswith("_proj.weight"):
            if scheme == INT4:
                size = gcd(w.shape[1], 128)
                codes, scale = quantize_groups(w, size)
                tensors[name] = codes * scale.repeat(size, 1)
            else:
                codes, scale = quantize_rows(w, scheme)
                tensors[name] = codes.astype(np.float32) * scale[:, None]
    save_file(tensors, folder / "model.safetensors")
    shutil.copy(source / "config.json", folder)
    return folder


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_engine_computes_what_the_rounded_weights_give(llama: Llama, scheme: str, tmp_path: Path) -> None:
    path, oracle = llama("even").path, llama("even").oracle
    plain = followed(path, oracle, backend="numpy")
    rounded = followed(rounded_checkpoint(path, tmp_path, scheme), oracle, backend="numpy")
    for backend in ("numpy", "cpu"):
        for was, expected, got in zip(
            plain, rounded, followed(path, oracle, backend=backend, quantization=scheme), strict=True
        ):
            np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4 * expected.std())
            off = np.sqrt(np.mean((got - was) ** 2)) / was.std()
            assert OFF[scheme][0] < off < OFF[scheme][1]


@pytest.mark.parametrize("scheme", ACTIVATION_SCHEMES)
def test_backends_agree_where_activations_are_quantized_too(llama: Llama, scheme: str) -> None:
    """But for codes that fall on the other side of a half, which is as far as one code off."""
    path, oracle = llama("gqa3-tied").path, llama("gqa3-tied").oracle
    plain, expected, got = (
        followed(path, oracle, backend=backend, quantization=name)
        for backend, name in (("numpy", "none"), ("numpy", scheme), ("cpu", scheme))
    )
    weights_alone = followed(path, oracle, backend="numpy", quantization=ACTIVATION_SCHEMES[scheme])
    for rows in zip(plain, expected, got, weights_alone, strict=True):
        was, right, found, half = rows
        off, apart, more = (np.sqrt(np.mean((a - b) ** 2)) / was.std() for a, b in (
            (right, was), (found, right), (right, half),
        ))  # fmt: skip
        assert OFF[scheme][0] < off < OFF[scheme][1]
        assert apart < 0.5 * off and more > 1e-3


def test_a_quantized_model_is_cut_among_workers(llama: Llama) -> None:
    """Each worker quantizes its own share: a row may get another scale there, and the tokens stay the same here."""
    prompts, tokens = llama("even").oracle.prompts(1, LENGTHS), {}
    for tp, scheme in ((1, "none"), (1, "int8"), (2, "int8")):
        tokens[tp, scheme] = tokens_at(llama("even").path, prompts, tp, scheme)
    assert tokens[2, "int8"] == tokens[1, "int8"] == tokens[1, "none"]


def test_groups_that_ranks_do_not_cut_are_the_same_at_every_degree(tmp_path: Path) -> None:
    oracle = make_model(tmp_path, **VARIANTS["lanes"] | {"intermediate_size": 256})
    prompts = oracle.prompts(1, LENGTHS)
    one, two, plain = (tokens_at(tmp_path, prompts, *way) for way in ((1, "int4"), (2, "int4"), (1, "none")))
    assert one == two != plain


def tokens_at(path: Path, prompts: Any, tp: int, scheme: str) -> Any:
    with Engine(config(path, **{**SMALL, "layout.tp": tp, "quantization": scheme})) as engine:
        return drive(engine, prompts, greedy(TOKENS), look=False).tokens


@pytest.mark.parametrize("scheme", LINEAR_SCHEMES)
def test_the_plan_says_what_is_quantized_and_what_it_saves(llama: Llama, scheme: str) -> None:
    path = llama("even").path
    plain, plan = (explain(config(path, **given, **SMALL)) for given in ({}, {"quantization": scheme}))
    before, after = (
        {entry.kernel: entry.problem for entry in made.entries if entry.op == "linear"} for made in (plain, plan)
    )
    assert set(after) == {*before, f"cpu_linear_{scheme}"}  # the head stays as it is
    assert [name for name, problem in after.items() if f"scheme={scheme}" in problem] == [f"cpu_linear_{scheme}"]
    (note,) = [note for note in plan.notes if f"quantized to {scheme}:" in note]
    layers = sum(name.startswith("layers.") and "norm" not in name for name in plan.weight_layouts)
    assert note.startswith(f"{layers} weights are quantized to {scheme}: ") and note in plan.summary()
    assert plan.weight_bytes < 0.6 * plain.weight_bytes and plan.hash != plain.hash


def test_columns_that_make_up_no_groups_are_refused_with_the_weight(llama: Llama) -> None:
    expected = r"quantization = 'int4': weight layers\.0\.qkv has 72 columns on a rank, cut into no groups .* 32 to 128"
    with pytest.raises(InvalidValue, match=expected):
        explain(config(llama("gqa1").path, quantization="int4", **SMALL))
    with pytest.raises(InvalidValue, match=r"layers\.0\.down has 48 columns on a rank.*another layout\.tp"):
        Engine(config(llama("even").path, quantization="int4", **SMALL, **{"layout.tp": 2}))


def in_blocks(tensor: str) -> str | None:
    """Values in other blocks than queries and keys, and norms in none."""
    if "norm" in tensor:
        return None
    return "q8_0" if "v_proj" in tensor or "embed" in tensor else "q4_1" if "down_proj" in tensor else "q4_0"


def test_blocks_of_a_file_are_multiplied_as_they_are(tmp_path: Path) -> None:
    """As their numbers in float32 are; a weight of several kinds of blocks is decoded."""
    oracle = make_model(tmp_path, **VARIANTS["lanes"] | {"intermediate_size": 256})
    path = convert(tmp_path, tmp_path / "blocks.gguf", in_blocks)
    decoded, stored = (followed(path, oracle, backend="cpu", quantization=name) for name in ("none", STORED))
    for expected, got in zip(decoded, stored, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4 * expected.std())
    plan, plain = (explain(config(path, quantization=name, **SMALL)) for name in (STORED, "none"))
    layouts = {name.rpartition(".")[2]: layout for name, layout in plan.weight_layouts.items()}
    assert {name: layouts[name] for name in ("qkv", "out", "gate_up", "down")} == {
        "qkv": "cpu_panels", "out": "cpu_q4_0_records", "gate_up": "cpu_q4_0_records", "down": "cpu_q4_1_records",
    }  # fmt: skip
    assert plan.weight_bytes < 0.6 * plain.weight_bytes
    blocks, dense = (model_figures(str(path), discover([]), quantization=name) for name in (STORED, "none"))
    assert blocks.weights_read(1) < 0.6 * dense.weights_read(1)


def test_a_checkpoint_without_blocks_is_refused_as_stored(llama: Llama) -> None:
    with pytest.raises(InvalidValue, match=r"quantization = 'stored': .* in blocks of q4_0, q4_1, q8_0; set it to"):
        explain(config(llama("even").path, quantization=STORED, **SMALL))


def test_a_backend_that_has_numbers_alone_takes_no_blocks(tmp_path: Path) -> None:
    make_model(tmp_path, **VARIANTS["lanes"])
    path = convert(tmp_path, tmp_path / "blocks.gguf", lambda name: None if "norm" in name else "q8_0")
    with pytest.raises(Unsupported, match=r"no kernel for linear .*scheme=q8_0.*numpy.linear: takes no blocks of q8_0"):
        explain(config(path, backend="numpy", quantization=STORED, **SMALL))


def test_the_key_takes_all_schemes_that_products_have() -> None:
    assert get_args(EngineConfig.model_fields["quantization"].annotation) == ("none", STORED, *LINEAR_SCHEMES)


def test_a_backend_without_a_kernel_says_why_each_of_its_own_declines(
    llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = setup.make_setup(config(llama("gqa1").path, quantization="int8", **SMALL), discover())
    few = [
        kernel for kernel in made.backend.kernels() if not kernel.name.startswith(("cpu_linear_int8", "cpu_reference"))
    ]
    monkeypatch.setattr(type(made.backend), "kernels", lambda backend: few)
    reasons = "no kernel for linear .*scheme=int8.*cpu_linear: does not handle scheme.*cpu_linear_fp8: is for "
    with pytest.raises(Unsupported, match=reasons):
        explain(config(llama("gqa1").path, quantization="int8", **SMALL))


def test_an_unknown_scheme_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(InvalidValue, match=r"quantization.*'int3'.*none.*int8.*fp8.*int4.*w8a8_int8.*w8a8_fp8"):
        config("x", quantization="int3")


def test_a_family_that_quantizes_nothing_is_refused(llama: Llama) -> None:
    family, *_ = builtin_families()
    deaf = ModelFamily("deaf", family.architectures, lambda given, context: family.build(given, plain(context)))

    def plain(context: Any) -> Any:
        return BuildContext(context.dtype, context.kv_dtype, context.page_size, context.degrees)

    checkpoint, _ = setup.open_model(config(llama("gqa1").path), discover())
    with pytest.raises(InvalidValue, match=r"quantization = 'fp8': the family 'deaf'.*set it to 'none'"):
        setup.build_model(config(llama("gqa1").path, quantization="fp8"), checkpoint, deaf)
