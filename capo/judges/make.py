"""From a configuration to a judge."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from capo.config import JudgeConfig
from capo.errors import UsageError
from capo.judges import Judge, JudgeError, JudgeRequest

# What each engine imports, and the extra that brings it.
ENGINES: dict[str, tuple[tuple[str, ...], str]] = {
    "scripted": ((), ""),
    "openai": (("httpx2",), "judge"),
    "transformers": (("transformers", "safetensors"), "train"),
    "vllm": (("transformers",), "train"),
}


def make_judge(config: JudgeConfig, checker: Callable[[JudgeRequest], Sequence[bool]], seed: int) -> Judge:
    """The judge that a configuration asks for.

    Args:
        config: the section ``judge``.
        checker: what the scripted judge knows.
        seed: of all randomness.

    Raises:
        UsageError: a package, key or model is missing.
    """
    common: dict[str, Any] = {
        "temperature": config.temperature,
        "top_p": config.top_p,
        "trust": config.trust,
        "structured": config.structured,
        "seed": seed,
    }
    try:
        if config.kind == "openai":
            return _openai(config, common)
        if config.kind == "transformers":
            from capo.judges.transformers import TransformersJudge

            where = config.transformers
            return TransformersJudge.load(
                str(where.path),
                device=where.device,
                dtype=where.dtype,
                batch=where.batch,
                max_new_tokens=config.max_tokens,
                **common,
            )
        if config.kind == "vllm":
            from capo.judges.vllm import VllmJudge

            engine = config.vllm
            return VllmJudge(
                str(engine.path),
                dtype=engine.dtype,
                context=engine.context,
                cache_gib=engine.cache_gib,
                max_new_tokens=config.max_tokens,
                **common,
            )
    except ModuleNotFoundError as error:
        extra = ENGINES[config.kind][1]
        raise UsageError(f"judge.kind={config.kind} needs {error.name}: pip install 'capo[{extra}]'") from None
    except (ValueError, OSError, JudgeError) as error:
        model = f".path={config.transformers.path}" if config.kind == "transformers" else ""
        raise UsageError(f"judge.{config.kind}{model}: {error}") from None
    from capo.judges.scripted import ScriptedJudge

    return ScriptedJudge(checker, config.false_alarm, config.missed, config.invalid, config.failed, seed)


@contextlib.contextmanager
def closing(judge: Judge) -> Iterator[Judge]:
    """Give the judge, and close it after the block if it holds connections."""
    try:
        yield judge
    finally:
        if (close := getattr(judge, "close", None)) is not None:
            close()


def _openai(config: JudgeConfig, common: dict[str, Any]) -> Judge:
    from capo.judges.client import Limits
    from capo.judges.openai import OpenAIJudge

    where = config.openai
    return OpenAIJudge(
        str(where.url),
        str(where.model),
        max_tokens=config.max_tokens,
        api_key_env=where.api_key_env,
        api_key_file=where.api_key_file,
        limits=Limits(
            concurrency=where.concurrency,
            attempt_timeout=where.attempt_timeout,
            deadline=where.deadline,
            batch_deadline=where.batch_deadline,
            retries=where.retries,
            max_wait=where.max_wait,
        ),
        max_failure_rate=where.max_failure_rate,
        cache=where.cache,
        extra=where.extra_fields(),
        allow_http=where.allow_http,
        trust_env=where.trust_env,
        **common,
    )
