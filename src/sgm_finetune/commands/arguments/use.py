"""The arguments of the commands that use results: `sgm report`, `compare`, `generate`, `chat`, `serve` and `export`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from sgm_finetune.base.config_file import load_config
from sgm_finetune.base.errors import UserError
from sgm_finetune.commands.arguments.options import AsJson, ConfigPath, Overrides, config_of_result
from sgm_finetune.commands.arguments.output import console_for, loading, print_saved

Compare = Annotated[bool, typer.Option("--compare", help="Show the base model's answer beside it.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Most tokens of an answer.")]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token always.")]
TopP = Annotated[
    float,
    typer.Option("--top-p", min=0.0, max=1.0, help="With a temperature: sample from this share of the probability."),
]
SamplingSeed = Annotated[int, typer.Option("--seed", min=0, help="With a temperature: seed of the sampling.")]


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
        with loading():
            from sgm_finetune.commands.page import serve_page

        serve_page(settings, [], console_for(False, True), port)
        return
    from sgm_finetune.results.report.run_files import check_finished

    check_finished(output)
    with loading("Matplotlib"):
        from sgm_finetune.results.report.page import remake_report

    path = remake_report(output)
    print_saved(console_for(as_json), path)
    if as_json:
        print(json.dumps({"report": str(path)}))


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

    console = console_for(as_json, result=True)
    with catch_bad_values("One of these folders"):
        found = compare_runs(runs)
        print_comparison(found, console)
        page = render_comparison(found) if html is not None else ""
    if html is not None:
        write_text(html, page)
        print_saved(console, html)
    if as_json:
        print(json.dumps(found.to_dict()))


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
    """Answer texts with the result in output.dir: a text, a class with its probabilities, tags, or a score.

    Example: sgm generate --prompt "A warm and clever film." output.dir=runs/first --compare
    """
    settings = config_of_result(config, overrides)
    if not prompt and input is None and not sys.stdin.isatty():
        input = Path("-")
    from sgm_finetune.commands.requests import GenerateRequest
    from sgm_finetune.results.sampling import Sampling

    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    request = GenerateRequest(prompt or (), input, sampling, compare, raw)
    request.check(settings)
    with loading():
        from sgm_finetune.commands.generate import generate

    rows = generate(settings, overrides or [], request, console_for(as_json, True))
    if as_json:
        print(json.dumps({"rows": rows}))


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
    settings = config_of_result(config, overrides)
    from sgm_finetune.commands.requests import check_result

    check_result(settings)
    with loading():
        from sgm_finetune.commands.chat import chat
        from sgm_finetune.results.sampling import Sampling

    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    turns = chat(settings, overrides or [], console_for(as_json, True), sampling, compare, system)
    if as_json:
        print(json.dumps({"turns": turns}))


def serve_command(
    overrides: Overrides = None,
    config: ConfigPath = None,
    host: Annotated[
        str, typer.Option("--host", help="Address to serve at; 0.0.0.0 lets other machines in, with a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to serve at.")] = 8000,
    token: Annotated[
        str | None,
        typer.Option("--token", envvar="SGM_TOKEN", help="The API key that clients must send.", show_default=False),
    ] = None,
) -> None:
    """Serve the result in output.dir to clients of OpenAI's API; the models are called before and after.

    Example: sgm serve output.dir=runs/chat --port 8001
    """
    settings = config_of_result(config, overrides)
    from sgm_finetune.commands.requests import ServeRequest

    request = ServeRequest(host, port, token or None)
    request.check(settings)
    with loading():
        from sgm_finetune.commands.serve import serve

    serve(settings, overrides or [], request, console_for(False, True))


def export_command(
    to: Annotated[
        Literal["adapter", "merged", "bnb-4bit", "compressed-tensors", "gguf", "gguf-adapter"],
        typer.Option(
            metavar="FORMAT",
            help="adapter: for PEFT. merged: a whole model for Transformers and vLLM. bnb-4bit: the same in "
            "bitsandbytes' 4 bits. compressed-tensors: in 4 bits for vLLM, calibrated on the training data. "
            "gguf: for llama.cpp and Ollama. "
            "gguf-adapter: for llama.cpp's --lora.",
            show_default=False,
        ),
    ],
    overrides: Overrides = None,
    config: ConfigPath = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder; OUTPUT.DIR/export/FORMAT if not given.")
    ] = None,
    gguf_type: Annotated[
        Literal["f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m"] | None,
        typer.Option(
            metavar="TYPE",
            help="gguf: type of the matrices: f32, f16 (if not given), bf16, q8_0, q6_k, q5_k_m or q4_k_m. "
            "gguf-adapter: f32 (if not given) or f16.",
            show_default=False,
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="adapter, gguf-adapter: cut each update to its best approximation of this rank.",
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        Literal["original", "trained"] | None,
        typer.Option(
            help="All but adapters, of a base trained in nf4 or int8: add to its original weights, or to those that "
            "training computed with. Not given: what predicts the validation data better.",
            show_default=False,
        ),
    ] = None,
    add: Annotated[
        list[Path] | None,
        typer.Option("--add", help="Combine with this run's or PEFT folder's adapter of the same base. Repeatable."),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="--add: weights of output.dir's adapter and of each other one: 0.7,0.3.", show_default=False),
    ] = None,
    method: Annotated[
        Literal[
            "cat",
            "linear",
            "svd",
            "ties",
            "ties_svd",
            "dare_linear",
            "dare_linear_svd",
            "dare_ties",
            "dare_ties_svd",
            "magnitude_prune",
            "magnitude_prune_svd",
        ]
        | None,
        typer.Option(
            metavar="METHOD",
            help="--add: PEFT's name of the way: cat (if not given), linear, svd, ties, dare_linear, dare_ties, "
            "magnitude_prune; or one of the last four with _svd.",
            show_default=False,
        ),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(help="--add: share of the numbers that ties, dare and magnitude_prune keep.", show_default=False),
    ] = None,
    calibration: Annotated[
        int | None,
        typer.Option(
            min=1, help="compressed-tensors: training examples to calibrate on (128 if not given).", show_default=False
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
    given = {"--weights": weights, "--method": method, "--density": density}
    if not add and (option := next((name for name, value in given.items() if value is not None), None)):
        raise UserError(f"{option} goes with --add, which names another adapter")
    if add and weights is None:
        raise UserError("--add needs --weights, one for output.dir's adapter and one for each --add: --weights 0.7,0.3")
    settings = config_of_result(config, overrides)
    from sgm_finetune.commands.requests import ExportRequest
    from sgm_finetune.results.export.combination import Combination, parse_weights

    combination = Combination(tuple(add), parse_weights(weights), method or "cat", density) if add and weights else None
    request = ExportRequest(to, output, gguf_type, push_to_hub, rank, base, combination, calibration)
    request.check(settings)
    with loading():
        from sgm_finetune.commands.export import export_result

    report = export_result(settings, overrides or [], request, console_for(as_json))
    if as_json:
        print(json.dumps(report))
