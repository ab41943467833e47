"""`sgm init`: asks four questions and writes a configuration that explains itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

from rich.console import Console
from rich.markup import escape
from rich.prompt import Prompt

from sgm_finetune.base.config import Config, Quantization, Role, Task
from sgm_finetune.base.config_file import parse_config
from sgm_finetune.base.console import loading, print_line
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.files import write_json, write_text
from sgm_finetune.base.reference import commented_yaml, json_schema
from sgm_finetune.base.text import gib
from sgm_finetune.data.columns import LAYOUTS, choose_layout
from sgm_finetune.data.embedded import EMBEDDED as EMBEDDED_DATA
from sgm_finetune.data.hints import columns_by_content
from sgm_finetune.data.sources import check_settings, peek
from sgm_finetune.data.tables import Table
from sgm_finetune.model.folder import EMBEDDED as EMBEDDED_MODELS
from sgm_finetune.model.folder import cache_dir, check_name

T = TypeVar("T")

ALWAYS_SHOWN = (
    "model.name", "model.task", "model.quantization", "data.name", "data.train", "data.columns", "data.max_length",
    "adapter.rank", "training.epochs", "training.batch_size", "training.learning_rate", "training.seed", "output.dir",
)  # fmt: skip
"""Keys that people change first. The file shows them even when they have their defaults."""


@dataclass(frozen=True)
class Answers:
    """The answers to the four questions that are already given; None for a question that is still open."""

    model: str | None = None
    data: str | None = None
    task: Task | None = None
    quantization: Quantization | None = None


def write_first_config(
    path: Path, console: Console, given: Answers = Answers(), ask: bool = True, overwrite: bool = False
) -> Config:
    """Asks the open questions, writes the configuration to `path` and returns it.

    A question whose answer cannot be used is asked again, and earlier answers stay. With ask=False, every open question
    takes its default answer. Raises UserError when `path` exists and `overwrite` is false, for a given answer that
    cannot be used, and when columns need names but ask=False forbids the question.
    """
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; name another file, or replace it with --force")
    interview = Interview(console, ask)
    model, possible = interview.settle(
        f"1/4 Model: a hub id, a folder, or {', '.join(EMBEDDED_MODELS)}",
        next(iter(EMBEDDED_MODELS)),
        _possible_tasks,
        given.model,
    )
    _, (data_keys, table) = interview.settle(
        f"2/4 Data: a file, a hub id, or {', '.join(EMBEDDED_DATA)}",
        next(iter(EMBEDDED_DATA)),
        lambda answer: _open_data(answer, console),
        given.data,
    )
    guess, proposal = guess_task(table, possible) if table is not None else (possible[0], {})

    def columns(task: str) -> dict[str, dict[Role, str]]:
        return _columns(table, task, proposal if task == guess else {}, console, ask) if table is not None else {}  # type: ignore[arg-type]

    task, chosen = interview.settle("3/4 Task", guess, columns, given.task, get_args(Task))
    quantization = given.quantization
    if quantization is None:
        quantization, _ = interview.settle(*_quantization_question(model), str, None, get_args(Quantization))
    values = {
        "model": {"name": model, "task": task, "quantization": quantization},
        "data": data_keys | chosen,
    }
    config = parse_config(values, "sgm init")
    shown_data = {f"data.{key}" for key in (*values["data"], "max_length")}
    shown = [key for key in ALWAYS_SHOWN if key in shown_data or not key.startswith("data.")]
    write_text(path, commented_yaml(config, shown, schema=write_schema()))
    return config


def write_schema() -> str | None:
    """The path of the installed version's JSON Schema, with which editors complete keys; None where the cache cannot be
    written: the configuration needs no schema."""
    path = cache_dir() / "config.schema.json"
    try:
        write_json(path, json_schema())
    except UserError:
        return None
    return str(path)


@dataclass(frozen=True)
class Interview:
    """Asks questions on a console."""

    console: Console
    asks: bool
    """Whether a person answers; else every question takes its default answer."""

    def settle(
        self,
        question: str,
        default: str,
        use: Callable[[str], T],
        given: str | None = None,
        choices: Sequence[str] = (),
    ) -> tuple[str, T]:
        """The answer, and what `use` makes of it. While `use` raises UserError, prints it and asks again.

        An answer that was `given`, or that nobody was asked for, is not asked for again: the UserError passes.
        """
        if given is not None or not self.asks:
            answer = default if given is None else given
            return answer, use(answer)
        while True:
            prompt, allowed = escape(question), list(choices) or None
            answer = Prompt.ask(prompt, console=self.console, default=default, choices=allowed).strip()
            try:
                return answer, use(answer)
            except UserError as error:
                self.console.print(str(error), style="yellow", markup=False, highlight=False, soft_wrap=True)


def _possible_tasks(model: str) -> Sequence[Task]:
    """The tasks that the model can do. Raises UserError when there is no such model; asks no hub."""
    check_name(model)
    if not Path(model).expanduser().is_dir():
        return get_args(Task)
    with loading("Transformers"):
        from sgm_finetune.model.architecture import fitting_tasks

    return fitting_tasks(model)


def _open_data(data: str, console: Console) -> tuple[dict[str, Any], Table | None]:
    """The keys of the configuration for the data, and its first rows. Raises UserError when it cannot be read."""
    keys = {"train": data} if _is_file(data) else {"name": data}
    return keys, _first_rows(keys, console)


def next_steps(path: Path) -> str:
    """The commands to run next with the configuration in `path`, one a line."""
    option = "" if str(path) == "config.yaml" else f" --config {path}"
    steps = (
        (f"sgm data{option}", "show what the model will read and what it will learn"),
        (f"sgm estimate{option}", "predict memory, disk and time"),
        (f"sgm finetune{option}", "train, evaluate before and after, save"),
    )
    width = max(len(command) for command, _ in steps)
    return "\n".join(f"  {command:<{width}}   {purpose}" for command, purpose in steps)


def guess_task(table: Table, possible: Sequence[Task] = get_args(Task)) -> tuple[Task, dict[Role, str]]:
    """A task for the data, of those that the model can do, and `data.columns` for it ({}: the names fit already).

    The first task whose columns the data has wins. Otherwise it is classification when some column has few values:
    that column is the label, and the column with the longest texts on average is the text.
    """
    order: tuple[Task, ...] = ("token-classification", "sequence-classification", "seq2seq-lm", "causal-lm")
    if "preference" in possible and {"chosen", "rejected"} <= set(table.columns):
        return "preference", {}
    for task in order:
        if task in possible and _layout_fits(table, task):
            return task, {}
    if "sequence-classification" in possible and (found := columns_by_content(table)):
        return "sequence-classification", found
    return possible[0], {}


def _layout_fits(table: Table, task: Task) -> bool:
    try:
        layout = choose_layout(table, {}, task)
    except UserError:
        return False
    return all(layout.column(role, {}) in table.columns for role in layout.roles)


def _quantization_question(model: str) -> tuple[str, str]:
    """The fourth question and its default: nf4 for a model of a quarter of the memory or more, else none."""
    question = "4/4 Quantise the frozen base: none (as stored), nf4 (4 bits), int8"
    size = _stored_bytes(model)
    if size is None:
        return question, "none"
    with loading("PyTorch"):  # the memory of the GPU, if there is one
        from sgm_finetune.base.memory import memory_within_reach
    memory = memory_within_reach()
    return f"{question} ({gib(size)} of weights, {gib(memory)} of memory)", "none" if 4 * size < memory else "nf4"


def _columns(
    table: Table, task: Task, proposal: dict[Role, str], console: Console, ask: bool
) -> dict[str, dict[Role, str]]:
    """{"columns": role -> column}, or {} when the task finds its columns by their names.

    Asks for the column of each role; with ask=False, takes the proposal and prints it.
    """
    if _layout_fits(table, task):
        return {}
    names = list(table.columns)
    if not ask and not proposal:
        needed = " or ".join(", ".join(layout.roles) for layout in LAYOUTS[task])
        raise UserError(
            f"{table.name} has the columns {', '.join(names)}, but model.task={task} needs {needed}; run sgm init "
            "without --yes, or name the columns in the file with data.columns"
        )
    console.print(f"{table.name} has the columns {', '.join(names)}.", markup=False, highlight=False)
    if not ask:
        guessed = ", ".join(f"{column} is the {role}" for role, column in proposal.items())
        console.print(f"Guessed: {guessed} (change it with data.columns)", markup=False, highlight=False)
        return {"columns": proposal}
    wanted = "completion" if task == "causal-lm" and len(names) > 1 else LAYOUTS[task][-1].name
    layout = next(layout for layout in LAYOUTS[task] if layout.name == wanted)
    chosen: dict[Role, str] = {}
    for role in layout.roles:
        free = [name for name in names if name not in chosen.values()]
        if not free:
            raise UserError(
                f"{table.name} has no column left for {role}; model.task={task} needs {len(layout.roles)} columns"
            )
        default = proposal.get(role) if proposal.get(role) in free else free[0]
        chosen[role] = Prompt.ask(f"    Which is the {role}?", console=console, choices=free, default=str(default))
    return {"columns": chosen}


def _is_file(data: str) -> bool:
    """Whether `data` is a file. Raises UserError when it looks like one that does not exist."""
    path = Path(data)
    if path.is_file():
        return True
    if data not in EMBEDDED_DATA and not path.is_dir() and (path.suffix or path.is_absolute()):
        raise UserError(f"No data file {data}; give an existing file, a hub id, or one of {', '.join(EMBEDDED_DATA)}")
    return False


def _first_rows(data_keys: dict[str, Any], console: Console) -> Table | None:
    """The first rows of the data; None for hub data, which `sgm init` does not download."""
    name = data_keys.get("name")
    config = parse_config({"data": data_keys}, "sgm init").data
    check_settings(config)
    if name is not None and name not in EMBEDDED_DATA and not Path(name).is_dir():
        return None
    try:
        with loading("the data"):
            return peek(config)
    except UserError as error:
        if name not in EMBEDDED_DATA:
            raise
        # the package with this data may be installed later
        print_line(console, str(error), style="yellow")
        return None


def _stored_bytes(model: str) -> int | None:
    """Bytes of the weight files in the folder `model`; None for a model that is not in a local folder."""
    folder = Path(model).expanduser()
    sizes = [path.stat().st_size for ending in ("safetensors", "bin") for path in folder.glob(f"*.{ending}")]
    return sum(sizes) or None
