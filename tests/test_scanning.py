"""`sgm scan` as people use it: what it shows, writes and draws, and what an interrupted scan leaves."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import save_file
from systems import needs_posix

from sgm_finetune.commands.cli import main
from sgm_finetune.measure.scan import scan
from sgm_finetune.measure.scan_formats import load_scan


def sgm(capfd, *arguments: object) -> tuple[str, str]:
    """Runs `sgm scan`, which must succeed; returns (stdout, stderr)."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(["scan", *map(str, arguments)])
    found = capfd.readouterr()
    assert caught.value.code == 0, found.err
    return found.out, found.err


def test_a_scan_starts_without_the_libraries_that_build_models():
    code = (
        "import sys, sgm_finetune.commands.scan; print(sorted({'transformers', 'peft', 'datasets'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_without_options_only_the_table_is_printed(llama_folder, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    out, err = sgm(capfd, llama_folder)
    assert "self_attn.q_proj" in out
    assert "29 matrices" in out
    assert "{" not in out
    assert err == ""


def test_the_result_is_written_and_read_again_without_the_model(llama_folder, tmp_path, capfd):
    sgm(capfd, llama_folder, "--output", tmp_path / "scan.json")
    assert load_scan(tmp_path / "scan.json") == scan(llama_folder)
    table = sgm(capfd, tmp_path / "scan.json")[0]
    assert "29 matrices" in table
    again = sgm(capfd, tmp_path / "scan.json", "--format", "axolotl", "--top-fraction", 0.5)[0]
    assert again == sgm(capfd, llama_folder, "--format", "axolotl", "--top-fraction", 0.5)[0]


def test_json_on_stdout_is_one_object_and_the_table_goes_to_stderr(llama_folder, tmp_path, capfd):
    expected = scan(llama_folder).to_dict()
    for options in (["--json"], ["--format", "json"], ["--json", "--format", "json"]):
        out, err = sgm(capfd, llama_folder, *options)
        assert json.loads(out) == expected
        assert "29 matrices" in err
    out, _ = sgm(capfd, llama_folder, "--json", "--output", tmp_path / "s.json")
    assert json.loads(out) == json.loads((tmp_path / "s.json").read_text()) == expected


def test_the_axolotl_list_on_stdout_is_yaml_of_the_top_half(llama_folder, capfd):
    from transformers import AutoModelForCausalLM

    out, err = sgm(capfd, llama_folder, "--format", "axolotl", "--top-fraction", 0.5)
    patterns = yaml.safe_load(out)["unfrozen_parameters"]
    names = [name for name, _ in AutoModelForCausalLM.from_pretrained(llama_folder).named_parameters()]
    matched = [name for name in names if any(re.match(pattern, name) for pattern in patterns)]
    assert len(matched) == len(patterns) == 7 * 2 + 1  # two of four layers for each kind, and the embedding
    assert "same SNR" in err  # a random model has no signal, so the order of the names decides, with a note


def test_the_published_formats_numbers_are_those_of_the_estimator(llama_folder, capfd):
    document = json.loads(sgm(capfd, llama_folder, "--estimator", "spectrum", "--format", "spectrum")[0])
    expected = {m.name: m.snr for m in scan(llama_folder, estimator="spectrum").matrices}
    assert {name: row["snr"] for name, row in document.items()} == expected


def test_every_matrix_has_its_control_beside_it(llama_folder, capfd):
    out, err = sgm(capfd, llama_folder, "--control", "--json")
    assert all(row["control"]["signal_rank"] == 0 for row in json.loads(out)["matrices"])
    assert "shuffled" in err


def test_pictures_are_a_heat_map_and_one_histogram_of_each_kind(llama_folder, tmp_path, capfd):
    sgm(capfd, llama_folder, "--plot", tmp_path / "a")
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert "snr.png" in names
    assert len(names) == 1 + 8
    kinds = {re.sub(r"\d+", "*", name) for name in names - {"snr.png"}}
    assert kinds == {f"{m.kind}.png" for m in scan(llama_folder).matrices}


def test_pictures_of_named_matrices(llama_folder, tmp_path, capfd):
    sgm(capfd, llama_folder, "--plot", tmp_path / "a", "--matrix", "*v_proj", "--matrix", "model.layers.2.mlp.up_proj")
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        "snr.png",
        "model.layers.2.mlp.up_proj.png",
        *(f"model.layers.{i}.self_attn.v_proj.png" for i in range(4)),
    }


def test_a_result_file_gives_only_the_heat_map(llama_folder, tmp_path, capfd):
    sgm(capfd, llama_folder, "--output", tmp_path / "scan.json")
    sgm(capfd, tmp_path / "scan.json", "--plot", tmp_path / "a")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["snr.png"]


@needs_posix
def test_an_interrupted_scan_prints_its_progress_and_resumes_there(tmp_path):
    draw = torch.Generator().manual_seed(0)
    save_file(
        {f"h.{i}.fc.weight": torch.randn(800, 800, generator=draw) for i in range(20)}, tmp_path / "m.safetensors"
    )
    cache, output = tmp_path / "cache", tmp_path / "scan.json"
    # a background job ignores SIGINT by default
    listening = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    program = f"{listening}; from sgm_finetune.commands.cli import main; main()"
    command = [sys.executable, "-c", program, "scan", str(tmp_path / "m.safetensors"), "-o", str(output)]
    environment = os.environ | {"SGM_CACHE": str(cache)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 60
    while len(list(cache.rglob("*.safetensors"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert re.fullmatch(r"Interrupted after \d+ of 20 matrices; the same command resumes there\n", error)
    assert not output.exists()
    kept = {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")}
    assert 2 <= len(kept) < 20
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    assert len(load_scan(output).matrices) == len(list(cache.rglob("*.safetensors"))) == 20
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
