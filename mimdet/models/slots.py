"""A slot's value: a registered name, or `module:function` for code that lives elsewhere."""

import importlib
from collections.abc import Mapping
from typing import Any


def resolve(name: str, registered: Mapping[str, Any], slot: str) -> Any:
    """The part called `name`. Raises ValueError that lists the choices."""
    if name in registered:
        return registered[name]
    module, separator, attribute = name.partition(":")
    if not separator:
        raise ValueError(
            f"{slot}={name!r} is not known: use one of {sorted(registered)}, or 'module:function', "
            f"or pass the {slot} itself to build_detector({slot}=...)"
        )
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{slot}={name!r} cannot be imported: {error}") from error
