"""What a command was asked for, and the mistakes in it that show before PyTorch is loaded.

`commands/arguments/` calls these checks first, so that a mistake costs no seconds. The commands call the same functions
again, for callers from Python and because a file may have changed.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sgm_finetune.base.config import Config
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.install import install_line
from sgm_finetune.base.search_space import SearchSpace
from sgm_finetune.base.text import first_line
from sgm_finetune.data.splits import check_data
from sgm_finetune.data.tables import type_of
from sgm_finetune.measure.plan_file import read_plan
from sgm_finetune.method.decibels import Estimator
from sgm_finetune.model.folder import check_name, refuse_adapter
from sgm_finetune.results.claim import as_it_began, claim_output
from sgm_finetune.results.export.combination import Combination
from sgm_finetune.results.export.hub import check_push
from sgm_finetune.results.export.target import (
    ADAPTER_TYPES,
    ADAPTERS,
    BaseWeights,
    ExportFormat,
    GgufType,
    check_folder,
    check_packages,
)
from sgm_finetune.results.files import find_earlier, find_result
from sgm_finetune.results.report.run_files import check_finished
from sgm_finetune.results.sampling import Sampling
from sgm_finetune.results.sweep_folder import open_folder

ScanFormat = Literal["json", "spectrum", "axolotl"]
HOST = "127.0.0.1"
"""Address at which `sgm report --serve`, and `sgm serve` unless told otherwise, serve: this machine only."""


def check_run(config: Config) -> None:
    """Raises UserError for a training run whose output folder, plan, data or model cannot be used."""
    output = Path(config.output.dir)
    if config.training.resume:
        config = as_it_began(config, output)
    resumes = claim_output(config, output) is not None
    check_inputs(config, with_plan=not resumes)  # a run that is resumed keeps its plan


def check_inputs(config: Config, with_plan: bool = False) -> None:
    """Raises UserError when the data, the model or the plan that `config` names is missing or does not fit."""
    if with_plan and config.plan is not None:
        read_plan(config.plan)
    if with_plan and config.adapter.from_run is not None:
        find_earlier(Path(config.adapter.from_run))
    check_data(config.data, config.model.task)
    check_name(config.model.name)


def check_result(config: Config) -> None:
    """Raises UserError when output.dir holds no result."""
    find_result(Path(config.output.dir))


def check_page(config: Config, port: int) -> None:
    """Raises UserError when the page cannot be served: Gradio is missing, the port is taken, or there is no result."""
    if importlib.util.find_spec("gradio") is None:
        raise UserError(f"--serve needs Gradio; {install_line('browser')}")
    _check_free(HOST, port)
    check_result(config)


def _check_free(host: str, port: int) -> None:
    """Raises UserError if `host` is no address of this machine, or the port is taken or not allowed."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host {host} is not known here ({first_line(error)}); name another --host") from None
    with socket.socket(family, kind) as probe:
        if os.name == "posix":  # on Windows it allows a port that is taken
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise UserError(f"--host {host} is no address of this machine; name another --host") from None
            raise UserError(f"--port {port} cannot be used ({error.strerror}); name another --port") from None


@dataclass(frozen=True)
class ServeRequest:
    """What `sgm serve` was asked for."""

    host: str = HOST
    port: int = 8000
    token: str | None = None
    """What a client must send; None: nothing."""

    def check(self, config: Config) -> None:
        """Raises UserError when a package is missing, strangers could come in, the address cannot be used, or there is
        no result."""
        if any(importlib.util.find_spec(name) is None for name in ("starlette", "uvicorn")):
            raise UserError(f"sgm serve needs Starlette and uvicorn; {install_line('serve')}")
        if self.token is None and self.host != HOST:
            raise UserError(
                f"--host {self.host} may let other machines in, which needs a token; set SGM_TOKEN, or leave --host out"
            )
        if self.token is not None and not (self.token.isascii() and self.token.isprintable() and " " not in self.token):
            raise UserError("The token has characters that a header cannot hold; take ASCII letters and digits")
        _check_free(self.host, self.port)
        check_result(config)


@dataclass(frozen=True)
class ScanRequest:
    """The arguments of `sgm scan`."""

    model: str
    """A model, or a file with the results of a scan."""
    output: Path | None = None
    """File to write."""
    format: ScanFormat | None = None
    """None: the JSON format for `output`; without `output` no result is printed."""
    estimator: Estimator | None = None
    """None: "mp", or the one that made the file of results."""
    top_fraction: float | None = None
    """Fraction of each kind of matrix to choose, in (0, 1]; the format "axolotl" needs it."""
    control: bool = False
    """Also scan each matrix with its entries shuffled."""
    plot: Path | None = None
    """New or empty folder for pictures: the heat map and histograms."""
    matrices: tuple[str, ...] = ()
    """Names of matrices, or patterns with * and ?, whose histograms are drawn; (): one matrix of each kind."""
    fresh: bool = False
    """Compute again what the cache has."""

    @property
    def is_result_file(self) -> bool:
        """Whether `model` is a file with the results of a scan."""
        path = Path(self.model)
        return path.suffix == ".json" and path.expanduser().is_file()

    def check(self) -> None:
        """Raises UserError for what is wrong before anything is read."""
        if self.output is not None and self.output.exists():
            raise UserError(f"{self.output} exists; name another --output")
        if self.plot is not None and self.plot.exists() and not (self.plot.is_dir() and not any(self.plot.iterdir())):
            raise UserError(f"{self.plot} is not an empty folder; name another --plot")
        if self.is_result_file and (self.control or self.matrices or self.fresh):
            options = {"--control": self.control, "--matrix": self.matrices, "--fresh": self.fresh}
            option = next(name for name, given in options.items() if given)
            raise UserError(
                f"{self.model} holds results of a scan, and {option} needs the weights; give the model itself"
            )
        if (path := Path(self.model).expanduser()).is_dir():
            refuse_adapter(path)
        elif not path.exists():
            check_name(self.model)


@dataclass(frozen=True)
class GenerateRequest:
    """What `sgm generate` was asked for."""

    texts: Sequence[str] = ()
    file: Path | None = None
    """A file of prompts; "-" is standard input."""
    sampling: Sampling = field(default_factory=Sampling)
    compare: bool = False
    """Show the base model's answer too."""
    raw: bool = False
    """Leave the chat template out."""

    def check(self, config: Config) -> None:
        """Raises UserError when there is no result, nothing to answer, or no file of prompts of a known type."""
        check_result(config)
        if not self.texts and self.file is None:
            raise UserError(NOTHING_TO_ANSWER)
        if self.file is not None and str(self.file) != "-":
            type_of(self.file, "--input")


@dataclass(frozen=True)
class ShipRequest:
    """What `sgm ship` was asked for."""

    task_test: Path | None = None
    """A file of test data; None: the run's own."""
    keep: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness that must not be lost."""

    def check(self, config: Config, overrides: Sequence[str] = ()) -> None:
        """Raises UserError when there is no finished run whose report can be written, or no test file of a known type,
        and in one of several processes."""
        output = Path(config.output.dir)
        check_finished(output)
        check_result(config)
        if not os.access(output, os.W_OK):
            raise UserError(f"{output} cannot be written, and ship.json belongs there; copy the folder")
        if self.task_test is not None:
            type_of(self.task_test, "--task-test", config.data.file_type)
        if any(given.startswith("evaluation.harness=") for given in overrides):
            raise UserError("evaluation.harness=... names the tasks of a run; name those of sgm ship by --keep")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("sgm ship runs in one process; start it without a launcher")

    def changes(self, overrides: Sequence[str]) -> list[str]:
        """What the run's configuration gets, as key=value: all of the test file, and then `overrides`."""
        if self.task_test is None:
            return list(overrides)
        return [f"data.test={json.dumps(str(self.task_test))}", "data.num_test=null", *overrides]


@dataclass(frozen=True)
class SweepRequest:
    """What `sgm sweep` was asked for."""

    space: SearchSpace
    tries: int
    """The tries of the sweep, those before an interruption among them."""
    minutes: float | None = None
    """Time after which no try begins; None: no limit."""
    output: Path = Path("sweep")

    def check(self) -> None:
        """Raises UserError when Optuna is missing, the folder holds something else, or the inputs do not fit."""
        if importlib.util.find_spec("optuna") is None:
            raise UserError(f"sgm sweep needs Optuna; {install_line('sweep')}")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("sgm sweep trains in one process; start it without torchrun or accelerate launch")
        config = self.space.config(self.space.first)
        if config.adapter.from_run is not None:
            raise UserError("adapter.from_run is for a run; leave it out of a sweep, or sweep the run that went before")
        if config.training.resume:
            raise UserError("training.resume=true is for a run; a sweep goes on by itself, so leave it out")
        open_folder(self.output, self.space)
        check_inputs(config, with_plan=True)
        for part in self.space.ranges:
            if part.key == "plan":
                for path in part.corners:
                    read_plan(path)


CALIBRATION = 128
"""The number of training examples on which `--to compressed-tensors` is calibrated without --calibration."""
NOTHING_TO_ANSWER = "There is nothing to answer; give --prompt TEXT or --input FILE"


@dataclass(frozen=True)
class ExportRequest:
    """The options of the command line."""

    to: ExportFormat
    output: Path | None = None
    gguf_type: GgufType | None = None
    push_to_hub: str | None = None
    rank: int | None = None
    """The rank to which the adapter is cut; None: its own."""
    base: BaseWeights | None = None
    """What a merge adds the update to, if the base was quantised in training; None: what predicts better."""
    combination: Combination | None = None
    """Other adapters that are combined with the result's."""
    calibration: int | None = None
    """The number of training examples on which the rounding is calibrated; None: `CALIBRATION`."""

    def folder(self, config: Config) -> Path:
        """The folder of the export."""
        return self.output or Path(config.output.dir) / "export" / self.to

    def check(self, config: Config) -> None:
        """Raises UserError when there is no result or package, the folder is taken, or the hub would refuse."""
        for option, given, formats in (
            ("gguf-type", self.gguf_type, ("gguf", "gguf-adapter")),
            ("rank", self.rank, ADAPTERS),
            ("base", self.base, ("merged", "bnb-4bit", "compressed-tensors", "gguf")),
            ("calibration", self.calibration, ("compressed-tensors",)),
        ):
            if given is not None and self.to not in formats:
                goes = " or ".join(f"--to {name}" for name in formats)
                raise UserError(f"--{option} {given} goes with {goes}, not with --to {self.to}")
        if self.to == "gguf-adapter" and self.gguf_type not in (None, *ADAPTER_TYPES):
            raise UserError(
                f"--gguf-type {self.gguf_type} is for whole models, and an adapter is written in f32 or f16; take "
                "--gguf-type f16"
            )
        check_result(config)
        if self.combination is not None:
            self.combination.check()
            if self.output is None:
                raise UserError("--add makes another model than the run's own; name its folder with --output")
        check_packages(self.to, self.gguf_type)
        check_folder(self.folder(config), config.output.overwrite)
        if self.push_to_hub is not None:
            check_push(self.push_to_hub)
