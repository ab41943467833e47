"""What waits for a GPU, most valuable first. A new measurement is one entry here, and its paragraph in docs/gpu.md."""

from __future__ import annotations

from dataclasses import dataclass

GPU_TIER = ("long-arithmetic", "long-summaries", "long-social", "long-questions")


@dataclass(frozen=True)
class Item:
    """One measurement: a script with arguments, in a process of its own.

    In the arguments, {out} is the item's results file, into which the script writes each number at once, and {step} is
    that of the item `step`.
    """

    name: str
    settles: str
    """The question that it answers."""
    script: str
    """The script, from the repository's root."""
    arguments: tuple[str, ...]
    pico: tuple[str, ...]
    """The arguments with which it takes seconds on a CPU."""
    seconds: int
    """Its time limit on a GPU."""
    gib: int
    """Memory of the GPU that it needs at most."""
    packs: tuple[str, ...] = ("tools",)
    """What it needs of `make gpu-pack` where the machine lacks it."""
    resumes: bool = False
    """Whether it goes on where its results file ends; of any other item, a new run replaces the file."""


ITEMS = (
    Item(
        name="tests",
        settles="Do kernels, fast step, scan and whole runs compute on a GPU what they compute on a CPU?",
        script="benchmarks/gpu/run_tests.py",
        arguments=("--out", "{out}", "tests/test_gpu.py", "tests/test_gpu_host.py", "tests/measure/test_scan.py"),
        pico=("--out", "{out}", "tests/test_gpu.py"),
        seconds=220, gib=4,
    ),
    Item(
        name="step",
        settles="How fast is a step of an 8B model in NF4, and in how much memory? (goal: 1.7 times PEFT's QLoRA)",
        script="benchmarks/step_gpu.py",
        arguments=(
            "--out", "{out}", "--repeats", "5",
            "--ways", "PEFT QLoRA", "PEFT, Liger", "fast, Liger", "SGM", "SGM, bitsandbytes' kernels", "frozen",
            "--runs", "2:on", "8:on", "1:on", "1:off", "2:off", "2:offload", "8:off",
        ),
        pico=(
            "--out", "{out}", "--repeats", "1", "--pico", "--runs", "1:on", "2:off",
            "--ways", "PEFT QLoRA", "fast, Liger", "SGM", "frozen",
        ),
        seconds=240, gib=75,
    ),
    Item(
        name="graphs",
        settles="Does a recorded step free short batches from the host? (goal: 1.5 times PEFT's QLoRA at 1 × 2,048)",
        script="benchmarks/step_gpu.py",
        arguments=(
            "--out", "{out}", "--repeats", "7", "--ways", "PEFT QLoRA", "SGM", "SGM, recorded", "SGM, reduced overhead",
            "--runs", "1:off", "1:on",
        ),
        pico=(
            "--out", "{out}", "--repeats", "1", "--pico", "--runs", "1:off", "1:on",
            "--ways", "SGM", "SGM, recorded", "SGM, reduced overhead",
        ),
        seconds=150, gib=50,
    ),
    Item(
        name="unsloth",
        settles="How fast is the same step in Unsloth? (goal: SGM is faster)",
        script="benchmarks/gpu/unsloth_step.py",
        arguments=("--out", "{out}", "--runs", "2:on", "8:on", "1:on", "1:off", "2:off"),
        pico=("--out", "{out}", "--pico", "--runs", "1:on", "2:off"),
        seconds=180, gib=75, packs=("tools", "unsloth"),
    ),
    Item(
        name="scan",
        settles="How long does the scan of an 8B model take? (goal: 90 s)",
        script="benchmarks/gpu/scan_8b.py",
        arguments=("--out", "{out}"),
        pico=("--out", "{out}", "--pico"),
        seconds=200, gib=20,
    ),
    Item(
        name="stream",
        settles="How fast and how small is a step of 8B, and of 70B, that stays in the host's memory, and is it equal?",
        script="benchmarks/gpu/stream_8b.py",
        arguments=("--out", "{out}"),
        pico=("--out", "{out}", "--pico", "--repeats", "1"),
        seconds=240, gib=30,
    ),
    Item(
        name="full",
        settles="How fast and how small is a step of 8B in bfloat16 whose matrices train whole? (goal: 17 GiB)",
        script="benchmarks/gpu/full_8b.py",
        arguments=("--out", "{out}"),
        pico=("--out", "{out}", "--pico", "--repeats", "1"),
        seconds=150, gib=70,
    ),
    Item(
        name="planner",
        settles="How near is the predicted memory to what the steps of the item `step` held? (computed without a GPU)",
        script="benchmarks/memory_gpu.py",
        arguments=("--steps", "{step}", "--out", "{out}"),
        pico=("--steps", "{step}", "--out", "{out}"),
        seconds=120, gib=0,
    ),
    Item(
        name="quality",
        settles="Do the quality tables hold for hundreds of steps, on four generation tasks, over five seeds?",
        script="benchmarks/gpu/quality_tier.py",
        arguments=("--out", "{out}", "--tasks", *GPU_TIER, "--seeds", "5", "--jobs", "12"),
        pico=("--out", "{out}", "--pico", "--seeds", "1", "--jobs", "1"),
        seconds=540, gib=75, packs=("tools", "model-1", "model-2"), resumes=True,
    ),
)  # fmt: skip
