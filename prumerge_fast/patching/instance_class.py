"""Classes for single instances: what changes an object's methods and can be taken off again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def instance_class(
    base: Any, namespace: Mapping[str, Any], empty: Callable[[Any], Any]
) -> type[Any]:
    """A subclass of `base`, of the same name, whose instances can be copied and pickled.

    Args:
        base: The class of the instances as they were.
        namespace: Methods and attributes that differ from those of `base`.
        empty: An importable function that makes an instance of the subclass from `base`, without
            calling `__init__`: the subclass has no importable name itself.
    """

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        _, _, *state = super(subclass, self).__reduce_ex__(protocol)
        return empty, (base,), *state

    names = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    subclass: Any = type(
        base.__name__, (base,), {**names, **namespace, "__reduce_ex__": __reduce_ex__}
    )
    return subclass
