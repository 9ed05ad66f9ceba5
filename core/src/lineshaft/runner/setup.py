"""From a configuration to everything that exists before weights are loaded: backend, model, limits, buckets, plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from importlib.metadata import distributions
from pathlib import Path

from lineshaft.config import EngineConfig, validate_options
from lineshaft.config.environment import cache_folder
from lineshaft.errors import InvalidValue
from lineshaft.layout import Degrees
from lineshaft.models import BuildContext, Model, ModelFamily, builtin_families, find_family
from lineshaft.models.family import STORED
from lineshaft.plan import Planned, ProgramSpec, Resolver, Workload, make_plan
from lineshaft.plan.trace import distinct_params
from lineshaft.plan.tuning import keep, kept, settle
from lineshaft.registry import Registry, load_attribute
from lineshaft.registry.registry import probe
from lineshaft.runner.buckets import make_shapes
from lineshaft.runner.programs import all_programs
from lineshaft.scheduler import Limits
from lineshaft.weights.checkpoint import FORMATS, CheckpointFormat, open_checkpoint
from lineshaft.weights.decoded import decode_with
from lineshaft.weights.refs import resolve
from lineshaft_contract.backends import Backend, BackendInfo, BackendKind, Capabilities, World
from lineshaft_contract.host import fair_share
from lineshaft_contract.kernels import Kernel
from lineshaft_contract.ops import all_ops
from lineshaft_contract.ops.quantize import BLOCK_SCHEMES, NONE
from lineshaft_contract.problems import KVProblem
from lineshaft_contract.steps import StepShape
from lineshaft_contract.timing import Choice
from lineshaft_contract.weights import Checkpoint

Told = Mapping[str, Choice] | None
"""How ties are settled (`Plan.choices`); None: nobody says."""


@dataclass(frozen=True)
class Setup:
    """One rank's view of a run before anything is loaded."""

    info: BackendInfo
    world: World
    backend: Backend
    checkpoint: Checkpoint
    model: Model
    caches: tuple[KVProblem, ...]
    limits: Limits
    shapes: tuple[StepShape, ...]
    dtype: str
    page_sizes: tuple[int, ...]


def degrees_of(config: EngineConfig) -> Degrees:
    """The configured degrees; raises InvalidValue for what no version of the layout runs yet."""
    layout = config.layout
    if layout.sequence_parallel:
        raise InvalidValue("layout.sequence_parallel = true: this version runs without it; set it to false")
    return Degrees(layout.dp, layout.pp, layout.cp, layout.ep, layout.tp)


def open_model(
    config: EngineConfig, registry: Registry, formats: Sequence[CheckpointFormat] = FORMATS
) -> tuple[Checkpoint, ModelFamily]:
    """The configured checkpoint, in a plugin's format or one of `formats`, and its family. Raises ModelError."""
    opened = open_checkpoint(resolve(config.model), (*registry.checkpoints(), *formats))
    checkpoint = decode_with(opened, registry.schemes())
    return checkpoint, find_family(checkpoint.config, (*registry.models(), *builtin_families()))


def check_layout(config: EngineConfig, registry: Registry) -> None:
    """Build the model's description at the configured degrees, before any worker or backend is started.

    Raises LayoutError with every broken rule, ModelError.
    """
    checkpoint, family = open_model(config, registry)
    build_model(config, checkpoint, family)


def build_model(
    config: EngineConfig, checkpoint: Checkpoint, family: ModelFamily, dtype: str = "float32", page_size: int = 1
) -> Model:
    """The model as configured. Raises LayoutError, ModelError, InvalidValue for a family that quantizes no weight."""
    degrees, wanted = degrees_of(config), config.quantization
    context = BuildContext(dtype, dtype, page_size, degrees, wanted, config.max_model_len, checkpoint)
    model = family.build(checkpoint.config, context)
    schemes = BLOCK_SCHEMES if wanted == STORED else (wanted,)
    if wanted != NONE and not any(param.scheme in schemes for param in distinct_params(model.params())):
        why = f"the checkpoint has no weight of a linear layer in blocks of {', '.join(schemes)}"
        why = why if wanted == STORED else f"the family {family.name!r} has no weight that it quantizes"
        raise InvalidValue(f"quantization = {wanted!r}: {why}; set it to '{NONE}'")
    return model


def make_setup(
    config: EngineConfig,
    registry: Registry,
    rank: int = 0,
    rendezvous: str = "",
    start: Callable[[World], Backend] | None = None,
    formats: Sequence[CheckpointFormat] = FORMATS,
) -> Setup:
    """Start the chosen backend and build the model at this rank's layout; loads no weights.

    start: makes the backend, which has to be named, instead of its factory; whether it is usable here is not asked.
    Raises BackendError, ModelError, LayoutError, ConfigError.
    """
    named = start is not None and config.backend != "auto"
    info = registry.named(config.backend) if named else registry.select(config.backend, config.backend_options)
    options = validate_options(info, config.backend_options)
    checkpoint, family = open_model(config, registry, formats)
    degrees = degrees_of(config)
    ranks = degrees.replica if info.single_program else 1
    world = World(rank, degrees.axes, rendezvous, threads_for(config, info, degrees.world), ranks)
    backend: Backend = start(world) if start else load_attribute(info.factory)(options, world)
    capabilities = backend.capabilities
    dtype = choose_dtype(config, info.name, capabilities)
    page_size = choose_page_size(config, info.name, capabilities)
    model = build_model(config, checkpoint, family, dtype, page_size)
    if degrees.tp > 1 and not capabilities.collectives:
        raise InvalidValue(f"layout {degrees}: backend {info.name!r} has no collectives; set layout.tp = 1")
    caches = tuple(model.caches())
    groups = 1 + max((cache.group for cache in caches), default=-1)
    limits = make_limits(config, capabilities, model)
    pages_per_row = tuple(-(-limits.max_model_len // page_size) for _ in range(groups))
    shapes = make_shapes(capabilities, limits, pages_per_row, degrees.dp)
    return Setup(info, world, backend, checkpoint, model, caches, limits, shapes, dtype, (page_size,) * groups)


def make_planned(
    config: EngineConfig, setup: Setup, registry: Registry, told: Told = None, measured: bool = False
) -> Planned:
    """Resolve the plan of this rank. Raises Unsupported, Ambiguous, ContractViolation.

    told       how rank 0 has settled ties, in the place of what earlier starts have kept
    measured   run the kernels of ties that are not settled, instead of taking the first by name
    """
    programs = all_programs(setup.model, setup.shapes, setup.dtype, config.max_logprobs, config.sampling_extras)
    return plan_programs(config, setup, registry, programs, told, measured)


def plan_programs(
    config: EngineConfig,
    setup: Setup,
    registry: Registry,
    programs: Sequence[ProgramSpec],
    told: Told = None,
    measured: bool = False,
) -> Planned:
    """The same for other programs of the model than the engine's."""
    name, specs = setup.info.name, all_ops(registry.ops())
    kernels = [*setup.backend.kernels(), *registry.kernels(name)]
    given = (f"backend option {key} = {value}" for key, value in config.backend_options.items())
    notes, axes = (*given, *setup.backend.capabilities.notes), dict(setup.world.axes)
    work = Workload(setup.model.params(), setup.caches, setup.model.uses(), programs, axes, notes)
    file = choices_file(config, setup, kernels) if told is None else None
    stored = kept(file) if file else {}
    known = dict(told or (stored if config.tuning == "cached" else {}))
    planned = make_plan(name, work, Resolver(name, kernels, config.kernels, known), specs)
    if not (file and measured and planned.ties):
        return planned
    found = settle(planned.ties, partial(setup.backend.session, setup.world.rank), setup.checkpoint)
    keep(file, stored | found)
    return make_plan(name, work, Resolver(name, kernels, config.kernels, known | found), specs)


def choices_file(config: EngineConfig, setup: Setup, kernels: Sequence[Kernel]) -> Path | None:
    """Where settled ties are kept, by all that decides them but op and problem; None where nothing is to settle."""
    tunable = sorted((k.op, k.name, k.version, k.layout, sorted(k.options.items())) for k in kernels if k.tunable)
    if config.tuning == "off" or not tunable:
        return None
    installed = sorted({(d.name, d.version) for d in distributions() if str(d.name).startswith("lineshaft")})
    options, devices = sorted(config.backend_options.items()), probe(setup.info).devices
    facts = (setup.info.name, options, devices, setup.world.threads, installed, tunable)
    return cache_folder() / "tuning" / f"{sha256(repr(facts).encode()).hexdigest()}.json"


def threads_for(config: EngineConfig, info: BackendInfo, world: int) -> int:
    """CPU threads of one worker: as configured, else a fair share where workers compute on the host itself."""
    if config.threads or world == 1 or info.kind is BackendKind.ACCELERATOR:
        return config.threads
    return fair_share(world)


def choose_dtype(config: EngineConfig, backend: str, capabilities: Capabilities) -> str:
    """The executed dtype: as configured, or the backend's preferred one. Raises InvalidValue."""
    if config.dtype == "auto":
        return capabilities.dtypes[0]
    if config.dtype not in capabilities.dtypes:
        allowed = ", ".join(capabilities.dtypes)
        raise InvalidValue(f"dtype = {config.dtype!r}: backend {backend!r} executes {allowed}; choose one or 'auto'")
    return config.dtype


def choose_page_size(config: EngineConfig, backend: str, capabilities: Capabilities) -> int:
    """Tokens a page: as configured, or the backend's default. Raises InvalidValue."""
    size = config.cache.page_size or capabilities.default_page_size
    if capabilities.page_sizes and size not in capabilities.page_sizes:
        allowed = ", ".join(map(str, capabilities.page_sizes))
        raise InvalidValue(f"cache.page_size = {size}: backend {backend!r} takes {allowed}")
    return size


def make_limits(config: EngineConfig, capabilities: Capabilities, model: Model) -> Limits:
    """The scheduler's limits: as configured, within what the model allows and the backend's tables hold.

    Raises InvalidValue.
    """
    longest = config.max_model_len or model.max_position
    if longest > model.max_position:
        raise InvalidValue(
            f"max_model_len = {longest}: the model's context is {model.max_position} tokens; set at most that"
        )
    budget, rows = config.scheduler.token_budget, config.scheduler.max_rows
    if budget < rows:
        raise InvalidValue(
            f"scheduler.token_budget = {budget} is below scheduler.max_rows = {rows}: a decode step needs a token a row"
        )
    largest = max(capabilities.token_buckets or (budget,))
    alone = capabilities.max_prefill_rows == 1 and not capabilities.mixed_steps and config.layout.dp == 1
    if not alone:  # else `max_query` bounds a prefill, and a decode step has a table of its own
        budget = min(budget, largest)
    rows = min(rows, budget, max(capabilities.row_buckets or (rows,)))
    return Limits(
        min(budget, rows * longest), rows, longest, capabilities.max_prefill_rows, capabilities.mixed_steps,
        min(largest, capabilities.max_query or largest), config.scheduler.max_prefill_tokens,
    )  # fmt: skip
