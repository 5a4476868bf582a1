"""Replacing methods of an object for a while."""

from __future__ import annotations

from typing import Any


class Attachment:
    """Instance attributes that stand before the methods of the class; `undo` takes them away again."""

    def __init__(self) -> None:
        self._replaced: list[tuple[Any, str, Any]] = []

    def replace(self, target: Any, name: str, value: Any) -> None:
        """Let ``target.name`` be ``value`` until `undo`."""
        self._replaced.append((target, name, vars(target).get(name)))
        setattr(target, name, value)

    def undo(self) -> None:
        """Put everything back, last replaced first; may be called twice."""
        while self._replaced:
            target, name, before = self._replaced.pop()
            if before is None:
                vars(target).pop(name, None)
            else:
                setattr(target, name, before)
