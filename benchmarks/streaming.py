"""Compares a base on disk with one in memory: the process's own memory, and seconds per step side by side.

    python benchmarks/streaming.py           # SmolLM2-135M in float32, appended to results/streaming.json
    python benchmarks/streaming.py --llama   # a random Llama of 8B in NF4, whose store is made block by block

Both processes exist at once and take turns, a few steps each, so that what else the machine does costs both the same.
Own memory is RssAnon, sampled while the model loads and while it trains, above what it is once the libraries are
imported. The files lie in the system's cache. The store is made before, in a process of its own.

With --llama a last step begins cold: before it, the system's cache gives up the store, and mincore must find none of
it there.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Literal

from llama_8b import LLAMA_8B
from recording import append_run, process_memory, processor

MODEL = "smollm2-135m-instruct"
ROWS = ((1, 128, False), (2, 128, True), (1, 256, False))
"""Examples a step, tokens an example, checkpointing."""
RANK, TURNS, STEPS = 16, 5, 1
_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


class MappedStore:
    """The files of a store in the system's cache, seen from the process that has mapped them (Linux)."""

    def __init__(self, folder: Path):
        self.files = sorted(folder.glob("*.safetensors"))
        self.libc = ctypes.CDLL(None)

    def share_in_cache(self) -> float:
        """The share of the mapped pages that the system holds in memory."""
        held = num = 0
        for first, length in self._places():
            found = (ctypes.c_ubyte * (length // mmap.PAGESIZE))()
            if self.libc.mincore(ctypes.c_void_p(first), ctypes.c_size_t(length), found):
                raise SystemExit("mincore failed")
            held, num = held + sum(byte & 1 for byte in bytes(found)), num + len(found)
        return held / num

    def drop(self) -> None:
        """Makes the system forget the files: the process gives back its pages, then the cache does."""
        for first, length in self._places():
            self.libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), mmap.MADV_DONTNEED)
        for path in self.files:
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def mib_per_second(self) -> float:
        """How fast the largest file, which the cache lacks, is read from its beginning to its end."""
        largest, buffer = max(self.files, key=lambda path: path.stat().st_size), bytearray(2**23)
        with largest.open("rb", buffering=0) as file:
            started = time.perf_counter()
            while file.readinto(buffer):
                pass
            return largest.stat().st_size / 2**20 / (time.perf_counter() - started)

    def _places(self) -> list[tuple[int, int]]:
        """The first address and the length of each mapping of these files."""
        found = []
        for line in Path("/proc/self/maps").read_text().splitlines():
            if line.split(maxsplit=5)[-1] in {str(path.resolve()) for path in self.files}:
                first, _, end = line.split(maxsplit=1)[0].partition("-")
                found.append((int(first, 16), int(end, 16) - int(first, 16)))
        return found


def bytes_read() -> int:
    """Bytes that this process has had read from a disk (Linux)."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])


class Peak:
    """The largest memory of each kind since the last `take`, in MiB; a thread looks every few milliseconds."""

    KINDS = ("RssAnon", "VmRSS")

    def __init__(self) -> None:
        self.most = dict.fromkeys(self.KINDS, 0.0)
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            for kind in self.KINDS:
                self.most[kind] = max(self.most[kind], process_memory(kind))
            time.sleep(0.003)

    def take(self) -> dict[str, float]:
        most, self.most = self.most, dict.fromkeys(self.KINDS, 0.0)
        return {kind: round(value, 1) for kind, value in most.items()}


def adapt(
    base: Any, batch: int, length: int, checkpointing: bool, rank: int = RANK, kinds: tuple[str, ...] | None = None
) -> Any:
    """The fast step of SGM on LoRA for the matrices of some kinds (None: all), as a function that returns the loss."""
    import torch
    from peft import LoraConfig, get_peft_model

    from sgm_finetune.model.matrices import adaptable
    from sgm_finetune.train.adapters.optimizer import create_optimizer
    from sgm_finetune.train.fast.adapter_forward import use_fast_step
    from sgm_finetune.train.fast.attention import recompute_attention
    from sgm_finetune.train.fast.gated_mlp import recompute_mlps
    from sgm_finetune.train.fast.head_loss import HeadLoss, find_head_loss

    base.requires_grad_(False)
    torch.manual_seed(0)
    ids = torch.randint(0, base.config.vocab_size, (batch, length))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    beginning = {name: x[:, :64] for name, x in inputs.items()}
    if not recompute_attention(base, beginning) or not (checkpointing or recompute_mlps(base, beginning)):
        raise SystemExit("The fast step does not fit this model")
    names = [name for name in adaptable(base) if kinds is None or name.endswith(kinds)]
    settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names, task_type="CAUSAL_LM")
    model: Any = get_peft_model(base, settings)
    use_fast_step(model)
    optimizer = create_optimizer(model, lr=0.0125)
    in_parts = find_head_loss(model, inputs)
    assert isinstance(in_parts, HeadLoss)
    model.train()
    if checkpointing:
        base.activation_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()

    def step() -> float:
        total, count = in_parts(model, inputs, ids)
        (total / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(total.detach()) / count

    return step


def load(residence: str) -> Any:
    from sgm_finetune.base.config import ModelConfig
    from sgm_finetune.model.folder import local_folder
    from sgm_finetune.model.load import load_model

    config = ModelConfig(name=MODEL, task="causal-lm", dtype="float32", residence=residence)  # type: ignore[arg-type]
    return load_model(config, local_folder(MODEL))[0]


def load_llama(layers: int, place: Path) -> Any:
    """A random Llama whose layers have the shape of 8B, in NF4, on disk; each matrix is drawn when it is packed."""
    import torch
    from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    from sgm_finetune.model.four_bit import ready_for_backward
    from sgm_finetune.model.residence.store import Store, keep_on_disk, loading_from_disk

    class Drawn:
        """A matrix that exists only while it is read."""

        def __init__(self, shape: torch.Size, seed: int):
            self.shape, self.seed = shape, seed

        def __getitem__(self, _: Any) -> torch.Tensor:
            if len(self.shape) == 1:
                return torch.ones(self.shape, dtype=torch.bfloat16)
            generator = torch.Generator().manual_seed(self.seed)
            return torch.empty(self.shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    config = LlamaConfig(**LLAMA_8B | {"num_hidden_layers": layers})
    with torch.device("meta"):
        empty = LlamaForCausalLM(config)
    drawn = {name: Drawn(p.shape, seed) for seed, (name, p) in enumerate(empty.named_parameters())}
    store = Store(place, "random", lambda line: print(line, file=sys.stderr, flush=True))
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head"],
    )  # fmt: skip
    with loading_from_disk(store):
        model = LlamaForCausalLM.from_pretrained(
            None, config=config, state_dict=drawn, dtype=torch.bfloat16, quantization_config=settings,
            device_map={"": "cpu"}, attn_implementation="eager",
        )  # fmt: skip
    ready_for_backward(model)
    keep_on_disk(model, store)
    return model.eval()


def work(asked: argparse.Namespace) -> None:
    """A process that trains: it takes a number of steps from each line of its input, and answers what they cost."""
    import torch
    import transformers  # noqa: F401

    import sgm_finetune.model.load
    import sgm_finetune.train.trainer  # noqa: F401

    torch.set_num_threads(asked.threads)
    libraries, peak = process_memory("RssAnon"), Peak()
    started = time.perf_counter()
    base = load_llama(asked.layers, Path(asked.work)) if asked.llama else load(asked.work)
    loaded = {"libraries": round(libraries, 1), "seconds": round(time.perf_counter() - started, 2), **peak.take()}
    small = {"rank": 8, "kinds": ("q_proj", "k_proj", "v_proj", "o_proj")} if asked.llama else {}
    step = adapt(base, asked.batch, asked.length, asked.checkpointing, **small)
    print(json.dumps(loaded | {"preparing": peak.take()}), flush=True)
    for line in sys.stdin:
        cold = grow_cold(Path(asked.work)) if line.strip() == "cold" else {}
        losses, started, read = [], time.perf_counter(), bytes_read()
        for _ in range(1 if cold else int(line)):
            losses.append(step())
        seconds = (time.perf_counter() - started) / len(losses)
        gib_read = round((bytes_read() - read) / len(losses) / 2**30, 3)
        answer = {"seconds": round(seconds, 4), "gib_read": gib_read, "losses": losses, **peak.take(), **cold}
        print(json.dumps(answer), flush=True)


def grow_cold(folder: Path) -> dict[str, float]:
    """Makes the system's cache forget a store, and says how much of it was there, and how fast the disk reads it."""
    store = MappedStore(folder)
    before = store.share_in_cache()
    store.drop()
    rate = store.mib_per_second()
    store.drop()
    return {
        "share_in_cache_before": round(before, 3), "share_in_cache_after": round(store.share_in_cache(), 6),
        "disk_mib_per_second": round(rate, 1),
    }  # fmt: skip


class Worker:
    """A process that runs `work`."""

    def __init__(self, *arguments: str, threads: int):
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--threads", str(threads), *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip
        self.loaded = self._read()

    def steps(self, number: int | Literal["cold"]) -> dict[str, Any]:
        """What a number of steps cost, or one step that begins cold."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            raise SystemExit(f"A process ended with status {self.process.wait()}")
        return json.loads(line)

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def compare(batch: int, length: int, checkpointing: bool, threads: int) -> dict[str, Any]:
    """One row: both residences, turn by turn."""
    shape = ["--batch", str(batch), "--length", str(length), *(["--checkpointing"] if checkpointing else [])]
    workers = {place: Worker("--work", place, *shape, threads=threads) for place in ("device", "disk")}
    turns: dict[str, list[dict[str, Any]]] = {place: [worker.steps(1)] for place, worker in workers.items()}
    for turn in range(TURNS):
        for place in sorted(workers, reverse=bool(turn % 2)):
            turns[place].append(workers[place].steps(STEPS))
    row: dict[str, Any] = {"batch": batch, "length": length, "checkpointing": checkpointing}
    for place, worker in workers.items():
        worker.end()
        libraries, training = worker.loaded["libraries"], [worker.loaded["preparing"], *turns[place]]
        row[place] = {
            "own_mib_loading": round(worker.loaded["RssAnon"] - libraries, 1),
            "own_mib_training": round(max(turn["RssAnon"] for turn in training) - libraries, 1),
            "resident_mib_training": max(turn["VmRSS"] for turn in training),
            "seconds": [turn["seconds"] for turn in turns[place][1:]],
        }
    print(json.dumps(row), file=sys.stderr, flush=True)
    losses = {place: [loss for turn in turns[place] for loss in turn["losses"]] for place in workers}
    speeds = [one / other for one, other in zip(row["device"]["seconds"], row["disk"]["seconds"], strict=True)]
    peaks = {place: max(row[place]["own_mib_loading"], row[place]["own_mib_training"]) for place in workers}
    return row | {
        "memory_ratio": round(peaks["disk"] / peaks["device"], 3),
        "memory_ratio_training": round(row["disk"]["own_mib_training"] / row["device"]["own_mib_training"], 3),
        "speed_ratio": round(statistics.median(speeds), 3),
        "losses_equal": losses["device"] == losses["disk"],
    }


def llama(asked: argparse.Namespace) -> dict[str, Any]:
    """One row: makes the store, trains a few steps on it, and deletes it."""
    with tempfile.TemporaryDirectory(dir=asked.place) as place:
        shape = ["--llama", "--layers", str(asked.layers), "--batch", "1", "--length", "128", "--checkpointing"]
        made = Worker("--work", place, *shape, threads=asked.threads)
        made.end()
        store = sum(path.stat().st_size for path in Path(place).glob("*.safetensors"))
        worker = Worker("--work", place, *shape, threads=asked.threads)
        steps = [worker.steps(1) for _ in range(asked.steps)]
        cold = worker.steps("cold")
        worker.end()
    return {
        "layers": asked.layers, "store_gib": round(store / 2**30, 2), "making": made.loaded, "loading": worker.loaded,
        "steps": steps, "cold": cold,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", action="store_true", help="a random Llama of 8B in NF4 instead")
    parser.add_argument("--layers", type=int, default=32, help="how many of its 32 layers")
    parser.add_argument("--steps", type=int, default=2, help="steps on it")
    parser.add_argument("--place", help="folder for its store, about 6 GiB with all layers")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.work:
        work(asked)
        return
    started = time.perf_counter()
    if asked.llama:
        rows: list[Any] = [llama(asked)]
    else:
        Worker("--work", "disk", "--batch", "1", "--length", "8", threads=asked.threads).end()  # makes the store
        rows = [compare(*row, asked.threads) for row in ROWS]
    print(json.dumps(rows, indent=1))
    command = " ".join(["python benchmarks/streaming.py", *sys.argv[1:]])
    append_run("streaming", command, started, rows, _PACKAGES, threads=asked.threads, **processor())


if __name__ == "__main__":
    main()
