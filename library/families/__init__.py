"""THE REGISTRY: one line per family. Names only, so that reading it loads nothing."""

from importlib import import_module
from typing import Any

FAMILIES = {
    "sd3": "library.families.sd3",
    "sana": "library.families.sana",
    "sd": "library.families.sd",
}


def family_options(name: str) -> Any:
    """The module with the family's options: light, no torch."""
    return import_module(f"{FAMILIES[name]}.options")


def family_files(name: str) -> Any:
    """The module that knows the family's files: checks headers, no torch."""
    return import_module(f"{FAMILIES[name]}.files")


def family_tokenizers(name: str) -> Any:
    """The module that finds the family's tokenizers on disk: no torch."""
    return import_module(f"{FAMILIES[name]}.tokenizers")


def create_family(name: str, config: Any) -> Any:
    """The family as the trainer uses it: a ``ModelFamily`` made from a validated configuration."""
    return import_module(f"{FAMILIES[name]}.family").create(config)
