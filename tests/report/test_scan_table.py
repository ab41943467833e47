"""A scan on the terminal is ordered, fits its width and cuts no number."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from sgm_finetune.measure.scan_result import Control, MatrixScan, Scan
from sgm_finetune.method.decibels import NO_SIGNAL_DB, ratio_decibels
from sgm_finetune.results.report.scan_table import kinds_in_order, scan_summary, scan_table, short_kinds

LLAMA = {
    "lm_head": 1, "model.embed_tokens": 1, "model.layers.*.mlp.down_proj": 3, "model.layers.*.mlp.gate_proj": 3,
    "model.layers.*.mlp.up_proj": 3, "model.layers.*.self_attn.k_proj": 3, "model.layers.*.self_attn.o_proj": 3,
    "model.layers.*.self_attn.q_proj": 3, "model.layers.*.self_attn.v_proj": 3,
}  # fmt: skip


def matrix(kind: str, layer: int | None, snr: float, **changes) -> MatrixScan:
    name = kind.replace("*", str(layer))
    values = {
        "name": name, "kind": kind, "layer": layer, "shape": (4, 6), "sigma": 0.1, "edge": 1.0, "signal_rank": 2,
        "snr": snr, "snr_db": ratio_decibels(snr), "parameter": f"{name}.weight", "energy": 1.0,
    }  # fmt: skip
    return MatrixScan(**{**values, **changes})


def llama(**changes) -> Scan:
    found = [
        matrix(kind, layer if "*" in kind else None, 10.0 ** (layer - 1), **changes)
        for kind, count in LLAMA.items()
        for layer in range(count)
    ]
    return Scan("pico", "mp", tuple(found), 2.0)


def printed(scan: Scan, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(scan_table(scan, width))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_kinds_stand_in_the_order_in_which_a_transformer_uses_them():
    assert [kind.split(".")[-1] for kind in kinds_in_order(llama().matrices)] == [
        "embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head",
    ]  # fmt: skip


def test_the_parts_of_gpt2_and_the_layers_of_bert_stand_in_that_order_too():
    gpt2 = ["wte", "wpe", *(f"h.*.{part}" for part in ("mlp.c_proj", "mlp.c_fc", "attn.c_proj", "attn.c_attn[v]",
            "attn.c_attn[k]", "attn.c_attn[q]"))]  # fmt: skip
    ordered = kinds_in_order([matrix(kind, 0 if "*" in kind else None, 1.0) for kind in gpt2])
    assert [k.removeprefix("h.*.") for k in ordered[2:]] == [
        "attn.c_attn[q]", "attn.c_attn[k]", "attn.c_attn[v]", "attn.c_proj", "mlp.c_fc", "mlp.c_proj",
    ]  # fmt: skip
    bert = [f"encoder.layer.*.{part}" for part in ("output.dense", "intermediate.dense", "attention.output.dense",
            "attention.self.query")] + ["pooler.dense"]  # fmt: skip
    ordered = kinds_in_order([matrix(kind, 0 if "*" in kind else None, 1.0) for kind in bert])
    assert [k.removeprefix("encoder.layer.*.") for k in ordered] == [
        "attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense", "pooler.dense",
    ]  # fmt: skip


def test_kinds_that_would_be_called_alike_keep_their_whole_names():
    kinds = ["encoder.block.*.fc", "decoder.block.*.fc"]
    assert short_kinds(kinds) == {kind: kind for kind in kinds}


def test_lowest_and_highest_say_where_they_are():
    text = printed(llama(), 120)
    row = next(line for line in text.splitlines() if "q_proj" in line)
    assert row.split() == ["self_attn.q_proj", "3", "4", "x", "6", "-10.0", "@0", "0.0", "10.0", "@2", "2", "of", "4"]


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
def test_no_line_is_wider_than_the_terminal_and_no_level_is_cut(width):
    text = printed(llama(control=Control(1, NO_SIGNAL_DB)), width)
    assert max(map(len, text.splitlines())) <= width
    if width >= 80:
        assert all(word in text for word in ("self_attn.q_proj", "-10.0", "10.0", "2 of 4", "1 (1)"))
        assert "…" not in text


def test_no_signal_infinite_and_unknown_are_words():
    found = [matrix("h.*.fc", 0, 0.0), matrix("h.*.fc", 1, math.inf), matrix("h.*.fc", 2, 1.0)]
    text = printed(Scan("m", "spectrum", tuple(found)), 120)
    assert "none @0" in text
    assert "inf @1" in text
    text = printed(Scan("m", "spectrum", (matrix("h.*.fc", 0, 1.0, shape=(0, 0)),)), 120)
    assert "0 x 0" not in text
    assert "–" in text


def test_parts_keep_their_brackets():
    text = printed(Scan("[m]", "mp", (matrix("h.*.attn.c_attn[q]", 0, 1.0), matrix("h.*.mlp.c_fc", 0, 1.0))), 100)
    assert "attn.c_attn[q]" in text
    assert "[m]: signal-to-noise" in text


def test_the_summary_counts_what_has_no_signal_and_what_is_infinite():
    found = [matrix("h.*.fc", i, snr) for i, snr in enumerate([0.0, math.inf, 10.0, 1000.0, 100.0])]
    summary = scan_summary(Scan("m", "spectrum", tuple(found), 1.25))
    assert summary == (
        "5 matrices in 1.2 s · SNR 10.0 to 30.0 dB, median 20.0 · 1 without any signal · 1 with an infinite SNR, "
        "not ranked"
    )
    assert scan_summary(Scan("m", "mp", (matrix("a", None, 0.0),))) == "1 matrix · 1 without any signal"
