"""The configuration of ``capo train``: one field per setting, read from YAML, checked before any work."""

from __future__ import annotations

import difflib
import json
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, DocumentStartEvent, NodeEvent

from capo.credit import CreditRule, Normalize, Vote
from capo.errors import UsageError
from capo.judges.address import check_url
from capo.losses import Kl, LossRule, Objective, Ratio, Reduce

MAX_FILE = 256 * 1024  # bytes; a configuration is a few kilobytes
MAX_DEPTH = 8  # of nested YAML collections
MAX_NODES = 10_000

Method = Literal["capo", "grpo", "dr_grpo", "rloo", "opo", "grpo_process", "vppo", "fapo", "papo"]


_SECRET = re.compile(
    r"(^|[_.-])(api_?key|key|secret|password|passwd|token|bearer|credentials?)($|[_.-])", re.IGNORECASE
)


class _Section(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class TaskConfig(_Section):
    """The built-in task: chains of single-digit steps."""

    steps: int = Field(default=6, ge=1, le=32, description="operations per problem")
    operators: str = Field(default="+-*", pattern=r"^[+*-]{1,3}$", description="which operations occur, of + - *")
    misconceptions: float = Field(
        default=0.4, ge=0, le=1, description="share of the facts (a op b) that the demos get wrong"
    )
    misconception_rate: float = Field(default=0.6, ge=0, le=1, description="how often a demo gets such a fact wrong")
    held_out: int = Field(default=256, ge=1, le=100_000, description="problems to evaluate on, never trained on")


class ModelConfig(_Section):
    """The policy, built from scratch."""

    arch: Literal["qwen2", "llama"] = Field(default="qwen2", description="architecture, as transformers has it")
    layers: int = Field(default=2, ge=1, le=128, description="decoder layers")
    hidden: int = Field(default=64, ge=8, le=16384, description="width; a multiple of heads")
    heads: int = Field(default=4, ge=1, le=256, description="attention heads")
    mlp: int = Field(default=128, ge=8, le=65536, description="width of the feed-forward part")
    init_std: float = Field(default=0.05, gt=0, le=1, description="standard deviation of the initial weights")

    @model_validator(mode="after")
    def _fits(self) -> ModelConfig:
        if self.hidden % (2 * self.heads):
            raise ValueError(f"hidden={self.hidden} must be a multiple of 2 * heads={2 * self.heads}")
        return self


class WarmStartConfig(_Section):
    """Supervised training on demos, before RL."""

    steps: int = Field(default=700, ge=0, le=1_000_000, description="optimiser steps")
    batch: int = Field(default=64, ge=1, le=65536, description="demos per step, always fresh ones")
    learning_rate: float = Field(default=5e-3, gt=0, le=1, description="peak; cosine to a tenth of it")
    warmup: int = Field(default=50, ge=0, le=1_000_000, description="steps of linear warm-up")
    cache: str | None = Field(
        default=None, min_length=1, description="folder of warm-started models that runs share; null: none"
    )


class OpenAIConfig(_Section):
    """For kind: openai, a server that speaks OpenAI's chat completions."""

    url: str | None = Field(default=None, description="of the API with /v1, such as http://localhost:8000/v1")
    model: str | None = Field(default=None, min_length=1, description="as the server calls it")
    api_key_env: str | None = Field(default=None, description="NAME of the environment variable with the key")
    api_key_file: str | None = Field(default=None, min_length=1, description="file with the key")
    concurrency: int = Field(default=64, ge=1, le=4096, description="requests in flight")
    attempt_timeout: float = Field(default=120.0, gt=0, le=86400, description="seconds for one attempt")
    deadline: float = Field(default=600.0, gt=0, le=86400, description="seconds for a request with its retries")
    batch_deadline: float = Field(default=3600.0, gt=0, le=864_000, description="seconds for all of an update")
    retries: int = Field(default=6, ge=0, le=100, description="further attempts after a fault that may pass")
    max_wait: float = Field(default=60.0, gt=0, le=86400, description="seconds, longest wait before a retry")
    max_failure_rate: float = Field(default=0.2, ge=0, le=1, description="more failed replies stop the run; 1: never")
    cache: str | None = Field(default=None, min_length=1, description="folder that replies are kept in; null: none")
    extra: str = Field(default="{}", description="JSON object, more fields of each request; null: without")
    allow_http: bool = Field(default=False, description="plain http to other machines")
    trust_env: bool = Field(default=False, description="use proxies from environment variables")

    @model_validator(mode="after")
    def _fits(self) -> OpenAIConfig:
        # Here and not on the fields, whose errors show the value: it may be or hold a secret.
        if self.url is not None:
            check_url(self.url, self.allow_http)
        if self.api_key_env is not None and not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", self.api_key_env):
            raise ValueError("api_key_env is the name of an environment variable; the key itself does not belong here")
        if self.api_key_env is not None and self.api_key_file is not None:
            raise ValueError("api_key_env and api_key_file: name one of them")
        extra = self.extra_fields()
        if secret := next(filter(_SECRET.search, extra), None):
            raise ValueError(f"extra: {secret} looks like a secret, which does not belong into a configuration")
        return self

    def extra_fields(self) -> dict[str, Any]:
        """The further fields of each request."""
        try:
            return dict[str, Any](json.loads(self.extra).items())
        except (ValueError, AttributeError, RecursionError):
            raise ValueError("extra must be a JSON object, such as '{\"top_k\": 20}'") from None


class TransformersConfig(_Section):
    """For kind: transformers, a model in this process."""

    path: str | None = Field(default=None, min_length=1, description="folder or name of the model")
    device: str = Field(default="cpu", pattern=r"^(cpu|cuda(:[0-9]+)?)$", description="cpu, cuda or cuda:1")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(default="auto", description="of the weights")
    batch: int = Field(default=64, ge=1, le=65536, description="replies generated at once")


class VllmConfig(_Section):
    """For kind: vllm, a model that vLLM runs in a process of its own."""

    path: str | None = Field(default=None, min_length=1, description="folder or name of the model")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(default="auto", description="of the weights")
    context: int | None = Field(
        default=None, ge=2, le=10_000_000, description="tokens of prompt and reply together; null: the model's limit"
    )
    cache_gib: float = Field(default=4.0, gt=0, le=10_000, description="memory for keys and values, GiB")


class JudgeConfig(_Section):
    """Who names wrong steps, and how it is asked."""

    kind: Literal["scripted", "openai", "transformers", "vllm"] = Field(
        default="scripted", description="scripted: an exact checker with noise; openai; transformers; vllm"
    )
    num_votes: int = Field(default=5, ge=0, le=127, description="K, critiques per response; 0: the judge is not asked")
    quorum: int = Field(
        default=1, ge=1, le=127, description="valid critiques that a response needs for any of its votes to count"
    )
    canaries: int = Field(
        default=0, ge=0, le=65536, description="responses with known wrong steps that are judged in each update"
    )
    min_canaries: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="stop if a smaller share of an update's canaries, without or with a wrong step, is judged right",
    )
    adaptive: bool = Field(default=True, description="leave out votes that can change no advantage")
    trust: Literal["list", "verdict"] = Field(default="list", description="what counts if a list follows a Yes")
    temperature: float = Field(default=1.0, ge=0, le=100, description="of the judge's sampling")
    top_p: float = Field(default=1.0, gt=0, le=1, description="of the judge's sampling")
    max_tokens: int = Field(default=1024, ge=1, le=1_000_000, description="longest reply; a longer one is invalid")
    structured: bool = Field(default=False, description="ask for JSON instead of tags")
    false_alarm: float = Field(
        default=0.2, ge=0, le=1, description="scripted: probability that a right step is flagged"
    )
    missed: float = Field(default=0.2, ge=0, le=1, description="scripted: probability that a wrong one is not")
    invalid: float = Field(default=0.0, ge=0, le=1, description="scripted: probability of a reply that does not parse")
    failed: float = Field(default=0.0, ge=0, le=1, description="scripted: probability that no reply comes")
    openai: OpenAIConfig = OpenAIConfig()
    transformers: TransformersConfig = TransformersConfig()
    vllm: VllmConfig = VllmConfig()

    @model_validator(mode="after")
    def _fits(self) -> JudgeConfig:
        if self.invalid + self.failed > 1:
            raise ValueError(f"invalid={self.invalid} and failed={self.failed} add up to more than 1")
        if self.quorum > max(1, self.num_votes):
            raise ValueError(f"quorum={self.quorum} can never be reached with num_votes={self.num_votes}")
        if self.canaries and self.num_votes == 0:
            raise ValueError(f"canaries={self.canaries} need votes, but num_votes is 0")
        if self.min_canaries and not self.canaries:
            raise ValueError(f"min_canaries={self.min_canaries:g} needs canaries, but canaries is 0")
        missing = {
            "openai": [name for name in ("url", "model") if getattr(self.openai, name) is None],
            "transformers": ["path"] if self.transformers.path is None else [],
            "vllm": ["path"] if self.vllm.path is None else [],
        }.get(self.kind, [])
        if missing:
            raise ValueError(f"kind={self.kind} needs judge.{self.kind}.{missing[0]}")
        return self


class RolloutConfig(_Section):
    """Who samples responses, always from the full distribution."""

    engine: Literal["transformers", "vllm"] = Field(
        default="transformers",
        description="transformers: the policy itself; vllm: in process, on a copy of its weights",
    )
    chunks: int = Field(
        default=1, ge=1, le=65536, description="parts of an update; one is judged while the next is sampled"
    )
    context: int | None = Field(
        default=None, ge=2, le=10_000_000, description="tokens of prompt and response together; null: the model's limit"
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        default=None, description="of vLLM's copy of the weights; null: the policy's"
    )
    cache_gib: float = Field(default=1.0, gt=0, le=10_000, description="memory for vLLM's keys and values, GiB")
    max_mismatch: float = Field(
        default=0.5, gt=0, le=100, description="stop if log-probabilities of sampler and trainer differ by more, mean"
    )


class CreditConfig(_Section):
    """Changes to the method's CreditRule; null keeps what the method has."""

    vote: Vote | None = Field(default=None, description="how votes become a step weight")
    outcome_weight: float | None = Field(default=None, ge=0, le=1e6, description="C, weight of the outcome")
    process_weight: float | None = Field(default=None, ge=0, le=1e6, description="P, weight of the steps")
    normalize: Normalize | None = Field(default=None, description="over what rewards are normalised")
    std_floor: float | None = Field(default=None, ge=0, le=1e6, description="the std is at least this")
    clamp: float | None = Field(default=None, gt=0, le=1e6, description="advantages are clamped to [-clamp, clamp]")


class LossConfig(_Section):
    """The LossRule; see ``capo.LossRule`` for the meaning of each."""

    clip_low: float = Field(default=0.2, ge=0, le=1, description="ratios below 1 - clip_low are clipped")
    clip_high: float = Field(default=0.2, ge=0, le=1e3, description="ratios above 1 + clip_high are clipped")
    clip_dual: float | None = Field(default=None, gt=1, le=1e3, description="dual clip; null: off")
    ratio: Ratio = Field(default="token", description="token, sequence (GSPO) or sequence_token")
    reduce: Reduce = Field(
        default="sequence_mean", description="sequence_mean (paper), token_mean (DAPO), constant (Dr. GRPO)"
    )
    constant: float | None = Field(
        default=None, gt=0, le=1e12, description="divisor of reduce: constant, per minibatch"
    )
    kl_coef: float = Field(
        default=0.0, ge=0, le=1e3, description="weight of the KL term against the warm-started model"
    )
    kl: Kl = Field(default="k3", description="estimator of the KL term")
    entropy_coef: float = Field(default=0.0, ge=-10, le=10, description="weight of the entropy bonus")
    objective: Objective = Field(default="clip", description="clip (PPO) or cispo")
    importance_cap: float | None = Field(
        default=None, gt=0, le=1e3, description="sampler/trainer correction; null: off"
    )


class SeedConfig(_Section):
    """Separate seeds, so that one thing can be varied at a time."""

    data: int = Field(default=0, ge=0, lt=2**31, description="the task's misconceptions and the held-out problems")
    warm_start: int = Field(default=0, ge=0, lt=2**31, description="initial weights and demos")
    rl: int = Field(default=0, ge=0, lt=2**31, description="prompts, samples and the judge's errors")


class TrainConfig(_Section):
    """A whole training: the RL settings here, the rest in sections."""

    method: Method = Field(default="capo", description="credit rule, a preset of capo.CreditRule; all else stays equal")
    output: str = Field(
        default="runs/arithmetic-{method}", min_length=1, description="run folder; {method} is filled in"
    )
    updates: int = Field(default=60, ge=0, le=10_000_000, description="RL updates; 0: warm start and evaluation only")
    prompts: int = Field(default=16, ge=1, le=65536, description="prompts per update")
    group_size: int = Field(default=8, ge=2, le=4096, description="responses per prompt")
    minibatches: int = Field(
        default=2, ge=1, le=65536, description="optimiser steps per pass over an update, cut by prompt"
    )
    epochs: int = Field(default=1, ge=1, le=100, description="passes over each update")
    micro_batch: int | None = Field(
        default=None, ge=1, le=1_000_000, description="responses per forward pass; null: all at once"
    )
    max_new_tokens: int | None = Field(default=None, ge=1, le=1_000_000, description="response limit; null: the task's")
    temperature: float = Field(default=1.0, gt=0, le=100, description="of sampling, and of the loss")
    learning_rate: float = Field(default=1.5e-4, gt=0, le=1, description="AdamW, constant after warm-up")
    warmup: int = Field(default=0, ge=0, le=1_000_000, description="updates of linear warm-up")
    weight_decay: float = Field(default=0.0, ge=0, le=1, description="AdamW, decoupled")
    max_grad_norm: float = Field(default=1.0, gt=0, le=1e6, description="gradients are scaled down to this norm")
    max_bad_updates: int = Field(
        default=3, ge=1, le=1000, description="abort after so many NaN or Inf updates in a row"
    )
    max_undecided: float = Field(
        default=0.2, ge=0, le=1, description="stop if a larger share of an update's outcomes is undecided; 1: never"
    )
    eval_every: int = Field(default=5, ge=1, le=1_000_000, description="updates between evaluations; also the last one")
    save_every: int = Field(
        default=20, ge=1, le=1_000_000, description="updates between checkpoints; also the last one"
    )
    keep_checkpoints: int = Field(default=2, ge=1, le=1000, description="older checkpoints are deleted")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: a GPU if there is one")
    threads: int | None = Field(default=None, ge=1, le=1024, description="CPU threads; null: PyTorch's default")
    task: TaskConfig = TaskConfig()
    model: ModelConfig = ModelConfig()
    warm_start: WarmStartConfig = WarmStartConfig()
    rollout: RolloutConfig = RolloutConfig()
    judge: JudgeConfig = JudgeConfig()
    credit: CreditConfig = CreditConfig()
    loss: LossConfig = LossConfig()
    seeds: SeedConfig = SeedConfig()

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        rule = self.credit_rule()
        self.loss_rule()
        if rule.process_weight > 0 and self.judge.num_votes == 0:
            raise ValueError(
                f"method={self.method} with process_weight {rule.process_weight:g} needs votes, but judge.num_votes is "
                "0: set judge.num_votes to 1 or more, or choose an outcome-only method (grpo, dr_grpo, rloo, opo)"
            )
        if rule.vote == "majority" and rule.process_weight > 0 and self.judge.num_votes == 2:
            raise ValueError(
                "judge.num_votes=2 with credit.vote=majority is the same as union (a tie flags); "
                "take an odd number, or say union, intersection or strict_majority"
            )
        if self.prompts % self.minibatches:
            raise ValueError(f"prompts={self.prompts} must be a multiple of minibatches={self.minibatches}")
        if self.prompts % self.rollout.chunks:
            raise ValueError(f"prompts={self.prompts} must be a multiple of rollout.chunks={self.rollout.chunks}")
        fields = set(re.findall(r"\{(.*?)\}", self.output)) - {"method"}
        if fields:
            raise ValueError(f"output={self.output!r}: only {{method}} is filled in, not {{{min(fields)}}}")
        return self

    def credit_rule(self) -> CreditRule:
        """The method's credit rule, with the changes asked for."""
        changes = {name: value for name, value in self.credit.model_dump().items() if value is not None}
        return CreditRule.preset(self.method, **changes)

    def loss_rule(self) -> LossRule:
        """The loss rule, at the temperature of sampling."""
        return LossRule(temperature=self.temperature, **self.loss.model_dump())

    @property
    def run_dir(self) -> Path:
        """The run folder, with the method filled in."""
        return Path(self.output.replace("{method}", self.method))

    def to_yaml(self) -> str:
        """All settings, each with its description, as YAML that ``load_config`` reads back."""
        return "".join(f"{line}\n" for line in _yaml_lines(self))


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a configuration: overrides win over the file, the file over the defaults.

    Args:
        path: a YAML 1.2 file; None for defaults only.
        overrides: ``key=value``, with dots into sections: ``loss.kl_coef=0.01``. Values are YAML.

    Raises:
        UsageError: a file that cannot be read or is no plain YAML mapping, an unknown key (the nearest one is named), a
            value of the wrong type or out of range, options that contradict each other, or a secret.
    """
    data: dict[str, Any] = {}
    if path is not None:
        data = _read_mapping(Path(path))
    _check_keys(data, TrainConfig, source=str(path))
    for override in overrides:
        _apply(data, override)
    try:
        return TrainConfig.model_validate(data)
    except ValidationError as problems:
        raise UsageError(
            _explain(problems, path, [override.partition("=")[0].strip() for override in overrides])
        ) from None


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE + 1)
    except OSError as error:
        hint = "; the first argument is a YAML file, settings come after it" if "=" in path.name else ""
        raise UsageError(f"{path}: cannot read the configuration: {error.strerror}{hint}") from None
    if len(raw) > MAX_FILE:
        raise UsageError(f"{path}: more than {MAX_FILE} bytes; a configuration is a few kilobytes")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text (byte {error.start})") from None
    data = _parse_yaml(text, str(path))
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UsageError(f"{path}: a configuration is a mapping of keys to values, this is a {type(data).__name__}")
    return data


def _parse_yaml(text: str, where: str) -> Any:
    """Plain YAML 1.2 data. Events are looked at first: nothing is built from tags, anchors or endless nesting."""
    try:
        depth = nodes = documents = 0
        for event in YAML(typ="safe", pure=True).parse(text):
            if isinstance(event, DocumentStartEvent):
                documents += 1
            elif isinstance(event, CollectionEndEvent):
                depth -= 1
            elif isinstance(event, NodeEvent):
                nodes += 1
                line = event.start_mark.line + 1
                if isinstance(event, AliasEvent) or event.anchor is not None:
                    raise UsageError(f"{where}:{line}: anchors and aliases are not supported; write the value out")
                tag = getattr(event, "tag", None)
                if tag is not None:
                    raise UsageError(f"{where}:{line}: tags such as {tag} are not supported")
                depth += isinstance(event, CollectionStartEvent)
            if depth > MAX_DEPTH or nodes > MAX_NODES or documents > 1:
                raise UsageError(f"{where}: nested too deeply, too long or more than one document")
        return YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f":{mark.line + 1}"
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UsageError(f"{where}{line}: not valid YAML: {problem}") from None


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, written = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UsageError(f"{override!r} is no setting; write key=value, for example updates=20 or loss.kl_coef=0.01")
    *sections, name = key.split(".")
    here: Any = data
    model: type[BaseModel] = TrainConfig
    for depth, section in enumerate(sections):
        child = _section(model.model_fields[section].annotation) if section in model.model_fields else None
        if child is None:
            _unknown(".".join(sections[: depth + 1]), model, prefix=".".join([*sections[:depth], ""]), source="")
        here, model = here.setdefault(section, {}), child
        if not isinstance(here, dict):
            raise UsageError(
                f"{'.'.join(sections[: depth + 1])} is a section, but the file gives it the value {here!r}"
            )
    if name not in model.model_fields:
        _unknown(key, model, prefix=".".join([*sections, ""]), source="")
    if _section(model.model_fields[name].annotation):
        raise UsageError(
            f"{key} is a section; set its keys, for example {key}.{next(iter(_section_fields(model, name)))}"
        )
    here[name] = _override_value(written, model.model_fields[name].annotation, key)


def _override_value(written: str, annotation: Any, key: str) -> Any:
    """A string field takes the text as it is, so that ``output=2024`` needs no quotes; the rest is YAML."""
    members = set(typing.get_args(annotation)) if _is_union(annotation) else {annotation}
    if str in members:
        return None if type(None) in members and written == "null" else written
    return _parse_yaml(written, key)


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _section(annotation: Any) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _section_fields(model: type[BaseModel], name: str) -> Iterable[str]:
    section = _section(model.model_fields[name].annotation)
    return section.model_fields if section else ()


def _check_keys(data: Mapping[Any, Any], model: type[BaseModel], source: str, prefix: str = "") -> None:
    for key, value in data.items():
        if not isinstance(key, str):
            raise UsageError(f"{source}: the key {key!r} in {prefix or 'the file'} is no string")
        if key not in model.model_fields:
            _unknown(f"{prefix}{key}", model, prefix, source)
        section = _section(model.model_fields[key].annotation)
        if section and isinstance(value, dict):
            _check_keys(value, section, source, f"{prefix}{key}.")


_TRUNCATING = ("top_p", "top_k", "min_p", "typical_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


def _unknown(key: str, model: type[BaseModel], prefix: str, source: str) -> typing.NoReturn:
    """Refuse an unknown key. The value is not shown: it may be a secret."""
    where = f"{source}: " if source else ""
    if _SECRET.search(key):
        raise UsageError(
            f"{where}{key} looks like a secret. Secrets do not belong into a configuration, which is saved with the "
            "run; put them into an environment variable"
        )
    if key.rpartition(".")[2] in _TRUNCATING:
        raise UsageError(
            f"{where}{key}: responses are sampled from the full distribution, which the loss takes ratios against; there is "
            "only temperature"
        )
    local = {name: f"{prefix}{name}" for name in model.model_fields}
    everywhere = {dotted.rpartition(".")[2]: dotted for dotted in _all_keys(TrainConfig)}
    name = key.rpartition(".")[2]
    for known in (local, everywhere):
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        if near:
            raise UsageError(f"{where}unknown key {key}; did you mean {known[near[0]]}?")
    raise UsageError(f"{where}unknown key {key}; there are {', '.join(local.values())}")


def _all_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        section = _section(field.annotation)
        keys += _all_keys(section, f"{prefix}{name}.") if section else [f"{prefix}{name}"]
    return keys


def _explain(problems: ValidationError, path: str | Path | None, overridden: Sequence[str]) -> str:
    """What is wrong, a line each; the file is named where no override can be at fault."""
    lines = []
    for problem in problems.errors(include_url=False):
        key = ".".join(map(str, problem["loc"]))
        value = problem["input"]
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] != "value_error":  # a sentence of pydantic's
            message = message[0].lower() + message[1:]
        plain = isinstance(value, str | int | float | bool | type(None))
        got = f", got {value!r:.80} ({type(value).__name__})" if key and plain else ""
        of_file = path is not None and not any(f"{name}.".startswith(f"{key}." if key else "") for name in overridden)
        lines.append(f"{path}: " * of_file + (f"{key}: {message}{got}" if key else message))
    return "\n".join(dict.fromkeys(lines))


def _yaml_lines(section: BaseModel, indent: str = "") -> Iterator[str]:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield f"{indent}{name}:  # {type(value).__doc__}"
            yield from _yaml_lines(value, indent + "  ")
        else:
            yield f"{f'{indent}{name}: {_yaml_scalar(value)}':<36}  # {field.description}"


def _yaml_scalar(value: Any) -> str:
    """A JSON scalar is a YAML one; words may go without quotes, but for those that YAML 1.1 or 1.2 takes for others."""
    if isinstance(value, str) and re.fullmatch(r"(?!(?i:null|true|false|on|off|yes|no|y|n)$)[A-Za-z][\w./{}-]*", value):
        return value
    return json.dumps(value, ensure_ascii=False)


def differing_keys(one: TrainConfig, other: TrainConfig) -> list[str]:
    """The dotted names of the settings in which two configurations differ."""
    first, second = one.model_dump(), other.model_dump()

    def value(data: dict, key: str) -> Any:
        for part in key.split("."):
            data = data[part]
        return data

    return [key for key in _all_keys(TrainConfig) if value(first, key) != value(second, key)]
