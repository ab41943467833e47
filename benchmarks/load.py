"""Measures commands on large input: wall and processor seconds, and the peak of memory.

    python benchmarks/load.py csv_rows json_array --source before=../before/src --source after=src

runs each row with each source in a process of its own, appends the numbers to benchmarks/results/load.json and prints
them. `--size` scales a row's input, for a source that takes too long with all of it. Memory is that of the command
minus that of the same command with little input; processor time is that of the whole command, imports included.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from recording import append_run, processor

WORDS = re.findall(
    r"\w+",
    "the a film plot cast story acting director scene moment heart humour drama quiet loud strange warm clever dull "
    "slow bright and with of in to is was not but never always almost every some",
)
ROOT = Path(__file__).parents[1]
LITTLE = 0.001
"""Share of a row's input for the command that memory is compared with."""


def texts(seed: int = 0):
    """Sentences of 8 to 32 words, without end."""
    generator, number = random.Random(seed), 0
    while True:
        yield f"{' '.join(generator.choices(WORDS, k=generator.randint(8, 32)))} {number}"
        number += 1


def save_encoder(folder: Path) -> Path:
    """A small BERT without weights worth the name, and a tokenizer that has the words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    raw = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    raw.normalizer, raw.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]"]
    trainer = trainers.WordPieceTrainer(special_tokens=special, vocab_size=500, show_progress=False)
    raw.train_from_iterator([*WORDS * 9, "film number 0 1 2 3 4 5 6 7 8 9"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]")
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=256,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder / "encoder")
    tokenizer.save_pretrained(folder / "encoder")
    return folder / "encoder"


def csv_rows(folder: Path, size: float) -> list[str]:
    """`sgm data` on 200,000 rows of CSV."""
    path = folder / "rows.csv"
    with path.open("w", encoding="utf-8") as file:
        file.write("text,label\n")
        file.writelines(f"film number {n},{'ab'[n % 2]}\n" for n in range(max(60, int(200_000 * size))))
    return ["data", "--examples", "1", f"model.name={save_encoder(folder)}", f"data.train={path}"]


def json_array(folder: Path, size: float) -> list[str]:
    """`sgm data` on a JSON list of 100 MB that stands on one line."""
    path, written, sentences = folder / "rows.json", 1, texts()
    with path.open("w", encoding="utf-8") as file:
        file.write("[")
        for number, text in enumerate(sentences):
            row = (", " if number else "") + json.dumps({"text": text, "label": "ab"[number % 2]})
            written += file.write(row)
            if written >= 100e6 * size and number > 60:
                break
        file.write("]")
    return ["data", "--examples", "1", f"model.name={save_encoder(folder)}", f"data.train={path}"]


def estimate(folder: Path, size: float) -> list[str]:
    """`sgm estimate` of a model of 160 layers."""
    from conftest import llama_config, make_tokenizer

    llama_config(num_hidden_layers=max(2, int(160 * size))).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    lines = [f"good film {i},{'ab'[i % 2]}" for i in range(300)]
    (folder / "rows.csv").write_text("\n".join(["text,label", *lines]))
    return ["estimate", f"model.name={folder / 'model'}", f"data.train={folder / 'rows.csv'}", "data.max_length=64"]


def report(folder: Path, size: float) -> list[str]:
    """`sgm report` on a run with 1,000 classes."""
    import numpy as np
    from made_up_runs import classification_metrics as sample
    from made_up_runs import leave_run

    from sgm_finetune.results.metrics import classification_metrics

    generator, num_classes = np.random.default_rng(0), max(3, int(1000 * size))
    truth = generator.integers(num_classes, size=20 * num_classes)
    metrics = sample(tuple(f"class {i}" for i in range(num_classes)))
    for when, share in (("before", 0.1), ("after", 0.7)):
        guessed = generator.integers(num_classes, size=len(truth))
        guessed = np.where(generator.random(len(truth)) < share, truth, guessed)
        found = classification_metrics(truth.tolist(), guessed.tolist(), num_classes)
        metrics[when] = {**{key: value for key, value in metrics[when].items() if key != "confusion_matrix"}, **found}
    leave_run(folder / "run", 0.8, metrics=metrics)
    return ["report", str(folder / "run")]


def chats(folder: Path, size: float) -> list[str]:
    """`sgm data` on 78,000 chats of four turns, which SmolLM2's template writes; others each time, for the cache."""
    path, sentences = folder / "rows.jsonl", texts(time.time_ns())
    with path.open("w", encoding="utf-8") as file:
        for _ in range(max(60, int(78_000 * size))):
            turns = [{"role": ("user", "assistant")[turn % 2], "content": next(sentences)} for turn in range(4)]
            file.write(json.dumps({"messages": turns}) + "\n")
    return [
        "data", "--examples", "1", "model.name=smollm2-135m-instruct", "model.task=causal-lm", f"data.train={path}",
        "data.max_length=256",
    ]  # fmt: skip


ROWS: dict[str, Callable[[Path, float], list[str]]] = {
    "csv_rows": csv_rows,
    "json_array": json_array,
    "estimate": estimate,
    "report": report,
    "chats": chats,
}
"""Each row writes its input into a folder and returns the arguments of `sgm`; `size` is a share of the whole input."""
WRITTEN = ("run/report.html", "run/metrics.json")
"""Files whose sizes are recorded where a row has them."""


@dataclass(frozen=True)
class Measured:
    wall: float
    processor: float
    peak: int
    """Bytes."""


def write_input(name: str, source: str, folder: Path, size: float) -> list[str]:
    """Writes a row's input with the code in `source`, in a process of its own; returns the arguments of `sgm`."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([source, str(ROOT / "tests")])}
    command = [sys.executable, __file__, "--write", name, str(folder), str(size)]
    written = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(written.stdout.splitlines()[-1])


def measure(arguments: list[str], source: str, folder: Path) -> Measured:
    """One run of `sgm` in `folder` with the code in `source`. Raises CalledProcessError where it fails."""
    environment = os.environ | {"PYTHONPATH": source}
    command = [sys.executable, "-m", "sgm_finetune", *arguments]
    began = time.perf_counter()
    child = subprocess.Popen(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert child.stdout is not None
    said = child.stdout.read()
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, command, said.decode(errors="replace")[-2000:])
    return Measured(time.perf_counter() - began, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)


def measure_row(name: str, source: str, size: float) -> dict:
    """Seconds and memory of one row. `memory_times_input`: memory above that of little input, by the input's bytes."""
    with tempfile.TemporaryDirectory() as scratch:
        little, whole = Path(scratch) / "little", Path(scratch) / "whole"
        for folder in (little, whole):
            folder.mkdir()
            (folder / "config.yaml").write_text("")
        base = measure(write_input(name, source, little, LITTLE), source, little)
        found = measure(write_input(name, source, whole, size), source, whole)
        input_bytes = sum(path.stat().st_size for path in whole.glob("rows.*"))
        sizes = {Path(file).name: (whole / file).stat().st_size for file in WRITTEN if (whole / file).exists()}
    above = found.peak - base.peak
    return {
        "row": name, "size": size, "input_mb": round(input_bytes / 1e6, 1), "wall_seconds": round(found.wall, 1),
        "processor_seconds": round(found.processor, 1), "peak_mb": round(found.peak / 1e6),
        "above_little_mb": round(above / 1e6),
        **({"memory_times_input": round(above / input_bytes, 2)} if input_bytes > 1e6 else {}),
        **{f"{file}_bytes": number for file, number in sizes.items()},
    }  # fmt: skip


def main() -> None:
    if sys.argv[1:2] == ["--write"]:
        name, folder, size = sys.argv[2:]
        print(json.dumps(ROWS[name](Path(folder), float(size))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", choices=[*ROWS])
    parser.add_argument(
        "--source", action="append", required=True, metavar="NAME=PATH", help="a src folder; repeatable"
    )
    parser.add_argument("--size", type=float, default=1.0, help="share of the input")
    options = parser.parse_args()
    sources = {name: str(Path(path).resolve()) for name, path in (text.split("=", 1) for text in options.source)}
    started = time.perf_counter()
    found = []
    for name in options.rows:
        for source, path in sources.items():
            found.append({"source": source, **measure_row(name, path, options.size)})
            print(json.dumps(found[-1]))
    command = f"python benchmarks/load.py {' '.join(sys.argv[1:])}"
    append_run("load", command, started, found, ("torch", "transformers", "datasets", "tokenizers"), **processor())


if __name__ == "__main__":
    main()
