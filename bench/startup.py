"""How long until something happens: ``--help``, and the first optimizer step with warm caches.

python -m bench.startup [--json startup.json]

It makes the miniature and a dozen pictures' caches in a temporary folder, runs one step to warm them, and then times a
second run from the start of its process to the line of its first step in the log, beside the imports alone.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IMPORTS = (
    "import torch, torch._dynamo, accelerate, PIL.Image, library.training.setup, library.families.sd3.family; "
    "from transformers import CLIPTokenizer"
)


def seconds(command: list[str], repeats: int) -> float:
    """The median wall-clock time of a command."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def first_step_seconds(command: list[str], log: Path) -> float:
    """From the start of the process to the first line in its log."""
    log.unlink(missing_ok=True)
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not (log.exists() and log.stat().st_size):
        if process.poll() not in (None, 0):
            raise RuntimeError(f"the run failed:\n{process.communicate()[0]}")
        time.sleep(0.01)
    elapsed = time.perf_counter() - started
    process.communicate()
    return elapsed


def training_command(folder: Path) -> list[str]:
    """One step on the miniature, everything cached on disk."""
    return [
        sys.executable,
        "sd3_train_network.py",
        f"--pretrained_model_name_or_path={folder / 'miniature' / 'sd3-miniature.safetensors'}",
        "--dataset_config=examples/sd3/quickstart.toml",
        f"--output_dir={folder / 'output'}",
        "--output_name=startup",
        "--network_module=networks.lora",
        "--network_train_unet_only",
        "--mixed_precision=no",
        "--max_train_steps=1",
        "--cache_latents_to_disk",
        "--cache_text_encoder_outputs_to_disk",
        "--max_data_loader_n_workers=0",
        "--seed=1",
    ]


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make = [sys.executable, "tools/make_miniature.py", "sd3", "--output", str(folder / "miniature")]
        subprocess.run(make, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        command = training_command(folder)
        log = folder / "output" / "startup-log.jsonl"
        first_step_seconds(command, log)  # fills the caches
        warm = statistics.median(first_step_seconds(command, log) for _ in range(options.repeats))
    numbers = {
        "help_seconds": seconds([sys.executable, "sd3_train_network.py", "--help"], options.repeats),
        "imports_seconds": seconds([sys.executable, "-c", IMPORTS], options.repeats),
        "first_step_seconds": warm,
    }
    numbers["first_step_after_imports_seconds"] = numbers["first_step_seconds"] - numbers["imports_seconds"]
    for name, value in numbers.items():
        print(f"{name:34} {value:6.2f}")
    if options.json:
        facts = {"machine": platform.processor() or platform.machine(), "python": platform.python_version()}
        options.json.write_text(json.dumps({**facts, **numbers}, indent=1))


if __name__ == "__main__":
    main()
