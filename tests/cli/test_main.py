from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from kvpsi import __version__
from kvpsi.cli import main as cli
from kvpsi.errors import DownloadError, UsageError
from support.gguf_files import write_gguf


def run(*args: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvpsi", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)  # type: ignore[call-overload, no-any-return]


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "app", app)


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"kvpsi {__version__}\n"


def test_the_version_does_not_load_the_engine() -> None:
    code = "import sys; from kvpsi.cli.main import main; main(['--version']); print('llama_cpp' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == f"kvpsi {__version__}\nFalse\n"


def test_the_names_of_the_package_can_be_listed_without_the_engine() -> None:
    code = (
        "import sys, kvpsi; print(set(kvpsi.__all__) | {'__version__'} <= set(dir(kvpsi)), 'llama_cpp' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "True False\n"


def test_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    assert "doctor" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "command"),
    [
        (["nonsense"], "kvpsi"),
        (["--nonsense"], "kvpsi"),
        (["pull", "--nonsense"], "kvpsi pull"),
        (["pull", "a", "b"], "kvpsi pull"),
        (["generate", "-c", "many"], "kvpsi generate"),
        (["bench", "nonsense"], "kvpsi bench"),
        (["bench", "elastic", "--nonsense"], "kvpsi bench elastic"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], args: list[str], command: str
) -> None:
    assert cli.main(args) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("kvpsi: ") and captured.err.count("\n") == 1
    assert f"`{command} --help`" in captured.err


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (DownloadError("No network:\ntry\x1b[2J again."), 1, "kvpsi: No network: try [2J again.\n"),
        (UsageError("Say 600M."), 2, "kvpsi: Say 600M.\n"),
        (KeyboardInterrupt(), 130, ""),
        (typer.Exit(3), 3, ""),
        (
            PermissionError(13, "Permission denied", "/x"),
            1,
            "kvpsi: Could not read or write '/x': Permission denied.\n",
        ),
    ],
)
def test_an_error_is_one_line_and_its_status(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    message: str,
) -> None:
    monkeypatch.delenv("KVPSI_DEBUG", raising=False)
    monkeypatch.setattr(cli, "_discard_output", lambda: None)
    raising(monkeypatch, error)
    assert cli.main(["--"]) == status
    assert capfd.readouterr().err.replace("  ", " ") == message


def test_a_bug_asks_for_a_report_and_debugging_shows_where(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raising(monkeypatch, ZeroDivisionError("oops"))
    monkeypatch.delenv("KVPSI_DEBUG", raising=False)
    assert cli.main(["--"]) == 1
    quiet = capsys.readouterr().err
    assert quiet.startswith("kvpsi: Internal error (ZeroDivisionError: oops)") and quiet.count("\n") == 1
    monkeypatch.setenv("KVPSI_DEBUG", "1")
    assert cli.main(["--"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_standard_output_is_one_line() -> None:
    with open("/dev/full", "w") as full:  # noqa: PTH123
        command = [sys.executable, "-m", "kvpsi", "--version"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == "kvpsi: Could not read or write its output: No space left on device.\n"


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = f"{sys.executable} -m kvpsi --help | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert done.stdout in ("0\n", "1\n")


def test_pull_prints_the_path(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "mine.gguf")
    done = run("pull", str(path))
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{path}\n", "")


def test_pull_prints_one_json_document(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "mine.gguf")
    done = run("pull", "--json", str(path))
    assert done.returncode == 0
    document = json.loads(done.stdout)
    assert (document["path"], document["architecture"], document["n_layer"]) == (str(path), "llama", 2)


def test_pull_of_a_broken_file_prints_nothing_on_standard_output(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    done = run("pull", "--json", str(tmp_path / "broken.gguf"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("kvpsi: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_that_a_library_takes_for_an_error_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: signal.Signals, status: int
) -> None:
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    def wrapping() -> None:
        try:
            signal.raise_signal(number)
        except BaseException as error:
            raise RuntimeError("SchemaError: KeyboardInterrupt") from error

    monkeypatch.setattr(cli, "app", app)
    assert cli.main(["--"]) == status
    assert not capsys.readouterr().err
