"""`alexnet predict` with its surroundings: files that are there, Ctrl-C, pipes, stdin and locales."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from alexnet import main
from infer.bundle.load import Bundle
from tests.helpers.command_line import assert_one_line, invoke
from tests.helpers.ranks import REPOSITORY

ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPOSITORY)}
NO_UTF8 = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def command(bundle: Bundle, *arguments: str | Path) -> list[str]:
    start = [sys.executable, "-m", "alexnet", "predict", "--model", bundle.folder, "--device", "cpu"]
    return list(map(str, [*start, *arguments]))


def test_predict_replaces_rows_only_with_overwrite(bundle: Bundle, files: list[Path], tmp_path: Path) -> None:
    rows, page = tmp_path / "rows.csv", tmp_path / "page.html"
    arguments = ("predict", "--model", bundle.folder, "--device", "cpu", "--output", rows, "--html", page)
    images = [Path(shutil.copy(file, tmp_path)) for file in files[:3]]
    assert invoke(*arguments, *images[:2]).exit_code == 0
    first = rows.read_bytes()
    assert_one_line(
        invoke(*arguments, *images[:1]), 2, "--resume goes on after them, --overwrite replaces them"
    )
    assert rows.read_bytes() == first
    assert invoke(*arguments, *images[:1], "--overwrite").exit_code == 0
    assert first.startswith(rows.read_bytes()) and rows.read_bytes().count(b"\n") == 2
    assert page.read_text().count("<img ") == 1
    # what the shell makes of `--output *.jpg`
    before = images[0].read_bytes()
    for option in ("--output", "--html"):
        result = invoke("predict", "--model", bundle.folder, option, *images)
        assert_one_line(result, 2, f"{option} {images[0]} exists and is not")
    assert images[0].read_bytes() == before


@pytest.mark.parametrize("decoder", ["dali", "pillow"])
def test_an_image_on_stdin_gives_its_row(bundle: Bundle, files: list[Path], decoder: str) -> None:
    options = [
        "predict",
        "--model",
        str(bundle.folder),
        "--decoder",
        decoder,
        "--device",
        "cpu",
        "--format=jsonl",
    ]
    piped = CliRunner().invoke(main, [*options, "-"], input=files[0].read_bytes())
    named = invoke(*options, files[0])
    assert piped.exit_code == named.exit_code == 0, piped.output
    one, other = json.loads(piped.stdout), json.loads(named.stdout)
    assert (one.pop("path"), other.pop("path")) == ("-", str(files[0])) and one == other
    broken = CliRunner().invoke(main, [*options, "-"], input=files[0].read_bytes()[:300])
    assert broken.exit_code == 3 and json.loads(broken.stdout)["status"] == "error"


@pytest.mark.slow
@pytest.mark.parametrize(("num_before", "decoder"), [(1, "auto"), (3, "pillow")])
def test_ctrl_c_keeps_rows_and_says_how_to_go_on(
    bundle: Bundle, files: list[Path], tmp_path: Path, num_before: int, decoder: str
) -> None:
    rows = tmp_path / "rows.jsonl"
    arguments = command(bundle, "-", "--output", rows, "--batch-size", "1", "--decoder", decoder)
    listed = b"".join(os.fsencode(file) + b"\n" for file in files)
    with subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT, cwd=tmp_path
    ) as process:
        assert process.stdin is not None and process.stderr is not None
        process.stdin.write(listed)
        process.stdin.flush()  # and not closed: a thread waits for more
        while not rows.exists() or rows.read_bytes().count(b"\n") < num_before:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        last = process.stderr.read().decode().splitlines()[-1]
        assert process.wait() == 130
    assert last == f"error: stopped; the same command with --resume goes on after the rows in {rows}"
    num_kept = rows.read_bytes().count(b"\n")
    done = CliRunner().invoke(main, [*arguments[3:], "--resume"], input=listed)
    assert done.exit_code == 0 and f"--resume: {num_kept} rows are there already" in done.stderr
    assert [json.loads(row)["path"] for row in rows.read_bytes().splitlines()] == list(map(str, files))


@pytest.mark.slow
@pytest.mark.parametrize(("format", "decoder"), [("csv", "pillow"), ("table", "auto")])
def test_predict_into_head_ends_quietly(
    bundle: Bundle, files: list[Path], tmp_path: Path, format: str, decoder: str
) -> None:
    listed = b"".join(os.fsencode(file) + b"\n" for file in files)
    with subprocess.Popen(
        command(bundle, "-", "--format", format, "--batch-size", "1", "--decoder", decoder),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT,
    ) as process:  # fmt: skip
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        process.stdin.write(listed * 3)
        process.stdin.flush()
        assert process.stdout.readline().startswith((b"path,status", b"image "))
        process.stdout.close()
        process.stdin.write(listed)
        process.stdin.flush()  # and not closed, as by `find` in a large folder
        said = process.stderr.read().decode()
        assert process.wait() == 141
    assert "Broken" not in said and "Traceback" not in said


@pytest.mark.slow
def test_names_are_utf8_whatever_the_locale(bundle: Bundle, files: list[Path], tmp_path: Path) -> None:
    names = ["Bär.jpg", "日本.jpg", os.fsdecode(b"caf\xe9.jpg")]
    for name in names:
        shutil.copy(files[0], tmp_path / name)
    (tmp_path / "list.txt").write_bytes(b"".join(os.fsencode(name) + b"\n" for name in names))
    for format in ("jsonl", "csv", "table"):
        output = tmp_path / f"rows.{format}"
        arguments = command(bundle, "@list.txt", "--format", format, "--output", output)
        done = subprocess.run(arguments, cwd=tmp_path, env=ENVIRONMENT | NO_UTF8, capture_output=True)
        assert done.returncode == 0, done.stderr
        text = output.read_text(encoding="utf-8")
        assert all(name in text for name in ("Bär.jpg", "日本.jpg")) and "caf\\" in text
    done = subprocess.run(
        command(bundle, *names[:2]), cwd=tmp_path, env=ENVIRONMENT | NO_UTF8, capture_output=True
    )
    assert [line.split()[0] for line in done.stdout.decode().splitlines()] == ["image", *names[:2]]


def test_labels_are_utf8_whatever_the_locale() -> None:
    code = (
        "import sys, msgspec, numpy as np\n"
        "from infer.predict.rows import ClassNames, top_k\n"
        r"labels = ('B\xe4r', '\u65e5\u672c')" + "\n"
        "(row,) = top_k(np.array([[0.25, 0.75]], np.float32), ClassNames(labels), 2)\n"
        "sys.stdout.buffer.write(msgspec.json.encode([one.label for one in row]))"
    )
    arguments = [sys.executable, "-c", code]
    done = subprocess.run(arguments, env=ENVIRONMENT | NO_UTF8, capture_output=True)
    assert done.stdout.decode() == '["日本","Bär"]', done.stderr
