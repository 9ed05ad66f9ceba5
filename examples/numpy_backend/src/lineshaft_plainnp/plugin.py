"""What core reads before it starts the backend: its registration, its probe and its options."""

from importlib.util import find_spec

from pydantic import BaseModel, ConfigDict, Field

from lineshaft.contract.backends import BackendInfo, BackendKind, Probe
from lineshaft.contract.hooks import hookimpl


@hookimpl
def lineshaft_backends() -> list[BackendInfo]:
    """The backend `plainnp`; what is named by a string is imported when it is needed."""
    here = "lineshaft_plainnp"
    names = {"probe": f"{here}.plugin:probe", "factory": f"{here}.backend:Plain", "options": f"{here}.plugin:Options"}
    return [BackendInfo("plainnp", **names, kind=BackendKind.HOST, summary="an example: plain NumPy, float32")]


def probe() -> Probe:
    """Usable where NumPy is installed."""
    found = find_spec("numpy") is not None
    return Probe(found, "NumPy is installed" if found else "NumPy is not installed; run `pip install numpy`", ("host",))


class Options(BaseModel):
    """`query_block`: queries of a row that attend at once, which bounds the memory that their scores take."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    query_block: int = Field(default=128, ge=1)
