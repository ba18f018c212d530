"""README and docs/ compared with `--help`, the configuration's keys, the repository's files and its tests.

Every command and option is documented, and every documented one exists. The model is sqlite-utils'
tests/test_docs.py.
"""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import click
import pytest

from alexnet import main as alexnet
from data_pipeline.common.errors import UserError
from tests.helpers.ranks import REPOSITORY
from train.config.load import make_config

PAGES = [
    *(path for name in ("README.md", "CONTRIBUTING.md") if (path := REPOSITORY / name).exists()),
    *sorted((REPOSITORY / "docs").rglob("*.md")),
]
SCRIPTS = [
    path
    for pattern in ("*.py", "*/__main__.py")
    for path in sorted((REPOSITORY / "scripts").glob(pattern))
    if "@click.command" in path.read_text(encoding="utf-8")
]

FENCE = re.compile(r"^```.*?\n(.*?)^```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)")
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^(?=#+ )", re.MULTILINE)
TABLE_ROW = re.compile(r"^\|.*\n?", re.MULTILINE)
OPTION = re.compile(r"--[a-z][\w-]*")
TEST = re.compile(r"(tests/[\w/]+\.py)::(\w+)")

FOREIGN_OPTIONS = {
    "--nproc_per_node", "--signals-to-handle",  # torchrun
    "--dist", "--numprocesses", "--durations",  # pytest
    "--build-arg", "--gpus",  # docker
    "--account", "--cpus-per-task", "--gpus-per-node", "--nodes", "--open-mode", "--partition",  # sbatch
    "--requeue", "--signal", "--time",
}  # fmt: skip
"""Other programs' options that a page names alone, outside of a command."""

SUFFIXES = (".py", ".md", ".toml", ".sh", ".sbatch", ".Dockerfile", ".yaml", ".yml")
"""How files of the repository end that a page names by their name alone."""

FOLDERS = ("data_pipeline", "docs", "infer", "scripts", "tests")
"""Top-level folders whose paths are ours. `train/` is a folder of images, too: of it only files count."""


class Passage(NamedTuple):
    """A section's prose and code, or one row of a table: the unit in which an option belongs to a command."""

    page: str
    text: str
    code: tuple[str, ...]


def code_of(text: str) -> tuple[str, ...]:
    """The code spans of a text, and the lines of its fenced blocks, continued lines joined."""
    blocks = [block.replace("\\\n", " ") for block in FENCE.findall(text)]
    spans = [" ".join(span.split()) for span in SPAN.findall(FENCE.sub("", text))]
    return (*(line for block in blocks for line in block.splitlines()), *spans)


def passages_of(page: Path) -> Iterator[Passage]:
    name, text = str(page.relative_to(REPOSITORY)), page.read_text(encoding="utf-8")
    fences: list[str] = FENCE.findall(text)
    # A comment in a block is no heading, and a line of a block no row of a table.
    numbers = iter(range(len(fences)))
    text = FENCE.sub(lambda _: f"\0{next(numbers)}\0", text)

    def whole(part: str) -> str:
        return re.sub(r"\0(\d+)\0", lambda found: f"```\n{fences[int(found[1])]}```", part)

    for section in HEADING.split(text):
        for row in TABLE_ROW.findall(section):
            row = row.replace("\\|", "|")
            yield Passage(name, row, code_of(row))
        prose = whole(TABLE_ROW.sub("", section))
        yield Passage(name, prose, code_of(prose))


@cache
def passages() -> tuple[Passage, ...]:
    return tuple(passage for page in PAGES for passage in passages_of(page))


@cache
def commands() -> dict[str, click.Command]:
    """Every command by the words with which a shell starts it."""
    found: dict[str, click.Command] = {"alexnet": alexnet}
    context = click.Context(alexnet)
    for name in alexnet.list_commands(context):
        command = alexnet.get_command(context, name)
        assert command is not None
        inner = command.commands if isinstance(command, click.Group) else {}
        found.update({f"alexnet {name} {key}": value for key, value in inner.items()})
        if not inner:
            found[f"alexnet {name}"] = command
    found["torchrun -m train.main"] = importlib.import_module("train.main").main
    for path in SCRIPTS:
        module = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
        found[f"python -m {module.removesuffix('.__main__')}"] = importlib.import_module(module).main
    return found


def options_of(command: click.Command) -> set[str]:
    """All long names of a command's options, `--help` excepted."""
    params = command.get_params(click.Context(command))
    names = {name for param in params for name in (*param.opts, *param.secondary_opts)}
    return {name for name in names if name.startswith("--")} - {"--help"}


class Use(NamedTuple):
    """A command as a page writes it."""

    command: str
    words: list[str]


def uses_of(line: str) -> Iterator[Use]:
    """The uses of our commands in a line of code; `command` need not exist."""
    for part in re.split(r" \| |&&|;", line):
        try:
            words = shlex.split(part.strip().removeprefix("$ "), comments=True)
        except ValueError:  # a quotation mark of prose
            words = part.split()
        words = [word for word in words if not re.fullmatch(r"sudo|[A-Z_]+=\S*", word)]
        if not words:
            continue
        if words[0] == "alexnet":
            yield from alexnet_uses(words[1:])
        elif words[0] in ("torchrun", "python") and "train.main" in words:
            yield Use("torchrun -m train.main", words[words.index("train.main") + 1 :])
        elif words[:2] == ["python", "-m"] and len(words) > 2 and words[2].startswith("scripts."):
            yield Use(f"python -m {words[2]}", words[3:])
        elif words[0] == "python" and len(words) > 1 and words[1].startswith("scripts/"):
            name = words[1].removesuffix(".py").replace("/", ".")
            yield Use(f"python -m {name}", words[2:])


def alexnet_uses(words: list[str]) -> Iterator[Use]:
    """`alexnet data info|verify DIR` is two uses; `alexnet data …` none, but its first word must exist."""
    while words and words[0].startswith("-"):
        yield Use("alexnet", [words[0]])
        words = words[1:]
    if not words or not re.match(r"[a-z]", words[0]):
        return
    for name in words[0].split("|"):
        group = any(command.startswith(f"alexnet {name} ") for command in commands())
        if not group:
            yield Use(f"alexnet {name}", words[1:])
        elif len(words) > 1 and re.match(r"[a-z]", words[1]):
            yield from (Use(f"alexnet {name} {inner}", words[2:]) for inner in words[1].split("|"))


def report(problems: Iterable[str]) -> None:
    """Fail with one sorted list."""
    lines = sorted(set(problems))
    if lines:
        pytest.fail(f"{len(lines)} differences:\n" + "\n".join(lines), pytrace=False)


def test_docs_name_every_command_and_option() -> None:
    """An option counts where it stands in one passage with its command: a section, or a row of a table."""
    documented: dict[str, set[str]] = {}
    for passage in passages():
        found = {name for text in passage.code for name in OPTION.findall(text)}
        for text in passage.code:
            for use in uses_of(text):
                documented.setdefault(use.command, set()).update(found)
    missing = []
    for name, command in commands().items():
        if name not in documented:
            missing.append(f"not documented: {name}")
        absent = options_of(command) - documented.get(name, set())
        for option in command.get_params(click.Context(command)):
            names = {*option.opts, *option.secondary_opts} & options_of(command)
            if names and names <= absent:
                missing.append(f"not documented: {name} {'/'.join(sorted(names))}")
    report(missing)


def test_docs_name_only_commands_and_options_that_exist() -> None:
    """In what is written as a command, and in code spans that are an option alone."""
    everywhere = FOREIGN_OPTIONS.union(*map(options_of, commands().values()), {"--help"})
    wrong = []
    for page, _, code in passages():
        for text in code:
            for use in uses_of(text):
                command = commands().get(use.command)
                if command is None:
                    wrong.append(f"{page}: there is no command {use.command!r}")
                    continue
                named = {name for word in use.words for name in OPTION.findall(word.partition("=")[0])}
                wrong += [
                    f"{page}: {use.command} has no option {name}"
                    for name in named - options_of(command) - {"--help"}
                ]
            if (alone := OPTION.match(text)) and alone[0] not in everywhere:
                wrong.append(f"{page}: no command has an option {alone[0]}")
    report(wrong)


def test_docs_set_only_keys_that_exist() -> None:
    """The configuration has the key of every `--set`; KEY=VALUE and key=value are placeholders."""
    wrong = []
    for page, _, code in passages():
        for text in code:
            for setting in re.findall(r"--set[ =]([a-z_.]+=[^\s`,;)]+)", text):
                if setting == "key=value":
                    continue
                try:
                    make_config("demo", [setting])
                except UserError as error:
                    if "unknown key" in str(error):
                        wrong.append(f"{page}: --set {setting}: {error}")
    report(wrong)


@cache
def tracked() -> frozenset[str]:
    """Files of the repository and their folders, as paths from its root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    files = [line for line in done.stdout.splitlines() if (REPOSITORY / line).exists()]
    return frozenset([*files, *(str(folder) for file in files for folder in Path(file).parents)])


def is_there(word: str) -> bool:
    """False for a path or file name that reads as one of the repository's, and is none."""
    word = word.removeprefix("../").removeprefix("./").rstrip("/")
    first, _, rest = word.partition("/")
    if rest and (first in FOLDERS or (first == "train" and word.endswith(SUFFIXES))):
        return word in tracked()
    if not rest and word.endswith((".py", ".sh")):
        return any(Path(file).name == word for file in tracked())
    return True


def test_docs_paths_exist() -> None:
    """Paths and file names in code, and the targets of links."""
    wrong = []
    for page, text, code in passages():
        words = {word.strip("[](),:'\"").partition("::")[0] for line in code for word in line.split()}
        names = {word for word in words if re.fullmatch(r"[\w./-]+", word)}
        wrong += [f"{page}: {name} does not exist" for name in names if not is_there(name)]
        for target in LINK.findall(text):
            path = target.partition("#")[0]
            if (
                not re.match(r"\w+:", target)
                and path
                and not (REPOSITORY / page).parent.joinpath(path).exists()
            ):
                wrong.append(f"{page}: the link to {target} leads nowhere")
    report(wrong)


def test_docs_name_only_tests_that_exist() -> None:
    """`tests/…/test_x.py::test_name` is a function of that file."""
    wrong = []
    for page, text, _ in passages():
        for file, name in TEST.findall(text):
            path = REPOSITORY / file
            if not path.exists() or f"def {name}(" not in path.read_text(encoding="utf-8"):
                wrong.append(f"{page}: there is no {file}::{name}")
    report(wrong)


def test_readme_cells_and_names_of_tests_are_short() -> None:
    rows = TABLE_ROW.findall((REPOSITORY / "README.md").read_text(encoding="utf-8"))
    cells = [cell.strip() for row in rows for cell in row.split("|")]
    assert cells and [cell for cell in cells if len(cell) > 119] == []
    names = [
        name
        for path in (REPOSITORY / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert len(names) > 1000 and [name for name in names if len(name) > 60] == []
