"""Options: declared once, parsed from words and TOML, built into groups."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pytest

from library.config.command_line import help_text, read_command_line
from library.config.errors import ConfigError
from library.config.options import (
    acting_metadata,
    all_options,
    build,
    canonical_names,
    option,
    options_of,
)


def parse_pair(value):
    low, high = str(value).split(",")
    return int(low), int(high)


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Engine of the car."""

    cylinders: int = option(4, "How many.", minimum=1, maximum=16, metadata_key="ss_cylinders")
    fuel: str = option("petrol", "What it burns.", choices=("petrol", "diesel"), aliases=("gas",))
    power: float | None = option(None, "In kW. By default unknown.", minimum=0, metadata_key="ss_power")
    turbo: bool = option(False, "Blow air in.", metadata_key="ss_turbo")
    gears: tuple[float, ...] = option((), "Ratios, 100% of them.", metadata_key="ss_gears")
    rpm: tuple[int, int] | None = option(None, "Range.", parse=parse_pair)
    key: str | None = option(None, "The key.", secret=True, metadata_key="ss_key")
    manual: Path | None = option(None, "A file.")

    def __post_init__(self):
        if self.turbo and self.cylinders < 3:
            raise ConfigError(f"--turbo needs 3 cylinders, not {self.cylinders}")


@dataclass(frozen=True, kw_only=True)
class Body:
    """Body."""

    doors: int = option(4, "How many.")


GROUPS = {"engine": Engine, "body": Body}


@dataclass(frozen=True)
class Car:
    name: str
    engine: Engine
    body: Body


def read(*argv, **more):
    return read_command_line(GROUPS, argv, **more)


def test_defaults_when_nothing_is_said():
    line = read()
    assert line.groups == {"engine": Engine(), "body": Body()}
    assert not line.problems
    assert set(line.provenance.values()) == {"default"}


def test_values_of_every_type():
    line = read(
        *("--cylinders", "6", "--gas=diesel", "--power", "1e2", "--turbo", "--gears", "1.5", "-1e-3", "-2"),
        *("--rpm", "800,6000", "--key=--odd", "--manual", "a/b.pdf", "--doors=2"),
    )
    assert not line.problems
    assert line.groups["engine"] == Engine(
        cylinders=6, fuel="diesel", power=100.0, turbo=True, gears=(1.5, -0.001, -2.0), rpm=(800, 6000), key="--odd",
        manual=Path("a/b.pdf"),
    )  # fmt: skip
    assert line.groups["body"] == Body(doors=2)
    assert line.provenance["fuel"] == "typed"


def test_everything_wrong_is_reported_at_once():
    line = read("--cylindres", "4", "--cylinders", "17", "--fuel", "deisel", "--power", "much", "--rpm", "1", "--doors")
    assert line.problems == (
        "unknown option --cylindres; did you mean --cylinders?",
        "--cylinders: expected a whole number from 1 to 16, got 17",
        "--fuel: expected one of petrol, diesel, got 'deisel'; did you mean diesel?",
        "--power: expected a number of at least 0, got 'much'",
        "--rpm: not enough values to unpack (expected 2, got 1)",
        "--doors: expected a whole number, got no value",
    )
    assert line.unusable == {"cylinders", "fuel", "power", "rpm", "doors"}


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["--doors", "2", "3"], "--doors: expected a whole number, got 2 values ('2 3')"),
        (["--doors", "2.0"], "--doors: expected a whole number, got '2.0'"),
        (["--power", "nan"], "--power: expected a number of at least 0, got nan"),
        (["--power", "-1"], "--power: expected a number of at least 0, got -1.0"),
        (["--turbo=yes"], "--turbo is a switch and takes no value, got 'yes'; write --turbo or --no-turbo"),
        (["--no-turbo=yes"], "--turbo is a switch and takes no value"),
        (["--help=me"], "--help is a switch"),
        (["stray"], "unexpected 'stray': options start with --"),
        (["--door", "2"], "unknown option --door; did you mean --doors?"),
        (["--zzz"], "unknown option --zzz; see --help"),
    ],
)
def test_wrong_words(argv, problem):
    problems = read(*argv).problems
    assert len(problems) == 1
    assert problems[0].startswith(problem)


def test_rules_inside_a_group_and_provenance():
    line = read("--turbo", "--cylinders", "2")
    assert line.problems == ("--turbo needs 3 cylinders, not 2",)
    assert line.groups["engine"] == Engine()


def test_secrets_are_not_shown():
    assert "hunter2" not in repr(Engine(key="hunter2"))
    line = read("--key", "hunter2", "hunter3")
    assert len(line.problems) == 1
    assert "hunter" not in line.problems[0]


def test_file_and_precedence(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        'cylinders = 8\ngas = "diesel"\nturbo = true\nmanual = "m.pdf"\n'
        '[anything]\ndoors = 5\ngears = [1, 2.5]\npower = 3\nrpm = "1,2"\n'
    )
    line = read("--config_file", str(path), "--cylinders", "3", "--no-turbo")
    assert not line.problems
    assert line.groups["engine"] == Engine(
        cylinders=3, fuel="diesel", gears=(1.0, 2.5), power=3.0, rpm=(1, 2), manual=Path("m.pdf")
    )
    assert isinstance(line.groups["engine"].power, float)
    assert line.groups["body"] == Body(doors=5)
    assert line.provenance["cylinders"] == line.provenance["turbo"] == "typed"
    assert line.provenance["doors"] == "from run.toml"


def test_mistakes_in_the_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        'cylinders = "8"\nturbo = 1\ncylindres = 3\nconfig_file = "x"\nwings = 2\nmanual = 3\n'
        "[a]\ndoors = 5\n[b]\ndoors = 4\n[[datasets]]\nx = 1\n"
    )
    problems = read("--config_file", str(path), refusals={"wings": "is not supported: cars don't fly"}).problems
    assert set(problems) == {
        "run.toml: unknown key cylindres; did you mean cylinders?",
        "run.toml: unknown key config_file; see --help for the known names",
        "run.toml: wings is not supported: cars don't fly",
        "run.toml: doors stands in [a] and in [b]; keep one",
        "run.toml: [[datasets]] belongs in the dataset TOML; name that file by dataset_config",
        "run.toml: cylinders: expected a whole number from 1 to 16, got '8'",
        "run.toml: turbo: expected true or false, got 1",
        "run.toml: manual: expected text, got 3",
    }


@pytest.mark.parametrize(
    ("content", "problem"), [(None, "no such file"), ("a = [", "not valid TOML"), (b"\xff\xfe\x00", "not a text file")]
)
def test_unreadable_file(tmp_path, content, problem):
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    problems = read("--config_file", str(path)).problems
    assert len(problems) == 1
    assert problem in problems[0]


def test_refused_option_with_its_reason():
    line = read("--wings", "2", refusals={"wings": "is not supported: cars don't fly"})
    assert line.problems == ("--wings is not supported: cars don't fly",)


def test_help_is_grouped_and_names_defaults():
    text = help_text(GROUPS, program="car.py", description="Cars.")
    assert (
        text.index("Engine of the car:") < text.index("--cylinders N") < text.index("Body:") < text.index("--doors N")
    )
    for part in ("How many. Default: 4.", "--fuel {petrol,diesel}", "Also: --gas.", "--[no-]turbo", "100% of them"):
        assert part in text
    assert "Default: off." in text


def test_metadata_holds_what_acted():
    car = Car("mine", Engine(gears=(1.0, 2.0), key="hunter2"), Body())
    assert acting_metadata(car) == {"ss_cylinders": "4", "ss_turbo": "False", "ss_gears": "[1.0, 2.0]"}


def test_metadata_leaves_out_idle_options():
    @dataclass(frozen=True, kw_only=True)
    class IdleEngine(Engine):
        """Engine."""

        @property
        def idle_options(self):
            return frozenset({"turbo"})

    assert "ss_turbo" not in acting_metadata(Car("mine", IdleEngine(), Body()))


def test_two_options_of_one_name_are_our_mistake():
    @dataclass(frozen=True, kw_only=True)
    class Other:
        """Other."""

        gas: int = option(1, "Clashes with an alias.")

    with pytest.raises(TypeError, match="gas"):
        all_options({**GROUPS, "other": Other})


def test_a_type_nobody_can_parse_is_our_mistake():
    @dataclass(frozen=True, kw_only=True)
    class Odd:
        """Odd."""

        thing: dict = option(None, "No parse function.")

    with pytest.raises(TypeError, match="thing"):
        list(options_of(Odd))


def test_names_of_aliases():
    assert canonical_names(all_options(GROUPS))["gas"] == "fuel"


def test_build_without_command_line():
    built = build(GROUPS, {"doors": ["3"], "turbo": True})
    assert built.groups["body"].doors == 3
    assert built.groups["engine"].turbo
    assert [field.name for field in dataclasses.fields(Engine)] == [o.name for o in options_of(Engine)]
