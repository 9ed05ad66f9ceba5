"""Models and devices as numbers: counted from declarations, described by files, and held to a roofline by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lineshaft.errors import InvalidValue, LineshaftError, OutOfMemory
from lineshaft.registry import discover
from lineshaft.scheduler import Limits
from lineshaft_bench.errors import DeviceError
from lineshaft_bench.simulator.cost import Load, Roofline
from lineshaft_bench.simulator.device import Device, devices, find_device
from lineshaft_bench.simulator.model import CacheGroup, model_figures
from lineshaft_bench.simulator.setup import pages_that_fit

LLAMA_8B = "hidden=4096,layers=32,heads=32,kv_heads=8,intermediate=14336,vocab=128256"
LIMITS = Limits(2048, 256, 131072)
TEXT = """
memory_bytes = 16e9
memory_bytes_per_s = 100e9
[flops_per_s]
bfloat16 = 10e12
"""


def device(**fields: object) -> Device:
    given = {"memory_bytes": 16e9, "memory_bytes_per_s": 100e9, "flops_per_s": {"bfloat16": 10e12}, **fields}
    return Device.model_validate(given)


# ---- models ----------------------------------------------------------------------------------------------------------


def test_the_figures_of_a_known_model() -> None:
    """Llama 3.1 8B: 8.03e9 parameters, of which the embedding is only looked up; 128 KiB of KV a token."""
    model = model_figures(LLAMA_8B, discover([]))
    assert model.weight_bytes == pytest.approx(2 * 8.03e9, rel=1e-3)
    assert model.dense_bytes == pytest.approx(2 * (8.03e9 - 128256 * 4096), rel=1e-3)
    assert model.kv_bytes == 131072
    assert model.logit_flops == 2 * 128256 * 4096
    assert model.token_flops == pytest.approx(2 * (8.03e9 - 2 * 128256 * 4096), rel=1e-3)
    assert model.groups == (CacheGroup(131072, 32 * 4 * 32 * 128, 0),)
    assert model.layers == 32


def test_a_rank_holds_its_share() -> None:
    whole, share = (model_figures(LLAMA_8B, discover([]), tp=tp) for tp in (1, 4))
    assert share.weight_bytes == pytest.approx(whole.weight_bytes / 4, rel=1e-3)
    assert share.kv_bytes == whole.kv_bytes / 4
    assert share.token_flops == whole.token_flops / 4


def test_quantized_weights_are_read_in_their_codes() -> None:
    """All linear layers but the head: 1 byte a weight and a float32 for each row, or half a byte and one a group."""
    plain, int8, int4 = (model_figures(LLAMA_8B, discover([]), quantization=name) for name in ("none", "int8", "int4"))
    head = 2 * 128256 * 4096
    weights = (plain.dense_bytes - head) / 2
    assert plain.dense_bytes > int8.dense_bytes > int4.dense_bytes > head
    assert int8.dense_bytes == pytest.approx(head + weights, rel=1e-2)
    assert int4.dense_bytes == pytest.approx(head + weights * (0.5 + 4 / 128), rel=1e-2)
    assert int8.token_flops == plain.token_flops


@pytest.mark.parametrize("window", [0, 3, 9])
def test_a_prompts_operations_are_those_of_its_tokens_and_pairs(window: int) -> None:
    plain = model_figures(LLAMA_8B, discover([]))
    model = replace(plain, groups=(replace(plain.groups[0], window=window),))
    pairs = sum(min(place + 1, window or 7) for place in range(7))
    expected = 7 * model.token_flops + model.logit_flops + pairs * model.groups[0].pair_flops
    assert model.prompt_flops(7) == pytest.approx(expected)


def test_a_config_alone_is_enough(tmp_path: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 256, "tie_word_embeddings": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    by_folder, by_file = (model_figures(str(path), discover([])) for path in (tmp_path, tmp_path / "config.json"))
    assert by_folder == by_file
    assert by_folder.kv_bytes == 2 * 2 * 2 * 16 * 2
    assert by_folder.dense_bytes == by_folder.weight_bytes  # a tied table is read as the head
    assert by_folder.logit_flops == 2 * 256 * 64
    assert by_folder.token_flops == 2 * 2 * (64 * 128 + 64 * 64 + 64 * 256 + 128 * 64)


def test_experts_are_counted_apart(tmp_path: Path) -> None:
    """Mixtral 8x7B: 46.7e9 parameters, of which a token uses 12.9e9, those of the embedding among them."""
    config = {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 4096, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "num_local_experts": 8,
        "num_experts_per_tok": 2, "vocab_size": 32000, "max_position_embeddings": 32768,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = model_figures(str(tmp_path), discover([]))
    assert model.weight_bytes == pytest.approx(2 * 46.7e9, rel=1e-3)
    assert model.token_flops + model.logit_flops == pytest.approx(2 * (12.88e9 - 32000 * 4096), rel=1e-2)
    assert model.expert_share == 0.25


@pytest.mark.parametrize("shape", ["layers=x", "colour=3", "hidden=64,layers=2", "nowhere", "hidden=64,,"])
def test_a_shape_that_makes_no_model_is_an_error(shape: str) -> None:
    with pytest.raises(LineshaftError):
        model_figures(shape, discover([]))


# ---- the roofline ----------------------------------------------------------------------------------------------------


def test_a_decode_step_waits_for_memory() -> None:
    model = model_figures(LLAMA_8B, discover([]))
    load = Load(rows=1, tokens=1, context=1000, pairs=1000, logits=1)
    expected = (model.dense_bytes + 131072 * 1001) / 100e9
    assert Roofline(model, device()).seconds(load) == pytest.approx(expected)


def test_a_long_prefill_waits_for_arithmetic() -> None:
    model = model_figures(LLAMA_8B, discover([]))
    load = Load(rows=1, tokens=2048, context=2048, pairs=2048 * 2049 / 2, logits=1)
    work = 2048 * model.token_flops + model.logit_flops + load.pairs * model.groups[0].pair_flops
    assert Roofline(model, device()).seconds(load) == pytest.approx(work / 10e12)
    assert Roofline(model, device(flops_efficiency=0.5)).seconds(load) == pytest.approx(work / 5e12)


def test_host_time_is_added_or_hidden() -> None:
    model = model_figures(LLAMA_8B, discover([]))
    load = Load(rows=2, tokens=2, context=10, pairs=10, logits=2)
    plain = Roofline(model, device()).seconds(load)
    costs = {"launch_s": 0.001, "host_s": 0.01, "host_row_s": 0.002}
    assert Roofline(model, device(**costs)).seconds(load) == pytest.approx(plain + 0.001 + 0.014)
    assert Roofline(model, device(**costs, overlap=True)).seconds(load) == pytest.approx(plain + 0.001)
    slow = {**costs, "host_s": 9.0, "overlap": True}
    assert Roofline(model, device(**slow)).seconds(load) == pytest.approx(9.004)


def test_ranks_pay_for_two_collectives_a_layer() -> None:
    model = model_figures(LLAMA_8B, discover([]), tp=4)
    load = Load(rows=1, tokens=100, context=100, pairs=5050, logits=1)
    linked = device(link_bytes_per_s=10e9, link_latency_s=1e-5)
    more = Roofline(model, linked, ranks=4).seconds(load) - Roofline(model, linked, ranks=1).seconds(load)
    assert more == pytest.approx(64 * (1e-5 + 100 * 4096 * 2 * 2 * 0.75 / 10e9))


def test_a_window_bounds_what_attention_reads() -> None:
    model = model_figures(LLAMA_8B, discover([]))
    (group,) = model.groups
    halves = (replace(group, kv_bytes=65536), replace(group, kv_bytes=65536, window=100))
    load = Load(rows=1, tokens=1, context=1000, pairs=1000, logits=1, seen={100: (100, 100.0)})
    more, less = (Roofline(replace(model, groups=groups), device()).seconds(load) for groups in ((group,), halves))
    assert more - less == pytest.approx(65536 * 900 / 100e9)


def test_experts_are_read_as_far_as_tokens_choose_them() -> None:
    dense = model_figures(LLAMA_8B, discover([]))
    model = replace(dense, dense_bytes=100, expert_bytes=1000, expert_share=0.25)
    assert model.weights_read(1) == pytest.approx(350)
    assert model.weights_read(100) == pytest.approx(1100)


# ---- devices ---------------------------------------------------------------------------------------------------------


def test_the_devices_of_the_installed_plugins_are_all_readable() -> None:
    registry = discover()
    names = [name for name, _ in devices(registry)]
    assert {"zen4-2core", "v5e", "tpu7x"} <= set(names)
    assert len(names) == len(set(names))
    assert all(find_device(name, registry).flops("bfloat16") > 0 for name in names)


def test_a_file_describes_a_device(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(TEXT)
    assert find_device(str(file), discover([])) == device()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("16e9", '"much"', "memory_bytes"),
        ("16e9", "-1", "memory_bytes"),
        ("100e9", "nan", "memory_bytes_per_s"),
        ("memory_bytes = 16e9", "", "memory_bytes"),
        ("memory_bytes = 16e9", "memory_bytes = 16e9\ncolour = 1", "colour"),
        ("[flops_per_s]", "[flops_per_s", "TOML"),
        ("memory_bytes = 16e9", f"colour = {'[' * 10_000}", "TOML"),
        ("10e12", "0", "flops_per_s"),
        ("10e12", "inf", "flops_per_s"),
    ],
)
def test_a_wrong_file_is_named_with_its_key(old: str, new: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(TEXT.replace(old, new))
    with pytest.raises(DeviceError, match=said):
        find_device(str(file), discover([]))


def test_an_unknown_device_names_the_known(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="zen4-2core"):
        find_device("abacus", discover())
    with pytest.raises(DeviceError, match=r"nowhere\.toml"):
        find_device(str(tmp_path / "nowhere.toml"), discover())


def test_a_dtype_that_the_device_does_not_know_is_refused() -> None:
    with pytest.raises(DeviceError, match="bfloat16"):
        device().flops("int4")


def test_pages_fill_what_the_weights_leave() -> None:
    model = model_figures(LLAMA_8B, discover([]))
    large = device(memory_bytes=80e9)
    (pages,) = pages_that_fit(model, large, LIMITS, 16, 0.9)
    assert pages * 16 * model.kv_bytes == pytest.approx(80e9 * 0.9 - model.weight_bytes, rel=1e-3)
    with pytest.raises(OutOfMemory, match="--tp"):
        pages_that_fit(model, device(), LIMITS, 16, 0.9)
    few = Limits(2048, 2, 4096)
    assert pages_that_fit(model, large, few, 16, 0.9) == (1 + 2 * 256,)  # more are of no use


def test_inline_shapes_say_what_they_take() -> None:
    with pytest.raises(InvalidValue, match="intermediate"):
        model_figures("width=3", discover([]))
