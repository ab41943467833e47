"""The command `sgm`, which src/finetune.py and src/evaluate.py call too: arguments in, results and exit status out.

Help and wrong input answer at once: a command checks what it was given (commands/requests.py) before it imports its
own module, and with it PyTorch.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import typer

from sgm_finetune.base.config import Config, Quantization, Task
from sgm_finetune.base.config_file import load_config
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.text import printable
from sgm_finetune.commands.exit_status import run_and_exit

app = typer.Typer(
    add_completion=True,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Fine-tune transformers on machines that are a little too small: measure, merge, train, evaluate, save.",
)

ConfigPath = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", help="YAML file with keys and values.", show_default="config.yaml, or defaults without one"
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Keys to change, e.g. training.epochs=2 merge.side=none", metavar="key=value")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and all else on stderr.")]

Compare = Annotated[bool, typer.Option("--compare", help="Show the base model's answer beside it.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Most tokens of an answer.")]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token always.")]
TopP = Annotated[
    float,
    typer.Option("--top-p", min=0.0, max=1.0, help="With a temperature: sample from this share of the probability."),
]
SamplingSeed = Annotated[int, typer.Option("--seed", min=0, help="With a temperature: seed of the sampling.")]

_OPTIONS = {"quiet": False}
"""Options that stand before the command: sgm --quiet finetune."""


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"sgm-finetune {version('sgm-finetune')}")
        raise typer.Exit


@app.callback()
def set_options(
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print errors only; --json still prints the result.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Print the messages of the libraries too (like SGM_DEBUG=1).")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    _OPTIONS.update(quiet=quiet)
    _configure_libraries(verbose or bool(os.environ.get("SGM_DEBUG")))


@app.command("init", rich_help_panel="Begin")
def init_command(
    path: Annotated[Path, typer.Argument(help="The file to write.", metavar="config.yaml")] = Path("config.yaml"),
    model: Annotated[str | None, typer.Option("--model", help="Answers the first question.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="Answers the second.")] = None,
    task: Annotated[
        Task | None, typer.Option("--task", metavar="TASK", help=f"Answers the third: {', '.join(get_args(Task))}.")
    ] = None,
    quantization: Annotated[Quantization | None, typer.Option("--quantization", help="Answers the fourth.")] = None,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Ask nothing; take the default answer for what is not given.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Ask four questions and write a commented configuration.

    Example: sgm init reviews.yaml --data reviews.csv
    """
    console = _console(False, result=True)
    if not yes and not sys.stdin.isatty() and None in (model, data, task, quantization):
        raise UserError("sgm init asks, and there is no terminal; give the four answers as options, or --yes")
    from sgm_finetune.commands.init import Answers, next_steps, write_first_config

    given = Answers(model, data, task, quantization)
    write_first_config(path, console, given, ask=not yes, overwrite=force)
    _print_saved(console, f"{path}\n{next_steps(path)}")


@app.command("doctor", rich_help_panel="Begin")
def doctor_command(as_json: AsJson = False) -> None:
    """Try what works on this machine: processor, GPU, memory, disk, 4 and 8 bits, extras, hub; say what to install.

    Example: sgm doctor --json
    """
    from sgm_finetune.commands.doctor import examine, report, to_dict

    findings = list(examine()) if as_json else report(examine(), _console(False, result=True))
    if as_json:
        print(json.dumps(to_dict(findings)))
    if any(finding.verdict == "broken" for finding in findings):
        raise SystemExit(2)


@app.command("data", rich_help_panel="Look first")
def data_command(
    overrides: Overrides = None,
    config: ConfigPath = None,
    examples: Annotated[int, typer.Option("--examples", "-n", min=0, help="Number of examples to show.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Show training examples as the model will read them, and their lengths. Text outside the loss is dimmed.

    Example: sgm data data.train=chats.jsonl model.task=causal-lm data.max_length=1024
    """
    settings = _read_config(config, overrides or [], as_json)
    from sgm_finetune.commands.requests import check_inputs

    check_inputs(settings)
    with _loading():
        from sgm_finetune.commands.data import preview

    shown = preview(settings, _console(as_json, result=True), examples)
    if as_json:
        print(json.dumps(shown))


@app.command("scan", rich_help_panel="Look first")
def scan_command(
    model: Annotated[
        str,
        typer.Argument(
            help="Hub id, local folder, .safetensors, .bin or .gguf file, embedded demo model; or a file of results."
        ),
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write the result to.")] = None,
    estimator: Annotated[
        Literal["mp", "spectrum"] | None,
        typer.Option(help="mp: ours, the default. spectrum: the published script's.", show_default=False),
    ] = None,
    format: Annotated[
        Literal["json", "spectrum", "axolotl"] | None,
        typer.Option(help="Format to write or print: json (the default of --output), or a file for those tools."),
    ] = None,
    top_fraction: Annotated[
        float | None, typer.Option(help="axolotl: share of each kind to train, (0, 1].", show_default=False)
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Folder for pictures: a map of layers x kinds, and histograms."),
    ] = None,
    matrix: Annotated[
        list[str] | None,
        typer.Option(help="--plot: draw histograms of these: a name, or a pattern such as '*v_proj'. Repeatable."),
    ] = None,
    control: Annotated[
        bool, typer.Option("--control", help="Scan each matrix a second time with its entries shuffled.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Compute again what an earlier scan has cached.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure the signal-to-noise ratio of every weight matrix, with two matrices in memory at a time.

    After an interruption, the same command continues where it stopped.

    Example: sgm scan smollm2-135m-instruct --output scan.json --plot pictures
    """
    if top_fraction is not None and not 0 < top_fraction <= 1:
        raise UserError(f"--top-fraction is {top_fraction}; it is a share above 0 and at most 1")
    if format == "axolotl" and top_fraction is None:
        raise UserError("--format axolotl needs --top-fraction, for example --top-fraction 0.5")
    if top_fraction is not None and format != "axolotl":
        raise UserError("--top-fraction goes with --format axolotl, which lists the parameters to train")
    if matrix and plot is None:
        raise UserError("--matrix says which histograms to draw; it needs --plot FOLDER")
    if as_json and format not in (None, "json"):
        raise UserError(f"--json and --format {format} print two things; leave one of them out")
    from sgm_finetune.commands.requests import ScanRequest

    request = ScanRequest(
        model,
        output=output,
        format=None if as_json else format,
        estimator=estimator,
        top_fraction=top_fraction,
        control=control,
        plot=plot,
        matrices=tuple(matrix or ()),
        fresh=fresh,
    )
    request.check()
    with _loading("PyTorch"):
        from sgm_finetune.commands.scan import run_scan

    console = _console(as_json or (output is None and format is not None), result=output is None)
    scanned = run_scan(request, console)
    if as_json:
        print(json.dumps(scanned.to_dict(), allow_nan=False))


@app.command("estimate", rich_help_panel="Look first")
def estimate_command(
    config_file: Annotated[
        str | None, typer.Argument(help="YAML file, instead of --config; or a key=value.", metavar="config.yaml")
    ] = None,
    overrides: Overrides = None,
    config: ConfigPath = None,
    as_json: AsJson = False,
) -> None:
    """Predict the memory, disk and time of a run from its configuration and data, without loading weights.

    Example: sgm estimate data.name=rotten-tomatoes training.batch_size=8 memory.budget=2GiB
    """
    given = [*([config_file] if config_file else []), *(overrides or [])]
    if given and "=" not in given[0]:
        config = Path(given.pop(0))
    settings = _read_config(config, given, as_json)
    from sgm_finetune.commands.requests import check_inputs

    check_inputs(settings, with_plan=True)
    with _loading():
        from sgm_finetune.commands.estimate import estimate_for

    needed = estimate_for(settings, _console(as_json, result=True))
    if as_json:
        print(json.dumps(needed.to_dict()))


@app.command("plan", rich_help_panel="Look first")
def plan_command(
    overrides: Overrides = None,
    config: ConfigPath = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write the plan to.")] = Path("plan.json"),
    as_json: AsJson = False,
) -> None:
    """Scan and probe, and write the plan: what is trained, what is shared, and why. Reuse it with plan=plan.json.

    Example: sgm plan data.name=rotten-tomatoes merge.threshold=0.9 --output plans/strict.json
    """
    settings = _read_config(config, overrides or [], as_json)
    if output.exists() and not settings.output.overwrite:
        raise UserError(f"{output} exists; name another --output, or replace it with output.overwrite=true")
    from sgm_finetune.commands.requests import check_inputs

    check_inputs(settings)
    with _loading():
        from sgm_finetune.commands.plan import make_plan_for
        from sgm_finetune.measure.plan_file import plan_document, save_plan

    console = _console(as_json)
    plan = make_plan_for(settings, console)
    save_plan(plan, output)
    _print_saved(console, output)
    if as_json:
        print(json.dumps(plan_document(plan)))


@app.command("finetune", rich_help_panel="Train")
def finetune_command(
    overrides: Overrides = None,
    config: ConfigPath = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Do everything up to the first step, and write nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Scan, probe, plan, train, evaluate and save, as the configuration says.

    Example: sgm finetune data.name=rotten-tomatoes training.epochs=2 output.dir=runs/two-epochs
    """
    settings = _read_config(config, overrides or [], as_json)
    from sgm_finetune.commands.requests import check_run

    check_run(settings)
    with _loading():
        from sgm_finetune.commands.finetune import finetune

    metrics = finetune(settings, _console(as_json), dry_run)
    if as_json:
        print(json.dumps(metrics))


@app.command("evaluate", rich_help_panel="Train")
def evaluate_command(overrides: Overrides = None, config: ConfigPath = None, as_json: AsJson = False) -> None:
    """Test output.dir/sgm_finetuned.pth on the test data, from that file and the base model alone.

    Example: sgm evaluate output.dir=runs/two-epochs
    """
    settings = _config_of_result(config, overrides)
    from sgm_finetune.commands.requests import check_result

    check_result(settings)
    with _loading():
        from sgm_finetune.commands.evaluate import evaluate

    metrics = evaluate(settings, overrides or [], _console(as_json))
    if as_json:
        print(json.dumps(metrics))


@app.command("report", rich_help_panel="Use")
def report_command(
    output: Annotated[Path, typer.Argument(help="The output.dir of a run.", metavar="OUTPUT")] = Path("output"),
    serve: Annotated[
        bool, typer.Option("--serve", help="Show it in a browser, and try the model before and after.")
    ] = False,
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="--serve: port on this machine.")] = 7860,
    as_json: AsJson = False,
) -> None:
    """Make report.html again from the other files of a run, also after its folder was moved.

    Example: sgm report runs/two-epochs --serve
    """
    if serve:
        if as_json:
            raise UserError("--serve shows a page, and --json prints an object; leave one of them out")
        from sgm_finetune.commands.requests import check_page

        settings = load_config(None, [f"output.dir={json.dumps(str(output))}"])
        check_page(settings, port)
        with _loading():
            from sgm_finetune.commands.serve import serve as serve_page

        serve_page(settings, [], _console(False, True), port)
        return
    from sgm_finetune.results.report.run_files import check_finished

    check_finished(output)
    with _loading("Matplotlib"):
        from sgm_finetune.results.report.page import remake_report

    path = remake_report(output)
    _print_saved(_console(as_json), path)
    if as_json:
        print(json.dumps({"report": str(path)}))


@app.command("compare", rich_help_panel="Use")
def compare_command(
    runs: Annotated[list[Path], typer.Argument(help="The output.dir of each run, two or more.", metavar="RUN1 RUN2")],
    html: Annotated[Path | None, typer.Option("--html", help="Write the comparison as a page, with curves.")] = None,
    as_json: AsJson = False,
) -> None:
    """Put runs side by side: quality, costs, different keys of their configurations, and which is better by how much.

    Example: sgm compare runs/merged runs/plain-lora --html comparison.html
    """
    if html is not None and html.exists():
        raise UserError(f"{html} exists; name another --html")
    from sgm_finetune.base.files import write_text
    from sgm_finetune.results.report.comparison import compare_runs
    from sgm_finetune.results.report.comparison_page import print_comparison, render_comparison
    from sgm_finetune.results.report.run_files import catch_bad_values

    console = _console(as_json, result=True)
    with catch_bad_values("One of these folders"):
        found = compare_runs(runs)
        print_comparison(found, console)
        page = render_comparison(found) if html is not None else ""
    if html is not None:
        write_text(html, page)
        _print_saved(console, html)
    if as_json:
        print(json.dumps(found.to_dict()))


@app.command("generate", rich_help_panel="Use")
def generate_command(
    overrides: Overrides = None,
    config: ConfigPath = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A text to answer. Repeatable.")] = None,
    input: Annotated[
        Path | None,
        typer.Option("--input", "-i", help="File of prompts: lines, or rows like the training data; -: stdin."),
    ] = None,
    compare: Compare = False,
    raw: Annotated[bool, typer.Option("--raw", help="Leave out the chat template.")] = False,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: SamplingSeed = 0,
    as_json: AsJson = False,
) -> None:
    """Answer texts with the result in output.dir: a text, a class with its probabilities, or tags.

    Example: sgm generate --prompt "A warm and clever film." output.dir=runs/first --compare
    """
    settings = _config_of_result(config, overrides)
    if not prompt and input is None and not sys.stdin.isatty():
        input = Path("-")
    from sgm_finetune.commands.requests import GenerateRequest
    from sgm_finetune.results.sampling import Sampling

    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    request = GenerateRequest(prompt or (), input, sampling, compare, raw)
    request.check(settings)
    with _loading():
        from sgm_finetune.commands.generate import generate

    rows = generate(settings, overrides or [], request, _console(as_json, True))
    if as_json:
        print(json.dumps({"rows": rows}))


@app.command("chat", rich_help_panel="Use")
def chat_command(
    overrides: Overrides = None,
    config: ConfigPath = None,
    compare: Compare = False,
    system: Annotated[str | None, typer.Option("--system", help="System message of the conversation.")] = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: SamplingSeed = 0,
    as_json: AsJson = False,
) -> None:
    """Talk with the result in output.dir; its answers appear as they are generated.

    Example: sgm chat output.dir=runs/chat --compare
    """
    settings = _config_of_result(config, overrides)
    from sgm_finetune.commands.requests import check_result

    check_result(settings)
    with _loading():
        from sgm_finetune.commands.chat import chat
        from sgm_finetune.results.sampling import Sampling

    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    turns = chat(settings, overrides or [], _console(as_json, True), sampling, compare, system)
    if as_json:
        print(json.dumps({"turns": turns}))


@app.command("export", rich_help_panel="Use")
def export_command(
    to: Annotated[
        Literal["adapter", "merged", "gguf"],
        typer.Option(
            help="adapter: for PEFT. merged: a whole model for Transformers and vLLM. gguf: for llama.cpp and Ollama.",
            show_default=False,
        ),
    ],
    overrides: Overrides = None,
    config: ConfigPath = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder; OUTPUT.DIR/export/FORMAT if not given.")
    ] = None,
    gguf_type: Annotated[
        Literal["f32", "f16", "bf16", "q8_0"] | None,
        typer.Option(help="gguf: type of the matrices; f16 if not given.", show_default=False),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            min=1, help="adapter: cut each update to its best approximation of this rank.", show_default=False
        ),
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Upload the checked export to this repository.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the result in output.dir in another format; load it again, and keep it only if it computes the same.

    Example: sgm export --to gguf --gguf-type q8_0 output.dir=runs/two-epochs
    """
    if gguf_type is not None and to != "gguf":
        raise UserError(f"--gguf-type {gguf_type} goes with --to gguf, not with --to {to}")
    if rank is not None and to != "adapter":
        raise UserError(f"--rank {rank} goes with --to adapter, not with --to {to}")
    settings = _config_of_result(config, overrides)
    from sgm_finetune.commands.requests import ExportRequest

    request = ExportRequest(to, output, gguf_type, push_to_hub, rank)
    request.check(settings)
    with _loading():
        from sgm_finetune.commands.export import export_result

    report = export_result(settings, overrides or [], request, _console(as_json))
    if as_json:
        print(json.dumps(report))


def _read_config(named: Path | None, overrides: list[str], as_json: bool) -> Config:
    """The configuration in the file that --config names, else in config.yaml, else the defaults; with `overrides`."""
    announce = _announce(as_json)
    if named is None and (named := _config_here()) is not None:
        announce(f"read from {named}")
    return load_config(named, overrides, announce)


def _config_of_result(config: Path | None, overrides: list[str] | None) -> Config:
    """The configuration that says where a result is: only its output.dir counts."""
    return load_config(config or _config_here(), overrides or [])


def _config_here() -> Path | None:
    """config.yaml, if this folder has one."""
    path = Path("config.yaml")
    return path if path.exists() else None


def _loading(what: str = "PyTorch and Transformers") -> AbstractContextManager[None]:
    """Says what the seconds before the first step are for."""
    from sgm_finetune.base.console import loading

    return loading(what, _OPTIONS["quiet"])


def _console(to_stderr: bool, result: bool = False) -> Any:
    """The console on which a command prints what it does, or its result, which --quiet lets through."""
    from sgm_finetune.base.console import PrintableConsole

    return PrintableConsole(stderr=to_stderr, quiet=_OPTIONS["quiet"] and not result)


def _announce(to_stderr: bool) -> Callable[[str], None]:
    """Prints what the command line replaces in the configuration; the first process does it for all of them."""
    from sgm_finetune.base.console import StepLog

    first = os.environ.get("RANK", "0") == "0"
    return lambda line: StepLog(_console(to_stderr)).line("config", line) if first else None


def _print_saved(console: Any, what: object) -> None:
    from sgm_finetune.base.console import StepLog

    StepLog(console).line("saved", str(what))


class _PrintableRecord(logging.LogRecord):
    """A message of a library, which may quote a file. The library's own colours are left out."""

    def getMessage(self) -> str:  # noqa: N802 - logging's name
        return printable(re.sub(r"\x1b\[[\d;]*m", "", super().getMessage()))


def _configure_libraries(verbose: bool) -> None:
    """Sets environment variables before torch is loaded, and silences other libraries unless `verbose`.

    Waiting threads spin briefly: on a shared machine, OpenMP threads that spin for milliseconds cost more than the
    work (docs/LOG.md, 2026-11-23). oneDNN keeps 64 compiled products instead of 1,024, a set for each length of a
    batch, and is as fast (2026-11-26).
    """
    logging.setLogRecordFactory(_PrintableRecord)
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if verbose:
        os.environ["TRANSFORMERS_VERBOSITY"] = "info"
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # no word about retries: base/hub.py says what failed
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
    warnings.simplefilter("ignore")
    for name in ("bitsandbytes", "torch.distributed", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)


def run(arguments: list[str] | None = None) -> None:
    """Runs `sgm` with `arguments` (None: those of the process). Raises what ends it early."""
    try:
        status = app(args=arguments, standalone_mode=False)
    except typer.TyperException as error:
        raise UserError(f"{error.format_message()} (sgm --help lists what there is)") from None
    except typer.Abort:
        raise KeyboardInterrupt from None
    if status == 128 + signal.SIGINT:  # typer makes a number of Ctrl-C, and returns it
        raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> None:
    """Runs `sgm` with `arguments` (None: those of the process) and exits with its status."""
    run_and_exit(lambda: run(arguments))
