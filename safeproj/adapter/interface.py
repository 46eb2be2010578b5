"""What every format of adapters offers; each has its own file beside this one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from safeproj.errors import SafeprojError
from safeproj.storage.arrays import Array, bytes_of
from safeproj.storage.source import Folder

if TYPE_CHECKING:
    from safeproj.adapter.record import AdaptedModule, Adapter

CONFIG = "adapter_config.json"
MANIFEST = "safeproj.json"
SIGNATURE = "model.sig"
"""Name of the signature in a directory, which is the default of model-signing."""


class Format(ABC):
    """How adapters of one kind are stored: reading one, and writing it back as it came.

    An instance belongs to one adapter and holds what only its writing needs.
    """

    documents: ClassVar[tuple[str, ...]] = ()
    """Files that are read beside the weights."""

    stand_ins: ClassVar[frozenset[str]] = frozenset()
    """Files that stand for the folder they are in, where SRC names one of them."""

    library: ClassVar[str | None] = None
    """`library_name` of a new model card."""

    base_model_key: ClassVar[str | None] = None
    """Where the config names the base model, for a new model card."""

    @classmethod
    @abstractmethod
    def read(cls, folder: Folder) -> Adapter | None:
        """Return the folder's adapter, checked; None if there is none of this format.

        Raises:
            SafeprojError: there is one that cannot be used.
        """

    @classmethod
    @abstractmethod
    def is_weights(cls, name: str) -> bool:
        """Tell whether a file of this name, without directories, holds an adapter's weights."""

    @classmethod
    def is_adapter(cls, files: Collection[str]) -> bool:
        """Tell whether a directory of these files is surely an adapter, which may be replaced."""
        return bool(cls.documents) and all(name in files for name in cls.documents)

    @property
    @abstractmethod
    def output_file(self) -> str:
        """Name of the weights file to write."""

    @property
    def replaced_files(self) -> frozenset[str]:
        """Files of the input that `output_file` replaces."""
        return frozenset({self.output_file})

    @property
    def container(self) -> Any:
        """What the weights file holds beside tensors, as it was read."""
        return None

    @property
    def written_container(self) -> Any:
        """The same as `write` writes it."""
        return self.container

    def reordered(self, adapter: Adapter, config: Mapping[str, Any]) -> Adapter:
        """Return the adapter with the rows of its tensors as the running model has them.

        Args:
            adapter: as `read` returned it.
            config: `config.json` of the model, which may tell what the adapter's files do not;
                empty if there is none.

        Raises:
            SafeprojError: the config does not tell either.
        """
        del config  # most formats store them so
        return adapter

    @abstractmethod
    def scalings(self, adapter: Adapter, modules: Sequence[AdaptedModule]) -> dict[str, float]:
        """Return `s` of each module by name, by which loaders multiply `B A`.

        Args:
            adapter: the adapter.
            modules: its updates, those of target parameters too.

        Raises:
            SafeprojError: the adapter's files do not tell.
        """

    def other_scalings(
        self, adapter: Adapter, modules: Sequence[AdaptedModule]
    ) -> dict[str, tuple[float, ...]]:
        """Return what else readers may multiply `B A` of each module by, where they differ.

        Raises:
            SafeprojError: the adapter's files do not tell.
        """
        del adapter, modules
        return {}

    def unloaded(self, adapter: Adapter, names: Collection[str]) -> Iterator[str]:
        """Yield why its own library would load nothing of some factors, without a word.

        Args:
            adapter: the adapter.
            names: of the model's weights.
        """
        del adapter, names
        yield from ()

    def differing(self, adapter: Adapter, modules: Sequence[AdaptedModule]) -> Iterator[str]:
        """Yield where readers of the adapter's files differ about ranks or scalings.

        Raises:
            SafeprojError: the files do not say what they are.
        """
        del adapter, modules
        yield from ()

    def changed_base(self, adapter: Adapter) -> str | None:
        """Return the initialisation that changed the base weights, if one did."""
        del adapter
        return None

    def disagreements(self, adapter: Adapter, names: Collection[str]) -> Iterator[str]:
        """Yield where the adapter's files differ about which modules are adapted.

        Args:
            adapter: the adapter.
            names: of the model's weights.

        Raises:
            SafeprojError: they do not say which modules are adapted.
        """
        del adapter, names  # where nothing but the tensors says so
        yield from ()

    def digests(self, tensors: Mapping[str, Array]) -> dict[str, str]:
        """Return the SHA-256 of each tensor's bytes as `write` stores them."""
        return {name: sha256(bytes_of(each)).hexdigest() for name, each in tensors.items()}

    def resized(self, adapter: Adapter, ranks: Mapping[str, int]) -> dict[str, bytes]:
        """Return the documents of an adapter some of whose factors get another rank.

        The scaling of every module stays what it was.

        Args:
            adapter: the adapter.
            ranks: module to its new rank.

        Raises:
            SafeprojError: an adapter of this format cannot have them.
        """
        del ranks
        raise SafeprojError(
            f"{adapter.source}: the ranks of its modules cannot be changed, since only adapters of "
            "PEFT say each of their own"
        )

    @abstractmethod
    def write(self, path: Path, tensors: Mapping[str, Array]) -> dict[str, str]:
        """Write the weights file.

        Args:
            path: the file to create.
            tensors: all tensors in the order of the input, as `reordered` returned them.

        Returns:
            SHA-256 of each tensor's bytes as they are stored.
        """
