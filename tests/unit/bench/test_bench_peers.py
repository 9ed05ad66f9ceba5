"""Engines behind a pipe: asked and answered a line at a time, measured in turns, and blamed by name when they fail."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from lineshaft.config import make_config
from lineshaft.weights.checkpoint import open_checkpoint
from lineshaft_bench.convert import folder_for_peers, write_folder
from lineshaft_bench.errors import PeerError
from lineshaft_bench.figures import Ran
from lineshaft_bench.measure import BOUND, Bench
from lineshaft_bench.peers import client
from lineshaft_bench.peers.client import BOUNDS, OURS, PEERS, Peer, environments
from lineshaft_bench.workloads import WORKLOADS, Ids, Job, Round

FAKE = """
import sys
from protocol import serve

class Fake:
    def load(self, **given):
        print("this goes to the log")
        self.given = given
        return {"version": "fake 1", "precision": given["dtype"], "python": sys.executable}

    def run(self, jobs):
        if len(jobs) == 3:
            raise ValueError("three are too many")
        if len(jobs) == 4:
            raise SystemExit("no more")
        short = len(jobs) == 5
        return {"stamps": [[0.1 * (n + 1) for n in range(job["out"] - short)] for job in jobs]}

serve(Fake())
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts an engine `fake` beside the others; returns a folder for logs."""
    for file in client.FOLDER.glob("*.py"):
        shutil.copy(file, tmp_path)
    (tmp_path / "fake_peer.py").write_text(FAKE)
    monkeypatch.setattr(client, "FOLDER", tmp_path)
    monkeypatch.setattr(client, "PEERS", (*PEERS, "fake"))
    return tmp_path


def opened(folder: Path, environment: Path | None = None) -> Peer:
    return Peer("fake", environment, 1, folder / "log")


def test_the_drivers_of_all_peers_are_there() -> None:
    assert set(PEERS) == {"lineshaft", "llamacpp", "openvino", "transformers", "vllm"}


def test_a_peer_answers_and_what_it_prints_is_in_the_log(fake: Path) -> None:
    with opened(fake) as peer:
        assert peer.ask("load", dtype="float32")["version"] == "fake 1"
        ran = peer.run([Job([1, 2], 2)])
        assert ran == Ran([Job([1, 2], 2)], [[0.1, 0.2]])
        assert peer.ask("memory")["peak_bytes"] > 1 << 20
    assert "this goes to the log" in (fake / "log").read_text()


def test_an_environment_is_a_folder_or_an_interpreter(fake: Path) -> None:
    for environment in (Path(sys.prefix), Path(sys.prefix) / "bin" / "python"):
        with opened(fake, environment) as peer:
            assert peer.ask("load", dtype="x")["python"].startswith(sys.prefix)
    with pytest.raises(PeerError, match="--peer-env fake="):
        opened(fake, fake)


@pytest.mark.parametrize(
    ("jobs", "said"), [(3, "three are too many"), (4, "ended at 'run': no more"), (5, "generated 5 tokens where 10")]
)
def test_a_failing_peer_is_blamed_with_its_reason(jobs: int, said: str, fake: Path) -> None:
    with opened(fake) as peer, pytest.raises(PeerError, match=f"peer fake: .*{said}"):
        peer.run([Job([1], 2)] * jobs)


def test_a_peer_whose_library_is_missing_says_so(fake: Path) -> None:
    (fake / "fake_peer.py").write_text("import no_such_engine\n")
    with opened(fake) as peer, pytest.raises(PeerError, match="no_such_engine"):
        peer.ask("load")


def test_unknown_peers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match="transformers, vllm"):
        Peer("tensorrt", None, 1, tmp_path / "log")
    with pytest.raises(PeerError, match="transformers, vllm"):
        environments({"tensorrt": "/x"})


def tiny(folder: Path) -> Path:
    """A Llama of next to no width, with room for the workloads."""
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "intermediate_size": 16, "vocab_size": 160, "tie_word_embeddings": True,
        "max_position_embeddings": 4096,
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    shapes = {"embed_tokens": (160, 16), "norm": (16,)}
    layer = {"self_attn.q_proj": (16, 16), "self_attn.k_proj": (8, 16), "self_attn.v_proj": (8, 16)}
    layer |= {"self_attn.o_proj": (16, 16), "mlp.gate_proj": (16, 16), "mlp.up_proj": (16, 16)}
    layer |= {"mlp.down_proj": (16, 16), "input_layernorm": (16,), "post_attention_layernorm": (16,)}
    shapes |= {f"layers.0.{name}": shape for name, shape in layer.items()}
    tensors = {
        f"model.{name}.weight": rng.standard_normal(shape).astype(np.float32) / 4 for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


def short(ids: Ids) -> Iterator[Round]:
    while True:
        yield [Job(ids.draw(8), 6)]


def test_engines_are_measured_in_turns_beside_the_bound(
    fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our engine on the reference backend, and a peer that takes 0.1 s a token, each in a process of its own."""
    monkeypatch.setitem(WORKLOADS, "single", short)
    model = tiny(tmp_path / "model")
    config = make_config(model=str(model), backend="numpy", dtype="float32", threads=1)
    told: list[str] = []
    bench = Bench(config, ["fake"], {}, {}, fake, timeline="")
    (found,) = bench.run(["single"], told.append)
    assert BOUNDS not in PEERS and "loading lineshaft" in told and "single: round 5 of 5" in told
    ours, theirs = found.engines[OURS], found.engines["fake"]
    assert len(ours.rounds) == len(theirs.rounds) == 5
    assert theirs.figures["tpot_ms"].median == pytest.approx(100)
    assert ours.figures["tpot_ms"].median == pytest.approx(float(np.median([each["tpot_ms"] for each in ours.rounds])))
    ratio, over_bound = found.ratio("tpot_ms", "fake"), found.ratio("tpot_ms", BOUND)
    assert ratio and over_bound and over_bound.low > 1
    assert ratio.median == pytest.approx(ours.figures["tpot_ms"].median / 100)
    assert len(found.bounds) == len(found.bound) == 5 and {each.threads for each in found.bounds} == {1}
    assert found.over_bounds("fake")["tpot_over_read"].median > 1
    assert ours.facts["steps"] >= 6 * 6 and 0 < ours.facts["kv_most"] <= 1
    assert ours.peak_bytes > 1 << 20
    assert json.loads(json.dumps(found.to_json()))["ratios"]["fake"]["tpot_ms"]["low"] > 0


# ---- a model as peers read it ----------------------------------------------------------------------------------------


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    model = tiny(tmp_path / "model")
    assert folder_for_peers(str(model), "float32", tmp_path) == model


def test_a_checkpoint_is_written_as_a_folder_in_one_dtype(tmp_path: Path) -> None:
    model = tiny(tmp_path / "model")
    checkpoint = open_checkpoint(model)
    folder = write_folder(checkpoint, "bfloat16", tmp_path / "made" / "it")
    tensors, before = load_file(folder / "model.safetensors"), load_file(model / "model.safetensors")
    assert tensors.keys() == before.keys() == checkpoint.names()
    for name, tensor in tensors.items():
        assert tensor.dtype == "bfloat16"
        np.testing.assert_allclose(tensor.astype(np.float32), before[name], rtol=2**-8)
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"
