"""Where the parts of a model lie: in the base model's file or folder, or in files of their own."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from library.config.documents import read_json
from library.config.errors import ConfigError
from library.io.architectures import Architecture, find_architecture, scripts_for
from library.io.components import BASE, Component, find_part, require_part
from library.io.header import Header
from library.io.parts import Part, read_weights
from library.io.pickles import SUFFIXES as PICKLE_SUFFIXES

DENOISER = "denoiser"
_DENOISER_FOLDERS = ("transformer", "unet")
_WEIGHTS_SUFFIXES = (".safetensors", ".json", *PICKLE_SUFFIXES)


def denoiser_architecture(path: Path) -> Architecture | None:
    """This recognises a base model by its denoiser's tensors, from headers alone.

    Args:
        path: A weights file, or a folder in diffusers' layout.

    Returns:
        None where it is unknown or can't be read.
    """
    inside = (path / folder for folder in _DENOISER_FOLDERS)
    try:
        headers = read_weights(next((folder for folder in inside if folder.is_dir()), path))
    except ConfigError:
        return None
    shapes = {name: shape for header in headers for name, shape in header.shapes.items()}
    return find_architecture(shapes, shapes)


@dataclass(frozen=True)
class Layout:
    """What a family's base models consist of.

    Attributes:
        title: The family's short name, for messages.
        pipeline: The class that diffusers writes into ``model_index.json``.
        pipelines: How the names of all such classes begin that hold the family's denoiser.
        components: The parts by name; ``denoiser`` is one of them.
        optional: The parts that a model can do without.
    """

    title: str
    pipeline: str
    pipelines: str
    components: Mapping[str, Component]
    optional: Collection[str] = ()

    def is_folder(self, path: Path) -> bool:
        """Whether the path is a folder in diffusers' layout."""
        folders = (*(component.folder for component in self.components.values()), "unet")
        return path.is_dir() and (
            (path / "model_index.json").is_file() or any((path / name).is_dir() for name in folders)
        )

    def search(self, path: str | None, named: Mapping[str, str | None]) -> tuple[dict[str, Part], list[str]]:
        """This finds all parts that can be found, and says all that is wrong.

        Args:
            path: The base model; None: it wasn't given.
            named: Part -> the file or folder that the user named for it; it wins over the one in the base model.

        Returns:
            The parts by name, and a line per problem. Without a problem all parts are there that must be.
        """
        parts: dict[str, Part] = {}
        wrong: list[str] = []
        base = self._open(path, wrong)
        for name, component in self.components.items():
            own_path = named.get(name)
            try:
                if own_path is not None:
                    parts[name] = require_part(
                        component, read_weights(own_path), str(own_path), self.components.values()
                    )
                elif base is not None and (part := base.find(name)) is not None:
                    parts[name] = part
            except ConfigError as error:
                wrong.append(f"{component.option}: {error}" if own_path is not None else str(error))
                if name == DENOISER:
                    base = None  # of another model: what else it holds doesn't matter
                continue
            if name not in parts and name not in self.optional and base is not None:
                add = "name one that has it" if component.option == BASE else f"add {component.option}"
                wrong.append(f"no {component.title}: {base.lacks(component)}; {add}")
        return parts, wrong

    def _open(self, path: str | None, wrong: list[str]) -> "_Base | None":
        if path is None:
            wrong.append(f"{BASE} is missing; name the base model's file, or its folder in diffusers' layout")
            return None
        if self.is_folder(Path(path)):
            return _Base(self, Path(path), ())
        if not Path(path).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not path.endswith(_WEIGHTS_SUFFIXES):
            wrong.append(f"{BASE}: {path} is no file or folder here; download it first, then name its folder")
            return None
        try:
            return _Base(self, Path(path), read_weights(path))
        except ConfigError as error:
            wrong.append(f"{BASE}: {error}")
            return None


@dataclass(frozen=True)
class _Base:
    """The base model: files with everything inside, or a folder with a sub-folder per part (then no headers)."""

    layout: Layout
    path: Path
    headers: tuple[Header, ...]

    def find(self, name: str) -> Part | None:
        component, others = self.layout.components[name], self.layout.components.values()
        if not self.headers:
            folder = self.path / component.folder
            if folder.is_dir():
                return require_part(component, read_weights(folder), str(folder), others)
            if name == DENOISER:
                raise ConfigError(self._without_denoiser())
            return None
        if name == DENOISER:
            return require_part(component, self.headers, str(self.path), others)
        return find_part(component, self.headers, str(self.path))

    def lacks(self, component: Component) -> str:
        return f"{self.path} has none inside" if self.headers else f"{self.path} has no folder {component.folder}"

    def _without_denoiser(self) -> str:
        try:
            kind = read_json(self.path / "model_index.json")["_class_name"]
        except (ConfigError, KeyError, TypeError):
            kind = None
        if kind is not None and not str(kind).startswith(self.layout.pipelines):
            remedy = scripts_for(denoiser_architecture(self.path))
            return f"{self.path} is a folder of {kind}, expected one of {self.layout.pipeline}{remedy}"
        folder = self.layout.components[DENOISER].folder
        return f"{self.path} has no folder {folder}, where diffusers keeps {self.layout.title}'s denoiser"
