"""Encodes large splits of conversations in parts, by several processes: writing them by a chat template takes longest.

The parts are the same on every machine, and so is the result; the number of processes is that of the processors. Each
is a program of its own (data/encode_part.py): the ways of `multiprocessing` either copy a process with its threads or
run the user's script again.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import datasets
import psutil

from sgm_finetune.base.config import Task
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.memory import host_memory_within_reach
from sgm_finetune.data.encode_part import Part, take_encoded, write_part, write_work
from sgm_finetune.data.encoding import Encoded, NothingToLearnError, all_lost, encode, join_encoded
from sgm_finetune.data.rows import Origin

PART = 5000
"""Rows of a part: some seconds of work."""
PROCESS_BYTES = 2**30
"""Free memory that each process needs."""


def encode_in_parts(
    split: datasets.Dataset, tokenizer: Any, task: Task, max_length: int, origins: Sequence[Origin] | None
) -> Encoded:
    """`encode`, of more than PART conversations part by part.

    Other data are encoded in one piece: their tokenizer has threads of its own, or a row needs the others (kto, running
    text).
    """
    parts = _parts(split, tokenizer, task, origins)
    if len(parts) < 2:
        return encode(split, tokenizer, task, max_length, origins)

    def encode_one(part: Part) -> Encoded | UserError:
        try:
            return encode(part[0], tokenizer, task, max_length, part[1])
        except UserError as error:
            return error

    number = num_processes(len(parts))
    found = _by_processes(parts, (tokenizer, task, max_length), number) if number > 1 else [None] * len(parts)
    done = (encode_one(part) if one is None else one for part, one in zip(parts, found, strict=True))
    return _joined(done, max_length)


def _parts(split: datasets.Dataset, tokenizer: Any, task: Task, origins: Sequence[Origin] | None) -> list[Part]:
    """The split in parts of PART rows; empty where it cannot be divided."""
    is_divisible = task == "causal-lm" or "rejected" in split.column_names
    has_template = "messages" in split.column_names and tokenizer.chat_template is not None
    is_known = tokenizer.is_fast and type(tokenizer).__module__.startswith("transformers.")
    if origins is None or not (is_divisible and has_template and is_known):
        return []
    begins = range(0, len(split), PART)
    return [(split.select(range(at, min(at + PART, len(split)))), origins[at : at + PART]) for at in begins]


def num_processes(num_parts: int) -> int:
    """The number of processes: one for each processor of this process, no more than the free memory allows."""
    usable = getattr(os, "sched_getaffinity", None)  # Linux alone has it
    processors = len(usable(0)) if usable is not None else os.cpu_count() or 1
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free = host_memory_within_reach() - psutil.Process().memory_info().rss
    return max(1, min(num_parts, processors // beside, free // PROCESS_BYTES))


def _joined(parts: Iterator[Encoded | UserError], max_length: int) -> Encoded:
    """The parts as one. Raises the first error; that a part has nothing to learn is one if no part has."""
    kept: list[Encoded] = []
    lost: list[NothingToLearnError] = []
    for part in parts:
        if isinstance(part, NothingToLearnError):
            lost.append(part)
        elif isinstance(part, UserError):
            raise part
        else:
            kept.append(part)
    num_lost = sum(one.num_examples for one in lost)
    if not kept:
        raise all_lost(num_lost, max_length, max(one.longest_prompt for one in lost))
    joined = join_encoded([one.dataset for one in kept], kept)
    unread = tuple(name for name in joined.unread if name not in joined.written)
    return replace(joined, num_dropped=joined.num_dropped + num_lost, unread=unread)


def _by_processes(parts: Sequence[Part], work: tuple[Any, Task, int], number: int) -> list[Encoded | UserError | None]:
    """What `number` processes make of the parts, up to the first error; None for a part whose process ended before it
    was done, and for those after an error."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        write_work(Path(folder), *work)
        idle: SimpleQueue[subprocess.Popen] = SimpleQueue()
        for _ in range(number):
            idle.put(stack.enter_context(_process(Path(folder))))

        def encoded(at: int) -> Encoded | UserError | None:
            process = idle.get()
            try:
                return _ask(process, Path(folder), at, parts[at])
            finally:
                idle.put(process)

        workers = stack.enter_context(ThreadPoolExecutor(number))
        found: list[Encoded | UserError | None] = []
        try:
            for one in workers.map(encoded, range(len(parts))):
                found.append(one)
                if isinstance(one, UserError) and not isinstance(one, NothingToLearnError):
                    break
        finally:
            workers.shutdown(wait=False, cancel_futures=True)
        return found + [None] * (len(parts) - len(found))


@contextmanager
def _process(folder: Path) -> Iterator[subprocess.Popen]:
    """One process that encodes parts; it is gone when the block is left."""
    command = [sys.executable, "-P", "-m", "sgm_finetune.data.encode_part", str(folder)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "TOKENIZERS_PARALLELISM": "false",
    }
    process = subprocess.Popen(
        command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _ask(process: subprocess.Popen, folder: Path, number: int, part: Part) -> Encoded | UserError | None:
    """What a process makes of a part; None if it has ended."""
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(OSError, ValueError):
        write_part(folder, number, part)
        process.stdin.write(f"{number}\n")
        process.stdin.flush()
        if process.stdout.readline():
            return take_encoded(folder, number)
    return None
