"""What the pages say is true: examples parse, names exist, links lead somewhere, quoted errors are the real ones."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from library import cli
from library.config import data as data_config
from library.config.command_line import InvocationConfig, read_command_line
from library.config.dataset import DatasetConfig, SubsetConfig, TomlKeys
from library.config.errors import ConfigError
from library.config.model import ModelConfig
from library.config.options import all_options
from library.config.run import training_groups
from library.families import FAMILIES, family_options
from library.records import Resolution
from library.sampling.prompts import read_prompts
from tests.dataset_toml import read_with
from tools.inspect_dataset import InspectionConfig

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
DATASETS = DOCS / "datasets.md"
TUTORIAL = DOCS / "tutorials" / "sd3_lora.md"
PAGES = sorted([ROOT / "README.md", *DOCS.rglob("*.md")])
SCRIPTS = sorted([*ROOT.glob("*.sh"), *(ROOT / "examples").rglob("*.sh"), *(ROOT / "tools").glob("*.sh")])

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
OPTION = re.compile(r"(?<![\w-])--(\[no-\])?([A-Za-z]\w*(?:-\w+)*)([*_]*)")
INLINE_PROMPT_OPTIONS = {"w", "h", "d", "s", "l", "n", "ss", "g", "cn", "ctr", "rcfg", "fs"}
OF_OTHER_PROGRAMS = {
    *("num_processes", "num_machines", "num_cpu_threads_per_process", "cpu", "dynamo_backend"),  # accelerate launch
    *("multi_gpu", "machine_rank", "main_process_ip", "main_process_port"),  # accelerate launch
    *("nproc_per_node", "nnodes", "rdzv_id", "rdzv_backend", "rdzv_endpoint"),  # torchrun
    *("job-name", "nodes", "ntasks-per-node", "gpus-per-node", "time", "requeue", "open-mode"),  # Slurm
    *("local-dir", "include"),  # hf download
    *("logdir",),  # tensorboard
    *("quiet", "upgrade"),  # pip
    *("check",),  # ruff format
}


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def blocks(page, language):
    return [text for found, text in BLOCK.findall(page.read_text(encoding="utf-8")) if found == language]


def pages(*, having=""):
    chosen = [page for page in PAGES if having in page.read_text(encoding="utf-8")]
    return pytest.mark.parametrize("page", [pytest.param(page, id=name_of(page)) for page in chosen])


def groups_of_scripts():
    for family in FAMILIES:
        options = family_options(family)
        for job in options.SCRIPTS:
            yield {"invocation": InvocationConfig, **training_groups(options, job=job)}
        generate = {"model": ModelConfig, "family": options.OPTIONS, **options.GENERATE_GROUPS}
        yield {"invocation": InvocationConfig, **generate}
    yield {"inspection": InspectionConfig}


@pytest.fixture(scope="module")
def known_options():
    known = set(INLINE_PROMPT_OPTIONS | OF_OTHER_PROGRAMS)
    for groups in groups_of_scripts():
        for option in all_options(groups).values():
            names = {option.name, *option.aliases}
            known |= names | ({f"no-{name}" for name in names} if option.is_switch else set())
    for family in FAMILIES:
        known |= set(cli.refused_options(family))
    for program in [*(ROOT / "tools").glob("*.py"), *(ROOT / "bench").glob("*.py")]:
        known |= set(re.findall(r"add_argument\(\s*\"--([\w-]+)\"", program.read_text(encoding="utf-8")))
    return known


def unknown_options(text, known):
    """The options in a text that no program has; ``--save_last_n_*`` stands for all that begin so.

    Left out are what an error message quotes as unknown, ``--no-`` by itself, and the made-up ``--word``.
    """
    for no, name, more in OPTION.findall(re.sub(r"unknown option --\w+|--no-(?!\w)|` --word`", "", text)):
        exists = any(other.startswith(name) for other in known) if more else name in known
        if not exists or (no and f"no-{name}" not in known):
            yield f"--{name}{more}"


@pytest.mark.parametrize("path", [pytest.param(path, id=name_of(path)) for path in [*PAGES, *SCRIPTS]])
def test_named_options_exist(path, known_options):
    assert not list(unknown_options(path.read_text(encoding="utf-8"), known_options))


def test_an_option_that_does_not_exist_is_noticed(known_options):
    text = "`--network_dimm 4` --network_dim --save_last_n_* --nothing_like_this_* --w 16 --no-cache_latents"
    assert list(unknown_options(text, known_options)) == ["--network_dimm", "--nothing_like_this_*"]


def headings(page):
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(page):
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        if not path.exists() or (anchor and anchor not in headings(path)):
            yield target


@pages()
def test_links_lead_somewhere(page):
    assert not list(broken_links(page))


def test_a_broken_link_is_noticed(tmp_path):
    (tmp_path / "there.md").write_text("# A title, here\n")
    page = tmp_path / "page.md"
    page.write_text("# Own\n[a](there.md) [b](there.md#a-title-here) [c](#own) [d](gone.md) [e](there.md#no) [f](#x)\n")
    assert list(broken_links(page)) == ["gone.md", "there.md#no", "#x"]


def test_the_index_names_every_page():
    text = (DOCS / "index.md").read_text(encoding="utf-8")
    linked = {(DOCS / target).resolve() for target in re.findall(r"\]\(([^)#\s]+)", text)}
    assert {page for page in PAGES if DOCS in page.parents} - {DOCS / "index.md"} <= linked


@pages()
def test_named_files_of_the_repository_exist(page):
    text = page.read_text(encoding="utf-8")
    rooms = "library|networks|tools|tests|bench|examples|docs"
    named = re.findall(rf"(?<![\w/.<>-])((?:{rooms})/[\w/.-]*\w)", text)
    assert not [path for path in named if not (ROOT / path).exists()]


DATASET_EXAMPLES = [
    pytest.param(text, id=f"{name_of(page)}-{number}")
    for page in PAGES
    for number, text in enumerate(blocks(page, "toml"))
    if page == DATASETS or "[[datasets]]" in text
]


@pytest.mark.parametrize("text", DATASET_EXAMPLES)
def test_dataset_examples_are_read(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in re.findall(r'(?:image_dir|conditioning_data_dir) = "([^":]+)"', text):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    for file in re.findall(r'metadata_file = "([^":]+)"', text):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    (tmp_path / "dataset.toml").write_text(text, encoding="utf-8")
    assert read_with(dataset_config="dataset.toml")


def key_rows():
    """Key -> scopes and default as the page's tables say them."""
    pattern = re.compile(r"^\| `(\w+)` \| ([GDS ]+) \| [^|]+ \| ([^|]+) \|", re.MULTILINE)
    return {key: (scopes, default.strip()) for key, scopes, default in pattern.findall(DATASETS.read_text())}


def dataset_keys():
    """Key -> its field, and where it may stand."""
    subset_only = ("image_dir", "metadata_file", "conditioning_data_dir", "is_reg")
    for record, scopes in ((DatasetConfig, "G D"), (SubsetConfig, "G D S"), (TomlKeys, "G D S")):
        for field in dataclasses.fields(record):
            if field.name != "subsets" and (record is not TomlKeys or field.name in ("disabled", "custom_attributes")):
                yield field, "S" if field.name in subset_only else scopes


def test_the_page_lists_every_dataset_key_with_its_scope_and_default():
    expected = {}
    for field, scopes in dataset_keys():
        default = None if field.default is dataclasses.MISSING else field.default
        shown = str(default).lower() if isinstance(default, bool) else str(default)
        expected[field.name] = (scopes, "none" if default in (None, "", ()) else f"`{shown}`")
    assert key_rows() == expected


def test_every_dataset_key_stands_in_an_example():
    text = "\n".join(blocks(DATASETS, "toml"))
    assert not [field.name for field, _ in dataset_keys() if not re.search(rf"^ *{field.name} = ", text, re.MULTILINE)]


def test_the_page_explains_every_refused_dataset_key():
    refused = DATASETS.read_text(encoding="utf-8").partition("## Keys that are refused")[2]
    assert not [key for key in data_config.UNSUPPORTED if f"`{key}`" not in refused]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_page_on_adapters_explains_every_network_arg(family):
    synthetic = pytest.importorskip(f"library.families.{family}.synthetic")
    from networks import settings

    targets = synthetic.synthetic_family("tiny").adapter_targets.values()
    names = {name for target in targets for name in target.dims} | {t.enabled_by for t in targets if t.enabled_by}
    names |= set(settings.OWN_NAMES) | {settings.factor_name(n) for target in targets for n in target.dims}
    text = (DOCS / "adapters.md").read_text(encoding="utf-8")
    assert not [name for name in (*names, "emb_dims", "algo") if f"`{name}`" not in text]


def commands(page):
    """The commands of a page's bash blocks, as words; continued lines are joined."""
    for text in blocks(page, "bash"):
        for line in text.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


@pages(having="```bash")
def test_commands_are_understood(page):
    scripts = {f"{name}.py": script.groups for name, script in cli.SCRIPTS.items()}
    for words in commands(page):
        family = family_options(words[words.index("--family") + 1] if "--family" in words else "sd3")
        scripts["generate.py"] = {"model": ModelConfig, "family": family.OPTIONS, **family.GENERATE_GROUPS}
        for script, groups in scripts.items():
            if script in words:
                options = words[words.index(script) + 1 :]
                options = options[options.index("--") + 1 :] if "--" in options else options  # before it: a tool's own
                problems = read_command_line(groups, options).problems
                assert not [problem for problem in problems if not problem.endswith("no such file")]


@pages(having="```python")
def test_python_examples_compile(page):
    for text in blocks(page, "python"):
        compile(text, name_of(page), "exec")


def test_the_prompts_of_the_tutorial_are_read(tmp_path):
    (prompts,) = [text for text in blocks(TUTORIAL, "") if "--w 1024" in text]
    (tmp_path / "prompts.txt").write_text(prompts)
    requests = read_prompts(
        tmp_path / "prompts.txt", native_resolution=Resolution(1024, 1024), resolution_step=16, seed=0
    )
    assert [request.seed for request in requests] == [1, 2, 3]


QUOTED_ERRORS = [
    ["--network_dimm", "4"],
    ["--clip_skip", "2"],
    ["--pretrained_model_name_or_path", "stabilityai/stable-diffusion-3.5-medium"],
    ["--cache_text_encoder_outputs"],
    ["--lr_warmup_steps", "100"],
    ["--sample_every_n_steps", "10"],
    ["--network_module", "networks.oft"],
]


@pytest.mark.parametrize("argv", QUOTED_ERRORS, ids=lambda argv: argv[0])
def test_the_tutorial_quotes_real_errors(argv, capsys):
    assert cli.main("sd3", job="adapter", argv=argv) == 2
    errors = [line.removeprefix("error: ") for line in capsys.readouterr().err.splitlines()]
    page = TUTORIAL.read_text(encoding="utf-8")
    assert any(f"| `{error}` |" in page for error in errors if argv[0] in error)


QUOTED_DATASET_ERRORS = {
    "general.resolutoin: unknown": "[general]\nresolutoin = 1024",
    "datasets[0].subsets[0].batch_size: belongs": "[[datasets]]\n[[datasets.subsets]]\nbatch_size = 4",
    "datasets[0].batch_size: expected": "[[datasets]]\nbatch_size = '4'",
    "datasets: expected a list": "[datasets]\nresolution = 512",
    "datasets[0].resolution: missing": "[[datasets]]\n[[datasets.subsets]]\nimage_dir = '.'",
    "datasets[0].resolution: 1000x1000": "[[datasets]]\nresolution = 1000\n[[datasets.subsets]]\nimage_dir = '.'",
    "datasets[0].max_bucket_reso": "[[datasets]]\nresolution = 1024\nmax_bucket_reso = 768",
    "datasets[0]: all subsets": "[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = '.'\nis_reg = true",
}


@pytest.mark.parametrize("start", QUOTED_DATASET_ERRORS)
def test_the_page_on_datasets_quotes_real_errors(start, tmp_path):
    path = tmp_path / "d.toml"
    path.write_text(QUOTED_DATASET_ERRORS[start])
    with pytest.raises(ConfigError) as raised:
        read_with(dataset_config=str(path))
    errors = [line.removeprefix(f"{path}: ") for line in str(raised.value).splitlines()]
    (error,) = [error for error in errors if error.startswith(start)]
    assert f"| `{error}` |" in DATASETS.read_text(encoding="utf-8")
