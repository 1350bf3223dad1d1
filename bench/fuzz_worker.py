"""Fuzzes one parser until its time is up; started by ``bench.fuzz``, in a process that atheris ends.

python -m bench.fuzz_worker TARGET [libFuzzer's options] [folder of inputs]
"""

import sys
import tempfile
from pathlib import Path


def main() -> None:
    """Fuzz."""
    import atheris

    # what is imported here reports its branches; torch and transformers are left as they are
    with atheris.instrument_imports(include=["library.config", "library.io", "library.data", "networks"]):
        from bench.fuzz_targets import all_targets

    name, *words = sys.argv[1:]
    parse = all_targets()[name].parse
    with tempfile.TemporaryDirectory() as folder:
        atheris.Setup([sys.argv[0], *words], lambda data: parse(data, Path(folder)))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
