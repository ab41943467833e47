"""The command `sgm`, and the doors src/finetune.py and src/evaluate.py: arguments in, results and exit status out.

Exit status: 0 done, 2 something a person can fix (one line on stderr), 1 our fault (traceback), 130 interrupted
(128 + its number by another signal).
Heavy libraries are imported inside the commands, so that help and wrong input answer at once.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from sgm_finetune.base.config import Config, Quantization, Task, load_config
from sgm_finetune.base.errors import UserError
from sgm_finetune.commands.exit_status import (
    Terminated,
    _fail,
    _is_out_of_memory,
    _out_of_memory,
    _peer_is_gone,
    _terminated_like_interrupted,
)

app = typer.Typer(
    add_completion=True,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Fine-tune transformers on machines a little too small: measure, merge, train, evaluate, save.",
)


ConfigPath = Annotated[Path, typer.Option("--config", "-c", help="YAML file; its keys are listed in config.yaml.")]


Overrides = Annotated[
    list[str] | None, typer.Argument(help="Keys to change, e.g. training.epochs=2 merge.side=none", metavar="key=value")
]


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout; all else goes to stderr.")]


Compare = Annotated[bool, typer.Option("--compare", help="The base model's answer, before the training, beside it.")]


MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")]


Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="0: always the likeliest token.")]


TopP = Annotated[
    float, typer.Option("--top-p", min=0.0, max=1.0, help="With a temperature: only the likeliest tokens.")
]


SamplingSeed = Annotated[int, typer.Option("--seed", min=0, help="With a temperature: of the choice of tokens.")]


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"sgm-finetune {version('sgm-finetune')}")
        raise typer.Exit


@app.callback()
def settle(
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Say nothing but errors; --json prints the result.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Let the libraries beneath say all that they say (as SGM_DEBUG=1).")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    _SETTLED.update(quiet=quiet)
    _settle_libraries(verbose or bool(os.environ.get("SGM_DEBUG")))


_SETTLED = {"quiet": False}
"""What stands before the command: sgm --quiet finetune."""


@app.command(rich_help_panel="Begin")
def init(
    path: Annotated[Path, typer.Argument(help="Where to write it.", metavar="[config.yaml]")] = Path("config.yaml"),
    model: Annotated[str | None, typer.Option("--model", help="Answers the first question.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="Answers the second.")] = None,
    task: Annotated[Task | None, typer.Option("--task", help="Answers the third.")] = None,
    quantization: Annotated[Quantization | None, typer.Option("--quantization", help="Answers the fourth.")] = None,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Ask nothing: default answers to what is not given.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Ask four questions and write a configuration that explains itself.

    Example: sgm init reviews.yaml --data reviews.csv
    """
    console = _console(False, result=True)
    if not yes and not sys.stdin.isatty() and None in (model, data, task, quantization):
        raise UserError("sgm init asks, and there is no terminal; give the four answers as options, or --yes")
    from sgm_finetune.commands import init as first_config

    first_config.begin(path, console, model, data, task, quantization, ask=not yes, overwrite=force)
    console.print(f"[bold]{'saved':<8}[/bold] {path}\n{first_config.next_steps(path)}", highlight=False, soft_wrap=True)


@app.command(rich_help_panel="Begin")
def doctor(as_json: AsJson = False) -> None:
    """What works on this machine (processor, GPU, memory, disk, 4 and 8 bits, extras, hub), tried; what to install.

    Example: sgm doctor --json
    """
    from sgm_finetune.commands import doctor as examination

    findings = examination.examine()
    if as_json:
        print(json.dumps(examination.to_dict(findings)))
    else:
        examination.report(findings, _console(False, result=True))
    if any(finding.verdict == "broken" for finding in findings):
        raise SystemExit(2)


@app.command(rich_help_panel="Look first")
def data(
    overrides: Overrides = None,
    config: ConfigPath = Path("config.yaml"),
    examples: Annotated[int, typer.Option("--examples", "-n", min=0, help="How many to show.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Show training examples as the model will see them (what the loss does not count is dimmed), and their lengths.

    Example: sgm data data.train=chats.jsonl model.task=causal-lm data.max_length=1024
    """
    settings = load_config(config, overrides or [])
    from sgm_finetune.commands.data import preview

    shown = preview(settings, _console(as_json, result=True), examples)
    if as_json:
        print(json.dumps(shown))


@app.command(rich_help_panel="Look first")
def scan(
    model: Annotated[
        str,
        typer.Argument(
            help="Hub id, local folder, .safetensors, .bin or .gguf file, an embedded demo model; or a result file."
        ),
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where to write the result.")] = None,
    estimator: Annotated[
        Literal["mp", "spectrum"] | None,
        typer.Option(help="mp: ours, the default. spectrum: the published script's.", show_default=False),
    ] = None,
    format: Annotated[
        Literal["json", "spectrum", "axolotl"] | None,
        typer.Option(help="What to write, or to print: json (the default of --output), or what those tools read."),
    ] = None,
    top_fraction: Annotated[
        float | None, typer.Option(help="axolotl: share of each kind to train, (0, 1].", show_default=False)
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Folder for pictures: layers x kinds, and histograms with the law of noise.")
    ] = None,
    matrix: Annotated[
        list[str] | None, typer.Option(help="--plot: histograms of these; a name, or a pattern: '*v_proj'. Repeatable.")
    ] = None,
    control: Annotated[
        bool, typer.Option("--control", help="Scan each matrix also with its entries shuffled: same values, no order.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Compute again what an earlier scan has left.")] = False,
    as_json: AsJson = False,
) -> None:
    """Signal-to-noise ratio of every weight matrix, by random matrix theory; two matrices in memory at a time.

    Interrupted, the same command goes on where it stopped.

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
    from sgm_finetune.commands import scan as scanning

    try:
        scanned = scanning.scan_to(
            model,
            _console(as_json or (output is None and format is not None), result=output is None),
            output=output,
            format=None if as_json else format,
            estimator=estimator,
            top_fraction=top_fraction,
            control=control,
            plot=plot,
            matrices=matrix or (),
            fresh=fresh,
        )
    except scanning.ScanInterrupted as stop:
        print(stop, file=sys.stderr)
        raise SystemExit(130) from None
    if as_json:
        print(json.dumps(scanned.to_dict(), allow_nan=False))


@app.command(rich_help_panel="Look first")
def estimate(
    config_file: Annotated[
        str | None, typer.Argument(help="YAML file, instead of --config; or a key=value.", metavar="[config.yaml]")
    ] = None,
    overrides: Overrides = None,
    config: ConfigPath = Path("config.yaml"),
    as_json: AsJson = False,
) -> None:
    """Memory, disk and time that a run will need, from its configuration and data; no weights are loaded.

    Example: sgm estimate configs/smollm2-chat.yaml training.batch_size=8 memory.budget=2GiB
    """
    given = [*([config_file] if config_file else []), *(overrides or [])]
    if given and "=" not in given[0]:
        config = Path(given.pop(0))
    settings = load_config(config, given)
    from sgm_finetune.commands import finetune as pipeline

    needed = pipeline.estimate_for(settings, _console(as_json, result=True))
    if as_json:
        print(json.dumps(needed.to_dict()))


@app.command(rich_help_panel="Look first")
def plan(
    overrides: Overrides = None,
    config: ConfigPath = Path("config.yaml"),
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the plan.")] = Path("plan.json"),
    as_json: AsJson = False,
) -> None:
    """Scan and probe, and write the plan: what is trained, what is shared, and why. Reuse it with plan=plan.json.

    Example: sgm plan merge.threshold=0.9 --output plans/strict.json
    """
    settings = load_config(config, overrides or [])
    if output.exists() and not settings.output.overwrite:
        raise UserError(f"{output} exists; name another --output, or replace it with output.overwrite=true")
    from sgm_finetune.commands import finetune as pipeline
    from sgm_finetune.measure.plan_file import plan_document, save_plan

    console = _console(as_json)
    made = pipeline.make_plan_for(settings, console)
    save_plan(made, output)
    console.print(f"[bold]{'saved':<8}[/bold] {output}", highlight=False)
    if as_json:
        print(json.dumps(plan_document(made)))


@app.command(rich_help_panel="Train")
def finetune(
    overrides: Overrides = None,
    config: ConfigPath = Path("config.yaml"),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Do everything up to the first step; write nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Scan, probe, plan, train, evaluate and save, as config.yaml says.

    Example: sgm finetune --config config.yaml training.epochs=2 output.dir=runs/two-epochs
    """
    settings = load_config(config, overrides or [])
    from sgm_finetune.commands import finetune as pipeline

    try:
        metrics = pipeline.finetune(settings, _console(as_json), dry_run)
    except pipeline.Interrupted as stop:
        print(stop, file=sys.stderr)
        raise SystemExit(130) from None
    if as_json:
        print(json.dumps(metrics))


@app.command(rich_help_panel="Train")
def evaluate(overrides: Overrides = None, config: ConfigPath = Path("config.yaml"), as_json: AsJson = False) -> None:
    """Metrics of output.dir/sgm_finetuned.pth on the test data, from that file and the base model alone.

    Example: sgm evaluate output.dir=runs/two-epochs
    """
    settings = _of_result(config, overrides)
    from sgm_finetune.commands import finetune as pipeline

    metrics = pipeline.evaluate(settings, overrides or [], _console(as_json))
    if as_json:
        print(json.dumps(metrics))


@app.command(rich_help_panel="Use")
def report(
    output: Annotated[Path, typer.Argument(help="The output.dir of a run.", metavar="[OUTPUT]")] = Path("output"),
    serve: Annotated[
        bool, typer.Option("--serve", help="Show it in a browser, with the model before and after to be tried.")
    ] = False,
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="--serve: on this machine's port.")] = 7860,
    as_json: AsJson = False,
) -> None:
    """Make report.html again from the other files of a run, also after its folder was moved.

    Example: sgm report runs/two-epochs --serve
    """
    if serve:
        if as_json:
            raise UserError("--serve shows a page, and --json prints an object; leave one of them out")
        from sgm_finetune.commands.serve import serve as serve_page

        serve_page(load_config(None, [f"output.dir={json.dumps(str(output))}"]), [], _console(False, True), port)
        return
    from sgm_finetune.results.report.page import remake_report

    path = remake_report(output)
    _console(as_json).print(f"[bold]{'saved':<8}[/bold] {path}", highlight=False, soft_wrap=True)
    if as_json:
        print(json.dumps({"report": str(path)}))


@app.command(rich_help_panel="Use")
def compare(
    runs: Annotated[list[Path], typer.Argument(help="The output.dir of each run, two or more.", metavar="RUN1 RUN2")],
    html: Annotated[Path | None, typer.Option("--html", help="Write the comparison as a page, with curves.")] = None,
    as_json: AsJson = False,
) -> None:
    """Put runs side by side: measures, costs, what was configured differently, and which is better by how much.

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
        console.print(f"[bold]{'saved':<8}[/bold] {html}", highlight=False, soft_wrap=True)
    if as_json:
        print(json.dumps(found.to_dict()))


@app.command(rich_help_panel="Use")
def generate(
    overrides: Overrides = None,
    config: ConfigPath = Path("config.yaml"),
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A text to answer. Repeatable.")] = None,
    input: Annotated[
        Path | None,
        typer.Option("--input", "-i", help="File of prompts: lines, or rows as the run was trained on; -: stdin."),
    ] = None,
    compare: Compare = False,
    raw: Annotated[bool, typer.Option("--raw", help="The prompt as it is, without the chat template.")] = False,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: SamplingSeed = 0,
    as_json: AsJson = False,
) -> None:
    """Answer texts with the result in output.dir: an answer, a class with its probabilities, or tags.

    Example: sgm generate --prompt "A warm and clever film." output.dir=runs/first --compare
    """
    settings = _of_result(config, overrides)
    if not prompt and input is None and not sys.stdin.isatty():
        input = Path("-")
    from sgm_finetune.commands.generate import generate as generate_with
    from sgm_finetune.results.answers import Sampling

    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    rows = generate_with(
        settings, overrides or [], prompt or (), input, _console(as_json, True), sampling, compare, raw
    )
    if as_json:
        print(json.dumps({"rows": rows}))


@app.command(rich_help_panel="Use")
def chat(
    overrides: Overrides = None,
    config: ConfigPath = Path("config.yaml"),
    compare: Compare = False,
    system: Annotated[str | None, typer.Option("--system", help="What the conversation begins with.")] = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: SamplingSeed = 0,
    as_json: AsJson = False,
) -> None:
    """Talk with the result in output.dir; its words appear as they are written.

    Example: sgm chat output.dir=runs/chat --compare
    """
    settings = _of_result(config, overrides)
    from sgm_finetune.commands.chat import chat as chat_with
    from sgm_finetune.results.answers import Sampling

    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    turns = chat_with(settings, overrides or [], _console(as_json, True), sampling, compare, system)
    if as_json:
        print(json.dumps({"turns": turns}))


@app.command(rich_help_panel="Use")
def export(
    to: Annotated[
        Literal["adapter", "merged", "gguf"],
        typer.Option(
            help="adapter: for PEFT. merged: a whole model for Transformers and vLLM. gguf: for llama.cpp and Ollama.",
            show_default=False,
        ),
    ],
    overrides: Overrides = None,
    config: ConfigPath = Path("config.yaml"),
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder; without it OUTPUT.DIR/export/FORMAT.")
    ] = None,
    gguf_type: Annotated[
        Literal["f32", "f16", "bf16", "q8_0"] | None,
        typer.Option(help="gguf: type of the matrices; f16 where none is given.", show_default=False),
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Upload it, once checked, into this repository.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Bring the result in output.dir to formats that others load; each is loaded again and compared before it is kept.

    Example: sgm export --to gguf --gguf-type q8_0 output.dir=runs/two-epochs
    """
    if gguf_type is not None and to != "gguf":
        raise UserError(f"--gguf-type {gguf_type} goes with --to gguf, not with --to {to}")
    settings = _of_result(config, overrides)
    from sgm_finetune.commands.export import ExportRequest, export_result

    report = export_result(
        settings, overrides or [], ExportRequest(to, output, gguf_type, push_to_hub), _console(as_json)
    )
    if as_json:
        print(json.dumps(report))


def _of_result(config: Path, overrides: list[str] | None) -> Config:
    """Where a result is: of the file only output.dir counts, so that no config.yaml need be there."""
    given = config if config.exists() or config != Path("config.yaml") else None
    return load_config(given, overrides or [])


def _console(to_stderr: bool, result: bool = False) -> Any:
    """Where a command says what it does, or prints its result, which --quiet lets through."""
    from rich.console import Console

    return Console(stderr=to_stderr, quiet=_SETTLED["quiet"] and not result)


def _settle_libraries(verbose: bool) -> None:
    """Before torch is loaded: waiting threads spin briefly, few compiled products are kept, and other libraries keep
    quiet unless they are asked for.

    On a shared machine OpenMP threads that spin for milliseconds cost more than the work (docs/LOG.md, 2026-11-23).
    oneDNN would keep 1,024 compiled products, a set for each length of a batch, and is no faster for it (2026-11-26).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if verbose:
        os.environ["TRANSFORMERS_VERBOSITY"] = "info"
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
    warnings.simplefilter("ignore")
    for name in ("bitsandbytes", "torch.distributed", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)


def main(arguments: list[str] | None = None) -> None:
    """Runs `sgm` with `arguments` (None: the process's own) and exits with its status."""
    try:
        with _terminated_like_interrupted():
            app(args=arguments, standalone_mode=False)
    except UserError as error:
        _fail(str(error), 2)
    except typer.TyperException as error:
        _fail(f"{error.format_message()} (sgm --help lists what there is)", 2)
    except Terminated as error:
        _fail(f"Ended by {error.signal.name}", 128 + error.signal)
    except (KeyboardInterrupt, typer.Abort):
        _fail("Interrupted", 130)
    except BrokenPipeError:
        os._exit(1)
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):
            raise
        _fail(f"{str(error.filename)[:60]}... is no path: {error.strerror}", 2)
    except MemoryError as error:
        _fail(_out_of_memory(error), 2)
    except RuntimeError as error:
        if _is_out_of_memory(error):
            _fail(_out_of_memory(error), 2)
        if not _peer_is_gone(error):
            raise
        line = (
            f"process {os.environ['RANK']}: another process of this run has ended (if it said nothing, the system may "
            "have ended it for want of memory); continue from the last checkpoint with training.resume=true\n"
        )
        os.write(2, line.encode())  # in one piece, beside those of the other processes
        os._exit(2)  # nothing is left to be taken down together
    sys.exit(0)
