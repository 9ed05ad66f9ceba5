"""Checks a backend's options against the model that its plugin registers, with errors worded like the core's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from lineshaft.config.values import complaint, dotted, suggestion
from lineshaft.errors import InvalidValue, UnknownKey
from lineshaft.registry import options_model

if TYPE_CHECKING:
    from lineshaft_contract.backends import BackendInfo

TABLE = "backend_options"


def validate_options(info: BackendInfo, options: Mapping[str, Any]) -> BaseModel | None:
    """An instance of the backend's options model, or None where it registers none.

    Text is converted to the option's type, since options also come from variables and the command line. Raises
    UnknownKey, InvalidValue, and PluginError for a model that `options_model` refuses.
    """
    model = options_model(info)
    known = {} if model is None else model.model_fields
    for key in options:
        if key not in known:
            hint = suggestion(key, (TABLE,), known)
            raise UnknownKey(f"the backend {info.name!r} has no option {TABLE}.{key}; {hint}")
    try:
        return None if model is None else model.model_validate(dict(options), strict=False)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = dotted((TABLE, *map(str, first["loc"])))
        given = "" if first["type"] == "missing" or not first["loc"] else f" = {first['input']!r}"
        raise InvalidValue(f"{key}{given} (backend {info.name!r}): {complaint(error)}") from error
