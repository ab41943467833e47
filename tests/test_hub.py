"""Downloads from the hub that fail end in one line of ours, and libraries add none of theirs."""

from __future__ import annotations

import errno
import importlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import errors

from sgm_finetune.base.hub import explain_hub_error

# the hub's HTTP client: httpx with the oldest version, httpx2 with newer ones
http = importlib.import_module(
    next(kind.__module__.split(".")[0] for kind in errors.HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
)


def answered(kind: type[errors.HfHubHTTPError], status: int) -> errors.HfHubHTTPError:
    return kind("long words of a library", response=http.Response(status, request=http.Request("GET", "http://hub")))


def wrapped(inner: Exception) -> Exception:
    """As libraries pass it on: the reason is the cause of another error."""
    outer = errors.LocalEntryNotFoundError("we cannot find the requested files in the local cache")
    outer.__cause__ = inner
    return outer


@pytest.fixture(autouse=True)
def _online(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.mark.parametrize(
    ("error", "reason", "remedy"),
    [
        (answered(errors.GatedRepoError, 403), "behind a licence", "hf auth login"),
        (answered(errors.RepositoryNotFoundError, 401), "no such model", "check the name"),
        (answered(errors.RevisionNotFoundError, 404), "no such revision", "tag or commit"),
        (answered(errors.DisabledRepoError, 403), "disabled", "another model"),
        (answered(errors.HfHubHTTPError, 429), "asks to wait", "in a few minutes"),
        (answered(errors.HfHubHTTPError, 503), "trouble of its own (503)", "later"),
        (wrapped(http.ConnectError("Name or service not known")), "does not answer (Name or service", "HTTPS_PROXY"),
        (wrapped(errors.OfflineModeIsEnabled("offline")), "HF_HUB_OFFLINE=1 forbids", "unset HF_HUB_OFFLINE"),
        (http.ReadTimeout("timed out"), "does not answer (timed out)", "network"),
        (OSError(errno.ENOSPC, "No space left on device"), "is full", "HF_HOME"),
        (RuntimeError("Data processing error: No space left on device (os error 28)"), "is full", "HF_HOME"),
        (PermissionError(errno.EACCES, "Permission denied"), "cannot be written", "HF_HOME"),
        (errors.HFValidationError("Repo id must use alphanumeric chars"), "no name on the hub", "owner/name"),
        (DatasetNotFoundError("Dataset 'a/b' is a gated dataset on the Hub."), "behind a licence", "accept"),
        (DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub or cannot be accessed."), "no such", "name"),
        (RuntimeError("something\nelse"), "something else", "check the name"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value[:12],
)
def test_each_failure_has_its_reason_and_its_remedy(error, reason, remedy):
    line = explain_hub_error(error, "model", "owner/name")
    said, _, advice = line.partition("; ")
    assert reason in said
    assert remedy in advice
    assert "\n" not in line


class _Gated(BaseHTTPRequestHandler):
    """A hub whose every repository is behind a licence."""

    def do_GET(self) -> None:
        self.send_response(403)
        self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def gated_hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Gated)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def run(arguments: list[str], **environment: str) -> tuple[int, list[str], list[str]]:
    """The exit status of `sgm`, and the lines of its stdout and stderr."""
    settings = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"} | environment
    program = [sys.executable, "-c", "from sgm_finetune.commands.cli import main; main()", *arguments]
    done = subprocess.run(program, env=settings, capture_output=True, text=True, timeout=240)
    return done.returncode, done.stdout.splitlines(), done.stderr.splitlines()


def test_a_model_behind_a_licence_is_one_line(gated_hub, tmp_path):
    status, out, err = run(["scan", "owner/name"], HF_ENDPOINT=gated_hub, HF_HOME=str(tmp_path))
    assert (status, "".join(out)) == (2, "")  # older versions of the hub's client print an empty line
    assert err == [
        "owner/name is not a local folder and cannot be downloaded from the hub: it is behind a licence; accept that "
        f"on {gated_hub}/owner/name, then run `hf auth login`"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_without_a_network_is_one_line(tmp_path, streaming):
    """The client asks five more times, and says nothing of that."""
    (tmp_path / "empty.yaml").write_text("")
    overrides = ["model.name=all-minilm-l6-v2", "data.name=owner/name"]
    if streaming:
        overrides += ["data.streaming=true", *(f"data.num_{split}=4" for split in ("train", "validation", "test"))]
    status, out, err = run(
        ["data", "--config", str(tmp_path / "empty.yaml"), *overrides],
        HF_ENDPOINT="http://127.0.0.1:9",
        HF_HOME=str(tmp_path),
    )
    assert status == 2
    assert out == ["data     looking for owner/name on the hub"]
    assert len(err) == 1
    assert "http://127.0.0.1:9 does not answer; check the network" in err[0]


@pytest.mark.parametrize("command", ["scan", "data"])
def test_without_leave_to_download_the_line_names_the_setting(command, tmp_path):
    (tmp_path / "empty.yaml").write_text("")
    arguments = ["owner/name"]
    if command == "data":
        arguments = ["--config", str(tmp_path / "empty.yaml"), "data.name=owner/name"]
    status, _, err = run([command, *arguments], HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert status == 2
    assert len(err) == 1
    assert "HF_HUB_OFFLINE=1 forbids downloads; unset HF_HUB_OFFLINE" in err[0]
