"""The file formats of a scan: the published script's, Axolotl's, SGM's."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from sgm_finetune.base.errors import UserError
from sgm_finetune.measure.scan import scan
from sgm_finetune.measure.scan_formats import axolotl_format, load_scan, selection_notes, spectrum_format

PUBLISHED = """{
    "model.layers.0.mlp.down_proj": {"snr": 0.5, "type": "mlp.down_proj"},
    "model.layers.1.mlp.down_proj": {"snr": Infinity, "type": "mlp.down_proj"},
    "model.layers.2.mlp.down_proj": {"snr": 2.5, "type": "mlp.down_proj"},
    "model.layers.3.mlp.down_proj": {"snr": 1.5, "type": "mlp.down_proj"},
    "model.layers.0.self_attn.v_proj": {"snr": Infinity, "type": "self_attn.v_proj"},
    "lm_head": {"snr": 7, "type": "lm_head"}
}"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "snr_results.json"
    path.write_text(text)
    return path


def test_a_published_file_is_read_with_its_own_kinds_and_infinities(tmp_path: Path):
    found = load_scan(written(tmp_path, PUBLISHED))
    assert found.estimator == "spectrum"
    assert [(m.name, m.kind, m.layer, m.snr) for m in found.matrices[1:3]] == [
        ("model.layers.1.mlp.down_proj", "mlp.down_proj", 1, math.inf),
        ("model.layers.2.mlp.down_proj", "mlp.down_proj", 2, 2.5),
    ]
    assert found.matrices[0].parameter == "model.layers.0.mlp.down_proj.weight"
    assert found.matrices[5].layer is None


def test_a_published_file_of_ratios_sorted_by_kind_is_read_too(tmp_path: Path):
    text = '{"mlp.down_proj": {"model.layers.2.mlp.down_proj": 2.5, "model.layers.0.mlp.down_proj": null}}'
    found = load_scan(written(tmp_path, text))
    assert [(m.name, m.kind, m.snr) for m in found.matrices] == [
        ("model.layers.2.mlp.down_proj", "mlp.down_proj", 2.5),
        ("model.layers.0.mlp.down_proj", "mlp.down_proj", math.inf),
    ]


def test_what_we_write_in_the_published_format_comes_back(tmp_path: Path):
    draw = torch.Generator().manual_seed(0)
    save_file({f"h.{i}.fc.weight": torch.randn(8, 64, generator=draw) for i in range(3)}, tmp_path / "m.safetensors")
    for estimator in ("mp", "spectrum"):
        found = scan(tmp_path / "m.safetensors", estimator=estimator)
        back = load_scan(written(tmp_path, spectrum_format(found)))
        assert {m.name: (m.snr, m.kind) for m in back.matrices} == {m.name: (m.snr, m.kind) for m in found.matrices}


def test_infinite_ratios_are_noted_and_not_ranked(tmp_path: Path):
    found = load_scan(written(tmp_path, PUBLISHED))
    text = axolotl_format(found, 0.5)
    chosen = yaml.safe_load(text)["unfrozen_parameters"]
    assert chosen == [  # two of four: the infinite one counts as a member but is not chosen
        "^model[.]layers[.]2[.]mlp[.]down_proj[.]weight$",
        "^model[.]layers[.]3[.]mlp[.]down_proj[.]weight$",
        "^lm_head[.]weight$",
    ]
    assert "2 of 4" in text
    notes = selection_notes(found, 0.5)
    assert len(notes) == 2
    assert all("infinite SNR, not ranked" in note for note in notes)


def test_a_file_with_only_infinite_ratios_has_no_choice(tmp_path: Path):
    found = load_scan(written(tmp_path, '{"a": {"snr": Infinity, "type": "t"}}'))
    with pytest.raises(UserError, match="finite SNR"):
        axolotl_format(found, 0.5)


def test_ties_at_the_cut_are_noted(tmp_path: Path):
    rows = {f"layers.{i}.fc": {"snr": 1.0 if i else 2.0, "type": "fc"} for i in range(4)}
    found = load_scan(written(tmp_path, json.dumps(rows)))
    (note,) = selection_notes(found, 0.5)
    assert note == "fc: 3 have the same SNR, 0.0 dB; chosen are the 1 that come first"
    assert selection_notes(found, 0.25) == selection_notes(found, 1.0) == []


def test_an_unusual_name_matches_only_itself(tmp_path: Path):
    names = ["h.0.fc+", "h.0.fcc", "h:0", "h.0.'x'", 'h"1', "h.0.ü"]
    rows = {name: {"snr": 1.0 + i, "type": name} for i, name in enumerate(names)}
    patterns = yaml.safe_load(axolotl_format(load_scan(written(tmp_path, json.dumps(rows))), 1.0))[
        "unfrozen_parameters"
    ]
    for name, pattern in zip(names, patterns, strict=True):
        matched = [other for other in names if re.match(pattern, f"{other}.weight")]
        assert matched == [name]


@pytest.mark.parametrize(
    "text",
    [
        '{"a": {"snr": "high", "type": "t"}}',
        '{"a": {"snr": NaN, "type": "t"}}',
        '{"a": {"snr": -1, "type": "t"}}',
        '{"a": {"snr": true, "type": "t"}}',
        '{"a": {"snr": [1], "type": "t"}}',
        '{"t": {"a": 1}, "u": {"a": 2}}',
        '{"a": {}}',
        "{}",
        "3",
        '"Infinity"',
        '{"model_type": "llama"}',
    ],
)
def test_a_file_that_is_not_a_scan_is_refused_in_one_line(text: str, tmp_path: Path):
    with pytest.raises(UserError, match="is no scan") as caught:
        load_scan(written(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_numbers_of_the_other_estimator_are_refused(tmp_path: Path):
    path = written(tmp_path, PUBLISHED)
    assert load_scan(path, "spectrum") == load_scan(path)
    with pytest.raises(UserError, match="estimator spectrum, not mp"):
        load_scan(path, "mp")
