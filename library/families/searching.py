"""The parts of a base model with their sizes, found and checked the same way for every family, from headers alone."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.config.errors import ConfigError
from library.config.model import ModelConfig
from library.io.base_model import Layout
from library.io.parts import Part


@dataclass(frozen=True)
class Search:
    """What was found.

    Attributes:
        layout: What such a base model consists of.
        named: Part -> the file that the user named for it, or None.
        parts: Those that were found.
        sizes: Of the parts that are whole, as their readers give them.
        wrong: What is wrong so far, a line each; families add to it.
    """

    layout: Layout
    named: Mapping[str, str | None]
    parts: dict[str, Part]
    sizes: dict[str, Any]
    wrong: list[str]

    def at(self, name: str) -> str:
        """Where a part lies, for messages: with the option that named it."""
        part, option = self.parts[name], self.layout.components[name].option
        return f"{option}: {part.title}" if self.named.get(name) else part.title

    def checked(self) -> dict[str, Part]:
        """The parts.

        Raises:
            ConfigError: All that is wrong, if anything.
        """
        if self.wrong:
            raise ConfigError("\n".join(self.wrong))
        return self.parts


def search(
    layout: Layout, readers: Mapping[str, Callable[[Part], Any]], model: ModelConfig, named: Mapping[str, str | None]
) -> Search:
    """This finds every part that can be found, and reads its sizes.

    Args:
        layout: What the family's base models consist of.
        readers: Part -> what reads its sizes, and raises ConfigError where it isn't whole.
        model: The base model.
        named: Part -> the file or folder that the user named for it.
    """
    parts, wrong = layout.search(model.pretrained_model_name_or_path, named)
    sizes: dict[str, Any] = {}
    for name, part in parts.items():
        try:
            sizes[name] = readers[name](part)
        except ConfigError as error:
            wrong.append(f"{layout.components[name].option}: {error}" if named.get(name) else str(error))
    if model.tokenizer_dir is not None and not Path(model.tokenizer_dir).is_dir():
        wrong.append(f"--tokenizer_dir: {model.tokenizer_dir} is not a folder")
    return Search(layout, named, parts, sizes, wrong)


def base_folder(layout: Layout, model: ModelConfig) -> Path | None:
    """The base model where it is a folder in diffusers' layout; None: it is a file."""
    base = Path(str(model.pretrained_model_name_or_path))
    return base if layout.is_folder(base) else None
