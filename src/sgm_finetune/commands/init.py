"""`sgm init`: four questions, and a configuration that explains itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.markup import escape
from rich.prompt import Prompt

from sgm_finetune.base.config import Config, Quantization, Role, Task, parse_config
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.files import write_json, write_text
from sgm_finetune.base.memory import memory_within_reach
from sgm_finetune.base.reference import commented_yaml, json_schema
from sgm_finetune.base.text import gib
from sgm_finetune.data.columns import LAYOUTS, choose_layout
from sgm_finetune.data.embedded import EMBEDDED as EMBEDDED_DATA
from sgm_finetune.data.sources import peek
from sgm_finetune.data.tables import Table
from sgm_finetune.model.architecture import fitting_tasks
from sgm_finetune.model.folder import EMBEDDED as EMBEDDED_MODELS
from sgm_finetune.model.folder import cache_dir

SAID = (
    "model.name", "model.task", "model.quantization", "data.name", "data.train", "data.columns", "data.max_length",
    "adapter.rank", "training.epochs", "training.batch_size", "training.learning_rate", "training.seed", "output.dir",
)  # fmt: skip
"""Keys that the file shows even where they have their defaults: what people change first."""


def begin(
    path: Path,
    console: Console,
    model: str | None = None,
    data: str | None = None,
    task: Task | None = None,
    quantization: Quantization | None = None,
    ask: bool = True,
    overwrite: bool = False,
) -> Config:
    """Asks for what is not given (ask=False: takes the default answer), and writes `path`. Raises UserError for a file
    that is there already, for data that cannot be read, and where columns have to be named and nobody can be asked."""
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; name another file, or replace it with --force")

    def answer(given: Any, question: str, default: str, choices: Sequence[str] = ()) -> str:
        if given is not None or not ask:
            return str(given if given is not None else default)
        return Prompt.ask(escape(question), console=console, default=default, choices=list(choices) or None).strip()

    model = answer(
        model, f"1/4 Model: a hub id, a folder, or {', '.join(EMBEDDED_MODELS)}", next(iter(EMBEDDED_MODELS))
    )
    data = answer(data, f"2/4 Data: a file, a hub id, or {', '.join(EMBEDDED_DATA)}", next(iter(EMBEDDED_DATA)))
    chosen: dict[str, Any] = {"train": data} if _is_file(data) else {"name": data}
    table = _seen(chosen, console)
    possible = fitting_tasks(model)
    guess, proposal = guessed(table, possible) if table is not None else (possible[0], {})
    task = answer(task, "3/4 Task", guess, get_args(Task))  # type: ignore[assignment]
    size = _stored_bytes(model)
    roomy = size is None or 4 * size < memory_within_reach()
    told = f" ({gib(size)} of weights, {gib(memory_within_reach())} within reach)" if size else ""
    question = f"4/4 Hold the frozen base in: none (as it is), nf4 (4 bits), int8{told}"
    quantization = answer(quantization, question, "none" if roomy else "nf4", get_args(Quantization))  # type: ignore[assignment]
    if table is not None:
        chosen |= _columns(table, task, proposal if task == guess else {}, console, ask)  # type: ignore[arg-type]
    values = {"model": {"name": model, "task": task, "quantization": quantization}, "data": chosen}
    config = parse_config(values, "sgm init")
    said = [key for key in SAID if key.partition(".")[2] in (*chosen, "max_length") or not key.startswith("data.")]
    schema = cache_dir() / "config.schema.json"  # of the installed version
    write_json(schema, json_schema())
    write_text(path, commented_yaml(config, said, schema=str(schema)))
    return config


def next_steps(path: Path) -> str:
    """What to do with the file, as lines."""
    given = "" if str(path) == "config.yaml" else f" --config {path}"
    steps = (
        (f"sgm data{given}", "what the model will read, and what of it is learnt"),
        (f"sgm estimate{given}", "memory, disk and time"),
        (f"sgm finetune{given}", "train, evaluate before and after, save"),
    )
    width = max(len(command) for command, _ in steps)
    return "\n".join(f"  {command:<{width}}   {what}" for command, what in steps)


def guessed(table: Table, possible: Sequence[Task] = get_args(Task)) -> tuple[Task, dict[Role, str]]:
    """The first task, of those that the model fits, whose columns the data has; else classification by a column of few
    values, of the column with the longest texts, and which columns these are."""
    order: tuple[Task, ...] = ("token-classification", "sequence-classification", "seq2seq-lm", "causal-lm")
    for task in order:
        if task in possible and _layout_fits(table, task):
            return task, {}
    texts = {name: mean for name, values in table.columns.items() if (mean := _mean_length(values[:])) is not None}
    if "sequence-classification" in possible and texts:
        text = max(texts, key=texts.__getitem__)
        few = {name: len({str(value) for value in values[:]}) for name, values in table.columns.items() if name != text}
        if few and (label := min(few, key=few.__getitem__)) and few[label] <= max(2, len(table.columns[text]) // 2):
            return "sequence-classification", {"text": text, "label": label}
    return possible[0], {}


def _mean_length(values: Sequence[Any]) -> float | None:
    """Characters of a value; None where one is no text."""
    if not values or not all(isinstance(value, str) for value in values):
        return None
    return sum(map(len, values)) / len(values)


def _layout_fits(table: Table, task: Task) -> bool:
    try:
        layout = choose_layout(table, {}, task)
    except UserError:
        return False
    return all(layout.column(role, {}) in table.columns for role in layout.roles)


def _columns(
    table: Table, task: Task, proposal: dict[Role, str], console: Console, ask: bool
) -> dict[str, dict[Role, str]]:
    """{"columns": ...} for roles that have to be told: asked, role by role, or as proposed, which is said."""
    if _layout_fits(table, task):
        return {}
    names = list(table.columns)
    if not ask and not proposal:
        needed = " or ".join(", ".join(layout.roles) for layout in LAYOUTS[task])
        raise UserError(
            f"{table.name} has the columns {', '.join(names)}, and model.task={task} needs {needed}; answer sgm init's "
            "questions, or name them in the file with data.columns"
        )
    console.print(f"{table.name} has the columns {', '.join(names)}.", markup=False, highlight=False)
    if not ask:
        told = ", ".join(f"{column} is the {role}" for role, column in proposal.items())
        console.print(f"Taken: {told} (data.columns)", markup=False, highlight=False)
        return {"columns": proposal}
    wanted = "completion" if task == "causal-lm" and len(names) > 1 else LAYOUTS[task][-1].name
    layout = next(layout for layout in LAYOUTS[task] if layout.name == wanted)
    chosen: dict[Role, str] = {}
    for role in layout.roles:
        free = [name for name in names if name not in chosen.values()]
        if not free:
            raise UserError(f"{table.name} has no column left for {role}; model.task={task} needs {len(layout.roles)}")
        default = proposal.get(role) if proposal.get(role) in free else free[0]
        chosen[role] = Prompt.ask(f"    Which is the {role}?", console=console, choices=free, default=str(default))
    return {"columns": chosen}


def _is_file(data: str) -> bool:
    """Raises UserError for what looks like a file and is none."""
    path = Path(data)
    if path.is_file():
        return True
    if data not in EMBEDDED_DATA and not path.is_dir() and (path.suffix or path.is_absolute()):
        raise UserError(
            f"No data file {data}; give a file that is there, a hub id, or one of {', '.join(EMBEDDED_DATA)}"
        )
    return False


def _seen(chosen: dict[str, Any], console: Console) -> Table | None:
    """The data's first rows; None for the hub's, which is not asked for that."""
    if "name" in chosen and chosen["name"] not in EMBEDDED_DATA and not Path(chosen["name"]).is_dir():
        return None
    try:
        return peek(parse_config({"data": chosen}, "sgm init").data)
    except UserError as error:
        if "name" in chosen and chosen["name"] in EMBEDDED_DATA:  # its package may be installed later
            console.print(str(error), style="yellow", markup=False, highlight=False, soft_wrap=True)
            return None
        raise


def _stored_bytes(model: str) -> int | None:
    """Of the weights' files of a folder; None for a model that is not here."""
    folder = Path(model).expanduser()
    sizes = [path.stat().st_size for ending in ("safetensors", "bin") for path in folder.glob(f"*.{ending}")]
    return sum(sizes) or None
