"""The Dockerfile holds no compiler and no host's folder, its page names what it has, and its lines run in a Debian."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import dockerfile
import pytest
from systems import needs_posix

ROOT = Path(__file__).parents[1]
INSTRUCTIONS = dockerfile.instructions((ROOT / "Dockerfile").read_text(encoding="utf-8"))
PAGE = (ROOT / "docs" / "docker.md").read_text(encoding="utf-8")
RUNS = [dockerfile.command(rest) for name, rest in INSTRUCTIONS if name == "RUN"]


@needs_posix
def test_every_run_line_is_a_shell_command():
    assert len(RUNS) == 3
    for line in RUNS:
        subprocess.run(["sh", "-n", "-c", line], check=True)


@needs_posix
@pytest.mark.parametrize(("torch", "compilers"), [("cpu", []), ("cu130", ["gcc"])])
def test_only_an_image_for_gpus_installs_a_compiler(torch, compilers):
    """The shell writes out the arguments of `apt-get install`."""
    (packages,) = [found[1] for line in RUNS if (found := re.search(r"apt-get install ([^&]*)&&", line))]
    said = subprocess.run(
        ["sh", "-c", f"echo {packages}"], env={**os.environ, "TORCH": torch}, check=True, capture_output=True, text=True
    )
    assert "make" in said.stdout.split()
    assert [word for word in said.stdout.split() if word in ("gcc", "g++", "build-essential", "clang")] == compilers


def test_the_image_holds_what_the_installation_and_the_demo_read_and_nothing_that_a_host_left():
    sent = {path.as_posix() for path in dockerfile.context()}
    needed = {
        "Makefile",
        "README.md",
        "LICENSE",
        "pyproject.toml",
        "requirements.txt",
        "config.yaml",
        "src/finetune.py",
    }
    assert needed - sent == set()
    assert dockerfile.ignored("output/report.html", ["output"])
    assert dockerfile.ignored("src/sgm_finetune/__pycache__/a.pyc", ["**/__pycache__"])
    assert not dockerfile.ignored("src/sgm_finetune/results/output.py", ["output"])
    assert {path.partition("/")[0] for path in sent} & {".git", ".venv", "output", "runs", "site"} == set()


def test_no_command_in_the_image_is_run_by_root():
    last = [name for name, _ in INSTRUCTIONS if name in ("RUN", "USER", "CMD")]
    assert last[-2:] == ["USER", "CMD"]
    (user,) = [rest for name, rest in INSTRUCTIONS if name == "USER"]
    assert user.split(":")[0] not in ("0", "root")


def test_the_page_names_arguments_and_folders_that_the_dockerfile_has():
    args = {rest.partition("=")[0] for name, rest in INSTRUCTIONS if name == "ARG"}
    given = set(re.findall(r"--build-arg (\w+)=", PAGE))
    assert given == {"TORCH"}
    assert given <= args
    assert all(f"`{name}" in PAGE for name in args)
    mounted = set(re.findall(r"-v \S+?:(/[\w/]+)", PAGE)) - {"/work"}
    made = {f"/sgm/{name}" if name[0] != "/" else name for name in re.findall(r"mkdir -p ([^&]*)", RUNS[-1])[0].split()}
    assert mounted == made


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.skipif(
    shutil.which("debootstrap") is None or os.getuid() != 0, reason="apt-get install debootstrap, as root"
)
def test_the_lines_of_the_dockerfile_run_in_a_debian_and_another_user_can_ask_for_help(tmp_path):
    debian = tmp_path / "debian"
    subprocess.run(["debootstrap", "--variant=minbase", "bookworm", str(debian)], check=True, capture_output=True)
    script = [sys.executable, str(ROOT / "tests" / "dockerfile.py"), str(debian)]
    subprocess.run([*script, "--command", "sgm --version && touch output/mine && ! command -v cc"], check=True)
    assert (debian / "sgm" / "output" / "mine").stat().st_uid == 1234
