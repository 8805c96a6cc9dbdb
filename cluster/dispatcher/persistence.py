"""The dispatcher's state as JSON: what it was of which instances, and back.

What is read may come from another version of the program, or be damaged: an entry that does
not fit is left out, never an error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from instance.executor import ModelDescription
from instance.load import InstanceInfo


def info_to_json(info: InstanceInfo) -> dict[str, Any]:
    """An instance as JSON says it."""
    return dataclasses.asdict(info)


def info_from_json(found: Any) -> InstanceInfo | None:
    """The instance that ``info_to_json`` wrote; None if it is not one."""
    if not isinstance(found, dict) or not isinstance(found.get("model"), dict):
        return None
    model = _fitting(ModelDescription, found["model"])
    model["eos_token_ids"] = tuple(model.get("eos_token_ids", ()))
    try:
        description = ModelDescription(**model)
        info = InstanceInfo(**{**_fitting(InstanceInfo, found), "model": description})
    except TypeError:
        return None
    texts = (info.instance_id, info.incarnation, info.address, info.node)
    numbers = (info.total_blocks, info.max_num_seqs, description.block_size)
    if not all(isinstance(text, str) and text for text in texts):
        return None
    if not all(isinstance(number, int) and number > 0 for number in numbers):
        return None
    return info


def infos_from_json(found: Any) -> Iterable[InstanceInfo]:
    """The instances of a list that can be understood."""
    for one in found if isinstance(found, list) else ():
        info = info_from_json(one)
        if info is not None:
            yield info


def _fitting(kind: Any, found: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(kind)}
    return {name: value for name, value in found.items() if name in names}
