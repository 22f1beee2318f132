"""Replies on disk: hit, miss or broken, never another key's and never half a value."""

import json
import os
import stat
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing

import pytest
from judge_server import FakeServer

from capo.judges import JudgeRequest
from capo.judges.cache import ReplyCache

pytest.importorskip("httpx2")
from capo.judges.openai import OpenAIJudge

KEY = {"body": {"model": "m", "seed": 3}, "first": 0, "count": 2}
REQUESTS = [JudgeRequest(f"question {n}", None, ("right", "wrong")) for n in range(5)]


def entries(folder):
    return sorted(path for path in folder.rglob("*.json"))


def test_values_come_back_for_their_key_alone(tmp_path):
    cache = ReplyCache(tmp_path / "deep" / "cache")
    assert cache.get(KEY) is None
    cache.put(KEY, [["Judgment: Yes \ud800 é", None], 1, 2])
    assert cache.get(KEY) == ReplyCache(cache.folder).get(KEY) == [["Judgment: Yes \ud800 é", None], 1, 2]
    assert cache.get(dict(reversed(KEY.items()))) is not None, "the order of a key's parts does not matter"
    for change in (
        {"first": 1},
        {"count": 3},
        {"body": {"model": "m", "seed": 4}},
        {"body": {"model": "n", "seed": 3}},
    ):
        assert cache.get({**KEY, **change}) is None
    assert cache.counts == {"cache/misses": 5, "cache/hits": 2}


def test_files_are_private_and_nothing_else_is_left(tmp_path):
    cache = ReplyCache(tmp_path / "cache")
    cache.put(KEY, "value")
    files = [path for path in cache.folder.rglob("*") if path.is_file()]
    assert files == entries(cache.folder) and len(files) == 1
    assert stat.S_IMODE(files[0].stat().st_mode) == 0o600
    assert stat.S_IMODE(cache.folder.stat().st_mode) == 0o700


def test_every_truncation_and_every_flipped_bit_is_a_counted_miss(tmp_path):
    cache = ReplyCache(tmp_path)
    cache.put(KEY, "value")
    [file] = entries(tmp_path)
    whole = file.read_bytes()
    damaged = [whole[:n] for n in range(len(whole))]
    damaged += [whole[:n] + bytes([whole[n] ^ 1]) + whole[n + 1 :] for n in range(len(whole))]
    for content in [*damaged, whole + b"x", b"[" * 10_000]:
        file.write_bytes(content)
        assert cache.get(KEY) is None
    assert cache.counts["cache/broken"] == cache.counts["cache/misses"] == len(damaged) + 2
    cache.put(KEY, "value")
    assert cache.get(KEY) == "value", "what is broken is written anew"


def test_an_entry_in_the_place_of_another_is_not_taken_for_it(tmp_path):
    cache = ReplyCache(tmp_path)
    cache.put(KEY, "value")
    [file] = entries(tmp_path)
    other = {**KEY, "first": 1}
    cache.put(other, "other")
    [other_file] = set(entries(tmp_path)) - {file}
    other_file.write_bytes(file.read_bytes())
    assert cache.get(other) is None and cache.counts["cache/broken"] == 1


def test_a_disk_that_cannot_be_written_costs_a_count(tmp_path, monkeypatch):
    cache = ReplyCache(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    cache.put(KEY, "value")
    assert cache.counts == {"cache/unwritable": 1}
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_two_processes_write_and_read_the_same_entries(tmp_path):
    code = (
        "import sys; from capo.judges.cache import ReplyCache\n"
        "cache = ReplyCache(sys.argv[1])\n"
        "for turn in range(40):\n"
        "    for n in range(10):\n"
        "        found = cache.get({'n': n})\n"
        "        assert found is None or found == [n] * 500, found\n"
        "        cache.put({'n': n}, [n] * 500)\n"
        "assert not cache.counts['cache/broken'] and not cache.counts['cache/unwritable'], cache.counts\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(2)]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    assert len(entries(tmp_path)) == 10


def test_a_writer_that_is_killed_leaves_no_half_entry(tmp_path):
    code = (
        "import sys; from capo.judges.cache import ReplyCache\n"
        "cache = ReplyCache(sys.argv[1]); print('go', flush=True)\n"
        "while True: cache.put({'n': 0}, 'x' * 300_000)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    writer.stdout.readline()
    time.sleep(0.2)
    writer.kill()
    writer.wait(10)
    cache = ReplyCache(tmp_path)
    assert cache.get({"n": 0}) == "x" * 300_000 and not cache.counts["cache/broken"]


def test_a_judge_asks_nothing_twice(tmp_path):
    with FakeServer() as server:
        with closing(OpenAIJudge(server.url, "m", cache=tmp_path)) as judge:
            once = judge.critique(REQUESTS, 2)
            assert judge.counts["cache/misses"] == 5
        assert len(server.requests) == 5
        entries(tmp_path)[0].write_bytes(b"")
        with closing(OpenAIJudge(server.url, "m", cache=tmp_path)) as judge:
            again = judge.critique(REQUESTS[::-1], 2)[::-1]
            counts = judge.counts
        assert len(server.requests) == 6
        assert counts["cache/hits"] == 4 and counts["cache/broken"] == 1
        strip = lambda rows: [[(r.text, r.critique, r.prompt_tokens) for r in row] for row in rows]
        assert strip(once) == strip(again)
        # Everything that matters is in the key; where the server lives is not.
        for change in (
            {"model": "n"}, {"temperature": 0.5}, {"top_p": 0.5}, {"max_tokens": 9}, {"seed": 1},
            {"structured": True}, {"extra": {"top_k": 1}},
        ):  # fmt: skip
            options = {"model": "m", "cache": tmp_path, **change}
            with closing(OpenAIJudge(server.url, **options)) as judge:
                judge.critique(REQUESTS, 2)
                assert judge.counts["cache/misses"] == 5, change
        with closing(OpenAIJudge(server.url, "m", cache=tmp_path)) as judge:
            judge.critique(REQUESTS, 2, first=2)
            judge.critique(REQUESTS, 3)
            assert judge.counts["cache/misses"] == 10
        with FakeServer() as other, closing(OpenAIJudge(other.url, "m", cache=tmp_path)) as judge:
            judge.critique(REQUESTS, 2)
            assert not other.requests


def test_failures_are_not_kept(tmp_path):
    kinds = Counter()

    def behave(body, headers):
        kinds[body["messages"][0]["content"]] += 1
        return "400" if kinds[body["messages"][0]["content"]] == 1 else "length"

    with FakeServer(behave) as server:
        for expected in ("http_400", "truncated", "truncated"):
            with closing(OpenAIJudge(server.url, "m", cache=tmp_path, max_failure_rate=1)) as judge:
                assert judge.critique(REQUESTS[:1], 1)[0][0].error == expected
        assert len(server.requests) == 2
    [file] = entries(tmp_path)
    assert "truncated" in json.loads(file.read_bytes().partition(b"\n")[2])["value"][0][0]
