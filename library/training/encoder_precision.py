"""What ``--text_encoder_1_precision`` and its siblings mean for a run: whether they can act, and for its caches."""

from collections.abc import Collection

from library.config.errors import ConfigError
from library.config.memory import MemoryConfig, encoder_problems
from library.families.protocols import ModelFamily


def precision_signature(memory: MemoryConfig) -> dict[str, str]:
    """What the formats add to the signature of text features; nothing where all encoders stay as they are."""
    return {f"text_encoder_{number}_precision": chosen for number, chosen in memory.encoder_formats.items()}


def check_encoder_precision(memory: MemoryConfig, family: ModelFamily, trained: Collection[str]) -> None:
    """Find out whether the text encoders can be stored as the options say.

    Args:
        memory: The options.
        family: The model's parts.
        trained: The components that are trained, by themselves or by an adapter.

    Raises:
        ConfigError: There is no such text encoder, or it is trained; a line for each.
    """
    names = family.description.text_encoders
    problems = encoder_problems(memory, names)
    for number, chosen in memory.encoder_formats.items():
        option = f"--text_encoder_{number}_precision"
        if number <= len(names) and names[number - 1] in trained:
            problems.append(
                f"{option} {chosen} is for a text encoder that stays as it is, and {names[number - 1]} is trained; "
                "train the denoiser alone, or remove it"
            )
    if problems:
        raise ConfigError("\n".join(problems))
