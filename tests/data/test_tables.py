from __future__ import annotations

import json
from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sgm_finetune.base.config import DataConfig
from sgm_finetune.base.errors import UserError
from sgm_finetune.data.arrow import table_of
from sgm_finetune.data.sources import open_source
from sgm_finetune.data.tables import PASSAGE_LENGTH, passages, read_file, running_text

ROWS = {"text": ['He said "no", twice.', "two\nlines", "NA"], "label": ["a", "b", "a"]}


def columns_of(path: Path, **options: str) -> dict[str, list]:
    return {name: list(values[:]) for name, values in read_file(path, "data.train", **options).columns.items()}


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    frame = pd.DataFrame(ROWS)
    frame.to_csv(tmp_path / "r.csv", index=False)
    frame.to_csv(tmp_path / "r.tsv", index=False, sep="\t")
    frame.to_parquet(tmp_path / "r.parquet", index=False)
    records = frame.to_dict("records")
    (tmp_path / "r.json").write_text(json.dumps(records, indent=1))
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, records)))
    for path in sorted(tmp_path.iterdir()):
        assert columns_of(path) == ROWS, path.name


def test_the_file_type_can_be_given_for_an_unknown_extension(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("text,label\nhello,1\n")
    assert columns_of(tmp_path / "data", format="csv") == {"text": ["hello"], "label": ["1"]}


def test_a_byte_order_mark_is_not_part_of_the_first_column(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("text,label\nhello,1\n", encoding="utf-8-sig")
    assert list(columns_of(tmp_path / "r.csv")) == ["text", "label"]


def test_a_field_may_be_longer_than_the_csv_module_allows_by_default(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("text,label\n" + "long " * 40_000 + ",1\n")
    assert len(columns_of(tmp_path / "r.csv")["text"][0]) == 200_000


@pytest.mark.parametrize("separator", [" ", "\t"])
def test_conll_files_are_sentences_of_words_and_their_last_column(tmp_path: Path, separator: str) -> None:
    rows = ["-DOCSTART- -X- -X- O", "", "U.N. NNP I-NP B-ORG", "# NN I-NP O", "1 CD I-NP O", "", "", "! . O O"]
    lines = [row.replace(" ", separator) for row in rows]
    (tmp_path / "r.conll").write_text("\r\n".join(["# id 7 domain=en", *lines[:-1], "# a note", lines[-1]]))
    assert columns_of(tmp_path / "r.conll") == {
        "tokens": [["U.N.", "#", "1"], ["!"]],
        "tags": [["B-ORG", "O", "O"], ["O"]],
    }


def test_parquet_keeps_class_names_and_reads_categories(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    made = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    pq.write_table(made.data.table, tmp_path / "named.parquet")
    assert read_file(tmp_path / "named.parquet", "data.train").class_names == {"label": ["no", "yes"]}
    pd.DataFrame({"label": pd.Categorical(["x", "y", "x"])}).to_parquet(tmp_path / "categories.parquet")
    assert columns_of(tmp_path / "categories.parquet")["label"] == ["x", "y", "x"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.csv", "text,label\na,1\nb\n", "line 3 has 1 fields, the first line 2"),
        ("r.csv", "text,label\na, b,1\n", "line 2 has 3 fields"),
        ("r.csv", 'text,label\n"a,1\nb,2\n', "unexpected end of data"),
        ("r.tsv", 'text\tlabel\n"a" b\t1\n', "write a double quote inside a quoted field twice"),
        ("r.csv", "text,text\na,1\n", "names the column `text` twice"),
        ("r.csv", "text,,\na,1,2\n", "values in several columns without a name"),
        ("r.json", '{"train": [{"text": "a"}], "test": [{"text": "b"}]}', "several lists of rows: train, test"),
        ("r.json", '{"text": {"0": "a"}, "label": {"0": "b"}}', "orient='records'"),
        ("r.json", '{"columns": ["text"], "index": [0], "data": [["a"]]}', "orient='records'"),
        ("r.csv", "text,label\n", "r.csv has no rows"),
        ("r.csv", "", "r.csv has no rows"),
        ("r.csv", b"text,label\ncaf\xe9,1\n", "is not UTF-8: byte 0xe9 at 14"),
        ("r.json", '[{"text": "a"},\n{"text": }]', "r.json line 2 is not JSON: Expecting value"),
        ("r.json", "[]", "r.json has no rows"),
        ("r.json", '["a", "b"]', "row 1 is not a JSON object"),
        ("r.jsonl", '{"text": "a"}\n\n{"text"\n', "line 3 is not JSON"),
        ("r.jsonl", '{"text": "a"}\n17\n', "line 2 is not a JSON object"),
        ("r.parquet", "text,label\n", "is not a Parquet file"),
        ("r.txt", " \n\n ", "r.txt has no rows"),
        ("r.conll", "-DOCSTART- -X- O\n\n", "r.conll has no rows"),
        ("r.conll", "U.N. NNP B-ORG\nofficial O\n", "line 2 has 2 field(s), the first word 3; write the word first"),
        ("r.conll", "hello\n", "line 1 has 1 field(s)"),
        (
            "r.doc",
            "",
            "unknown extension `.doc` (known: .csv .tsv .json .jsonl .ndjson .parquet .txt .conll, and .gz .bz2 .xz "
            ".zst after them); set data.file_type",
        ),
    ],
)
def test_a_malformed_file_is_refused_in_one_line(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError) as caught:
        read_file(path, "data.train")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_line_with_which_a_spreadsheet_tells_its_separator_is_no_row(tmp_path: Path) -> None:
    file = tmp_path / "r.csv"
    file.write_text("sep=;\r\ntext;label\r\na;1\r\nb;2\r\n")
    assert read_file(file, "data.train").columns == {"text": ["a", "b"], "label": ["1", "2"]}
    file.write_text("sep=;\n" + "text;label\n" + "".join(f"film {n};{n % 2}\n" for n in range(12)))
    config = DataConfig(train=str(file), streaming=True, num_train=4, num_validation=2, num_test=2)
    assert list(open_source(config).tables["train"].columns) == ["text", "label"]


def test_empty_columns_without_a_name_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "r.csv"
    file.write_text("text,label,,\na,1,,\nb,2,,\n")
    assert read_file(file, "data.train").columns == {"text": ["a", "b"], "label": ["1", "2"]}
    file.write_text(",text,label\n0,a,1\n1,b,2\n")  # pandas' index is a column
    assert list(read_file(file, "data.train").columns) == ["", "text", "label"]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("key", ["data", "train"])
def test_one_object_that_holds_a_list_of_rows_is_those_rows(tmp_path: Path, key: str, indent: int | None) -> None:
    file, rows = tmp_path / "r.json", [{"text": "a", "label": 1}, {"text": "b", "label": 2}]
    file.write_text(json.dumps({"version": "1.1", key: rows}, indent=indent))
    table = read_file(file, "data.train")
    assert table.columns == {"text": ["a", "b"], "label": [1, 2]}
    assert table.note == f"rows of `{key}`"
    assert read_file(file, "data.train", num_rows=1).columns == {"text": ["a"], "label": [1]}


def test_one_conversation_in_a_file_stays_one_row(tmp_path: Path) -> None:
    file, row = tmp_path / "r.json", {"messages": [{"role": "user", "content": "a"}], "tools": [{"name": "f"}]}
    file.write_text(json.dumps(row, indent=2))
    assert read_file(file, "data.train").columns == {key: [value] for key, value in row.items()}


@pytest.mark.parametrize("name", ["part-*.csv", "[a.csv, b.csv]"])
def test_several_files_are_a_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"for several files, give their folder as data\.name"):
        read_file(tmp_path / name, "data.train")


def test_a_spreadsheet_is_named_by_its_ending(tmp_path: Path) -> None:
    (tmp_path / "r.xlsx").write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError, match=r"r\.xlsx is a spreadsheet; save the sheet as CSV"):
        read_file(tmp_path / "r.xlsx", "data.train")
    (tmp_path / "r.ndjson").write_text('{"text": "a"}\n')
    assert read_file(tmp_path / "r.ndjson", "data.train").columns == {"text": ["a"]}


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.test=.*gone.csv does not exist"):
        read_file(tmp_path / "gone.csv", "data.test")
    with pytest.raises(UserError, match=r"is a folder; .* data.name"):
        read_file(tmp_path, "data.train")


@pytest.mark.parametrize("unit", ["a word or two. ", "a line\n", "a paragraph\n\n", "x"])
def test_joined_passages_are_the_document(unit: str) -> None:
    document = unit * 5000
    parts = list(passages(document, PASSAGE_LENGTH))
    assert "".join(parts) == document
    assert all(PASSAGE_LENGTH <= len(part) <= 2 * PASSAGE_LENGTH for part in parts[:-1])


def test_passages_end_with_paragraphs_where_there_are_any() -> None:
    document = "\n\n".join("word " * 30 + f"end {n}." for n in range(200))
    assert all(part.endswith("\n\n") for part in list(passages(document, PASSAGE_LENGTH))[:-1])


def test_a_short_text_is_cut_finer_so_that_it_can_be_split() -> None:
    table = running_text("short.txt", ["A sentence of some words.\n\n" * 100])
    assert 10 <= len(table.columns["text"]) <= 50


def test_no_passage_spans_two_documents() -> None:
    table = running_text("two.txt", ["left " * 300, "right " * 300])
    assert not any("left" in text and "right" in text for text in table.columns["text"])


def test_a_data_set_is_read_in_its_own_order() -> None:
    made = datasets.Dataset(pa.table({"text": ["a", "b", "c"]})).select([2, 0])
    assert list(table_of("x", made).columns["text"][:]) == ["c", "a"]
