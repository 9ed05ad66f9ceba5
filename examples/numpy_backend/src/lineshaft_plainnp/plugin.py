"""What core reads before it starts the backend: its registration, its probe and its options."""

from importlib.util import find_spec

from pydantic import BaseModel, ConfigDict, Field

from lineshaft_contract.backends import BackendInfo, BackendKind, Probe
from lineshaft_contract.hooks import hookimpl


@hookimpl
def lineshaft_backends() -> list[BackendInfo]:
    """What is named by a string is imported when it is needed."""
    return [
        BackendInfo(
            "plainnp", "lineshaft_plainnp.plugin:probe", "lineshaft_plainnp.backend:Plain",
            options="lineshaft_plainnp.plugin:Options", kind=BackendKind.HOST, summary="an example: NumPy, float32",
        )
    ]  # fmt: skip


def probe() -> Probe:
    """Usable where NumPy is installed."""
    found = find_spec("numpy") is not None
    return Probe(found, "NumPy is installed" if found else "NumPy is not installed; run `pip install numpy`", ("host",))


class Options(BaseModel):
    """`query_block`: queries of a row that attend at once, which bounds the memory that their scores take."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    query_block: int = Field(default=128, ge=1)
