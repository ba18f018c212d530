"""The command line as a contract: help, exit codes, one line for each mistake."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import click
import msgspec
import pytest

from alexnet import main
from infer.bundle.load import Bundle
from tests.helpers.command_line import assert_one_line, invoke
from tests.helpers.ranks import REPOSITORY

CONTEXT = click.Context(main)
COMMANDS = main.list_commands(CONTEXT)


def command_of(name: str) -> click.Command:
    command = main.get_command(CONTEXT, name)
    assert command is not None
    return command


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_have_help_an_example_and_a_readme_line(name: str) -> None:
    command = command_of(name)
    shown = invoke(name, "--help")
    assert shown.exit_code == 0
    readme = (REPOSITORY / "README.md").read_text()
    examples = [name]
    if isinstance(command, click.Group):
        examples = [f"{name} {inner}" for inner in command.commands]
        assert all(c.help for c in command.commands.values())
    else:
        assert re.search(rf"^\s+alexnet {name}", shown.output, re.MULTILINE), "help without an example"
    for example in examples:
        assert f"alexnet {example}" in readme


def test_options_have_help_unless_their_choices_suffice() -> None:
    plain = {"--device", "--backend", "--precision", "--format"}  # their choices are shown
    for name in COMMANDS:
        command = command_of(name)
        for option in command.get_params(click.Context(command)):
            if isinstance(option, click.Option):
                assert option.help or set(option.opts) & plain, f"{name} {option.opts}"


def test_help_imports_no_work(tmp_path: Path) -> None:
    code = (
        "import sys, runpy; sys.argv = ['alexnet', '--help']\n"
        "try: runpy.run_module('alexnet', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'onnxruntime', 'rich', 'PIL', 'msgspec', 'infer.bundle.load'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_python_interface_is_lazy(tmp_path: Path) -> None:
    code = (
        "import sys, alexnet\n"
        "heavy = {'torch', 'torchvision', 'train', 'nvidia', 'numpy', 'onnxruntime', 'msgspec', 'infer'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
        "from alexnet import Predictor, find_inputs, load_bundle\n"
        "print(Predictor.__module__, find_inputs.__module__, load_bundle.__module__)\n"
        "print(sorted({'torch', 'torchvision', 'train', 'nvidia', 'onnx'} & set(sys.modules)))\n"
        "try: alexnet.predictor\n"
        "except AttributeError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert done.stdout.splitlines() == [
        "[]",
        "infer.predictor infer.predict.inputs infer.bundle.load",
        "[]",
        "module 'alexnet' has no attribute 'predictor'",
    ]


def test_version_is_the_packages() -> None:
    assert invoke("--version").output.strip() == "alexnet, version 0.1.0"
    assert 'version = "0.1.0"' in (REPOSITORY / "pyproject.toml").read_text()
    assert "## 0.1.0" in (REPOSITORY / "CHANGELOG.md").read_text()


def test_doctor_reports_what_this_machine_would_use() -> None:
    result = invoke("doctor", "--json")
    assert result.exit_code == 0
    report = msgspec.json.decode(result.stdout)
    assert report["dali"]["status"] == report["onnxruntime"]["status"] == "ok"
    assert report["training"]["device"] == ("cuda" if report["gpus"] else "cpu")
    assert "ONNX Runtime" in report["prediction"]["onnx_models"]
    text = invoke("doctor")
    assert text.exit_code == 0
    assert "collectives: " in text.stdout


def test_unexpected_error_is_one_line_or_traceback_with_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("something\nelse")

    monkeypatch.setattr("infer.doctor.machine.examine", broken)
    assert_one_line(invoke("doctor"), 1, "RuntimeError: something (traceback: alexnet --debug")
    assert isinstance(invoke("--debug", "doctor").exception, RuntimeError)


@pytest.mark.parametrize(
    ("command", "advice"),
    [
        ("data demo OUT", "name another folder: alexnet data demo DIR"),
        ("data shard DATA OUT", "name another folder"),
        ("data download cifar10 OUT", "name another folder"),
        ("data info DATA --sample 1 --grid FILE/x.html", "there is no folder"),
        ("checkpoint convert RUN OUT --to safetensors", "name another file"),
        ("checkpoint convert WEIGHTS OUT", "name another folder for the run"),
        ("export RUN --data DATA --out OUT", "name another folder for the export"),
        ("export RUN --data DATA --triton OUT", "name another folder with --triton"),
        ("bench lr --plot FILE/x.png", "there is no folder"),
    ],
)
def test_place_that_cannot_be_written_to_is_one_line(
    command: str, advice: str, bundle: Bundle, demo_data: Path, tmp_path: Path
) -> None:
    """Below a file, where not even root can write."""
    from tests.helpers.infer_samples import shared_networks

    (tmp_path / "file").touch()
    checkpoint = bundle.folder.parent.parent / "checkpoints" / "step-00000007"
    weights = tmp_path / "w.safetensors"
    if "WEIGHTS" in command:
        assert invoke("checkpoint", "convert", checkpoint, weights, "--to", "safetensors").exit_code == 0
    places = {
        "OUT": tmp_path / "file" / "out", "FILE": tmp_path / "file", "RUN": checkpoint, "WEIGHTS": weights,
        "DATA": demo_data,
    }  # fmt: skip
    for name, place in places.items():
        command = command.replace(name, str(place))
    with shared_networks():
        result = invoke(*command.split())
    assert_one_line(result, 2, advice)
    assert str(tmp_path / "file") in result.stderr


def test_errors_of_the_system_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "/secret/x")

    monkeypatch.setattr("data_pipeline.datasets.demo.write_demo", refuse)
    expected = "error: /secret/x: Permission denied; change its permissions, or name another place\n"
    assert invoke("data", "demo").stderr == expected
    assert isinstance(invoke("--debug", "data", "demo").exception, PermissionError)


def test_data_shard_writes_once_and_refuses_a_wrong_size(demo_data: Path, tmp_path: Path) -> None:
    wrong = invoke("data", "shard", demo_data, tmp_path / "s", "--shard-size", "many")
    assert_one_line(wrong, 2, "'many' is not a size")
    first = invoke("data", "shard", demo_data, tmp_path / "s", "--shard-size", "1MB")
    assert first.exit_code == 0, first.stderr
    assert "1797 samples in " in first.stdout
    again = invoke("data", "shard", demo_data, tmp_path / "s", "--shard-size", "1MB")
    assert again.stdout == first.stdout
    assert "shards were there already" in again.stderr
