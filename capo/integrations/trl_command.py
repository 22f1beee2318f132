"""``capo trl``: what ``trl grpo`` is, with step-level credit; the same options, YAML file and launcher."""

from __future__ import annotations

import gc
import importlib
import inspect
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    TrlParser,
    get_dataset,
    get_peft_config,
    get_quantization_config,
    rewards,
)

from capo.errors import UsageError
from capo.integrations.trl import CapoConfig, CapoGRPOTrainer

_LAUNCHED = "CAPO_TRL_LAUNCHED"  # set for the processes that accelerate starts


@dataclass
class CapoScriptArguments(ScriptArguments):
    """What is trained on, and by what it is rewarded and judged."""

    reward_model_name_or_path: str | None = field(default=None, metadata={"help": "A reward model, path or name."})
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={"help": "Reward functions: names in trl.rewards, or import paths (my_lib.rewards.exact)."},
    )
    capo_judge: str | None = field(
        default=None,
        metadata={"help": "Import path of a judge (see capo.judges.Judge), or of a function that makes one."},
    )


def run(args: list[str]) -> None:
    """Train as the options say; those that the parser does not know go to ``accelerate launch``.

    Raises:
        UsageError: options that are unknown, missing or do not go together.
    """
    unknown = _unknown(args)
    if unknown and _LAUNCHED not in os.environ:
        if "LOCAL_RANK" in os.environ:
            raise UsageError(f"unknown options: {' '.join(unknown)}")
        _launch(unknown, args)
        return
    try:
        script, config, model, mixture, _ = _parser().parse_args_and_config(list(args), return_remaining_strings=True)
    except ValueError as error:
        raise UsageError(str(error)) from error
    config.capo_delimiter = config.capo_delimiter.replace("\\n", "\n")
    if model.model_name_or_path is None:
        raise UsageError("--model_name_or_path is missing")
    if not script.reward_funcs and script.reward_model_name_or_path is None:
        raise UsageError(
            "--reward_funcs is missing: the outcome of a response, by import path or a name in trl.rewards"
        )
    sys.path.insert(0, os.getcwd())
    functions = [_reward(name) for name in script.reward_funcs or ()]
    judge = None if script.capo_judge is None else _judge(script.capo_judge)
    if judge is None and config.capo_process_weight != 0:
        raise UsageError("--capo_judge is missing: who names wrong steps; without one set --capo_process_weight 0")
    config.model_init_kwargs = {**_model_kwargs(config, model), **(config.model_init_kwargs or {})}
    dataset = _dataset(script, mixture)
    trainer = CapoGRPOTrainer(
        model=model.model_name_or_path,
        reward_funcs=[*filter(None, [script.reward_model_name_or_path]), *functions],
        judge=judge,
        args=config,
        train_dataset=dataset[script.dataset_train_split],
        eval_dataset=dataset[script.dataset_test_split] if config.eval_strategy != "no" else None,
        peft_config=get_peft_config(model),
    )
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model(config.output_dir)
    if config.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
    # A process group that lives until the interpreter ends may abort it there: with gloo, one run in some twenty.
    del trainer
    gc.collect()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _parser() -> Any:
    kinds: Any = (CapoScriptArguments, CapoConfig, ModelConfig, DatasetMixtureConfig)
    return TrlParser(kinds, prog="capo trl")


def _unknown(args: list[str]) -> list[str]:
    """The options that the parser does not know, of the YAML file and of the command line.

    No configuration is made of the rest: what fits into a batch depends on the number of processes.
    """
    import yaml

    parser, rest, unknown = _parser(), list(args), []
    if "--config" in rest:
        place = rest.index("--config")
        try:
            path = rest[place + 1]
            given = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (IndexError, OSError, ValueError, yaml.YAMLError) as error:
            raise UsageError(f"--config: {error}") from error
        if not isinstance(given, dict):
            raise UsageError(f"{path}: a configuration is a mapping of keys to values")
        del rest[place : place + 2]
        given.pop("env", None)
        unknown = parser.set_defaults_with_config(**given)
    return unknown + parser.parse_known_args(rest)[1]


def _launch(options: list[str], args: list[str]) -> None:
    """The same command in processes that ``accelerate launch`` starts, with the options that are its own."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    os.environ[_LAUNCHED] = "1"
    launch_command(launch_command_parser().parse_args([*options, "--module", "capo.cli", "trl", *args]))


def _reward(name: str) -> Any:
    if "." in name:
        return _imported(name, "reward_funcs")
    found = getattr(rewards, name, None)
    if found is None:
        raise UsageError(f"reward_funcs: {name!r} is no name in trl.rewards; functions of yours need an import path")
    # As `trl grpo` does; the one name there that makes a reward function instead of being one.
    return found(max_completion_len=1280, soft_punish_cache=256) if name == "get_soft_overlong_punishment" else found


def _judge(path: str) -> Any:
    found = _imported(path, "capo_judge")
    if inspect.isclass(found) or not hasattr(found, "critique"):
        if not callable(found):
            raise UsageError(f"capo_judge: {path} is neither a judge nor a function that makes one: {found!r:.80}")
        found = found()
    return found


def _imported(path: str, option: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ValueError, AttributeError, ModuleNotFoundError) as error:
        raise UsageError(f"{option}: cannot import {path!r}: {error}") from error


def _model_kwargs(config: Any, model: Any) -> dict[str, Any]:
    kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        # moved from one configuration to the other in TRL 1
        "trust_remote_code": getattr(config, "trust_remote_code", getattr(model, "trust_remote_code", False)),
    }
    quantization = get_quantization_config(model)
    return kwargs if quantization is None else {**kwargs, "quantization_config": quantization}


def _dataset(script: Any, mixture: Any) -> Any:
    if mixture.datasets:
        if script.dataset_name:
            raise UsageError("give either --dataset_name or datasets, not both")
        return get_dataset(mixture)
    if not script.dataset_name:
        raise UsageError("--dataset_name is missing: a name on the Hub or a local folder with a column prompt")
    from datasets import load_dataset

    if not Path(script.dataset_name).exists() and script.dataset_name.startswith((".", "/")):
        raise UsageError(f"--dataset_name: there is no {script.dataset_name}")
    return load_dataset(script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming)
