"""Options: command line, config files, --help, and contradictions that are found before any file is read."""

import ast
import dataclasses
import importlib
import inspect
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch

import rewards
import rollout
import train
from data.prompts import TEMPLATES, Prompt, language
from lib import options
from lib.distributed import World
from lib.files import read_jsonl
from lib.options import UserError
from lib.scoring import choose_rewards
from rewards import REQUIRED, REWARDS, TRANSFORMS
from scripts import pretrain
from train import Config, check, parse

ROOT = Path(__file__).parent.parent
TINY = dataclasses.replace(Config(), **{
    k: v for k, v in json.loads((ROOT / "configs" / "tiny.json").read_text()).items() if "//" not in k})
FIELDS = {f.name: f for f in dataclasses.fields(Config)}
OTHER = {str: "elsewhere", int: 7919, float: 0.125}  # a value that is no field's default


def other(field):
    """A legal value of a field that is not its default."""
    value = not field.default if field.type is bool else OTHER[field.type]
    assert value != field.default
    return value


def config_file(folder, content):
    file = folder / "config.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(file)


# ------------------------------------------------------------------------------------------ parse


def test_no_argument_gives_the_embedded_default():
    assert parse([]) == TINY and parse([]).files[0].endswith("configs/tiny.json")
    assert (TINY.model, TINY.lr, TINY.recompute) == ("data/tiny/base", 1.75e-4, False)
    assert parse(["--config", str(ROOT / "configs" / "tiny.json")]) == TINY


def test_a_model_or_a_config_takes_nothing_from_the_embedded_default(tmp_path):
    """Nor do its paths: what a real run must be given is empty."""
    assert parse(["--model", "here"]) == Config(model="here") and not parse(["--model", "here"]).files
    file = config_file(tmp_path, {"steps": 3})
    assert parse(["--config", file]) == Config(steps=3) and parse(["--config", file]).files == [file]
    assert not any("tiny" in str(f.default) for f in FIELDS.values()) and Config().lr == 1e-6


@pytest.mark.parametrize("name", FIELDS)
def test_every_option_is_set_from_the_command_line_in_both_spellings(name):
    """--NAME VALUE and --NAME=VALUE, with underscores or hyphens; every other field keeps its default."""
    value = other(FIELDS[name])
    text = str(value).lower() if isinstance(value, bool) else str(value)
    expected = dataclasses.replace(Config() if name == "model" else TINY, **{name: value})
    for spelled in ("--" + name, "--" + name.replace("_", "-")):
        for arguments in ([spelled, text], [f"{spelled}={text}"]):
            got = parse(arguments)
            assert got == expected and type(getattr(got, name)) is FIELDS[name].type


@pytest.mark.parametrize("name", FIELDS)
def test_every_option_is_set_from_a_config_file_as_a_value_or_as_text(name, tmp_path):
    value = other(FIELDS[name])
    expected = dataclasses.replace(Config(), **{name: value})
    for written in (value, str(value)):
        got = parse(["--config", config_file(tmp_path, {name: written})])
        assert got == expected and type(getattr(got, name)) is FIELDS[name].type


def test_a_whole_number_in_a_config_file_is_a_number(tmp_path):
    got = parse(["--config", config_file(tmp_path, {"lr": 1, "clip_grad": 2})])
    assert (got.lr, got.clip_grad) == (1.0, 2.0) and type(got.lr) is float


def test_options_after_a_config_file_win_over_it(tmp_path):
    file = config_file(tmp_path, {"lr": 0.5, "steps": 3, "wandb": True})
    got = parse(["--config", file, "--lr", "0.25", "--wandb=false"])
    assert (got.lr, got.steps, got.wandb) == (0.25, 3, False)
    assert parse([f"--config={file}", "--steps", "4"]).steps == 4
    assert parse(["--lr", "0.25", "--config", file]).lr == 0.5, "the later one wins"
    assert parse(["--lr", "1", "--lr", "2"]).lr == 2.0


def test_a_recorded_config_reads_back_as_it_was(tmp_path):
    """A run's config.json is a config file."""
    config = dataclasses.replace(Config(), **{name: other(f) for name, f in FIELDS.items()})
    assert parse(["--config", config_file(tmp_path, dataclasses.asdict(config))]) == config


def test_a_folder_with_a_run_brings_the_options_of_the_run(tmp_path):
    """Those that are given win, on the command line or in another file; how it was to be resumed is past."""
    config = dataclasses.replace(Config(), **{name: other(f) for name, f in FIELDS.items()})
    config_file(tmp_path, dataclasses.asdict(config))
    folder = ["--run_dir", str(tmp_path)]
    assert parse(folder).files == [str(tmp_path / "config.json")]
    expected = dataclasses.replace(config, run_dir=str(tmp_path), resume="auto")
    assert parse(folder) == expected
    assert parse(["--steps", "3", *folder]) == dataclasses.replace(expected, steps=3)
    file = tmp_path / "other.json"
    file.write_text(json.dumps({"lr": 0.5, "run_dir": str(tmp_path)}))
    assert parse(["--config", str(file)]) == dataclasses.replace(expected, lr=0.5)
    assert parse(["--run_dir", str(tmp_path / "absent")]).steps == TINY.steps


@pytest.mark.parametrize("arguments, stop", [
    (["--stop="], ()), (["--stop", ""], ()), (["--stop=a=b,--c"], ("a=b", "--c")),
    (["--stop", "</a>"], ("</a>",)), (["--stop", "x,,y,"], ("x", "y")), (["--stop", " x y"], (" x y",)),
    (["--stop=用户"], ("用户",))])
def test_text_is_taken_as_it_stands(arguments, stop):
    assert parse(arguments).stop_strings == stop


def test_numbers_may_be_written_in_any_of_pythons_ways():
    assert parse(["--lr", "1e-6"]).lr == 1e-6 and parse(["--lr", "3"]).lr == 3.0
    assert parse(["--seed", "-5"]).seed == -5


@pytest.mark.parametrize("text, value", [("true", True), ("false", False), ("True", True), ("FALSE", False)])
def test_booleans_are_written_true_and_false(text, value):
    assert parse(["--recompute", text]).recompute is value


@pytest.mark.parametrize("name, near", [
    ("learning_rate", None), ("grop_size", "group_size"), ("group-sizes", "group_size"),
    ("max_new_token", "max_new_tokens"), ("step", "steps"), ("stopp", "stop"), ("Seed", "seed"),
    ("resum", "resume"), ("qqqq", None)])
def test_an_unknown_option_is_an_error_that_names_the_nearest_one(name, near, tmp_path):
    file = config_file(tmp_path, {name.replace("-", "_"): 1})
    for arguments in (["--" + name, "1"], [f"--{name}=1"], ["--config", file]):
        with pytest.raises(UserError) as e:
            parse(arguments)
        assert repr(name.replace("-", "_")) in str(e.value)
        if near:
            assert f"did you mean {near!r}" in str(e.value)


@pytest.mark.parametrize("name, text, expected", [
    ("steps", "many", "a whole number"), ("steps", "1.5", "a whole number"),
    ("steps", "1e3", "a whole number"), ("steps", "", "a whole number"), ("lr", "fast", "a number"),
    ("lr", "", "a number"), ("lr", "1,5", "a number"), ("recompute", "1", "true or false"),
    ("recompute", "yes", "true or false"), ("wandb", "", "true or false"),
    ("wandb", "--lr", "true or false")])
def test_a_value_of_the_wrong_type_is_an_error_that_names_option_and_value(name, text, expected):
    with pytest.raises(UserError, match=f"{name} must be {expected}") as e:
        parse([f"--{name}", text])
    assert repr(text) in str(e.value) and "command line" in str(e.value)


@pytest.mark.parametrize("name, value", [
    ("steps", 1.5), ("steps", True), ("steps", None), ("steps", [1]), ("steps", "x"), ("lr", True),
    ("lr", None), ("lr", {}), ("recompute", 1), ("recompute", 0), ("recompute", None), ("model", 3),
    ("model", None), ("stop", ["a"]), ("stop", True)])
def test_a_wrong_type_in_a_config_file_is_an_error_that_names_file_option_and_value(name, value, tmp_path):
    """JSON's true is not 1, and a list is not a comma-separated text."""
    file = config_file(tmp_path, {name: value})
    with pytest.raises(UserError) as e:
        parse(["--config", file])
    assert file in str(e.value) and f"{name} must be" in str(e.value) and repr(value) in str(e.value)


@pytest.mark.parametrize("arguments, part", [
    (["lr", "1"], "'lr'"), (["--lr", "1", "2"], "'2'"), (["-lr", "1"], "'-lr'"), (["--lr"], "--lr"),
    (["--config"], "--config"), (["--steps", "3", "--wandb"], "--wandb"), (["--", "3"], "no option")])
def test_a_command_line_that_is_not_names_and_values_is_an_error(arguments, part):
    with pytest.raises(UserError) as e:
        parse(arguments)
    assert part in str(e.value)


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", '"steps"', "null", "3", "{'steps': 3}"])
def test_a_config_file_that_is_no_json_object_is_an_error_that_names_it(content, tmp_path):
    file = config_file(tmp_path, content)
    with pytest.raises(UserError) as e:
        parse(["--config", file])
    assert file in str(e.value) and "JSON object" in str(e.value)


def test_a_config_file_that_is_absent_is_an_error_that_names_it(tmp_path):
    for file, why in ((tmp_path / "absent.json", "does not exist"), (tmp_path, "cannot be read")):
        with pytest.raises(UserError, match=why) as e:
            parse(["--config", str(file)])
        assert str(file) in str(e.value)


def test_a_config_file_that_is_not_text_is_an_error_that_names_it(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(UserError, match="model.safetensors"):
        parse(["--config", str(file)])


# ------------------------------------------------------------------------------------------ JSON

FILES = {  # what stands in a JSON file: what is said of it
    "": "Expecting value", "{": "Expecting property name", '{"a": 1} x': "Extra data",
    "[1]": "must be a JSON object",
    "null": "must be a JSON object", '{"a": NaN}': "NaN is not a finite number",
    '{"a": -Infinity}': "-Infinity is not a finite number", '{"a": 1e999}': "1e999 is not a finite number",
    '{"a": %s}' % ("9" * 5000): "5000 digits", '{"a": %s' % ("[" * 100_000): "nested too deeply",
    b"\xff\xfe{\0}\0": "codec can't decode", b"\x80\x81": "codec can't decode",
    b'{"a": "\xe9"}': "codec can't decode"}


@pytest.mark.parametrize("content", FILES, ids=range(len(FILES)))
def test_a_json_file_that_is_none_is_one_sentence(content, tmp_path, monkeypatch):
    file = tmp_path / "x.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as e:
        options.read_json(file, "copy it again")
    assert str(e.value).startswith(f"{file} cannot be read (") and str(e.value).endswith("): copy it again")
    assert FILES[content] in str(e.value) and len(str(e.value)) < 400 and "\n" not in str(e.value)


def test_a_json_file_that_is_missing_a_folder_or_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(options, "FILE_BYTES", 20)
    file = tmp_path / "x.json"
    file.write_bytes(b'\xef\xbb\xbf{"a": "' + b"x" * 8 + b'"}')  # 20 bytes
    assert options.read_json(file, "") == {"a": "x" * 8}
    file.write_bytes(b'{"a": "' + b"x" * 12 + b'"}')
    for path, why in ((file, "cannot be read (more than 20 bytes)"),
                      (tmp_path, "cannot be read (Is a directory)"),
                      (tmp_path / "gone", "does not exist"), (file / "x", "cannot be read (Not a directory)"),
                      (tmp_path / ("x" * 300), "cannot be read (File name too long)"),
                      (f"{file}\0", "cannot be read (embedded null byte)")):
        with pytest.raises(UserError) as e:
            options.read_json(path, "copy it")
        assert str(e.value) == f"{path} {why}: copy it"


FIELD = options.Field
VALUES = [  # field, value: what it becomes, or what is said
    (FIELD(int, 1, 9), 1, 1), (FIELD(int, 1, 9), 9, 9),
    (FIELD(int, 1, 9), 0, "a whole number of at most 18 digits from 1 to 9, not 0"),
    (FIELD(int, 1, 9), 10, "not 10"), (FIELD(int, 1, 9), 1.0, "not 1.0"), (FIELD(int, 1, 9), "3", "not '3'"),
    (FIELD(int, 0, 9), True, "not True"), (FIELD(int), None, "not None"), (FIELD(int, default=4), None, 4),
    (FIELD(int), [1], "not [1]"), (FIELD(int), 10**18, 10**18), (FIELD(int), 10**18 + 1, "at most 18 digits"),
    (FIELD(int), 10**400, "(401 characters)"), (FIELD(float, 0, 1), 1, 1.0),
    (FIELD(float, 0, 1), 10**400, "(401 characters)"), (FIELD(float, 0, 1), False, "not False"),
    (FIELD(float), math.nan, "not nan"), (FIELD(float), math.inf, "not inf"),
    (FIELD(float, 1e-3, 1), 0.0, "from 0.001 to 1, not 0.0"), (FIELD(str), "a\0", "a\0"),
    (FIELD(str), 3, "a string, not 3"), (FIELD(bool), 1, "true or false, not 1"),
    (FIELD(bool, default=False), None, False), (FIELD(bool), "true", "not 'true'"),
    (FIELD(dict), [], "an object, not []"), (FIELD(list), {}, "a list, not {}"),
    (FIELD(dict), {"a": 1}, {"a": 1})]


@pytest.mark.parametrize("field, value, expected", VALUES, ids=range(len(VALUES)))
def test_a_field_has_its_type_and_range_or_is_refused_by_file_name_and_value(field, value, expected):
    for raw in [{"size": value}] + [{}] * (value is None):
        if isinstance(expected, str) and expected != value:
            with pytest.raises(UserError) as e:
                options.typed(raw, "x.json", {"size": field})
            assert str(e.value).startswith("x.json: size must be ") and expected in str(e.value)
        else:
            (got,) = options.typed(raw, "x.json", {"size": field}).values()
            assert got == expected and type(got) is type(expected)


@pytest.mark.parametrize("content, part", [
    ("\n", "at line 1 (Expecting value"), ('{"a": 1}\n[1]\n', "at line 2 (it must be a JSON"),
    ('{"a": 1}\n{"a": "x"}\n', ", line 2: a must be a whole"), ('{"a": NaN}\n', "NaN is not a finite"),
    ("{}\n", ", line 1: a must be a whole"),
    (b"\xff\n", "codec can't decode")])
def test_records_that_cannot_be_are_named_by_line(content, part, tmp_path):
    file = tmp_path / "m.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as e:
        read_jsonl(file, "remove it", a=FIELD(int))
    assert str(file) in str(e.value) and part in str(e.value)
    file.write_text('{"a": 1}\n{"a": ')
    assert read_jsonl(file, a=FIELD(int)) == [{"a": 1}], "without the line that is being written"


# ------------------------------------------------------------------------------------------ odd values


@pytest.mark.parametrize("name, value", [
    ("model", "a\0b"), ("prompts", "\ud800"), ("stop", "\udcff"), ("steps", "9" * 5000), ("steps", "1" * 400),
    ("lr", "1" * 400), ("lr", "inf"), ("temperature", "nan"), ("timeout", "1e14"), ("seed", str(10**19)),
    ("loss", "\0"), ("wandb", "\ud800")])
def test_an_odd_value_is_refused_in_a_short_line(name, value, tmp_path):
    for arguments in ([f"--{name}", value], ["--config", config_file(tmp_path, {name: value})]):
        with pytest.raises(UserError) as e:
            parse(arguments)
        assert name in str(e.value) and len(str(e.value)) < 300
        str(e.value).encode()


@pytest.mark.parametrize("name", [
    name for name, field in FIELDS.items() if field.type in (int, float) and name != "seed"])
def test_every_number_has_a_finite_range(name):
    for value in (10**12, 10**400, float("inf"), float("nan"), -10**12):
        assert name in refused(ranks=1, **{name: value})


@pytest.mark.parametrize("name", options.TORCHRUN)
@pytest.mark.parametrize("value", ["abc", "", "-1", "65536", "1.5", " 1", "9" * 5000])
def test_torchruns_variables_must_be_numbers(name, value, monkeypatch, capsys):
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as e:
        options.command(lambda: None)()
    (line,) = capsys.readouterr().err.splitlines()
    assert e.value.code == 2 and line.startswith(f"error: environment: {name} must be a whole number")
    monkeypatch.setenv(name, "3")
    assert options.environment()[name] == 3


def test_line_breaks_of_a_value_do_not_break_the_line(monkeypatch, capsys):
    for name in ("a\nb", "x\n" * 9999):
        monkeypatch.setattr(sys, "argv", ["train.py", "--reward", name, "--device", "cpu"])
        with pytest.raises(SystemExit):
            train.main()
        (line,) = capsys.readouterr().err.splitlines()
        assert len(line) < 3000 and line.endswith(", ".join(REWARDS))


# ------------------------------------------------------------------------------------------ positional


@dataclasses.dataclass
class Files:
    first: str = ""  # one file
    # others
    rest: tuple = ()  # more files

    size: int = 3  # of them, which a sentence of so many words says that it must be wrapped somewhere


@pytest.mark.parametrize("arguments, expected", [
    (["a", "b"], Files("a", ("b",))), (["a", "--size", "4", "b", "c"], Files("a", ("b", "c"), 4)),
    (["--size=4", "a", "b", "--size=5", "c"], Files("a", ("b", "c"), 5)),
    (["a", "b=c"], Files("a", ("b=c",)))])
def test_values_without_names_go_to_the_positional_fields(arguments, expected):
    assert options.parse(Files, arguments, "", "first rest") == expected


@pytest.mark.parametrize("arguments, part", [
    ([], "FIRST is missing"), (["a"], "REST is missing"), (["a", "\0"], "rest must be UTF-8"),
    (["a", "-b"], "is not an option"),
    (["--size", "3"], "FIRST is missing")])
def test_positional_fields_must_be_given(arguments, part):
    with pytest.raises(UserError, match=part):
        options.parse(Files, arguments, "", "first rest")


def test_help_shows_positional_fields_groups_and_wrapped_lines():
    shown = options.help_text(Files, "About.", "first rest").splitlines()
    assert shown[3:6] == ["  FIRST                   str    one file ['']", "others",
                          "  REST                    tuple  more files [()]"]
    assert shown[6] == "" and len(shown) == 9 and shown[8] == " " * 33 + "wrapped somewhere [3]"


@pytest.mark.parametrize("script", sorted(f.stem for f in (ROOT / "scripts").glob("[a-z]*.py")) + ["train"])
def test_help_of_every_command_fits_a_hundred_columns(script, monkeypatch, capsys):
    module = train if script == "train" else importlib.import_module(f"scripts.{script}")
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as e:
        module.main()
    lines = capsys.readouterr().out.splitlines()
    assert e.value.code == 0 and "Options, with their defaults:" in lines
    assert [line for line in lines if len(line) > 100] == []


# ------------------------------------------------------------------------------------------ help


@pytest.mark.parametrize("flag", [["--help"], ["-h"], ["--lr", "1", "--help"]])
def test_help_lists_every_option_with_its_comment_and_default(flag, capsys):
    """--help is made from the source: a field whose line is written otherwise would vanish from it."""
    with pytest.raises(SystemExit) as e:
        parse(flag)
    assert e.value.code == 0
    shown = re.sub(r"\n {33}", " ", capsys.readouterr().out).splitlines()  # of wrapped lines
    source = inspect.getsource(Config).splitlines()
    for name, field in FIELDS.items():
        (line,) = [x for x in source if re.match(rf"    {name}: ", x)]
        assert "  # " in line, f"the default of {name} and its comment must stand on one line"
        comment = line.split("  # ", 1)[1]
        (row,) = [x for x in shown if re.match(rf"\s*--{name}\s", x)]
        assert comment in row and field.type.__name__ in row
        default = re.search(r"\[([^][]*)\]$", row).group(1)
        assert ast.literal_eval(default) == field.default
    assert any("--config FILE.json" in x for x in shown)


def test_help_lists_nothing_else(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    rows = re.findall(r"^  --(\w+)", capsys.readouterr().out, re.M)
    assert rows == list(FIELDS)


def test_a_wrong_option_ends_the_program_with_one_line_and_no_traceback(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys, "argv", ["train.py", "--grop_size", "4"])
    with pytest.raises(SystemExit) as e:
        train.main()
    error = capsys.readouterr().err
    assert e.value.code == 2
    assert error.startswith("error: ") and "group_size" in error and error.count("\n") == 1


# ------------------------------------------------------------------------------------------ check


def refused(ranks=2, **changes):
    """The message with which check refuses the default config with some changes."""
    with pytest.raises(UserError) as e:
        check(dataclasses.replace(Config(), **changes), World(rank=0, size=ranks, device=torch.device("cpu")))
    return str(e.value)


def allowed(ranks=2, **changes):
    check(dataclasses.replace(Config(), **changes), World(rank=0, size=ranks, device=torch.device("cpu")))


def test_the_default_config_is_allowed():
    for ranks in (1, 2, 4, 8):
        allowed(ranks)


@pytest.mark.parametrize("name", [
    "steps", "prompts_per_step", "max_new_tokens", "temperature", "clip_grad", "micro_batch_tokens",
    "max_sequences", "page_size", "eval_every", "save_every", "keep_checkpoints"])
def test_what_must_be_positive_may_not_be_zero_negative_or_nan(name):
    for value in (0, -1, float("nan")):
        assert re.search(rf"{name} must be (positive|at least [0.1]+), not {value}", refused(**{name: value}))
    assert f"{name} must be at most" in refused(**{name: 10**12})
    allowed(ranks=1, **{name: 1})


@pytest.mark.parametrize("name", ["lr", "warmup", "weight_decay", "eps_low", "eps_high", "std_floor"])
def test_what_may_be_zero_may_not_be_negative_or_nan(name):
    for value in (-1, -1e-9, float("nan")):
        assert f"{name} must be at least 0, not {value}" in refused(**{name: value})
    assert f"{name} must be at most 1,000,000,000, not inf" in refused(**{name: float("inf")})
    allowed(**{name: 0})


@pytest.mark.parametrize("name, choices", [
    ("prompt_style", ("think", "direct")), ("unreachable", ("drop", "keep")),
    ("resume", ("auto", "true", "false")), ("device", ("auto", "cpu", "cuda")),
    ("sampler_dtype", ("auto", "float32", "bfloat16"))])
def test_a_choice_outside_its_list_is_refused_with_the_list(name, choices):
    for value in ("", "other", choices[0].upper(), choices[0] + " "):
        message = refused(**{name: value})
        assert name in message and repr(value) in message and all(choice in message for choice in choices)
    for value in choices:
        allowed(**{name: value})


def test_a_group_of_one_has_nothing_to_compare():
    for size in (1, 0, -3):
        assert f"group_size must be at least 2, not {size}" in refused(group_size=size)
    allowed(group_size=2)


def test_training_samples_from_the_whole_distribution():
    """With top-p below 1 the policy that samples is not the one whose logprobs are trained."""
    for top_p in (0.95, 0.0, 1.5, float("nan")):
        assert f"top_p must be 1 in training, not {top_p}" in refused(top_p=top_p)


def test_groups_are_shared_out_evenly_over_ranks():
    message = refused(ranks=2, prompts_per_step=7)
    assert "prompts_per_step 7" in message and "2 ranks" in message
    refused(ranks=3, prompts_per_step=8)
    refused(ranks=16, prompts_per_step=8)
    allowed(ranks=3, prompts_per_step=9)
    allowed(ranks=1, prompts_per_step=7)


def test_rewards_are_named_as_they_are_registered():
    message = refused(reward="length,lenght")
    assert "'lenght'" in message and all(name in message for name in REWARDS)
    for reward in ("length", " length , format ", "format,", ""):
        allowed(reward=reward)


def test_some_reward_needs_a_weight(monkeypatch):
    """Advantages are averaged with weights w / sum w: with all of them 0 that is a division by zero."""
    monkeypatch.setitem(REWARDS, "length", (REWARDS["length"][0], 0.0))
    assert "length" in refused(reward="length") and "weight 0" in refused(reward="length")
    allowed(reward="length,format")
    names = [r.name for r in choose_rewards("", rewards)]
    assert "length" not in names and "format" in names
    named = [r.name for r in choose_rewards("length, format", rewards)]
    assert named == ["length", "format"], "if named, it is logged"


@pytest.mark.parametrize("table, entry, part", [
    (TRANSFORMS, {"lenght": abs}, "'lenght'"), (TRANSFORMS, {"length": 2}, "must be a function"),
    (REQUIRED, {"lenght": 0.5}, "'lenght'"), (REQUIRED, {"format": "high"}, "must be a number"),
    (REQUIRED, {"format": float("nan")}, "must be a number"), (REQUIRED, {"overlong": -0.5}, "name it too")])
def test_transforms_and_requirements_are_of_rewards_that_are_trained(table, entry, part, monkeypatch):
    monkeypatch.setattr("rewards.TRANSFORMS" if table is TRANSFORMS else "rewards.REQUIRED", entry)
    assert part in refused(reward="length,format")


def test_a_required_reward_is_computed_though_it_has_no_weight(monkeypatch):
    monkeypatch.setitem(REQUIRED, "overlong", -0.5)
    assert [r.name for r in choose_rewards("", rewards)] == ["length", "format", "writing", "overlong"]
    allowed()
    allowed(reward="length,overlong")


# ------------------------------------------------------------------------------------------ prompts


@pytest.mark.parametrize("query, hi, tokens", [
    ("Write a story.", 1000, 2600), ("写一个故事", 1000, 1400), ("写一个故事", 10**6, 14000),
    ("Write.", 0, 1)])
def test_a_guess_at_tokens_knows_the_rate_of_the_language(query, hi, tokens):
    prompt = Prompt("1", query, query, (0, hi), language(query))
    assert rollout.expected_tokens(prompt, Config(max_new_tokens=14000)) == tokens
    assert rollout.expected_tokens(dataclasses.replace(prompt, length_range=None), Config()) == 14000


def test_evaluation_prompts_that_are_dropped_are_counted_in_the_start_line(tmp_path, capsys):
    file = tmp_path / "eval.jsonl"
    file.write_text("".join(f'{{"prompt": "Write {n} words.", "length": {n}}}\n' for n in (40, 900, 800)))
    train.train(parse(["--eval_prompts", str(file), "--run_dir", str(tmp_path / "run"), "--steps", "1",
                       "--prompts_per_step", "1", "--group_size", "2", "--max_new_tokens", "120",
                       "--reward", "length"]))
    assert "2 unreachable evaluation prompts dropped" in capsys.readouterr().out.splitlines()[0]


# ------------------------------------------------------------------------------------------ configs/


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.json")), ids=lambda f: f.name)
def test_every_config_is_one(file, monkeypatch):
    """Its names and types; and that check() finds nothing wrong, on the number of GPUs that it is for."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    config = parse(["--config", str(file)])
    ranks = {"tiny": 2, "qwen2.5-7b": 8, "qwen2.5-32b": 64}[file.stem]
    check(config, World(0, ranks, None))


@pytest.mark.parametrize("file", sorted((ROOT / "configs/paper").glob("*.json")), ids=lambda f: f.name)
def test_what_differs_in_the_papers_other_settings_is_known_to_their_program(file):
    if file.stem in ("pretrain", "sft"):
        config = options.parse(pretrain.Config, ["--config", str(file)], "")
        assert config.row_tokens == 32768 and config.rows_per_step % 64 == 0 and (config.data or config.sft)
        return
    base = str(ROOT / "configs/qwen2.5-32b.json")
    plain, other = (vars(parse(["--config", base, *more])) for more in ([], ["--config", str(file)]))
    assert {k for k in plain if plain[k] != other[k]} == {"nothink": {"prompt_style", "files"},
                                                          "continual": {"model", "files"}}[file.stem]


def test_a_sample_ends_where_it_goes_on_as_the_user_of_its_template():
    for template in TEMPLATES.values():
        assert re.findall(r"(<\|\w+\|>): \{query\}", template)[0] in Config().stop_strings


def test_keys_that_begin_with_slashes_are_comments(tmp_path):
    file = tmp_path / "c.json"
    file.write_text('{"//": "note", "//lr": "not specified by the paper", "lr": 0.5}')
    assert parse(["--config", str(file)]) == Config(lr=0.5)
