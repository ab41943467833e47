"""Data files are unpacked, decoded and divided into columns as they are, or refused in one line."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import tracemalloc
import zipfile
from pathlib import Path

import pyarrow as pa
import pytest

from sgm_finetune.base.config_file import load_config
from sgm_finetune.base.errors import UserError
from sgm_finetune.commands.generate import read_prompts
from sgm_finetune.data.splits import check_data, load_splits
from sgm_finetune.data.tables import find_separator, read_file
from sgm_finetune.data.text_file import ALWAYS_UNPACKED, CHUNK


def zstd(content: bytes) -> bytes:
    return pa.Codec("zstd").compress(content, asbytes=True)


PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}
ROWS = [{"text": f"film {n} é", "label": "ab"[n % 2]} for n in range(40)]
FILES = {
    "csv": ("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in ROWS)).encode(),
    "tsv": ("text\tlabel\n" + "".join(f"{row['text']}\t{row['label']}\n" for row in ROWS)).encode(),
    "jsonl": "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    "json": json.dumps(ROWS, ensure_ascii=False).encode(),
    "txt": b"a film and a cast\n\n" * 40,
    "conll": b"film O\nBob B-PER\n\n" * 40,
}


def said(path: Path, **options) -> str:
    with pytest.raises(UserError) as caught:
        read_file(path, "data.train", **options)
    line = str(caught.value)
    assert "\n" not in line
    assert str(path) in line
    return line


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("kind", FILES)
def test_a_packed_file_is_read_as_the_file_within(kind, packing, tmp_path):
    plain = read_file(write(tmp_path / f"rows.{kind}", FILES[kind]), "data.train")
    packed = write(tmp_path / f"rows.{kind}{packing}", PACK[packing](FILES[kind]))
    assert read_file(packed, "data.train").columns == plain.columns
    assert read_file(packed, "data.train", num_rows=3).columns["text" if kind != "conll" else "tokens"]


@pytest.mark.parametrize("packing", PACK)
def test_a_packed_file_is_known_by_its_content_and_by_its_file_type(packing, tmp_path):
    packed = PACK[packing](FILES["jsonl"])
    assert read_file(write(tmp_path / "rows.jsonl", packed), "data.train").columns["label"][:2] == ["a", "b"]
    named = write(tmp_path / f"rows{packing}", packed)
    assert read_file(named, "data.train", "jsonl").columns["label"][:2] == ["a", "b"]
    assert "set data.file_type" in said(tmp_path / f"rows{packing}")


@pytest.mark.parametrize("packing", PACK)
def test_a_packed_file_that_is_damaged_is_one_line(packing, tmp_path):
    packed = PACK[packing](FILES["jsonl"])
    middle = len(packed) // 2
    changed = bytes(255 - byte for byte in packed[middle : middle + 20])
    for name, content in (
        ("cut", packed[:middle]),
        (
            "changed",
            packed[:middle] + changed + packed[middle + 20 :],
        ),
    ):
        assert "cannot be unpacked" in said(write(tmp_path / f"{name}.jsonl{packing}", content))
    plain = write(tmp_path / f"plain.jsonl{packing}", FILES["jsonl"])
    assert "is not packed as its name says; name it plain.jsonl" in said(plain)
    assert "has no rows" in said(write(tmp_path / f"empty.jsonl{packing}", b""))


@pytest.mark.parametrize("packing", PACK)
def test_a_small_file_that_unpacks_to_much_is_refused_before_it_is_held(packing, tmp_path):
    bomb = write(tmp_path / f"bomb.jsonl{packing}", PACK[packing](b" " * (ALWAYS_UNPACKED + CHUNK)))
    assert bomb.stat().st_size < ALWAYS_UNPACKED / 100
    tracemalloc.start()
    try:
        assert "unpacks to more than 64 MiB, far more than its size; unpack it yourself" in said(bomb)
        assert tracemalloc.get_traced_memory()[1] < ALWAYS_UNPACKED / 2
    finally:
        tracemalloc.stop()


def test_files_of_other_kinds_are_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "rows.csv", "w") as archive:
        archive.writestr("rows.csv", FILES["csv"])
    assert "is a ZIP archive or a spreadsheet; unpack it" in said(tmp_path / "rows.csv")
    tar = b"rows.csv" + bytes(249) + b"ustar\0" + bytes(249)
    assert "is a tar archive; unpack it" in said(write(tmp_path / "rows.csv.gz", gzip.compress(tar)))
    parquet = write(tmp_path / "rows.parquet", gzip.compress(b"PAR1"))
    assert "is a packed Parquet file; unpack it" in said(parquet)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_wide_encoding_is_named(encoding, tmp_path):
    wide = FILES["csv"].decode().encode(encoding)
    name = "UTF-32" if encoding == "utf-32" else "UTF-16"
    for path in (write(tmp_path / "rows.csv", wide), write(tmp_path / "rows.csv.gz", gzip.compress(wide))):
        assert f"is {name}, not UTF-8; save it as UTF-8 (iconv -f {name} -t UTF-8)" in said(path)


def test_latin_1_is_named_with_its_place_however_far_it_stands(tmp_path):
    far = b"text,label\n" + b"film,a\n" * 400_000 + "caf\xe9,b\n".encode("latin-1")
    line = "is not UTF-8: byte 0xe9 at 2800014, in line 400002 (é in Latin-1); save it as UTF-8"
    assert line in said(write(tmp_path / "rows.csv", far))
    assert line in said(write(tmp_path / "rows.csv.xz", lzma.compress(far, preset=0)))


@pytest.mark.parametrize(("by", "words"), [(";", "semicolons"), ("\t", "tabs"), ("|", "vertical bars")])
def test_a_csv_file_with_another_separator_is_read_and_the_data_line_says_so(by, words, tmp_path):
    rows = [("text", "label"), *((f"film {n}, a cast", "ab"[n % 2]) for n in range(40))]
    path = write(tmp_path / "rows.csv", "".join(f"{text}{by}{label}\n" for text, label in rows).encode())
    config = load_config(None, [f"data.train={path}"])
    check_data(config.data, config.model.task)
    assert f"separated by {words}" in load_splits(config.data, config.model.task).description
    assert read_file(path, "data.train").columns["text"][0] == "film 0, a cast"


@pytest.mark.parametrize(
    ("text", "by"),
    [
        ("text,label\na,1\nb,2\n", ","),
        ("text,label\na;x,1\nb;y,2\n", ","),
        ("text\na; b\nc\n", ","),
        ("text;score\na;1,5\nb;2,5\n", ";"),
        ('text;label\n"a;b";1\n"c\nd";2\n', ";"),
        ("text;label\na;1\nb\n", ";"),
        ("text,label\na,1\nb\n", ","),
        ("text|label|id\na, b|1|2\n", "|"),
        ("", ","),
    ],
)
def test_the_separator_is_the_comma_unless_only_another_divides_the_first_line(text, by, tmp_path):
    assert find_separator(write(tmp_path / "rows.csv", text.encode()), ",") == by


def test_a_separator_is_found_in_rows_longer_than_the_sample(tmp_path):
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=";").writerows([("text", "label"), *[("a, b; " * 30_000, "x")] * 3])
    assert read_file(path, "data.train").columns["label"] == ["x"] * 3


def test_a_tsv_file_with_commas_is_read(tmp_path):
    table = read_file(write(tmp_path / "rows.tsv", FILES["csv"]), "data.train")
    assert (list(table.columns), table.note) == (["text", "label"], "separated by commas")


@pytest.mark.parametrize("space", ["", " ", "\n", "\r\n\t"])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_a_list_is_the_same_wherever_the_buffer_ends(space, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr("sgm_finetune.data.tables.CHUNK", chunk)
    rows = [
        {"text": 'a "]}, \\ é \ud83d\ude00', "n": -12.5e3, "more": [1, {"x": None}]},
        {"n": 7},
        {"text": "", "b": True},
    ]
    text = f",{space}".join(json.dumps(row) for row in rows)
    found = read_file(
        write(tmp_path / "r.json", f"{space}[{space}{text}{space}]{space}".encode()), "data.train"
    ).columns
    assert found["n"] == [-12.5e3, 7, None]
    assert found["text"] == ['a "]}, \\ é 😀', None, ""]
    assert found["more"] == [[1, {"x": None}], None, None]
    assert found["b"] == [None, None, True]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"text": "a"} {"text": "b"}]', "line 1 is not JSON: Expecting ',' delimiter"),
        ('[{"text": "a"},\n{"text": "b"}', "line 2 is not JSON: Expecting ',' delimiter"),
        ('[{"text": "a"},\n\n{"text": "b', "line 3 is not JSON: Unterminated string"),
        ('[{"text": "a"}] more', "line 1 is not JSON: Extra data"),
        ('[{"text": "a"},]', "line 1 is not JSON: Expecting value"),
        ('[{"text": "a"}, "b"]', "row 2 is not a JSON object"),
        ("[" * 100_000, "cannot be read as JSON"),
        ('[{"text": "a"}, {"text": "\\ud83d"}]', "row 2 has half of a surrogate pair"),
        ('\n\n{"text": "a"}\n{"text"', "line 4 is not JSON"),
        ('{"text": "a"}\n{"text": "\\udc00"}', "line 2 has half of a surrogate pair"),
    ],
)
@pytest.mark.parametrize("chunk", [3, CHUNK])
def test_a_mistake_in_a_list_is_named_with_its_place(text, message, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr("sgm_finetune.data.tables.CHUNK", chunk)
    assert message in said(write(tmp_path / "r.json", text.encode()))


def test_a_list_on_one_line_takes_little_more_than_its_rows(tmp_path):
    rows = [{"text": f"{n} " + "film " * 40, "label": "a"} for n in range(20_000)]
    path = write(tmp_path / "r.json", json.dumps(rows).encode())
    del rows
    tracemalloc.start()
    try:
        table = read_file(path, "data.train")
        assert len(table.columns["text"]) == 20_000
        assert tracemalloc.get_traced_memory()[1] < 3 * path.stat().st_size
    finally:
        tracemalloc.stop()


def test_the_first_rows_of_a_list_are_read_alone(tmp_path):
    path = write(tmp_path / "r.json", json.dumps(ROWS * 1000).encode()[:-100])
    assert len(read_file(path, "data.train", num_rows=5).columns["text"]) == 5


def test_packed_prompts_are_answered_like_those_within(tmp_path):
    config = load_config(None, ["model.task=causal-lm"])
    assert read_prompts(write(tmp_path / "p.txt.gz", gzip.compress(b"one\n\ntwo\n")), config) == ["one", "two"]
    rows = b'{"prompt": "one"}\n{"prompt": "two"}\n'
    assert read_prompts(write(tmp_path / "p.jsonl.xz", lzma.compress(rows)), config) == ["one", "two"]
