"""sgm sweep: which settings are tried, what a try leaves, and that a sweep that stops goes on as if it had not."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import adapted, make_model, short_run
from moments import ended_by, start_until
from rich.console import Console
from transformers import TrainerControl, TrainerState

from sgm_finetune.base.config_file import FileValues, load_config
from sgm_finetune.base.errors import Interrupted, NotFiniteError, UserError
from sgm_finetune.base.search_space import Choices, Range, search_space
from sgm_finetune.commands.cli import main
from sgm_finetune.commands.requests import SweepRequest
from sgm_finetune.results.sweep_folder import new_sweep, open_folder, save_sweep
from sgm_finetune.train.lending import condition, take_back
from sgm_finetune.train.tries import Try, Validation, winner

FILE = FileValues("defaults", {})
RATES = "training.learning_rate=log:3e-3..3e-2"


def space_of(*overrides: str):
    return search_space(FILE, overrides)


def test_ranges_choices_and_plain_overrides_are_told_apart():
    space = space_of(RATES, "adapter.rank=4..16", "merge.scope=layers, activation", "training.epochs=2")
    assert space.ranges == (
        Range("training.learning_rate", 0.003, 0.03, log=True, whole=False),
        Range("adapter.rank", 4, 16, log=False, whole=True),
        Choices("merge.scope", ("layers", "activation")),
    )
    assert space.plain == ("training.epochs=2",)
    config = space.config({"training.learning_rate": "0.01", "adapter.rank": "8", "merge.scope": "layers"})
    assert (config.training.learning_rate, config.adapter.rank, config.training.epochs) == (0.01, 8, 2)


@pytest.mark.parametrize(
    ("override", "texts", "size"),
    [
        ("adapter.rank=4,16", "4,16", 2), ("adapter.rank=log:4..16", "log:4..16", 13),
        ("adapter.parameters=300k..301k", "300000..301000", 1001), ("training.epochs=1..2", "1.0..2.0", float("inf")),
        ("training.learning_rate=auto,0.01", "auto,0.01", 2), ("merge.max_group_size=null,4", "null,4", 2),
        ("merge.threshold=-0.5..0.5", "-0.5..0.5", float("inf")), ("training.step=fast,peft", "fast,peft", 2),
    ],
)  # fmt: skip
def test_a_range_takes_what_its_key_takes(override, texts, size):
    space = space_of(override)
    assert list(space.texts.values()) == [texts]
    assert space.size == size


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ([], ["nothing to vary", "adapter.rank=4,16"]),
        (["training.epochs=2"], ["nothing to vary"]),
        (["training.learning_rte=1e-3..1e-2"], ["unknown key `training.learning_rte`", "did you mean `learning_rate`"]),
        (["merge.scope=1..2"], ["merge.scope is no number", "choices between commas"]),
        (["model.dtype=float32,float99"], ["`model.dtype=float99`", "'float32'"]),
        (["adapter.rank=0..16"], ["`adapter.rank=0`", "greater than or equal to 1"]),
        (["adapter.rank=16..4"], ["`adapter.rank=16..4`", "16 is not below 4"]),
        (["adapter.rank=4..4"], ["4 is not below 4"]),
        (["adapter.dropout=log:0..0.5"], ["log: needs numbers above 0", "leave out log:"]),
        (["training.weight_decay=log:-0.1..0.1"], ["-0.1", "greater than or equal to 0"]),
        (["training.learning_rate=log:3e-3,3e-2"], ["'log:3e-3'", "a range is A..B or log:A..B"]),
        (["adapter.rank=4,"], ["has an empty choice"]),
        (["adapter.rank=4,8,4.0"], ["lists 4.0 twice"]),
        (["adapter.rank=4,8", "adapter.rank=2"], ["`adapter.rank` is given twice"]),
        (["adapter.rank=4,128"], ["probe.sketch_size=48 is smaller than adapter.rank=128"]),
        (["merge.scope=layers,activation", "merge.side=auto,output"],
         ["merge.side=output compares layers", "the try merge.scope=activation merge.side=output"]),
        (["data.max_length=64,128"], ["cannot be compared", "sgm compare"]),
        (["preference.beta=0.1..0.5"], ["cannot be compared"]),
        (["data.train=a,b.csv", RATES], ["data.train=a,b.csv", "in quotes if it has a comma"]),
        (["output.dir=a,b"], ["output.dir changes no validation loss"]),
        (["plan=plan.json", "adapter.rank=4,16"], ["plan=plan.json has decided adapter.rank"]),
        (["adapter.rank", RATES], ["`adapter.rank` is not key=value"]),
    ],
)  # fmt: skip
def test_a_wrong_range_is_one_line(overrides, parts):
    with pytest.raises(UserError) as caught:
        space_of(*overrides)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_a_text_in_quotes_and_a_path_with_dots_are_no_ranges():
    space = space_of('data.train="a,b.csv"', "model.name=../models/x", RATES)
    config = space.config(space.first)
    assert (config.data.train, config.model.name) == ("a,b.csv", "../models/x")
    assert list(space.texts) == ["training.learning_rate"]


def validations(*losses: float) -> tuple[Validation, ...]:
    return tuple(Validation(step=i + 1, percent=25 * (i + 1), loss=loss) for i, loss in enumerate(losses))


def complete(number: int, settings: dict[str, str], *losses: float) -> Try:
    return Try(number=number, settings=settings, state="complete", validations=validations(*losses), steps=4)


def test_the_winner_is_the_complete_try_with_the_lowest_validation():
    tries = [complete(1, {}, 0.9, 0.5, 0.7), complete(2, {}, 0.6), complete(3, {}, 0.5)]
    pruned = Try(number=4, settings={}, state="pruned", validations=validations(0.1))
    failed = Try(number=5, settings={}, state="failed", reason="why")
    assert winner([*tries, pruned, failed]) == tries[0]
    assert winner([pruned, failed]) is None


def test_tries_follow_from_those_before_and_from_the_seed():
    """So an interrupted sweep goes on as if it had not been interrupted."""
    pytest.importorskip("optuna")
    from sgm_finetune.train.suggestions import suggest

    space, tries = space_of(RATES, "adapter.rank=4,8,16"), []
    for number in range(1, 8):
        (_, settings), (_, again), (_, other) = (suggest(space, tries, seed) for seed in (0, 0, 1))
        assert settings == again != other
        assert 0.003 <= float(settings["training.learning_rate"]) <= 0.03
        tries.append(complete(number, settings, float(settings["training.learning_rate"])))
    assert len({one.settings["training.learning_rate"] for one in tries}) == 7


def test_no_settings_are_tried_twice_as_long_as_there_are_others():
    pytest.importorskip("optuna")
    from sgm_finetune.train.suggestions import suggest

    space, tries = space_of("adapter.rank=2,4", "training.batch_size=8..10"), []
    for number in range(1, 7):
        _, settings = suggest(space, tries, 0)
        tries.append(Try(number=number, settings=settings, state="failed", reason="why"))
    assert sorted(str(one.settings) for one in tries) == sorted(map(str, space.every()))


def test_a_base_that_was_lent_comes_back_as_it_was():
    """With the head of before, and ready for other adapters."""
    model = make_model().eval().requires_grad_(False)
    before, weights = condition(model), {name: p.clone() for name, p in model.state_dict().items()}
    for _ in range(2):
        lent = adapted(model, share=True, modules_to_save=["score"])
        with torch.no_grad():
            for parameter in lent.parameters():
                if parameter.requires_grad:
                    parameter.add_(1.0)
        assert take_back(lent, before)
        assert all(torch.equal(p, weights[name]) for name, p in model.state_dict().items())


def test_a_base_that_was_written_to_is_not_taken_for_whole():
    model = make_model().eval().requires_grad_(False)
    before, lent = condition(model), adapted(model)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.0)
    assert not take_back(lent, before)


def pico(model: Path, reviews: Path, output: Path, *ranges: str) -> list[str]:
    """Four steps, with a validation after each."""
    short = ("model.dtype=float32", "training.max_steps=4", "probe.num_batches=2", "data.num_validation=8")
    return short_run(model, reviews, output.parent / "out", *short, *ranges)


@pytest.fixture(scope="module")
def request_of(llama_folder, reviews):
    """A sweep of a few pico tries of four steps, as the command line asks for it."""
    pytest.importorskip("optuna")

    def make(output: Path, *ranges: str, tries: int = 3, **more) -> SweepRequest:
        overrides = pico(llama_folder, reviews, output, *ranges)
        return SweepRequest(space_of(*overrides), tries, output=output, **more)

    return make


RANGES = ("training.learning_rate=log:0.01..0.2", "merge.side=auto,none")
"""One key that the training alone reads, and one that changes the plan."""


@pytest.fixture(scope="module")
def swept(request_of, tmp_path_factory) -> Path:
    """The folder of a sweep of three tries. Ctrl-C ended the third one, and a second call began it again. Each call
    loads the base once, and measures once."""
    from sgm_finetune.commands import shared
    from sgm_finetune.commands import sweep as command

    output = tmp_path_factory.mktemp("swept") / "sweep"
    request = request_of(output, *RANGES)
    with pytest.MonkeyPatch.context() as patched:
        calls: dict[str, int] = {}
        for name in ("load_base", "probe_gradients", "scan_weights", "checked_data", "choose_plan"):
            patched.setattr(shared, name, counted(name, calls, getattr(shared, name)))
        patched.setattr(command, "make_trainer", ctrl_c_in(3, command.make_trainer))
        with pytest.raises(Interrupted, match="Stopped in try 3 of 3, which is not kept; the same command begins it"):
            command.sweep(request, Console(quiet=True))
    settings = [one.settings for one in open_folder(output, request.space).tries]
    assert calls.pop("choose_plan") == len({one["merge.side"] for one in settings}) == 2
    assert set(calls.values()) == {1}
    assert len(settings) == 2
    assert (output / "sweep.html").is_file()
    command.sweep(request, Console(quiet=True))
    return output


def counted(name: str, calls: dict[str, int], real: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        calls[name] = calls.get(name, 0) + 1
        return real(*args, **options)

    return call


def ctrl_c_in(number: int, real: Callable[..., Any]) -> Callable[..., Any]:
    """`real`, whose call with this number ends in Ctrl-C."""
    calls = itertools.count(1)

    def call(*args: Any) -> Any:
        if next(calls) == number:
            raise KeyboardInterrupt
        return real(*args)

    return call


def test_a_sweep_leaves_a_folder_for_each_try_a_table_a_picture_and_the_best_configuration(swept):
    found = json.loads((swept / "sweep.json").read_text())
    assert [one["state"] for one in found["tries"]] == ["complete"] * 3
    best = min(found["tries"], key=lambda one: one["loss"])
    assert found["best"] == best["number"]
    for one in found["tries"]:
        folder = swept / "tries" / f"{one['number']:03d}"
        assert {path.name for path in folder.iterdir()} == {"config.yaml", "history.json", "metrics.json"}
        losses = [row["eval_loss"] for row in json.loads((folder / "history.json").read_text()) if "eval_loss" in row]
        assert one["loss"] == min(losses)
        assert len(losses) == 4
        assert json.loads((folder / "metrics.json").read_text()) == one
        config = load_config(folder / "config.yaml")
        assert config.training.learning_rate == float(one["settings"]["training.learning_rate"])
        assert config.merge.side == one["settings"]["merge.side"]
    text = (swept / "best.yaml").read_text()
    assert text.startswith(f"# Try {best['number']} of a sweep: validation loss {best['loss']:.4f} with training.learn")
    assert load_config(swept / "best.yaml") == load_config(swept / "tries" / f"{best['number']:03d}" / "config.yaml")
    page = (swept / "sweep.html").read_text()
    assert page.count("<svg") == 4
    assert "Validation loss by merge.side" in page
    assert {path.name for path in swept.iterdir()} == {"best.yaml", "sweep.html", "sweep.json", "tries"}


def test_a_finished_sweep_is_printed_again_without_another_try(swept, request_of, llama_folder, reviews, capfd):
    before = (swept / "sweep.json").read_bytes()
    empty = swept.parent / "empty.yaml"
    empty.write_text("")
    arguments = pico(llama_folder, reviews, swept, *RANGES)
    with pytest.raises(SystemExit) as caught:
        main(["sweep", str(empty), *arguments, "--tries", "3", "--output", str(swept), "--json"])
    written, said = capfd.readouterr()
    assert caught.value.code == 0, said
    assert json.loads(written) == {"folder": str(swept), **json.loads(before)}
    assert (swept / "sweep.json").read_bytes() == before
    assert f"sgm finetune --config {swept / 'best.yaml'}" in said


@pytest.mark.slow
def test_an_interrupted_sweep_is_the_uninterrupted_one(swept, request_of, tmp_path):
    """To the last bit, although other tries shared the base, the scan and the probe."""
    from sgm_finetune.commands.sweep import sweep

    found = sweep(request_of(tmp_path / "sweep", *RANGES), Console(quiet=True))
    before = json.loads((swept / "sweep.json").read_text())
    assert without_seconds(found["tries"]) == without_seconds(before["tries"])


def without_seconds(tries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in one.items() if key != "seconds"} for one in tries]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("choices", "more"),
    [
        ("training.seed=0,1", []),
        ("adapter.alpha=8,16", ["adapter.dropout=0.1"]),
        ("merge.scope=layers,pool", []),
        ("probe.seed=0,1", ["training.checkpointing=true"]),
        ("adapter.alpha=8,16", ["model.quantization=nf4"]),
        ("adapter.alpha=8,16", ["model.residence=disk"]),
        ("training.schedule=linear,cosine", ["adapter.kind=full", "adapter.rank=16"]),
    ],
)
def test_the_run_of_a_trys_configuration_is_the_try(choices, more, request_of, tmp_path):
    """To the last bit, although the try was one of three on a shared base."""
    from sgm_finetune.commands.finetune import finetune
    from sgm_finetune.commands.sweep import sweep

    request = request_of(tmp_path / "sweep", "training.learning_rate=log:1e-4..1e-2", choices, *more)
    found = sweep(request, Console(quiet=True))
    assert [one["state"] for one in found["tries"]] == ["complete"] * 3, found
    for one in found["tries"][1:]:
        folder, output = tmp_path / "sweep" / "tries" / f"00{one['number']}", tmp_path / f"out{one['number']}"
        finetune(load_config(folder / "config.yaml", [f"output.dir={output}"]), Console(quiet=True))
        assert losses(output) == losses(folder)


def losses(folder: Path) -> list[tuple[float | None, ...]]:
    rows = json.loads((folder / "history.json").read_text())
    return [tuple(row.get(key) for key in ("step", "loss", "grad_norm", "eval_loss")) for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_leaves_a_whole_sweep(number, llama_folder, reviews, tmp_path):
    pytest.importorskip("optuna")
    (tmp_path / "empty.yaml").write_text("")
    arguments = ["sweep", "empty.yaml", *pico(llama_folder, reviews, tmp_path / "sweep", *RANGES), "--tries", "2"]
    process = start_until("begin sgm_finetune.train.trainer:SGMTrainer.training_step #6", arguments, tmp_path)
    status, said = ended_by(number, process)
    assert status == 128 + number
    line = "Stopped in try 2 of 2, which is not kept; the same command begins it again"
    assert said == [line if number == signal.SIGINT else "Ended by SIGTERM"]
    sweep = tmp_path / "sweep"
    assert len(json.loads((sweep / "sweep.json").read_text())["tries"]) == 1
    assert load_config(sweep / "best.yaml").merge.side in ("auto", "none")
    assert not [path for path in sweep.rglob("*") if path.name.endswith((".partial", ".lock"))]


@pytest.mark.parametrize(("loss", "stops_at"), [(0.1, None), (0.9, 50)])
def test_only_what_is_above_the_median_at_half_of_the_steps_is_stopped(loss, stops_at):
    pytest.importorskip("optuna")
    from sgm_finetune.train.suggestions import Pruning, suggest

    space = space_of(RATES)
    tries = [complete(i, {"training.learning_rate": f"0.00{i + 3}"}, 0.01, 0.5, 0.5, 0.4) for i in range(1, 5)]
    trial, _ = suggest(space, tries, 0)
    pruning, control = Pruning(trial), TrainerControl()
    for step in range(1, 5):
        pruning.on_evaluate(None, TrainerState(global_step=step, max_steps=4), control, {"eval_loss": loss})
        if control.should_training_stop:
            break
    assert (pruning.validations[-1].percent if pruning.pruned else None) == stops_at
    assert pruning.pruned == (pruning.reason is not None) == control.should_training_stop


@pytest.mark.slow
def test_a_try_that_is_worse_than_the_others_at_half_of_its_steps_is_stopped(request_of, tmp_path):
    from sgm_finetune.commands.sweep import sweep

    output = tmp_path / "sweep"
    request = request_of(output, RATES, tries=5)
    tries = [complete(i, {"training.learning_rate": f"0.00{i + 3}"}, 9.0, 1e-6, 9.0, 9.0) for i in range(1, 5)]
    save_sweep(new_sweep(request.space).model_copy(update={"tries": tuple(tries)}), output)
    found = sweep(request, Console(quiet=True))
    assert found["tries"][4]["state"] == "pruned"
    assert [one["percent"] for one in found["tries"][4]["validations"]] == [25, 50]
    assert found["tries"][4]["reason"] == "above the median of the tries before it at 50 % of the steps"
    assert found["best"] == 1


def test_a_failed_try_is_recorded_and_the_sweep_goes_on(request_of, tmp_path, monkeypatch):
    from sgm_finetune.commands import sweep as command

    ends = [NotFiniteError("loss is nan at step 2"), torch.OutOfMemoryError("CUDA out of memory. Tried"), None]

    def train(self, number, settings, trial):
        if (end := ends[number - 1]) is not None:
            raise end
        folder = self.request.output / "tries" / "003"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text("")
        return complete(number, settings, 0.5)

    monkeypatch.setattr(command.Sweeping, "_train", train)
    found = command.sweep(request_of(tmp_path / "sweep", RATES), Console(quiet=True))
    assert [one["state"] for one in found["tries"]] == ["failed", "failed", "complete"]
    assert found["tries"][0]["reason"] == "loss is nan at step 2"
    assert "the memory was not enough: CUDA out of memory" in found["tries"][1]["reason"]
    assert found["best"] == 3
    assert "loss is nan at step 2" in (tmp_path / "sweep" / "sweep.html").read_text()


def test_a_sweep_of_failures_ends_with_the_reason(request_of, tmp_path, monkeypatch):
    from sgm_finetune.commands import sweep as command

    def train(*args):
        raise UserError("This run needs about 900 GiB")

    monkeypatch.setattr(command.Sweeping, "_train", train)
    request = request_of(tmp_path / "sweep", RATES)
    for _ in range(2):  # the second time, all tries are done
        with pytest.raises(UserError, match="No try of this sweep is complete; the first one failed: This run needs"):
            command.sweep(request, Console(quiet=True))
    assert not (tmp_path / "sweep" / "best.yaml").exists()


def test_a_setting_that_another_key_overrules_fails():
    from sgm_finetune.commands.sweep import require_settings

    asked, became = load_config(None, ["adapter.rank=16"]), load_config(None, ["adapter.rank=4"])
    require_settings(asked, asked, {"adapter.rank": "16"})
    with pytest.raises(UserError, match=r"adapter.rank=16 would become 4: memory.budget or adapter.parameters"):
        require_settings(became, asked, {"adapter.rank": "16"})


def refused(arguments: list[str], capfd) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["sweep", *arguments])
    assert caught.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    return line


def test_the_folder_of_another_sweep_and_of_other_files_is_refused(swept, llama_folder, reviews, tmp_path, capfd):
    (tmp_path / "empty.yaml").write_text("")
    run = [str(tmp_path / "empty.yaml"), *pico(llama_folder, reviews, swept)]
    output = ["--output", str(swept)]
    line = refused([*run, RANGES[0], "merge.side=auto,input", *output], capfd)
    assert (
        "holds another sweep: `merge.side` was 'auto,none' there and is 'auto,input' now; name another --outp" in line
    )
    line = refused([*run, *RANGES, "adapter.alpha=8", *output], capfd)
    assert "`adapter.alpha` was 32.0 there and is 8.0 now" in line
    assert "holds empty.yaml and no sweep.json" in refused([*run, *RANGES, "--output", str(tmp_path)], capfd)
    (tmp_path / "harmed").mkdir()
    (tmp_path / "harmed" / "sweep.json").write_text('{"ranges": {}, "config": {}, "tries": [{"number": 0}]}')
    assert "harmed/sweep.json" in refused([*run, *RANGES, "--output", str(tmp_path / "harmed")], capfd)
    for options, words in ((["--tries", "0"], "--tries"), (["--minutes", "0"], "--minutes is 0")):
        assert words in refused([*run, *RANGES, *options], capfd)
    assert "training.resume=true is for a run" in refused([*run, *RANGES, "training.resume=true"], capfd)
    assert "No data" in refused([run[0], *RANGES], capfd)


def test_other_validation_examples_end_a_sweep(swept, request_of, tmp_path, reviews):
    from sgm_finetune.commands.sweep import sweep

    output = tmp_path / "sweep"
    shutil.copytree(swept, output)
    found = json.loads((output / "sweep.json").read_text())
    (output / "sweep.json").write_text(json.dumps({**found, "validation": "other"}))
    with pytest.raises(UserError, match="validation examples are not those that the sweep"):
        sweep(request_of(output, *RANGES, tries=4), Console(quiet=True))


def test_no_try_begins_that_would_not_end_in_time(request_of, tmp_path, monkeypatch, capfd):
    from sgm_finetune.commands import sweep as command

    def train(self, number, settings, trial):
        folder = self.request.output / "tries" / "001"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text("")
        return complete(number, settings, 0.5)

    monkeypatch.setattr(command.Sweeping, "_train", train)
    found = command.sweep(request_of(tmp_path / "sweep", RATES, minutes=1e-9), Console())
    assert len(found["tries"]) == 1
    assert "--minutes 1e-09 leave no time for another try" in capfd.readouterr().out
