"""The command line: the messages that a user sees for wrong flags."""

import copy
import importlib
import operator
import os
import subprocess
import sys
import warnings

import pytest
from absl import flags

from configs import base, settings
from kd_jax import command_help, main, replay, train
from kd_jax.command import parse
from kd_jax.evaluate import arguments as evaluate_arguments
from kd_jax.report import __main__ as report_command
from kd_jax.settings.value_types import whole_number
from kd_jax.storage import directory
from tests.helpers.commands import environment
from tests.helpers.paths import ROOT
from tests.helpers.runs import METHODS, smoke


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config=configs/forward_kl.py:smoke", "--config.objective.temprature=2"], "temperature"),
        (
            ["--config=configs/forward_kl.py:smoke", "--config.steps=many"],
            "--config.steps=many: the key takes a whole number, such as 1000, 1_000 or 1e3.",
        ),
        (["--config=configs/forward_kl.py:smok"], "smoke"),
        (["--config=configs/forward_lk.py"], "no config file configs/forward_lk.py (did you mean 'forward_kl'?)"),
        (["--config=configs/forward_kl.py:smoke", "--config.mesh.data=3"], "the product of the sizes must be 1"),
        (["--config=configs/forward_kl.py:smoke", "--processes=10.0.0.1:80,2,2"], "INDEX below COUNT"),
        ([], "config"),
    ],
)
def test_a_wrong_flag_is_one_paragraph(flags, words, tmp_path):
    command = [sys.executable, "-m", "kd_jax.main", *flags, f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(command, cwd=ROOT, env=environment(1), capture_output=True, text=True)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert words in done.stderr + done.stdout
    assert not (tmp_path / "run").exists()


@pytest.fixture
def parsed(monkeypatch):
    """A function that parses flags after the smoke setting of forward KL in this process and returns the config."""

    def parse(*given, workdir=("--workdir=nowhere",)):
        argv = ["main", "--config=configs/forward_kl.py:smoke", *workdir, *given]
        monkeypatch.setattr(sys, "argv", argv)
        values = copy.deepcopy(flags.FLAGS)
        with monkeypatch.context() as patch:
            patch.setattr(flags, "FLAGS", values)
            patch.setattr(main.CONFIG, "_flagvalues", values)
            values["config"].flag_values = values
            with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # warnings of ml_collections
                main.parse(argv)
            return main.CONFIG.value

    monkeypatch.chdir(ROOT)
    return parse


@pytest.mark.parametrize("text", ["1e3", "1_000", "1000.0", "1000", "0x3e8", "10e2"])
def test_a_whole_number_has_many_forms(text, parsed):
    config = parsed(f"--config.steps={text}", "--config.clip_norm=1")
    assert config.steps == 1000 and type(config.steps) is int
    assert config.clip_norm == 1.0 and type(config.clip_norm) is float


def test_a_large_whole_number_is_exact():
    assert whole_number("1e23") == 10**23 and whole_number("1.5e1") == 15 and whole_number(7) == 7


WHOLE = "the key takes a whole number, such as 1000, 1_000 or 1e3."


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("steps=2.5", f"--config.steps=2.5: {WHOLE}"),
        ("steps=1e400", f"--config.steps=1e400: {WHOLE}"),
        ("steps=nan", f"--config.steps=nan: {WHOLE}"),
        ("data.batch_size=", f"--config.data.batch_size=: {WHOLE}"),
        ("mesh.fsdp=two", f"--config.mesh.fsdp=two: {WHOLE}"),
        ("teacher.int8_report=maybe", "--config.teacher.int8_report=maybe: the key takes true or false."),
        ("clip_norm=0,5", "--config.clip_norm=0,5: the key takes a number, such as 0.5 or 1e-3."),
        ("optimizer.weight_decay=inf", "--config.optimizer.weight_decay=inf: the key takes a number"),
        ("student.layers=(1,)x", "--config.student.layers=(1,)x: the key takes a tuple, such as (0, 3, 6)"),
        (
            "data=3",
            "--config.data=3: the key takes a dict such as {'name': 'adamw'}; a flag sets one entry, such as",
        ),
        ("steps", "Missing value for flag --config.steps"),
        (
            "data.optons.path=x",
            "--config.data.optons.path=x: config.data has no key 'optons' (did you mean 'options'?)",
        ),
        ("optimzer.name=sgd", "config has no key 'optimzer' (did you mean 'optimizer'?)"),
        ("objective.terms.distill.weight=1", "config.objective.terms has no key 'distill' (did you mean 'distil'?)"),
        ("data.options.path.x=3", "config.data.options has no keys."),
        ("steps.x=3", "--config.steps.x=3: config.steps is 2 and has no keys."),
    ],
)
def test_a_flag_of_the_wrong_type_names_the_key_the_value_and_the_type(flag, words, parsed):
    with pytest.raises(SystemExit) as ended:
        parsed(f"--config.{flag}")
    assert words in str(ended.value) and "\n" not in str(ended.value)


def test_an_empty_text_is_an_empty_tuple(parsed):
    config = parsed("--config.student.layers=", "--config.optimizer.no_decay=")
    assert config.student.layers == config.optimizer.no_decay == ()


def test_a_value_of_the_wrong_type_in_a_config_file_is_one_sentence_with_the_line(tmp_path, parsed):
    lines = "from configs import forward_kl\n\ndef get_config():\n    config = forward_kl.get_config('smoke')\n"
    (tmp_path / "mine.py").write_text(lines + "    config.steps = '100'\n    return config\n")
    with pytest.raises(SystemExit) as ended:
        parsed(f"--config={tmp_path / 'mine.py'}")
    assert "the key 'steps' takes a whole number" in str(ended.value)
    assert "not '100', which is of type str" in str(ended.value) and "mine.py, line 5)" in str(ended.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(steps=None), "steps=None must be a whole number"),
        (dict(steps=True), "steps=True must be a whole number"),
        (dict(mesh=dict(data="two", fsdp=1, tensor=1)), "mesh.data='two' must be a whole number"),
        (dict(mesh=dict(data=1)), "the config lacks the key 'mesh.fsdp'"),
        (dict(student__layers=("a",)), "student.layers=('a',) must be a tuple of whole numbers"),
        (dict(profile_steps=(1, 2.5)), "profile_steps=(1, 2.5) must be"),
        (dict(steps=10**30), f"steps={10**30} must be below {2**31}."),
        (dict(seed=2**32), f"seed={2**32} must be below {2**32}."),
        (dict(profile_steps=(1,)), "profile_steps=(1,) must be (first, last)"),
        (dict(clip_norm=float("inf")), "clip_norm=inf must be a number"),
        (dict(data__options=None), "data.options=None must be a dict"),
        (dict(objective__terms__distil__pair=("teacher", 3)), "objective.terms.distil.pair=('teacher', 3) must be"),
        (dict(optimizer=dict(name="adamw", weight_decay="0.1")), "weight_decay='0.1' in the spec"),
        (dict(data__options=dict(packages="optax")), "packages='optax' of the dataset docstrings must be a tuple"),
    ],
)
def test_values_of_the_wrong_type_that_ml_collections_lets_through_are_refused(change, words, data_dir, one_device):
    config = smoke("forward_kl", data_dir)
    for key, value in change.items():
        *path, last = key.split("__")
        node = operator.attrgetter(".".join(path))(config) if path else config
        node[last] = value
    with pytest.raises(ValueError) as error:
        train.build(config)
    assert words in str(error.value)


def call(command, *given, environment=None):
    """Runs a command in a child process."""
    return subprocess.run(
        [sys.executable, "-m", f"kd_jax.{command}", *given], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("command", command_help.CONFIGURED)
@pytest.mark.parametrize("flag", ["--help", "--helpshort"])
def test_help_is_there_without_jax_and_without_a_work_directory(command, flag, tmp_path):
    (tmp_path / "jax.py").write_text("raise SystemExit('jax was imported')")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = call(command, flag, environment=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: python -m kd_jax.{command} --config=configs/")
    assert done.stdout.count(f"\n  python -m kd_jax.{command} --config=") == 3
    alone = call(command, environment=environment)
    folder = "out" if command == "cache_teacher" else "workdir"
    assert alone.returncode == 1 and alone.stderr.startswith(f"kd_jax: --config and --{folder} are needed")
    assert alone.stderr.count("\n") == 1 and not alone.stdout


def test_the_help_has_every_method_setting_key_and_flag():
    said = command_help.text("main")
    for name in (*METHODS, "quickstart"):
        doc = importlib.import_module(f"configs.{name}").__doc__
        assert f"\n  {name}\n      {' '.join(doc.split())[:40]}" in said, name
    assert list(dict(command_help.settings())) == [setting.__name__ for setting in settings.SETTINGS]
    for setting in dict(command_help.settings()):
        assert f"\n  {setting}\n" in said
    declared = directory.flat(base.get_config().to_dict()) | directory.flat(
        {"objective.terms.NAME": base.term().to_dict()}
    )
    specs = (
        "spans", "optimizer", "learning_rate", "prefixes", "divergence", "assistant", "logits", "tokens", "row_gate", "vocabulary",
        "reward", "policy.members", "data.order", "teacher.view",
    )  # fmt: skip
    for key in declared:
        shown = next((key[: key.index(spec) + len(spec)] for spec in specs if f".{spec}." in f".{key}."), key)
        assert f"\n  --config.{shown}\n" in said, key
    assert (
        "--config.steps\n      number of updates [1000]\n" in said and "[adamw(no_decay=(), weight_decay=0.01)]" in said
    )
    assert "  --processes\n" in said and "base\n" not in said.partition("Settings")[0]
    assert (
        "  --k\n      With top_k or samples: the number of tokens stored at each position. [64]"
        in command_help.text("cache_teacher")
    )
    assert "  --shard\n" in command_help.text("ablate") and "\n  capacity_gap\n" in command_help.text("ablate")


@pytest.mark.parametrize("command", command_help.CONFIGURED)
def test_the_examples_name_files_that_are_there(command):
    for example in command_help.EXAMPLES[command]:
        assert (ROOT / example.split()[0].removeprefix("--config=").partition(":")[0]).exists()


FLAGS = {"evaluate": evaluate_arguments.FLAGS, "replay": replay.FLAGS, "report": report_command.FLAGS}


@pytest.mark.parametrize("command", FLAGS)
def test_the_help_of_the_other_commands_has_every_flag_and_three_examples(command):
    done = call(command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: python -m kd_jax.{command} ")
    assert done.stdout.count(f"\n  python -m kd_jax.{command} ") == 3
    for name in FLAGS[command]:
        assert f"\n  --{name}\n      " in done.stdout
    assert all(len(line) <= command_help.WIDTH or " " not in line.strip() for line in done.stdout.splitlines()[4:-3])


def test_the_help_of_evaluate_has_defaults_and_choices(capsys):
    with pytest.raises(SystemExit) as ended:
        evaluate_arguments.parse(["--helpshort"])
    assert ended.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "[that of the run of --model, or else 256]" in said and "One of plain, alpaca, chat." in said
    assert "['10,20,30,40,50']" in said and "dolly_eval" in said


@pytest.mark.parametrize("command", FLAGS)
def test_the_examples_of_the_other_commands_can_be_parsed(command):
    for example in command_help.EXAMPLES[command]:
        positional = "DIR" if command == "report" else ""
        parse(command, FLAGS[command], example.split(), about="", positional=positional)


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--rows=many", "kd_jax.evaluate: --rows=many: the flag takes a whole number, such as 1000, 1_000 or 1e3."),
        ("--temperature=hot", "--temperature=hot: could not convert"),
        ("--template=alpacca", "--template=alpacca: value should be one of <plain|alpaca|chat>"),
        ("--data_options={", "--data_options={: the value is not JSON"),
        ("--data_options=[1]", "--data_options=[1]: the value must be an object of JSON"),
        ("--numbers=maybe", "--numbers=maybe"),
        ("--modle=x", "Unknown command line flag 'modle'. Did you mean: model ?"),
        ("x", "'x' is no flag; flags look like --model=VALUE."),
    ],
)
def test_a_wrong_flag_of_evaluate_is_one_paragraph(flag, words):
    with pytest.raises(SystemExit) as ended:
        evaluate_arguments.parse(["--model=a", "--out=b", flag])
    assert words in str(ended.value) and "\n" not in str(ended.value)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("evaluate", "kd_jax.evaluate: --model and --out are needed. For example: python -m kd_jax.evaluate --model="),
        ("replay", "kd_jax.replay: --workdir is needed."),
        ("report", "kd_jax.report: at least one DIR is needed."),
    ],
)
def test_a_flag_that_is_missing_is_asked_for_with_an_example(command, words):
    done = call(command)
    assert done.returncode == 1 and done.stderr.startswith(words) and done.stderr.count("\n") == 1


def test_flags_of_evaluate_have_types_and_are_absent_if_a_run_may_fill_them_in():
    args = evaluate_arguments.parse(
        ["--model", "a", "--out=b", "--rows=1e3", "--numbers", '--template_options={"x": 1}']
    )
    assert (args.model, args.rows, args.numbers, args.template_options, args.top_p) == ("a", 1000, True, {"x": 1}, 1.0)
    assert not any(hasattr(args, name) for name in ("data", "split", "template", "max_new_tokens"))


def test_a_work_directory_that_is_missing_is_asked_for(parsed):
    with pytest.raises(SystemExit, match="kd_jax: --config and --workdir are needed"):
        parsed(workdir=())
