"""Imports point down, and what --help and --dry_run load stays light."""

import subprocess
import sys
from pathlib import Path

import pytest

from library.families import FAMILIES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "tokenizers", "accelerate", "diffusers", "safetensors", "numpy", "PIL", "tqdm")
LIGHT = (
    "library.cli",
    "library.dry_run",
    "library.version",
    "library.records",
    "library.randomness",
    "library.families",
    *(f"library.config.{path.stem}" for path in (ROOT / "library" / "config").glob("[a-z]*.py")),
    *(f"library.families.{family}.{part}" for family in FAMILIES for part in ("options", "files", "tokenizers")),
    *(f"library.data.{name}" for name in ("discovery", "file_index", "captions", "buckets", "plan", "cache_keys")),
    *(f"library.io.{name}" for name in ("header", "atomic", "architectures")),
    "library.sampling.prompts",
    *(f"library.data.{path.stem}" for path in (ROOT / "library" / "data").glob("report*.py")),
    "library.text_encoders.tokenizers",
    "library.training.launch",
    "tools.make_option_pages",
    "tools.inspect_dataset",
)


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def contracts():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]


def test_light_modules_load_nothing_heavy():
    code = (
        "import sys, importlib\n"
        f"for name in {LIGHT!r}:\n"
        "    importlib.import_module(name)\n"
        f"    loaded = [heavy for heavy in {HEAVY!r} if heavy in sys.modules]\n"
        "    assert not loaded, f'{name} loads {loaded}'\n"
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_imports_point_down():
    pytest.importorskip("importlinter")
    result = run_python("from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


def test_every_room_has_its_layer():
    (layers,) = [contract["layers"] for contract in contracts() if contract["type"] == "layers"]
    placed = {name for layer in layers for name in layer.replace(":", "|").replace(" ", "").split("|")}
    library = ROOT / "library"
    rooms = {path.stem for path in library.iterdir() if path.suffix == ".py" or any(path.glob("*.py"))} - {"__init__"}
    assert {f"library.{room}" for room in rooms} | {"networks", "tools", "bench"} == placed


def test_every_family_is_kept_apart():
    (apart,) = [contract["modules"] for contract in contracts() if contract["type"] == "independence"]
    assert set(apart) == set(FAMILIES.values())
