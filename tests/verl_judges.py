"""Judges by import path, as verl's configuration names them. A step is wrong if its text says so."""

import threading

from capo.judges import JudgeError
from capo.judges.scripted import ScriptedJudge

SEEN = []  # requests, and the threads that asked


class Spy:
    def __init__(self, **rates):
        self.judge = ScriptedJudge(lambda request: ["wrong" in step for step in request.steps], **rates)

    def critique(self, requests, num_votes, first=0):
        SEEN.append((*requests, threading.current_thread().name))
        return self.judge.critique(requests, num_votes, first)


class Awaited(Spy):
    async def critique(self, requests, num_votes, first=0):
        return super().critique(requests, num_votes, first)


class Broken(Spy):
    def critique(self, requests, num_votes, first=0):
        raise JudgeError("nobody answers")


class Crashing(Spy):
    def critique(self, requests, num_votes, first=0):
        raise RuntimeError("out of order")


class Short(Spy):
    def critique(self, requests, num_votes, first=0):
        return [row[1:] for row in super().critique(requests, num_votes, first)]


ready = Spy()
no_judge = object()
