"""Finds what a weight of the running model is made of: the user's word first, then ever less."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from safeproj.checkpoint.expression import (
    Expression,
    Item,
    Stored,
    Swapped,
    dtype_and_shape,
    stored_names,
)
from safeproj.checkpoint.interface import Checkpoint
from safeproj.errors import SafeprojError, install
from safeproj.names.layout import DENSE, LINEAR, Layout, known_layout, layout_by_name, model_types
from safeproj.names.rules import parse_rules, rewrite
from safeproj.names.suffix import TURNED_ON_DISK, Suffixes, turned_on_disk
from safeproj.text import printable, shorten

if TYPE_CHECKING:
    from safeproj.names.architecture import Mapping

Fits = Callable[[tuple[int, ...]], bool]

_MISLEADING = TURNED_ON_DISK | {"kimi_k25"}
"""Architectures where a file's tensor may have the name that the running model gives another."""

_SHOWN = 3
"""How many names a message lists."""


MAX_CLOSEST = 20
"""Names that are not there for which the one that looks most like it is said."""


class Names:
    """The weights of a running model in one checkpoint.

    transformers is asked only where the name alone does not tell, since importing it takes seconds.

    Args:
        checkpoint: where the tensors are.
        maps: values of `--map`.
        architecture: False to do without transformers even if it is installed.
        running: whether the tensors are those of the running model, under its names.

    Raises:
        SafeprojError: one of `maps` is malformed.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        maps: Sequence[str] = (),
        *,
        architecture: bool = True,
        running: bool = False,
    ) -> None:
        self._rules = parse_rules(maps)
        self._checkpoint = checkpoint
        self._suffixes = Suffixes(checkpoint)
        self._close: dict[str, str] = {}
        self._may_import = architecture
        self._types = frozenset[str]() if running else model_types(checkpoint.config)

    def find(self, parameter: str, fits: Fits) -> Expression:
        """Return what a weight is made of.

        Args:
            parameter: its name in the running model.
            fits: tells whether the running model's weight may have a shape.

        Raises:
            SafeprojError: nothing is found, or nothing that fits, or more than one that does.
        """
        mapped = self._mapped(parameter)
        if mapped is not None:
            return self._require_fit(parameter, mapped, fits)
        stored = Stored(parameter) if parameter in self._checkpoint.names else None
        if stored and not self._types & _MISLEADING and self._fits(stored, fits):
            return stored
        found = self._mapping.find(parameter) if self._mapping else None
        if found is not None:
            return self._require_fit(parameter, found, fits)
        if stored is not None:
            turned = None
            if self._types & TURNED_ON_DISK:
                turned = turned_on_disk(parameter, self._checkpoint)
            return self._require_fit(parameter, turned or stored, fits)
        if self._mapping and self._mapping.knows(parameter):
            # The architecture has this weight, and loads it from nothing in the checkpoint.
            raise self._not_found(parameter)
        return self._choose(parameter, fits)

    def layout(self, parameter: str) -> Layout | None:
        """Return how the running model stores a weight, None if nothing tells."""
        return LINEAR if self._rules and self._is_item(parameter) else self._own_layout(parameter)

    def _own_layout(self, parameter: str) -> Layout | None:
        found = known_layout(self._checkpoint.config, parameter)
        if found is None and self._mapping is not None:
            found = self._mapping.layout(parameter)
        return found

    @property
    def checkpoint(self) -> Checkpoint:
        """Where the tensors are."""
        return self._checkpoint

    def parameters(self) -> dict[str, Layout]:
        """Return the weights of the running model that low-rank updates can have.

        Without transformers, or where it does not know the architecture, these are the weights
        that the checkpoint's own names tell.
        """
        if not self._is_dense and self._mapping is not None:
            return self._mapping.parameters()
        found = {}
        for name in self._checkpoint.names:
            dimensions = len(self._checkpoint.describe(name).shape)
            layout = known_layout(self._checkpoint.config, name) or layout_by_name(name)
            if layout is not None and dimensions == (3 if layout.kind == "experts" else 2):
                found[name] = layout
        return found

    @property
    def _is_dense(self) -> bool:
        """Tell whether the stored names are all that there is, so that transformers adds nothing.

        It may where the output head is not stored, which is the embedding then.
        """
        config, types = self._checkpoint.config, self._types
        known = bool(types) and types <= DENSE and "auto_map" not in config
        names = self._checkpoint.names
        if not known or "lm_head.weight" not in names:
            return False
        return all(name.startswith(("model.", "lm_head.")) for name in names)

    def experts(self) -> dict[str, Layout]:
        """Return the weights of single experts, as models had them before there were stacks."""
        return dict.fromkeys(self._suffixes.experts(), LINEAR)

    @cached_property
    def _mapping(self) -> Mapping | None:
        """What transformers says, None without it or if it does not know the architecture."""
        if not self._may_import or not self._checkpoint.config:
            return None
        from safeproj.names.architecture import mapping_of

        return mapping_of(self._checkpoint)

    def _mapped(self, parameter: str) -> Expression | None:
        """Return what the first rule says whose right side exists, None if no rule is meant."""
        missing = []
        for rule in self._rules:
            for name in rewrite(rule, parameter):
                if name in self._checkpoint.names:
                    return Stored(name)
                item = self._item(name)
                if item is not None:
                    return item
                stacks = self._suffixes.stacks(name)
                if len(stacks) == 1:
                    return stacks[0]
                missing.append((rule, name))
        if not missing:
            return None
        rule, name = missing[0]
        raise SafeprojError(
            f"{self._checkpoint.source}: --map {printable(rule.text)!r} makes {printable(name)} of "
            f"{parameter}, but the checkpoint has no such tensor{self._closest(name)}; correct the "
            "rule, or add one for this checkpoint"
        )

    def _is_item(self, parameter: str) -> bool:
        """Tell whether a rule says that a weight is one item of a stack."""
        try:
            return isinstance(self._mapped(parameter), Item | Swapped)
        except SafeprojError:
            return False

    def _item(self, name: str) -> Expression | None:
        """Return the item of a stack, as (out, in), that the right side of a rule names: `x[3]`.

        Raises:
            SafeprojError: nothing tells which side of it is the output.
        """
        match = re.fullmatch(r"(?P<stack>[^\[\]]+)\[(?P<index>\d{1,6})\]", name, re.ASCII)
        if match is None or match["stack"] not in self._checkpoint.names:
            return None
        stack, index = match["stack"], int(match["index"])
        shape = self._checkpoint.describe(stack).shape
        if len(shape) != 3 or index >= shape[0]:
            return None
        layout = self._own_layout(stack)
        if layout is None or layout.out_first is None:
            raise SafeprojError(
                f"{self._checkpoint.source}: nothing tells which side of {stack} {list(shape)} is "
                f"the output; transformers knows the architecture; {install('train')}"
            )
        item = Item(Stored(stack), index)
        return item if layout.out_first else Swapped(item)

    def _choose(self, parameter: str, fits: Fits) -> Expression:
        """Return the one weight whose name says the same; the architecture says nothing."""
        candidates = self._suffixes.candidates(parameter)
        fitting = [candidate for candidate in candidates if self._fits(candidate, fits)]
        if len(fitting) == 1:
            return fitting[0]
        if not candidates:
            raise self._not_found(parameter)
        if not fitting:
            return self._require_fit(parameter, candidates[0], fits)
        listed = " or ".join(self._described(candidate) for candidate in fitting)
        raise SafeprojError(
            f"{self._checkpoint.source}: {parameter} may be {listed}; say which with "
            f"--map '{parameter}={next(stored_names(fitting[0]))}'"
        )

    def _fits(self, expression: Expression, fits: Fits) -> bool:
        return fits(dtype_and_shape(expression, self._checkpoint)[1])

    def _require_fit(self, parameter: str, expression: Expression, fits: Fits) -> Expression:
        if not self._fits(expression, fits):
            raise SafeprojError(
                f"{self._checkpoint.source}: {parameter} is {self._described(expression)}, and the "
                "adapter does not fit that shape; is the adapter for another model?"
            )
        return expression

    def _described(self, expression: Expression) -> str:
        shape = dtype_and_shape(expression, self._checkpoint)[1]
        return f"{shorten(stored_names(expression), _SHOWN)} {list(shape)}"

    def _closest(self, name: str) -> str:
        """Return which name looks most like one that is not there; only for the first few.

        Each has to be compared with all names, and an adapter may have any number of such.
        """
        if name not in self._close:
            if len(self._close) == MAX_CLOSEST:
                return ""
            found = difflib.get_close_matches(name, list(self._checkpoint.names), n=1)
            text = f", closest is {found[0]}" if found else ", nothing looks like it"
            self._close[name] = text
        return self._close[name]

    def _not_found(self, parameter: str) -> SafeprojError:
        return SafeprojError(
            f"{self._checkpoint.source}: no weight for {parameter}{self._closest(parameter)}; is "
            "the adapter for another model? If it is only named otherwise there, say how with "
            "--map RUNTIME=CHECKPOINT" + ("" if self._mapping else _MORE)
        )


_MORE = f"; with transformers more names are known; {install('train')}"
