"""The OpenAI judge against a server that goes wrong in every way: nothing is lost, swapped or turned into a penalty."""

import asyncio
import concurrent.futures
import dataclasses
import datetime
import email.utils
import gc
import logging
import os
import random
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from contextlib import closing

import pytest
from judge_server import FAULTS, FakeServer, often

from capo.critique import Critique
from capo.judges import Fault, JudgeError, JudgeRequest

pytest.importorskip("httpx2")
from capo.judges.address import check_url, read_key
from capo.judges.client import Limits, retry_after
from capo.judges.openai import OpenAIJudge

QUICK = Limits(attempt_timeout=0.5, backoff=0.01, max_wait=0.05, retries=3, deadline=10)
CANARY = "sk-canary-5eed5eed5eed5eed"


def make_request(number, rng=None):
    rng = rng or random.Random(number)
    steps = [f"step {i} of {number} is {rng.choice(['right', 'wrong'])}" for i in range(rng.randrange(8))]
    return JudgeRequest(f"question {number}", rng.choice([None, "the answer"]), tuple(steps))


def truth(request):
    return tuple(i for i, step in enumerate(request.steps) if "wrong" in step)


WRONG = JudgeRequest("question", None, ("right", "wrong", "right"))


def open_judge(server, **options):
    options = {"limits": QUICK, "max_failure_rate": 1.0, **options}
    return OpenAIJudge(server.url, "model", **options)


def judge_of(server, **options):
    return closing(open_judge(server, **options))


def always(kind):
    return FakeServer(lambda body, headers: kind)


def test_votes_come_in_one_call_and_are_read():
    with (
        FakeServer() as server,
        judge_of(server, temperature=0.7, top_p=0.9, max_tokens=77, extra={"top_k": 5}) as judge,
    ):
        [replies] = judge.critique([WRONG], 4)
        assert [reply.critique for reply in replies] == [Critique(False, (1,))] * 4
        assert [reply.prompt_tokens for reply in replies] == [100, 0, 0, 0]
        assert [reply.completion_tokens for reply in replies] == [10] * 4
        assert all(reply.seconds > 0 and reply.nonce == WRONG.fingerprint(0)[:12] for reply in replies)
        [(body, headers)] = server.requests
        sampling = {"model": "model", "n": 4, "temperature": 0.7, "top_p": 0.9, "max_tokens": 77, "top_k": 5}
        assert {name: body[name] for name in sampling} == sampling
        assert "authorization" not in headers and "response_format" not in body
        assert judge.counts == {"valid": 4, "attempts": 1}


def test_seeds_and_prompts_depend_on_content_and_vote_and_on_nothing_else():
    requests = [make_request(n) for n in range(6)]

    def sent(*batches, seed=0):
        with FakeServer() as server, judge_of(server, seed=seed) as judge:
            for batch, first in batches:
                judge.critique(batch, 3, first)
            bodies = {body["messages"][0]["content"]: body["seed"] for body, _ in server.requests}
            assert len(bodies) == len(server.requests)
            return bodies

    once = sent((requests, 0))
    assert len(once) == len(set(once.values())) == 6
    assert sent((requests[3:][::-1], 0), (requests[:3], 0)) == once
    assert {prompt: seed + 5 for prompt, seed in once.items()} == sent((requests, 5))
    assert not set(once) & set(sent((requests, 0), seed=1)), "another seed has other nonces"


def test_results_are_in_the_order_of_the_requests():
    requests = [make_request(n) for n in range(60)]
    rng = random.Random(0)
    with (
        FakeServer(lambda body, headers: "slow" if rng.random() < 0.2 else "healthy") as server,
        judge_of(server) as judge,
    ):
        replies = judge.critique(requests, 2)
    assert [[reply.critique.flagged for reply in votes] for votes in replies] == [[truth(r)] * 2 for r in requests]


def test_no_requests_and_no_votes_cost_nothing():
    with FakeServer() as server, judge_of(server) as judge:
        assert judge.critique([], 3) == []
        assert judge.critique([WRONG, WRONG], 0) == [[], []]
        assert not server.requests
        with pytest.raises(ValueError, match="num_votes"):
            judge.critique([WRONG], -1)


@pytest.mark.parametrize("kind", ["fewer", "ignores_n"])
def test_missing_choices_are_asked_for_again(kind):
    with always(kind) as server, judge_of(server) as judge:
        [replies] = judge.critique([WRONG], 4)
        assert [reply.critique.flagged for reply in replies] == [(1,)] * 4
        base = server.requests[0][0]["seed"]
        asked = [(body["seed"] - base, body.get("n", 1)) for body, _ in server.requests]
        assert asked == {"fewer": [(0, 4), (3, 1)], "ignores_n": [(0, 4), (1, 3), (2, 2), (3, 1)]}[kind]


@pytest.mark.parametrize(
    "kind, error",
    [
        ("null", "no_content"), ("length", "truncated"), ("filter", "filtered"), ("refusal", "no_answer"),
        ("empty", "empty_reply"), ("garbage", "no_answer"), ("swapped", "no_list"),
    ],
)  # fmt: skip
def test_a_reply_that_cannot_be_read_is_invalid_and_not_asked_for_again(kind, error):
    with always(kind) as server, judge_of(server) as judge:
        [replies] = judge.critique([WRONG], 2)
        assert [(reply.state, reply.error, reply.critique) for reply in replies] == [("invalid", error, None)] * 2
        assert len(server.requests) == 1
        assert judge.counts[f"invalid/{error}"] == 2


@pytest.mark.parametrize(
    "kind, error",
    [
        ("reset", "connection"), ("reset_body", "connection"), ("stall", "deadline"), ("drip", "deadline"),
        ("429", "http_429"), ("429_long", "http_429"), ("408", "http_408"), ("409", "http_409"), ("500", "http_500"),
        ("503", "http_503"), ("html", "bad_body"), ("truncated_json", "bad_body"), ("array", "bad_body"),
        ("deep", "bad_body"), ("wrong_id", "wrong_id"), ("wrong_index", "bad_choices"), ("same_index", "bad_choices"),
        ("more", "bad_choices"), ("none", "bad_choices"),
    ],
)  # fmt: skip
def test_faults_are_retried_a_few_times_and_then_the_reply_has_failed(kind, error):
    limits = dataclasses.replace(QUICK, retries=2, attempt_timeout=0.2)
    with always(kind) as server, judge_of(server, limits=limits) as judge:
        began = time.monotonic()
        [replies] = judge.critique([WRONG], 2)
        assert time.monotonic() - began < 3
        assert [(reply.state, reply.error, reply.text) for reply in replies] == [("failed", error, None)] * 2
        assert len(server.requests) == judge.counts["attempts"] == 3
        assert judge.counts[f"retries/{error}"] == 2
        assert judge.counts[f"failed/{error}"] == 2


@pytest.mark.parametrize("kind", [kind for kind in FAULTS if kind not in ("slow", "fewer")])
def test_a_fault_that_passes_leaves_no_trace_in_the_votes(kind):
    first = []

    def once(body, headers):
        first.append(kind)
        return kind if len(first) == 1 else "healthy"

    with FakeServer(once) as server, judge_of(server, limits=dataclasses.replace(QUICK, attempt_timeout=0.2)) as judge:
        [replies] = judge.critique([WRONG], 2)
        if kind in ("null", "refusal", "empty", "length", "filter", "garbage", "swapped"):
            assert {reply.state for reply in replies} == {"invalid"}
        else:
            assert [reply.critique for reply in replies] == [Critique(False, (1,))] * 2
            assert len(server.requests) == 2


@pytest.mark.parametrize("kind, error", [("400", "http_400"), ("413", "http_413"), ("422", "http_422")])
def test_a_request_that_is_refused_for_itself_fails_at_once_and_alone(kind, error):
    with (
        FakeServer(lambda body, headers: kind if "bad" in str(body["messages"]) else "healthy") as server,
        judge_of(server) as judge,
    ):
        bad, good = judge.critique([JudgeRequest("bad", None, ("right",)), WRONG], 1)
        assert (bad[0].state, bad[0].error) == ("failed", error)
        assert good[0].state == "valid"
        assert len(server.requests) == 2


@pytest.mark.parametrize("kind", ["401", "403", "404", "redirect"])
def test_a_server_that_answers_nobody_stops_the_run_at_once(kind):
    with always(kind) as server, judge_of(server, limits=dataclasses.replace(QUICK, concurrency=2)) as judge:
        with pytest.raises(JudgeError, match=r"redirect to '169.254.169.254'" if kind == "redirect" else kind):
            judge.critique([make_request(n) for n in range(50)], 1)
        assert len(server.requests) <= 3


@pytest.mark.parametrize("kind, error", [("endless", "too_large"), ("gzip", "bad_body")])
def test_bodies_have_a_limit_and_are_never_unpacked(kind, error):
    with always(kind) as server, judge_of(server, limits=dataclasses.replace(QUICK, max_body=1 << 20)) as judge:
        [[reply]] = judge.critique([WRONG], 1)
        assert (reply.state, reply.error) == ("failed", error)
        assert server.requests[0][1]["accept-encoding"] == "identity"


def test_usage_may_be_missing():
    with always("no_usage") as server, judge_of(server) as judge:
        [replies] = judge.critique([WRONG], 2)
        assert [(reply.state, reply.prompt_tokens, reply.completion_tokens) for reply in replies] == [
            ("valid", 0, 0)
        ] * 2


def test_nobody_listens():
    with FakeServer() as server:
        url = server.url
    with closing(OpenAIJudge(url, "m", limits=QUICK, max_failure_rate=1)) as judge:
        [[reply]] = judge.critique([WRONG], 1)
        assert (reply.state, reply.error) == ("failed", "connection")
        assert judge.counts["attempts"] == 4


def test_what_is_no_tls_is_a_connection_fault():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            for _ in range(2):
                connection, _ = listener.accept()
                with connection:
                    connection.recv(4096)
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        url = f"https://127.0.0.1:{listener.getsockname()[1]}/v1"
        limits = dataclasses.replace(QUICK, retries=1)
        with closing(OpenAIJudge(url, "m", limits=limits, max_failure_rate=1)) as judge:
            [[reply]] = judge.critique([WRONG], 1)
            assert (reply.state, reply.error) == ("failed", "connection")
            assert judge.counts["attempts"] == 2


def test_a_name_that_does_not_exist_is_a_connection_fault(monkeypatch):
    def getaddrinfo(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with closing(OpenAIJudge("https://judge.invalid/v1", "m", limits=QUICK, max_failure_rate=1)) as judge:
        [[reply]] = judge.critique([WRONG], 1)
        assert (reply.state, reply.error) == ("failed", "connection")
        assert judge.counts["attempts"] == 4


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_a_certificate_that_nobody_vouches_for_gets_neither_prompt_nor_key(tmp_path, monkeypatch):
    files = [str(tmp_path / "key.pem"), str(tmp_path / "certificate.pem")]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    subprocess.run([*command, "-keyout", files[0], "-out", files[1]], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files[1], files[0])
    received = []

    def serve(listener):
        while True:
            try:
                connection, _ = listener.accept()
                received.append(context.wrap_socket(connection, server_side=True).recv(4096))
            except ssl.SSLError:
                received.append("refused")
            except OSError:
                return

    monkeypatch.setenv("JUDGE_KEY", CANARY)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=[listener], daemon=True).start()
        url = f"https://localhost:{listener.getsockname()[1]}/v1"
        limits = dataclasses.replace(QUICK, retries=1)
        with closing(OpenAIJudge(url, "m", limits=limits, max_failure_rate=1, api_key_env="JUDGE_KEY")) as judge:
            [[reply]] = judge.critique([WRONG], 1)
            assert (reply.state, reply.error) == ("failed", "connection")
        listener.shutdown(socket.SHUT_RDWR)
    assert received and set(received) <= {"refused", b""}


def test_fields_can_be_added_and_left_out():
    with FakeServer() as server:
        extra = {"max_tokens": None, "max_completion_tokens": 9, "top_p": 0.3}
        with judge_of(server, extra=extra) as judge:
            judge.critique([WRONG], 1)
        body, _ = server.requests[0]
        assert (body["max_completion_tokens"], body["top_p"]) == (9, 0.3)
        assert "max_tokens" not in body


def test_the_server_says_how_long_to_wait():
    seen = []

    def behave(body, headers):
        seen.append(time.monotonic())
        return "429_date" if len(seen) == 1 else "healthy"

    with FakeServer(behave) as server, judge_of(server, limits=dataclasses.replace(QUICK, max_wait=5)) as judge:
        assert judge.critique([WRONG], 1)[0][0].state == "valid"
    assert 0.0 < seen[1] - seen[0] < 2  # HTTP dates have whole seconds
    now = datetime.datetime.now(datetime.timezone.utc)
    date = email.utils.format_datetime(now + datetime.timedelta(seconds=30), usegmt=True)
    assert 28 <= retry_after(date) <= 30
    assert retry_after("3") == 3 and retry_after("0.5") == 0.5 and retry_after("1000000000") == 1e9
    past = email.utils.format_datetime(now - datetime.timedelta(days=1), usegmt=True)
    for nothing in (None, "", "-5", "nan", "soon", past, "Wed, 99 Foo 2026"):
        assert retry_after(nothing) == 0


def test_a_wait_beyond_the_deadline_is_not_begun():
    limits = dataclasses.replace(QUICK, max_wait=100, deadline=2)
    with always("429_long") as server, judge_of(server, limits=limits) as judge:
        began = time.monotonic()
        assert judge.critique([WRONG], 1)[0][0].error == "http_429"
        assert time.monotonic() - began < 1


@pytest.mark.parametrize("kind", ["stall", "drip", "503"])
def test_the_deadline_of_a_request_holds_over_all_its_attempts(kind):
    limits = Limits(attempt_timeout=60, deadline=0.5, retries=100, backoff=0.05)
    with always(kind) as server, judge_of(server, limits=limits) as judge:
        began = time.monotonic()
        assert judge.critique([WRONG], 1)[0][0].state == "failed"
        assert time.monotonic() - began < 1.5
        if kind == "stall":
            while not server.hung_up and time.monotonic() - began < 5:
                time.sleep(0.01)
            assert server.hung_up == 1, "the connection is closed at the deadline, not left to hang"


def test_the_deadline_of_a_batch_fails_what_is_not_there():
    requests = [make_request(n) for n in range(6)]
    limits = dataclasses.replace(QUICK, attempt_timeout=30, deadline=30, batch_deadline=0.5)
    with (
        FakeServer(lambda body, headers: "stall" if "question 3" in str(body) else "healthy") as server,
        judge_of(server, limits=limits) as judge,
    ):
        began = time.monotonic()
        replies = judge.critique(requests, 2)
        assert time.monotonic() - began < 2
    assert [votes[0].state for votes in replies] == ["valid"] * 3 + ["failed"] + ["valid"] * 2
    assert [reply.error for reply in replies[3]] == ["deadline"] * 2


def test_no_more_requests_in_flight_than_allowed():
    with FakeServer(delay=0.02) as server, judge_of(server, limits=dataclasses.replace(QUICK, concurrency=5)) as judge:
        judge.critique([make_request(n) for n in range(60)], 1)
        assert server.most_in_flight == 5
        assert server.connections <= 5
        judge.critique([make_request(n) for n in range(60)], 1)
        assert server.connections <= 5, "connections are kept between calls"


def test_calls_at_the_same_time_share_the_connections():
    limits = dataclasses.replace(QUICK, concurrency=3, attempt_timeout=10)
    with FakeServer(delay=0.01) as server, judge_of(server, limits=limits) as judge:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            batches = [[make_request(10 * i + n) for n in range(10)] for i in range(4)]
            for batch, votes in zip(batches, pool.map(lambda batch: judge.critique(batch, 1), batches), strict=True):
                assert [reply.critique.flagged for [reply] in votes] == [truth(request) for request in batch]
        assert server.most_in_flight == 3 and server.connections <= 3


@pytest.mark.parametrize("kind", ["reset", "reset_body", "stall", "drip", "endless", "gzip", "500"])
def test_a_connection_that_failed_makes_room_for_the_next(kind):
    failing = [kind] * 6
    limits = dataclasses.replace(QUICK, concurrency=2, attempt_timeout=0.2, retries=0, max_body=1 << 20)
    with (
        FakeServer(lambda *_: failing.pop() if failing else "healthy") as server,
        judge_of(server, limits=limits) as judge,
    ):
        states = [votes[0].state for votes in judge.critique([make_request(n) for n in range(20)], 1)]
        assert (states.count("failed"), states.count("valid")) == (6, 14)


def test_too_many_failures_stop_the_run_with_the_reasons():
    def behave(body, headers):
        return "500" if int(str(body["messages"]).split("question ")[1].split("\\")[0]) >= 40 else "healthy"

    limits = dataclasses.replace(QUICK, retries=0, concurrency=4)
    with (
        FakeServer(behave) as server,
        judge_of(server, limits=limits, max_failure_rate=0.3, failure_window=40) as judge,
    ):
        requests = [make_request(n) for n in range(400)]
        with pytest.raises(JudgeError, match=r"of the last 40 replies have failed.*max_failure_rate=0.3.*http_500"):
            judge.critique(requests, 2)
        assert len(server.requests) < 60
    with (
        always("500") as server,
        judge_of(server, limits=limits, max_failure_rate=0.3) as judge,
        pytest.raises(JudgeError, match="4 of the 4 replies of a call have failed"),
    ):
        judge.critique(requests[:2], 2)
    half = FakeServer(lambda body, headers: "500" if len(half.requests) % 2 else "healthy")
    with half, judge_of(half, limits=limits, max_failure_rate=0.3) as judge:
        judge.critique(requests[:4], 2)  # too few to tell
        with pytest.raises(JudgeError, match="20 of the 40 replies of a call"):
            judge.critique(requests[:20], 2)


def test_structured_output_is_asked_for_and_read():
    with FakeServer() as server, judge_of(server, structured=True) as judge:
        [replies] = judge.critique([WRONG], 2)
        assert [reply.critique for reply in replies] == [Critique(False, (1,))] * 2
        body = server.requests[0][0]
        assert body["response_format"]["type"] == "json_schema" and '"verdict"' in body["messages"][0]["content"]
        assert "downgraded" not in judge.counts
    with always("swapped") as server, judge_of(server, structured=True) as judge:
        assert judge.critique([WRONG], 1)[0][0].error == "wrong_nonce"


@pytest.mark.parametrize("status", ["400", "422"])
def test_structured_output_is_given_up_once_where_the_server_refuses_it(status):
    with (
        FakeServer(lambda body, headers: status if "response_format" in body else "healthy") as server,
        judge_of(server, structured=True, limits=dataclasses.replace(QUICK, concurrency=1)) as judge,
    ):
        replies = judge.critique([make_request(n) for n in range(5)], 2)
        assert all(reply.state == "valid" for votes in replies for reply in votes)
        assert judge.counts["downgraded"] == 1
        assert ["response_format" in body for body, _ in server.requests] == [True] + [False] * 5
        judge.critique([WRONG], 1)
        assert len(server.requests) == 7


def test_a_request_refused_in_either_form_does_not_end_structured_output():
    with (
        FakeServer(lambda body, headers: "400" if "too long" in str(body) else "healthy") as server,
        judge_of(server, structured=True) as judge,
    ):
        [[reply]] = judge.critique([JudgeRequest("too long", None, ("right",))], 1)
        assert (reply.state, reply.error) == ("failed", "http_400")
        judge.critique([WRONG], 1)
        assert "response_format" in server.requests[-1][0] and "downgraded" not in judge.counts


def test_from_any_thread_and_from_a_running_event_loop():
    with FakeServer() as server, judge_of(server) as judge:

        async def inside():
            return judge.critique([WRONG], 1)

        assert asyncio.run(inside())[0][0].state == "valid"
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            batches = [[make_request(10 * t + n) for n in range(10)] for t in range(8)]
            for batch, replies in zip(batches, pool.map(lambda b: judge.critique(b, 2), batches), strict=True):
                assert [votes[1].critique.flagged for votes in replies] == [truth(request) for request in batch]


@pytest.fixture
def interruptible():
    """SIGINT interrupts, also where the shell that started the tests in the background had it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupted_call_leaves_nothing_behind(interruptible):
    with always("stall") as server:
        judge = open_judge(server, limits=Limits())
        judge_threads = lambda: [t for t in threading.enumerate() if t.name == "capo judge"]

        def interrupt():
            while not server.in_flight:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            judge.critique([make_request(n) for n in range(100)], 1)
        loop = judge._engine._loop
        for _ in range(100):
            if not asyncio.all_tasks(loop):
                break
            time.sleep(0.02)
        assert not asyncio.all_tasks(loop)
        assert len(judge_threads()) == 1
        judge.close()
        assert not judge_threads()


def test_a_judge_that_is_forgotten_or_never_closed_ends_with_the_process():
    with FakeServer() as server:
        judge = open_judge(server)
        judge.critique([WRONG], 1)
        del judge
        gc.collect()
        assert "capo judge" not in [thread.name for thread in threading.enumerate()]
        code = (
            "from capo.judges import JudgeRequest; from capo.judges.openai import OpenAIJudge\n"
            f"judge = OpenAIJudge({server.url!r}, 'm')\n"
            "print(judge.critique([JudgeRequest('q', None, ('wrong',))], 1)[0][0].state)"
        )
        done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "valid", "")


@pytest.mark.parametrize("kind", ["echo", "reset", "healthy", "400"])
def test_the_key_appears_nowhere(kind, monkeypatch, caplog, capsys, tmp_path):
    """Not even where the server sends it back."""
    monkeypatch.setenv("JUDGE_KEY", f" {CANARY}\n")
    caplog.set_level(logging.DEBUG)

    class Echo(FakeServer):
        async def _answer(self, reader, writer, body, headers):
            if kind != "echo":
                return await super()._answer(reader, writer, body, headers)
            data = f"bad key: {headers['authorization']}".encode()
            writer.write(b"HTTP/1.1 401 No\r\nContent-Length: %d\r\n\r\n" % len(data) + data)

    with Echo(lambda body, headers: kind) as server:
        judge = open_judge(server, api_key_env="JUDGE_KEY", cache=tmp_path)
        shown = [repr(judge), str(vars(judge)["counts"])]
        try:
            shown.append(repr(judge.critique([WRONG], 1)))
        except JudgeError as error:
            chain = error
            while chain is not None:
                shown += [str(chain), repr(chain)]
                chain = chain.__cause__ or chain.__context__
            assert "***" in str(error)
        judge.close()
        assert server.requests[0][1]["authorization"] == f"Bearer {CANARY}"
    shown += [caplog.text, *capsys.readouterr()]
    shown += [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(CANARY in text for text in shown)


def test_keys_come_from_a_variable_or_a_file(monkeypatch, tmp_path):
    file = tmp_path / "key"
    file.write_text(f"{CANARY}\n")
    monkeypatch.setenv("JUDGE_KEY", CANARY)
    assert read_key("JUDGE_KEY", None) == read_key(None, file) == CANARY
    assert read_key(None, None) is None
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.setenv("TWO_LINES", f"{CANARY}\nX-Evil: 1")
    for env, path, message in [
        ("EMPTY", None, "EMPTY is not set or empty"),
        ("MISSING_VARIABLE", None, "MISSING_VARIABLE is not set"),
        (None, tmp_path / "no", "FileNotFoundError"),
        ("JUDGE_KEY", file, "name one"),
        ("TWO_LINES", None, "no API key"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            read_key(env, path)
        assert CANARY not in str(caught.value)


def test_addresses():
    for fine in (
        "http://localhost:8000/v1",
        "http://127.0.0.1:1/v1/",
        "http://[::1]:8000",
        "https://api.example.com/v1",
    ):
        assert check_url(fine) == fine.rstrip("/")
    assert check_url("http://10.0.0.7:8000/v1", allow_http=True)
    for bad, message in [
        ("http://10.0.0.7:8000/v1", "allow_http"),
        ("http://judge.internal/v1", "allow_http"),
        ("http://169.254.169.254/latest", "link-local"),
        ("https://[fe80::1]/v1", "link-local"),
        ("https://[::ffff:169.254.169.254]/v1", "link-local"),
        ("https://[fd00:ec2::254]/v1", "metadata"),
        ("https://100.100.100.200/v1", "metadata"),
        ("http://0.0.0.0:8000/v1", "unspecified"),
        ("https://224.0.0.1/v1", "multicast"),
        ("http://2130706433/v1", "allow_http"),
        (f"https://user:{CANARY}@api.example.com/v1", "no user"),
        (f"https://api.example.com/v1?key={CANARY}", "query"),
        ("file:///etc/passwd", "http or https"),
        ("localhost:8000", "http or https"),
        ("https://api.example.com:notaport/v1", "http or https"),
        ("", "http or https"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            check_url(bad, allow_http=False)
        assert CANARY not in str(caught.value)


@pytest.mark.parametrize(
    "url, places, message",
    [
        (
            "http://judge.internal",
            ["127.0.0.1", "169.254.169.254"],
            "'judge.internal' was looked up to 169.254.169.254",
        ),
        ("http://judge.internal", ["127.0.0.1", "::ffff:169.254.169.254"], "link-local"),
        ("http://judge.internal", ["127.0.0.1", "fd00:ec2::254"], "metadata"),
        ("http://judge.internal", ["127.0.0.1", "0.0.0.0"], "unspecified"),
        ("http://judge.localhost", ["127.0.0.1", "10.0.0.7"], "foreign"),
    ],
)
def test_a_name_that_comes_to_stand_for_another_place_is_not_followed(url, places, message, monkeypatch):
    """DNS rebinding: the first connection is let through, the second is not made."""
    looked_up = []

    def getaddrinfo(host, port, *rest, **options):
        looked_up.append(host)
        place = places[min(len(looked_up), len(places)) - 1]
        family = socket.AF_INET6 if ":" in place else socket.AF_INET
        return [(family, socket.SOCK_STREAM, 6, "", (place, port, 0, 0) if ":" in place else (place, port))]

    with FakeServer() as server:
        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        judge = OpenAIJudge(f"{url}:{server.port}/v1", "m", limits=QUICK, allow_http="internal" in url)
        with closing(judge):
            assert judge.critique([WRONG], 1)[0][0].state == "valid"
            judge.close()  # as the server would, by and by
            with pytest.raises(JudgeError, match=message):
                judge.critique([make_request(1)], 1)
        assert len(looked_up) == 2 and len(server.requests) == 1


def test_a_number_for_a_name_is_an_address():
    judge = OpenAIJudge("http://2852039166:8000/v1", "m", limits=QUICK, allow_http=True)
    with closing(judge), pytest.raises(JudgeError, match=r"169\.254\.169\.254, a link-local address"):
        judge.critique([WRONG], 1)


def test_proxies_of_the_environment_are_used_only_when_asked_for(monkeypatch):
    with FakeServer() as proxy, FakeServer() as server:
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        with judge_of(server) as judge:
            assert judge.critique([WRONG], 1)[0][0].state == "valid"
        assert len(server.requests) == 1 and not proxy.requests
        with judge_of(server, trust_env=True) as judge:
            assert judge.critique([WRONG], 1)[0][0].state == "valid"
        assert len(server.requests) == 1 and len(proxy.requests) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"max_tokens": 0}, {"max_failure_rate": 2},
        {"failure_window": 0}, {"extra": {"n": 3}}, {"extra": {"messages": []}}, {"extra": {"x": float("nan")}},
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError):
        OpenAIJudge("http://localhost/v1", "m", **options)
    with pytest.raises(ValueError, match="retries"):
        Limits(retries=-1)
    with pytest.raises(ValueError, match="deadline"):
        Limits(deadline=float("inf"))


def test_a_thousand_requests_under_fire():
    """A third of the attempts meet a fault of some kind: every reply ends valid, invalid or failed, and none is wrong."""
    rng = random.Random(7)
    requests = [make_request(number, rng) for number in range(1000)]
    limits = dataclasses.replace(QUICK, attempt_timeout=0.5, retries=5)
    with FakeServer(often(0.3, patience=8)) as server, judge_of(server, limits=limits) as judge:
        server.keep = False
        replies = judge.critique(requests, 3)
        states = [reply.state for votes in replies for reply in votes]
        assert len(replies) == 1000 and all(len(votes) == 3 for votes in replies)
        for request, votes in zip(requests, replies, strict=True):
            assert {reply.critique.flagged for reply in votes if reply.state == "valid"} <= {truth(request)}
            assert all(reply.critique is None and reply.error for reply in votes if reply.state != "valid")
        assert states.count("valid") > 2000 and states.count("invalid") > 200
        counted = {s: sum(n for name, n in judge.counts.items() if name.startswith(s)) for s in set(states)}
        assert counted == {state: states.count(state) for state in set(states)}
        for reason in (Fault.CONNECTION, Fault.DEADLINE, Fault.BAD_BODY, Fault.BAD_CHOICES, Fault.WRONG_ID):
            assert judge.counts[f"retries/{reason.value}"] > 0
