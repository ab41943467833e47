"""The configuration is typed, bounded and documented; it reports a mistake in one line, with the remedy."""

from __future__ import annotations

import itertools
import json
import shlex
from pathlib import Path

import pytest
import yaml

from sgm_finetune.base.config import ALTERNATIVES, Config, known_keys
from sgm_finetune.base.config_file import load_config, parse_config
from sgm_finetune.base.errors import UserError
from sgm_finetune.commands.cli import app, main
from sgm_finetune.commands.requests import check_inputs

ROOT = Path(__file__).parents[1]
SECTIONS = [name for name in Config.model_fields if name != "plan"]
EXAMPLES = sorted(ROOT.glob("configs/*.yaml"))


@pytest.fixture
def write(tmp_path):
    def write_file(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


def value_at(config: Config, dotted: str):
    value = config
    for part in dotted.split("."):
        value = getattr(value, part)
    return value


def said(act, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        act(*arguments)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_no_file_and_no_override_is_all_defaults():
    assert load_config(None) == Config()


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n", "---\n"])
def test_an_empty_file_is_all_defaults(write, text):
    assert load_config(write(text)) == Config()


@pytest.mark.parametrize("section", SECTIONS)
def test_an_empty_section_is_all_its_defaults(write, section):
    assert load_config(write(f"{section}:\n")) == Config()


def test_an_override_fills_an_empty_section(write):
    config = load_config(write("training:\n"), ["training.epochs=2"])
    assert config.training.epochs == 2
    assert config.training.batch_size == Config().training.batch_size


def test_an_override_wins_over_the_file_and_leaves_its_neighbours(write):
    path = write("training: {epochs: 3, seed: 7}\nplan: a.json\n")
    config = load_config(path, ["training.epochs=2", "plan=b.json"])
    assert (config.training.epochs, config.training.seed, config.plan) == (2, 7, "b.json")


def test_the_last_of_two_overrides_wins():
    assert load_config(None, ["training.seed=1", "training.seed=2"]).training.seed == 2


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("training.learning_rate=2e-5", "training.learning_rate", 2e-5),
        ("training.learning_rate=1", "training.learning_rate", 1.0),
        ("training.max_steps=2e3", "training.max_steps", 2000),
        ("training.max_steps=200.0", "training.max_steps", 200),
        ("training.max_steps=null", "training.max_steps", None),
        ("training.max_steps=", "training.max_steps", None),
        (" training.seed = 3", "training.seed", 3),
        ("output.overwrite=true", "output.overwrite", True),
        ("data.columns={text: review, label: stars}", "data.columns", {"text": "review", "label": "stars"}),
        ("data.columns.text=review", "data.columns", {"text": "review"}),
        ("data.train=a b=c.csv", "data.train", "a b=c.csv"),
        ("output.dir=[unclosed", "output.dir", "[unclosed"),
        ("output.dir=o/trial #7", "output.dir", "o/trial #7"),
        ("output.dir=o/run: a", "output.dir", "o/run: a"),
        ("output.dir=2024-01-01", "output.dir", "2024-01-01"),
        ("output.dir=010", "output.dir", "010"),
        ("output.dir=yes", "output.dir", "yes"),
        ("output.dir=1e3", "output.dir", "1e3"),
        ("output.dir={a: b}", "output.dir", "{a: b}"),
        ("output.dir='null'", "output.dir", "null"),
        ('output.dir="a #b"', "output.dir", "a #b"),
        ("output.dir='a' or 'b'", "output.dir", "'a' or 'b'"),
        ("model.name=[a, b]", "model.name", "[a, b]"),
        ("model.revision=1234567", "model.revision", "1234567"),
        ("model.revision=1e10", "model.revision", "1e10"),
        ("data.train=null", "data.train", None),
        ("data.train='null'", "data.train", "null"),
        ("data.train=&a", "data.train", "&a"),
        ("data.train=!a", "data.train", "!a"),
        ("data.columns={text: 1, label: yes}", "data.columns", {"text": "1", "label": "yes"}),
        ("data.columns={text: '~'}", "data.columns", {"text": "~"}),
        ("data.columns.text=film: review #1", "data.columns", {"text": "film: review #1"}),
        ("training.learning_rate=1e-3", "training.learning_rate", 1e-3),
        ("training.max_steps=1_000", "training.max_steps", 1000),
        ("training.seed=0", "training.seed", 0),
        ("memory.budget=1_000_000_000", "memory.budget", 10**9),
        ("memory.budget=1.5GB", "memory.budget", 1_500_000_000),
        ("training.checkpointing=true", "training.checkpointing", True),
        ("training.checkpointing=offload", "training.checkpointing", "offload"),
        ("training.report_to=null", "training.report_to", []),
        ("training.report_to=[wandb, mlflow]", "training.report_to", ["wandb", "mlflow"]),
    ],
)
def test_an_override_is_read_as_the_type_its_key_declares(override, key, value):
    found = value_at(load_config(None, [override]), key)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("output: {dir: 2024-01-01}", "output.dir", "2024-01-01"),
        ("output: {dir: 1:30}", "output.dir", "1:30"),
        ("output: {dir: no}", "output.dir", "no"),
        ("output: {dir: 010}", "output.dir", "010"),
        ("output: {dir: 'null'}", "output.dir", "null"),
        ("model: {revision: 12e4}", "model.revision", "12e4"),
        ("data: {columns: {text: on, label: 3}}", "data.columns", {"text": "on", "label": "3"}),
        ("data: {train: null}", "data.train", None),
        ("data: {train: ~}", "data.train", None),
        ("training: {max_steps: }", "training.max_steps", None),
        ("training: {learning_rate: 1e-3}", "training.learning_rate", 1e-3),
        ("training: {seed: '3'}", "training.seed", 3),
        ("training: {seed: !!int 3}", "training.seed", 3),
        ("plan: null", "plan", None),
        ("plan: 1", "plan", "1"),
        ("output: {overwrite: True}", "output.overwrite", True),
    ],
)
def test_a_value_of_a_file_is_read_as_the_type_its_key_declares(write, text, key, value):
    found = value_at(load_config(write(text)), key)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("training: {max_steps: 1:30}", "`training.max_steps` is '1:30'; write a plain number"),
        ("training: {seed: 010}", "`training.seed` is '010'; write a plain number"),
        ("training: {seed: 2024-01-01}", "`training.seed` is '2024-01-01'; write a plain number"),
        ("output: {overwrite: yes}", "`output.overwrite` is 'yes'; write true or false"),
        ("output: {dir: null}", "`output.dir` is 'null'; it takes a text; leave it out, or put the text into quotes"),
        ("output: {dir: [a]}", "`output.dir` is ['a']"),
        ("plan: ''", "`plan` is ''; it is empty"),
        (
            "training: {checkpointing: [a]}",
            "`training.checkpointing` is ['a']; input should be False, True or 'offload'",
        ),
    ],
)
def test_a_value_of_a_file_that_can_be_read_in_two_ways_is_quoted_as_written(write, text, part):
    path = write(text)
    assert said(load_config, path).startswith(f"{path}: {part}")


PATHS = ["data.train", "data.validation", "data.test", "data.name", "model.name", "output.dir", "plan", "snr.scan"]


@pytest.mark.parametrize("key", PATHS)
def test_a_tilde_is_the_home_folder_where_a_key_takes_a_path(write, key, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    section, _, leaf = key.rpartition(".")
    others = {"data.validation": ["data.train=a.csv"], "data.test": ["data.train=a.csv"]}.get(key, [])
    assert value_at(load_config(None, [f"{key}=~/x #1", *others]), key) == "/home/me/x #1"
    written = f"{section}: {{{leaf}: ~/x}}" if section else f"{leaf}: ~/x"
    assert value_at(load_config(write(written), others), key) == "/home/me/x"
    assert "no home folder ~nobody-here; write ./~nobody-here/x" in said(
        load_config, None, [f"{key}=~nobody-here/x", *others]
    )
    assert value_at(load_config(None, [f"{key}=./~x", *others]), key) == "./~x"


def test_a_tilde_in_a_list_of_paths_is_home_and_in_a_column_it_is_not(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = load_config(None, ["evaluation.harness=[~/a.yaml, arc_easy]", "data.columns={text: ~x}"])
    assert config.evaluation.harness == ["/home/me/a.yaml", "arc_easy"]
    assert config.data.columns == {"text": "~x"}


def test_a_number_that_yaml_reads_as_text_is_a_number(write):
    assert isinstance(yaml.safe_load("2e-5"), str)
    assert load_config(write("training:\n  learning_rate: 2e-5\n")).training.learning_rate == 2e-5


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("trainin.epochs=1", ["unknown key `trainin`", "did you mean `training`"]),
        ("training.learning_rte=1", ["unknown key `training.learning_rte`", "did you mean `learning_rate`"]),
        ("training.rank=8", ["unknown key `training.rank`", "did you mean `adapter.rank`"]),
        ("epochs=1", ["unknown key `epochs`", "did you mean `training.epochs`"]),
        ("snr.zzzz=1", ["unknown key `snr.zzzz`", "known keys: estimator"]),
        ("data.columns.txt=review", ["`data.columns` is 'txt'", "'text', 'text_pair', 'label', 'prompt'"]),
        ("training.epochs.more=1", ["`training.epochs` is {'more': '1'}", "valid number"]),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(override, parts):
    line = said(load_config, None, [override])
    assert all(part in line for part in [*parts, override])


def test_an_unknown_key_in_a_file_names_the_file(write):
    path = write("training:\n  learning_rte: 1\n")
    assert said(load_config, path) == f"{path}: unknown key `training.learning_rte`; did you mean `learning_rate`?"


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("training.learning_rate=fast", "'fast'"),
        ("training.max_steps=2.5", "2.5"),
        ("training.max_steps=many", "'many'"),
        ("training.max_steps=true", "'true'"),
        ("training.learning_rate=true", "'true'"),
        ("training.seed=false", "'false'"),
        ("adapter.dropout=yes", "'yes'"),
        ("output.overwrite=perhaps", "'perhaps'"),
        ("output.overwrite=yes", "'yes'"),
        ("output.overwrite=1", "'1'"),
        ("output.dir=null", "'null'"),
        ("output.dir=", "''"),
        ("data.columns=review", "'review'"),
        ("training.learning_rate=[1]", "'[1]'"),
        ("training.weight_decay=nan", "'nan'"),
        ("training.learning_rate=nan", "'nan'"),
        ("training.learning_rate=.inf", "'.inf'"),
        ("training.max_grad_norm=.inf", "'.inf'"),
        ("training.max_steps=.inf", "'.inf'"),
        ("training.max_steps=1e400", "'1e400'"),
        ("training.max_steps=1:30", "'1:30'"),
        ("training.seed=010", "'010'"),
        ("training.seed=0x10", "'0x10'"),
        ("training.seed=1_5", "'1_5'"),
        ("training.seed=1,000", "'1,000'"),
        ("memory.budget=1:30", "'1:30'"),
        ("memory.budget=08GiB", "'08GiB'"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_its_key_and_value(override, value):
    line = said(load_config, None, [override])
    assert f"`{override.partition('=')[0]}` is {value}; " in line
    assert f"`{override}`: " in line


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("300k", 300_000), ("1.5M", 1_500_000), ("0.3 m", 300_000), ("300000", 300_000), ("3e5", 300_000),
        ("1_000", 1000), ("123456.789M", 123_456_789_000), ("null", None),
    ],
)  # fmt: skip
def test_a_number_of_parameters_may_end_in_thousands_or_millions(write, text, number):
    assert load_config(None, [f"adapter.parameters={text}"]).adapter.parameters == number
    assert load_config(write(f"adapter: {{parameters: {text}}}")).adapter.parameters == number


@pytest.mark.parametrize("text", ["3 kk", "-1", "-3k", "0", "0.0001k", "1e99", "1e400", "1.0005k", "2.5", "true", "k"])
def test_what_is_no_number_of_parameters_is_refused_with_one_that_is(text):
    line = said(load_config, None, [f"adapter.parameters={text}"])
    assert f"`adapter.parameters` is '{text}'; " in line
    assert "a whole number from 1 to 1e12, such as 300k, 1.5M or 300000" in line


@pytest.mark.parametrize("text", ["8g", "GiB", "08GiB", "300k", "1e400GB", "true"])
def test_what_is_no_size_is_refused_with_one_that_is(text):
    line = said(load_config, None, [f"memory.budget={text}"])
    assert f"`memory.budget` is '{text}'; write a number of bytes, or a size such as 8GiB or 512MB" in line


@pytest.mark.parametrize(
    ("override", "bound"),
    [
        ("selection.top_fraction=0", "greater than 0"),
        ("selection.top_fraction=1.5", "less than or equal to 1"),
        ("selection.snr_threshold=-1", "greater than or equal to 0"),
        ("merge.threshold=2", "less than or equal to 1"),
        ("merge.max_group_size=1", "greater than or equal to 2"),
        ("merge.side=left", "'auto', 'input', 'output' or 'none'"),
        ("merge.criterion=gut", "'subspace', 'cosine' or 'snr'"),
        ("model.task=poetry", "'causal-lm', 'sequence-classification'"),
        ("model.quantization=int3", "'none', 'nf4' or 'int8'"),
        ("adapter.rank=0", "greater than or equal to 1"),
        ("adapter.dropout=1", "less than 1"),
        ("training.learning_rate=0", "write a number above 0 and up to 10"),
        ("training.learning_rate=11", "or auto"),
        ("training.seed=-1", "greater than or equal to 0"),
        ("data.max_length=7", "greater than or equal to 8"),
        ("probe.num_batches=1", "greater than or equal to 2"),
    ],
)
def test_a_value_out_of_its_range_is_named_with_the_range(override, bound):
    line = said(load_config, None, [override])
    assert bound in line
    assert f"`{override}`: " in line


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["selection.top_fraction=0.5", "selection.snr_threshold=1"], ["top_fraction", "snr_threshold", "not both"]),
        (["data.name=imdb", "data.train=a.csv"], ["data.name", "data.train", "not both"]),
        (["data.name=imdb", "data.validation=a.csv"], ["data.validation", "data.name"]),
        (["data.name=imdb", "data.test=a.csv", "data.streaming=true"], ["data.test", "data.streaming=true"]),
        (["training.batch_size=10", "training.micro_batch_size=4"], ["batch_size=10", "micro_batch_size=4"]),
        (["adapter.rank=64", "probe.sketch_size=32"], ["probe.sketch_size=32", "adapter.rank=64"]),
    ],
)
def test_keys_that_exclude_each_other_are_both_named(overrides, parts):
    line = said(load_config, None, overrides)
    assert all(part in line for part in parts)


ONE_OF = {
    "data.name": "imdb", "data.train": "mine.csv", "selection.top_fraction": 0.5, "selection.snr_threshold": 2.0,
    "plan": "plan.json", "adapter.parameters": 300_000, "data.mixture": [{"train": "mine.csv"}],
    "training.eval_steps": 10, "training.eval_seconds": 30.0,
}  # fmt: skip
"""A value for each key that excludes another one."""


def in_a_file(keys) -> str:
    values = {}
    for key in keys:
        section, _, leaf = key.rpartition(".")
        (values.setdefault(section, {}) if section else values)[leaf] = ONE_OF[key]
    return yaml.safe_dump(values)


@pytest.mark.parametrize(("new", "old"), [pair for keys in ALTERNATIVES for pair in itertools.permutations(keys, 2)])
def test_a_key_on_the_command_line_replaces_what_it_excludes_in_the_file_and_says_so(write, new, old):
    file, lines = write(in_a_file([old])), []
    config = load_config(file, [f"{new}={ONE_OF[new]}"], lines.append)
    section, _, leaf = new.rpartition(".")
    values = config.model_dump(exclude_defaults=True)
    assert (values[section] if section else values)[leaf] == ONE_OF[new]
    assert value_at(config, old) is None
    first, second = (key if key == "data.mixture" else f"{key}={ONE_OF[key]}" for key in (new, old))
    assert lines == [f"{first} replaces {second} of {file}"]


@pytest.mark.parametrize("keys", ALTERNATIVES)
def test_two_keys_that_exclude_each_other_are_refused_in_one_place(write, keys):
    """On the command line, or in the file, where neither was said after the other."""
    overrides = [f"{key}={ONE_OF[key]}" for key in keys]
    assert "not both" in said(load_config, None, overrides)
    assert "not both" in said(load_config, write(in_a_file(keys)))


def test_what_describes_the_replaced_data_goes_with_it_and_the_rest_stays(write):
    file = write(
        "data: {name: imdb, columns: {text: review}, format: auto, num_train: 100, max_length: 32}\n"
        "training: {batch_size: 4}"
    )
    lines = []
    config = load_config(file, ["data.train=mine.csv"], lines.append)
    assert lines == [f"data.train=mine.csv replaces data.name=imdb of {file}, and data.columns with it"]
    assert config.data.columns == {}
    assert (config.data.num_train, config.data.max_length, config.training.batch_size) == (100, 32, 4)


def test_columns_on_the_command_line_belong_to_the_data_on_it(write):
    file = write("data: {train: a.csv, test: b.csv, columns: {text: review, label: stars}}")
    config = load_config(file, ["data.name=owner/name", "data.columns.text=body"])
    assert config.data.columns == {"text": "body"}
    assert config.data.test is None


def test_depth_is_preferred_only_beside_the_fraction_that_was_replaced(write):
    config = load_config(write("selection: {top_fraction: 0.5, prefer_depth: true}"), ["selection.snr_threshold=2"])
    assert config.selection == load_config(None, ["selection.snr_threshold=2"]).selection


@pytest.mark.parametrize("empty", ["null", ""])
def test_emptying_the_excluded_key_is_accepted_and_says_nothing(write, empty):
    lines = []
    config = load_config(write("data: {name: imdb}"), [f"data.name={empty}", "data.train=mine.csv"], lines.append)
    assert (config.data.name, config.data.train, lines) == (None, "mine.csv", [])


def test_a_small_sketch_is_enough_where_nothing_is_probed():
    config = load_config(None, ["adapter.rank=64", "probe.sketch_size=32", "merge.side=none"])
    assert config.adapter.rank == 64


@pytest.mark.parametrize("override", ["training.epochs", "=3", "", "--fast"])
def test_an_override_that_is_not_key_equals_value_is_refused(override):
    line = said(load_config, None, [override])
    assert f"`{override}` is not key=value" in line


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("- a\n- b\n", ["['a', 'b']", "key: value"]),
        ("just words\n", ["'just words'", "key: value"]),
        ("training: [1, 2\n", ["is not YAML"]),
        ("training: 3\n", ["`training` is '3'", "epochs"]),
        ("training: [epochs]\n", ["`training` is ['epochs']", "epochs"]),
        ("1: 2\n", ["unknown key `1`"]),
    ],
)
def test_an_invalid_configuration_file_is_refused_in_one_line(write, text, parts):
    path = write(text)
    line = said(load_config, path)
    assert all(part in line for part in [str(path), *parts])


def test_an_override_cannot_give_keys_to_a_value(write):
    assert "`plan` holds 'a.json'" in said(load_config, write("plan: a.json\n"), ["plan.name=b"])


def test_a_missing_file_is_named_with_the_option_that_gives_one(tmp_path):
    line = said(load_config, tmp_path / "none.yaml")
    assert str(tmp_path / "none.yaml") in line
    assert "--config" in line


def test_a_folder_and_a_binary_file_cannot_be_read(tmp_path):
    assert "cannot be read" in said(load_config, tmp_path)
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in said(load_config, tmp_path / "run.yaml")


def test_every_key_is_documented():
    for key in known_keys():
        section, _, leaf = key.rpartition(".")
        fields = type(getattr(Config(), section)).model_fields if section else Config.model_fields
        assert fields[leaf].description, key


def test_the_resolved_configuration_reads_back_as_itself(write):
    config = load_config(None, ["training.learning_rate=2e-5", "data.columns={text: t}", "data.train=a.csv"])
    dumped = yaml.safe_dump(config.model_dump(mode="json"))
    assert load_config(write(dumped)) == config
    assert parse_config(config.model_dump(mode="json")) == config


def test_a_configuration_cannot_be_changed_in_passing():
    with pytest.raises(ValueError, match="frozen"):
        Config().training.seed = 1


def test_the_repositorys_config_is_the_readmes_run():
    config = load_config(ROOT / "config.yaml")
    assert config.output.dir == "output"
    assert not config.output.overwrite
    assert config.plan is None


@pytest.mark.parametrize("path", [ROOT / "config.yaml", *EXAMPLES], ids=lambda path: path.name)
def test_every_file_of_the_repository_loads_and_writes_known_keys_only(path):
    load_config(path)
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    keys = {f"{s}.{k}" for s, values in written.items() if isinstance(values, dict) for k in values}
    assert keys <= set(known_keys())


@pytest.mark.parametrize(
    ("overrides", "rate"),
    [
        ([], 0.0125),
        (["adapter.rank=2"], 0.025),
        (["merge.scope=pool"], 0.0354),
        (["adapter.rank=2", "training.learning_rate=0.0125"], 0.0125),
        (["training.optimizer=adamw"], 1e-3),
        (["training.learning_rate=3e-3"], 3e-3),
        (["training.optimizer=adamw", "training.learning_rate=2e-5"], 2e-5),
    ],
)
def test_each_optimizer_has_its_own_default_learning_rate(overrides, rate):
    assert load_config(None, overrides).peak_learning_rate(60) == rate


CONFIGURED = ("data", "estimate", "plan", "finetune")
"""The commands that begin with a configuration."""


@pytest.mark.parametrize("command", CONFIGURED)
def test_the_example_of_a_commands_help_works_in_an_empty_folder(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [
        {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"{n}"}]}
        for n in range(20)
    ]
    Path("chats.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    text = next(found.callback.__doc__ for found in app.registered_commands if found.name == command)
    example = text.partition(f"Example: sgm {command} ")[2].strip()
    check_inputs(load_config(None, [word for word in shlex.split(example) if "=" in word]))


@pytest.mark.parametrize("command", CONFIGURED)
def test_without_a_configuration_file_the_defaults_hold_and_one_that_is_named_must_exist(
    command, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    for arguments, line in (
        ([command], "No data: give data.train=FILE or data.name, for example data.name=rotten-tomatoes"),
        ([command, "--config", "config.yaml"], "No configuration file config.yaml; name another, leave --config out"),
        ([command, "data.train=none.csv"], f"data.train=none.csv does not exist (looked in {tmp_path})"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        shown = capfd.readouterr()
        assert stop.value.code == 2
        assert shown.err.startswith(line)
        assert shown.err.count("\n") == 1
        assert shown.out == ""


def test_a_command_reads_config_yaml_of_its_folder_and_says_so(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text("data: {train: none.csv}", encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["data"])
    shown = capfd.readouterr()
    assert shown.out == "config   read from config.yaml\n"
    assert shown.err.startswith("data.train=none.csv does not exist")
    with pytest.raises(SystemExit):
        main(["--quiet", "data", "--json"])
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("written", ["1.000", "10.000", "1.000.000"])
def test_a_whole_number_with_a_point_is_refused_where_it_can_be_thousands(written):
    with pytest.raises(UserError, match=r"can be read in two ways"):
        load_config(None, [f"training.max_steps={written}"])
    assert load_config(None, ["training.max_steps=200.0", "training.learning_rate=0.125"]).training.max_steps == 200


def test_a_backslash_in_double_quotes_is_refused_where_it_is_no_backslash():
    with pytest.raises(UserError, match=r"backslash in double quotes .* use single quotes or none"):
        load_config(None, ['data.train="C:\\new\\table.csv"'])
    for written in ("C:\\new\\table.csv", "'C:\\new\\table.csv'"):
        assert load_config(None, [f"data.train={written}"]).data.train == "C:\\new\\table.csv"


@pytest.mark.parametrize("written", ["[Text, Label]", "text: Text, label: Label"])
def test_a_key_that_takes_a_mapping_says_how_one_is_written(written):
    with pytest.raises(UserError, match=r"`data\.columns` is .*; write a mapping, such as \{text: review"):
        load_config(None, [f"data.columns={written}"])
