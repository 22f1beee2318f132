import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from capo import CreditRule
from capo.cli import app
from capo.config import MAX_FILE, TrainConfig, _all_keys, differing_keys, load_config
from capo.errors import UsageError

EXAMPLES = Path(__file__).parent.parent / "examples" / "arithmetic"


def written(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refusal(path=None, overrides=()):
    with pytest.raises(UsageError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_override_wins_over_file_wins_over_default(tmp_path):
    path = written(tmp_path, "updates: 7\nloss:\n  kl_coef: 0.5\n")
    default, file, flags = TrainConfig(), load_config(path), load_config(path, ["updates=8", "loss.clip_low=0.1"])
    assert (default.updates, file.updates, flags.updates) == (60, 7, 8)
    assert (default.loss.kl_coef, file.loss.kl_coef, flags.loss.kl_coef) == (0.0, 0.5, 0.5)
    assert (file.loss.clip_low, flags.loss.clip_low) == (0.2, 0.1)


def test_the_last_override_wins_and_values_are_yaml_1_2():
    config = load_config(None, ["updates=1", "updates=2", "learning_rate=1e-6", "micro_batch=null", "epochs=010"])
    assert (config.updates, config.learning_rate, config.micro_batch, config.epochs) == (2, 1e-6, None, 10)


def test_string_fields_take_the_text_as_it_is():
    assert load_config(None, ["output=2024"]).output == "2024"
    assert load_config(None, ["output=a=b: [c"]).output == "a=b: [c"
    assert load_config(None, ["warm_start.cache=null"]).warm_start.cache is None


def test_an_empty_file_gives_the_defaults(tmp_path):
    assert load_config(written(tmp_path, "# nothing\n")) == TrainConfig()


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("updats", "updates"),
        ("learningrate", "learning_rate"),
        ("loss.klcoef", "loss.kl_coef"),
        ("hiden", "model.hidden"),  # right name, section left out
        ("model.kl_coef", "loss.kl_coef"),
        ("modle.hidden", "model"),
        ("judge.num_vote", "judge.num_votes"),
    ],
)
def test_unknown_key_names_the_nearest(tmp_path, key, near):
    assert f"did you mean {near}?" in refusal(overrides=[f"{key}=1"])
    nested = "1"
    for part in reversed(key.split(".")):
        nested = f"{{{part}: {nested}}}"
    message = refusal(written(tmp_path, nested))
    assert "config.yaml: unknown key" in message and f"did you mean {near}?" in message


def test_unknown_key_with_nothing_near_lists_the_keys():
    assert "there are method, output, updates" in refusal(overrides=["xyzzy=1"])


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("updates=false", "updates: input should be a valid integer, got False (bool)"),
        ("updates='5'", "updates: input should be a valid integer, got '5' (str)"),
        ("updates=5.0", "updates: input should be a valid integer, got 5.0 (float)"),
        ("updates=on", "got 'on' (str)"),
        ("updates=null", "updates: input should be a valid integer"),
        ("updates=[1]", "updates: input should be a valid integer"),
        ("learning_rate='1e-3'", "learning_rate: input should be a valid number, got '1e-3' (str)"),
        ("learning_rate=yes", "learning_rate: input should be a valid number, got 'yes' (str)"),
        ("learning_rate=true", "learning_rate: input should be a valid number, got True (bool)"),
        ("method=ppo", "method: input should be 'capo', 'grpo'"),
        ("task.operators=/", "task.operators"),
        ("updates=2026-01-01", "updates: input should be a valid integer"),
    ],
)
def test_wrong_type_names_key_and_value(override, says):
    assert says in refusal(overrides=[override])


def test_an_error_names_the_file_only_if_no_override_can_be_at_fault(tmp_path):
    path = written(tmp_path, "updates: x\nprompts: 6\nminibatches: 4\njudge: {kind: openai}\n")
    assert refusal(path, ["epochs=y"]).splitlines() == [
        f"{path}: updates: input should be a valid integer, got 'x' (str)",
        "epochs: input should be a valid integer, got 'y' (str)",
        f"{path}: judge: kind=openai needs judge.openai.url",
    ]
    good = written(tmp_path, "prompts: 6\nminibatches: 3\n")
    assert refusal(good, ["minibatches=4"]) == "prompts=6 must be a multiple of minibatches=4"
    assert refusal(good, ["judge.kind=vllm"]) == "judge: kind=vllm needs judge.vllm.path"
    bad = written(tmp_path, "prompts: 6\nminibatches: 4\n")
    assert refusal(bad) == f"{bad}: prompts=6 must be a multiple of minibatches=4"


def test_a_setting_in_place_of_the_file_is_told_apart():
    assert "the first argument is a YAML file, settings come after it" in refusal("updates=3")


@pytest.mark.parametrize(
    "override",
    ["judge.adaptive='false'", "judge.adaptive=0", "judge.structured=off", "judge.openai.allow_http='true'"],
)
def test_only_true_and_false_are_booleans(override):
    assert "input should be a valid boolean" in refusal(overrides=[override])


# The last value that is allowed, and the first one that is not.
@pytest.mark.parametrize(
    ("key", "allowed", "refused"),
    [
        ("group_size", 2, 1), ("prompts", 2, 0), ("updates", 0, -1), ("epochs", 1, 0), ("micro_batch", 1, 0),
        ("max_new_tokens", 1, 0), ("temperature", 1e-3, 0), ("temperature", 100, 101), ("learning_rate", 1e-9, 0),
        ("learning_rate", 1, 1.5), ("weight_decay", 0, -0.1), ("max_grad_norm", 1e-9, 0), ("max_bad_updates", 1, 0),
        ("eval_every", 1, 0), ("save_every", 1, 0), ("keep_checkpoints", 1, 0), ("threads", 1, 0), ("task.steps", 1, 0),
        ("task.held_out", 1, 0), ("task.misconceptions", 1, 1.1), ("model.layers", 1, 0), ("model.init_std", 1e-9, 0),
        ("warm_start.steps", 0, -1), ("warm_start.batch", 1, 0), ("warm_start.learning_rate", 1e-9, 0),
        ("judge.num_votes", 1, 0), ("judge.num_votes", 127, 128), ("judge.failed", 1, 1.1), ("judge.missed", 0, -0.1),
        ("judge.top_p", 1, 0), ("judge.temperature", 0, -0.1), ("judge.max_tokens", 1, 0), ("rollout.chunks", 1, 0),
        ("rollout.context", 2, 1), ("rollout.max_mismatch", 1e-9, 0), ("credit.clamp", 1e-9, 0), ("credit.std_floor", 0, -1),
        ("credit.process_weight", 0, -1), ("loss.clip_low", 1, 1.1), ("loss.clip_low", 0, -0.1),
        ("loss.clip_dual", 1.001, 1), ("loss.kl_coef", 0, -0.1), ("loss.importance_cap", 1e-9, 0), ("seeds.rl", 2**31 - 1, 2**31),
    ],
)  # fmt: skip
def test_where_ranges_end(key, allowed, refused):
    rest = ["minibatches=1", "judge.num_votes=1"]
    load_config(None, [*rest, f"{key}={allowed}"])
    assert key in refusal(overrides=[*rest, f"{key}={refused}"])


def test_heads_have_an_even_width():
    load_config(None, ["model.hidden=72", "model.heads=4"])
    assert "hidden=68 must be a multiple of 2 * heads=8" in refusal(overrides=["model.hidden=68", "model.heads=4"])


def numeric_keys():
    schema = TrainConfig.model_json_schema()

    def kinds(field):
        return {part.get("type") for part in [field, *field.get("anyOf", [])]}

    for key in _all_keys(TrainConfig):
        *sections, name = key.split(".")
        properties = schema["properties"]
        for section in sections:
            properties = schema["$defs"][properties[section]["$ref"].rpartition("/")[2]]["properties"]
        if kinds(properties[name]) & {"integer", "number"}:
            yield key


def test_the_numeric_keys_are_found():
    keys = list(numeric_keys())
    assert {"updates", "micro_batch", "loss.clip_dual", "seeds.rl", "judge.missed"} <= set(keys) and len(keys) > 40


@pytest.mark.parametrize("key", list(numeric_keys()))
@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "-11", "1e30", str(10**30)])
def test_every_number_has_a_range(key, value):
    assert key in refusal(overrides=[f"{key}={value}"])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: &x [1]\nb: *x", "anchors and aliases"),
        ("updates: !!int 5", "tags such as"),
        ("updates: !!python/object/apply:os.system ['true']", "tags such as"),
        ("updates: 1\nupdates: 2", "not valid YAML"),
        ("loss: {kl: k1, kl: k2}", "not valid YAML"),
        ("updates: 1\n\tepochs: 2", ":2: not valid YAML"),
        ("updates: [1", "not valid YAML"),
        ("- 1\n- 2", "a mapping of keys to values, this is a list"),
        ("just text", "a mapping of keys to values, this is a str"),
        ("updates: 1\n---\nupdates: 2", "more than one document"),
        ("1: 2", "the key 1 in the file is no string"),
        ("model: 3", "model: input should be a valid dictionary"),
        ("updates: " + "[" * 5000, "nested too deeply"),
        ("x: [" + "1," * 20_000 + "]", "too long"),
        ("# " + "x" * MAX_FILE, f"more than {MAX_FILE} bytes"),
        (b"updates: \xff", "not UTF-8"),
        (b"updates: \x00", "not valid YAML"),
        ("updates: " + "1" * 5000, "not valid YAML"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_is_no_plain_yaml_mapping_is_refused(tmp_path, text, says):
    message = refusal(written(tmp_path, text))
    assert says in message and "config.yaml" in message


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    assert "No such file" in refusal(tmp_path / "none.yaml")
    assert "Is a directory" in refusal(tmp_path)


@pytest.mark.parametrize("override", ["nonsense", "=3", "task=3", "loss.kl_coef.x=3", "updates=&a 1", "updates=*a"])
def test_overrides_of_another_form_are_refused(override):
    assert refusal(overrides=[override])


def test_an_override_into_a_section_that_the_file_made_a_value(tmp_path):
    assert "model is a section" in refusal(written(tmp_path, "model: 3"), ["model.hidden=8"])


@pytest.mark.parametrize(
    "key", ["api_key", "judge.api_key", "judge.api_token", "password", "hf_token", "client_secret"]
)
def test_secrets_are_refused_and_not_repeated(tmp_path, key):
    section, _, name = key.rpartition(".")
    text = f"{section}: {{{name}: hunter2}}" if section else f"{name}: hunter2"
    for message in (refusal(written(tmp_path, text)), refusal(overrides=[f"{key}=hunter2"])):
        assert "environment variable" in message and "hunter2" not in message


def test_the_value_of_an_unknown_key_is_not_repeated():
    assert "hunter2" not in refusal(overrides=["passphrase=hunter2"])


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["judge.num_votes=0"], "method=capo with process_weight 1 needs votes"),
        (["method=vppo", "judge.num_votes=0"], "method=vppo"),
        (["method=grpo", "judge.num_votes=0", "credit.process_weight=0.5"], "needs votes"),
        (["judge.num_votes=2"], "a tie flags"),
        (["judge.invalid=0.6", "judge.failed=0.6"], "add up to more than 1"),
        (["minibatches=3"], "prompts=16 must be a multiple of minibatches=3"),
        (["model.hidden=66"], "hidden=66 must be a multiple of"),
        (["loss.reduce=constant"], "reduce='constant'"),
        (["loss.constant=5"], "reduce='constant'"),
        (["credit.normalize=group_steps"], "belong together"),
        (["loss.objective=cispo", "loss.clip_dual=3"], "clip_dual has no meaning"),
        (["output=runs/{seed}"], "only {method} is filled in"),
    ],
)
def test_contradictions_are_refused(overrides, says):
    assert says in refusal(overrides=overrides)


def test_methods_are_presets_and_changes_apply():
    for method in ("capo", "grpo", "dr_grpo", "rloo", "opo", "grpo_process", "vppo", "fapo", "papo"):
        assert load_config(None, [f"method={method}"]).credit_rule() == CreditRule.preset(method)
    config = load_config(None, ["credit.process_weight=0.5", "credit.vote=union", "temperature=0.7", "loss.kl=k1"])
    assert config.credit_rule() == CreditRule.preset("capo", process_weight=0.5, vote="union")
    assert (config.loss_rule().temperature, config.loss_rule().kl) == (0.7, "k1")


def test_outcome_only_methods_do_without_votes_and_may_have_them():
    for method in ("grpo", "dr_grpo", "rloo", "opo"):
        load_config(None, [f"method={method}", "judge.num_votes=0"])
        load_config(None, [f"method={method}", "judge.num_votes=3"])


@pytest.mark.parametrize(
    "output",
    [
        "on",
        "y",
        "n",
        "No",
        "null",
        "runs/a-{method}",
        "a: b # c",
        "ünï 😀",
        "\"quoted\" \\ 'twice'",
        "two\nlines",
        "-",
        "12",
        "1e3",
    ],
)
def test_yaml_round_trip(tmp_path, output):
    config = load_config(None, ["learning_rate=1e-7", "credit.clamp=3", f"output={output}", "warm_start.cache=null"])
    assert config.output == output and load_config(written(tmp_path, config.to_yaml())) == config


def test_yaml_shows_every_setting_with_its_meaning():
    lines = TrainConfig().to_yaml().splitlines()
    assert re.fullmatch(r"method: capo +# credit rule, .*", lines[0])
    assert len(lines) == len(_all_keys(TrainConfig)) + 11  # eleven sections
    assert all(re.search(r" # \S", line) for line in lines)


def test_a_configuration_does_not_change():
    with pytest.raises(ValidationError, match="frozen"):
        TrainConfig().updates = 3
    with pytest.raises(ValidationError, match="frozen"):
        TrainConfig().loss.kl_coef = 0.5


def test_differing_keys():
    assert differing_keys(TrainConfig(), load_config(None, ["loss.kl_coef=1", "updates=5"])) == [
        "updates",
        "loss.kl_coef",
    ]


def test_examples_differ_in_method_and_judge_only():
    capo, grpo = (load_config(EXAMPLES / f"{name}.yaml") for name in ("capo", "grpo"))
    assert differing_keys(capo, grpo) == ["method", "judge.num_votes"]
    assert (str(capo.run_dir), str(grpo.run_dir)) == ("runs/arithmetic-capo", "runs/arithmetic-grpo")


def test_command_line_dry_run(tmp_path):
    shown = CliRunner().invoke(app, ["train", str(written(tmp_path, "updates: 3\n")), "epochs=2", "--dry-run"])
    assert shown.exit_code == 0
    assert re.search(r"^updates: 3 .*\n(.*\n)*epochs: 2 ", shown.stdout, re.MULTILINE)


def test_mistakes_end_with_code_2_before_any_model_library_is_loaded(tmp_path):
    code = """
import sys
from capo.cli import main
sys.argv[1:] = ["train", sys.argv[1], "judge.num_vote=0"]
try:
    main()
finally:
    print("transformers" in sys.modules)
"""
    path = str(written(tmp_path, "updates: 3\n"))
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "False\n")
    assert done.stderr == "error: unknown key judge.num_vote; did you mean judge.num_votes?\n"


def test_missing_libraries_are_named():
    code = "import sys; sys.modules['safetensors'] = None; from capo.cli import main; sys.argv[1:] = ['train', sys.argv[1]]; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, str(EXAMPLES / "capo.yaml")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and done.stderr == "error: capo train needs safetensors: pip install 'capo[train]'\n"


def test_without_trl_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    for name in ("capo.integrations.trl_command", "capo.integrations.trl"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    done = CliRunner().invoke(app, ["trl", "--help"])
    assert str(done.exception) == "capo trl needs trl: pip install 'capo[trl]'"


def test_a_folder_that_the_judge_cannot_write_is_named_before_it_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr("capo.judges.make.make_judge", None)
    place = written(tmp_path, "") / "out"
    done = CliRunner().invoke(app, ["judge", str(EXAMPLES.parent / "judge" / "arithmetic.jsonl"), "--out", str(place)])
    assert isinstance(done.exception, UsageError)
    assert str(done.exception) == f"--out={place}: cannot write there: Not a directory; choose another folder"


def test_help_is_quick_and_loads_nothing_heavy():
    code = "import sys; from capo.cli import app\ntry: app(['train', '--help'])\nexcept SystemExit: pass\n"
    code += "print('torch' in sys.modules, 'transformers' in sys.modules, 'ruamel' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "capo train examples/arithmetic/capo.yaml" in done.stdout
    assert done.stdout.splitlines()[-1] == "False False False"


@pytest.mark.parametrize(
    "key", ["top_p", "rollout.top_p", "rollout.top_k", "rollout.min_p", "rollout.repetition_penalty"]
)
def test_sampling_from_a_part_of_the_distribution_is_refused_with_the_reason(key):
    with pytest.raises(
        UsageError, match=rf"{key}: responses are sampled from the full distribution, .* only temperature"
    ):
        load_config(None, [f"{key}=0.9"])


def test_chunks_must_divide_prompts():
    with pytest.raises(UsageError, match=r"prompts=16 must be a multiple of rollout.chunks=3"):
        load_config(None, ["rollout.chunks=3"])
