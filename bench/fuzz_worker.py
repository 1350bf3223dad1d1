"""Fuzzes one parser until its time is up; started by ``bench.fuzz``, in a process that atheris ends.

python -m bench.fuzz_worker TARGET [libFuzzer's options] [folder of inputs]
"""

import sys
import tempfile
from pathlib import Path


def main() -> None:
    """Fuzz."""
    import atheris

    name, *words = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        # what is imported here reports its branches, also what the parser imports at first use; torch is left as it is
        with atheris.instrument_imports(include=["library.config", "library.io", "library.data", "networks"]):
            from bench.fuzz_targets import all_targets

            target = all_targets()[name]
            for seed in target.seeds:
                target.parse(seed, Path(folder))
        parse = target.parse
        atheris.Setup([sys.argv[0], *words], lambda data: parse(data, Path(folder)))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
