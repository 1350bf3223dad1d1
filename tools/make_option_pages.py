"""Write docs/options/*.md from the options as they are declared.

python tools/make_option_pages.py
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file, from anywhere

from library.cli import SCRIPTS, refused_options
from library.config.command_line import InvocationConfig, default_text
from library.config.generate import GenerateConfig
from library.config.model import ModelConfig
from library.config.options import Option, group_title, options_of
from library.families import FAMILIES, family_options

ROOT = Path(__file__).resolve().parent.parent


def pages() -> dict[str, str]:
    """Every page by file name."""
    made = {}
    for name, script in SCRIPTS.items():
        made[f"{name}.md"] = page(f"{name}.py", script.about, script.groups, refused_options(script.family))
    made["generate.md"] = page("generate.py", "Pictures from prompts.", generate_groups(), {})
    return made


def generate_groups() -> dict[str, type]:
    """The option groups of generate.py, those of every family among them."""
    modules = [family_options(family) for family in FAMILIES]
    own = {family: module.OPTIONS for family, module in zip(FAMILIES, modules)}
    others = {name: group for module in modules for name, group in module.GENERATE_GROUPS.items() if name != "generate"}
    return {"model": ModelConfig, **own, **others, "generate": GenerateConfig}


def page(script: str, job: str, groups: Mapping[str, type], refused: Mapping[str, str]) -> str:
    """One script's page: a table per option group, then what is refused and why."""
    lines = [
        f"# Options of {script}",
        "",
        f"{job} This page is made by `python tools/make_option_pages.py`; `python {script} --help` says the same.",
        "",
        "An option is typed (`--max_grad_norm 2`) or stands in the file that `--config_file` names "
        "(`max_grad_norm = 2`, in any section); what is typed wins. A switch is undone by `--no-`: "
        "`--no-cache_latents`.",
    ]
    for group in (InvocationConfig, *groups.values()):
        lines += [
            "",
            f"## {group_title(group)}",
            "",
            "| option | type | default | what it does | metadata |",
            "|---|---|---|---|---|",
        ]
        lines += [_row(declared) for declared in options_of(group)]
    if refused:
        lines += [
            "",
            "## Refused",
            "",
            "These are known from other trainers. Typing one stops the run with its reason.",
            "",
        ]
        lines += ["| option | why |", "|---|---|"]
        lines += [f"| `{name}` | {_cell(reason)} |" for name, reason in sorted(refused.items())]
    return "\n".join(lines) + "\n"


def _row(declared: Option) -> str:
    names = ", ".join(f"`{name}`" for name in (declared.name, *declared.aliases))
    kind = "switch" if declared.is_switch else declared.expected
    default = default_text(declared)
    key = f"`{declared.metadata_key}`" if declared.metadata_key else ""
    return f"| {names} | {_cell(kind)} | {f'`{default}`' if default else ''} | {_cell(declared.help)} | {key} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def stale_pages(folder: Path) -> Iterator[str]:
    """The pages in ``folder`` that are missing or say something else than the options do."""
    for name, text in pages().items():
        path = folder / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            yield name


def main(arguments: Sequence[str] | None = None) -> int:
    """This writes the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "options", help="Folder; default: docs/options.")
    folder = parser.parse_args(arguments).output
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
        print(folder / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
