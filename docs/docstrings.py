"""Griffe: the house's "Example:" is what its Google parser calls "Examples:", code that is shown as code."""

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Names the section as the parser does."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of whatever has one."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"(?m)^(\s*)Example:$", r"\1Examples:", obj.docstring.value)
