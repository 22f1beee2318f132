"""The judge against real servers with a tiny model: what it says is noise, but the protocol is theirs."""

import os
import sys
from contextlib import closing

import pytest
from servers import free_port, serving
from tiny_model import save

from capo.judges import JudgeRequest

pytest.importorskip("httpx2")
from capo.judges.client import Limits
from capo.judges.openai import OpenAIJudge

REQUESTS = [JudgeRequest(f"{n} + 2?", str(n + 2), (f"{n} + 2 = {n + 2}", "So it is.")) for n in range(3)]
OFFLINE = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def transformers_serve(folder):
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package, reason="transformers serve needs transformers[serving]")
    port = free_port()
    command = [os.path.join(os.path.dirname(sys.executable), "transformers"), "serve", str(folder)]
    if not os.path.exists(command[0]):
        command[:1] = [sys.executable, "-m", "transformers.cli.transformers"]
    return serving([*command, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"], port, env=OFFLINE)


# A server is a function from the model's folder to a context manager that gives its address.
@pytest.fixture(scope="module", params=[transformers_serve])
def server(request, tmp_path_factory):
    folder = save(tmp_path_factory.mktemp("model"))
    with request.param(folder) as url:
        yield url, str(folder)


@pytest.mark.slow
def test_a_real_server_gives_as_many_replies_as_votes(server):
    url, model = server
    limits = Limits(attempt_timeout=60, concurrency=2, retries=1)
    with closing(OpenAIJudge(url, model, max_tokens=8, limits=limits)) as judge:
        replies = judge.critique(REQUESTS, 2)
        assert [len(votes) for votes in replies] == [2, 2, 2]
        flat = [reply for votes in replies for reply in votes]
        assert all(reply.state == "invalid" for reply in flat), judge.counts
        assert all(1 <= reply.completion_tokens <= 8 for reply in flat)
        assert {reply.error for reply in flat if reply.completion_tokens == 8} <= {"truncated"}
        assert all(votes[0].prompt_tokens > 1000 for votes in replies), "a byte is a token"
        assert not any(name.startswith("retries/wrong_id") for name in judge.counts)


@pytest.mark.slow
def test_a_real_server_refuses_another_model(server):
    from capo.judges import JudgeError

    url, _ = server
    with closing(OpenAIJudge(url, "another", limits=Limits(retries=0))) as judge, pytest.raises(JudgeError):
        judge.critique(REQUESTS, 1)


@pytest.mark.slow
def test_structured_output_is_asked_of_a_real_server(server):
    url, model = server
    with closing(OpenAIJudge(url, model, max_tokens=8, structured=True, limits=Limits(attempt_timeout=60))) as judge:
        [votes] = judge.critique(REQUESTS[:1], 1)
        assert votes[0].state == "invalid", judge.counts
