"""Rewards that worker processes import: well-behaved ones, and ones that fail on completions that ask for it."""

import os
import subprocess
import time


def length(prompts, completions, **columns):
    return [float(len(completion)) for completion in completions]


def wayward(prompts, completions, **columns):
    """Score 1, but do what a completion says."""
    return [_obey(completion) for completion in completions]


def _obey(completion):
    if completion == "raise":
        raise ZeroDivisionError("of a completion")
    if completion == "hang":
        time.sleep(600)
    if completion == "exit":
        os._exit(3)
    if completion.startswith("child"):
        child = subprocess.Popen(["sleep", "600"])
        with open(completion.removeprefix("child "), "w") as file:
            file.write(str(child.pid))
        time.sleep(600)
    return {"nan": float("nan"), "text": "1.0"}.get(completion, 1)


def too_few(prompts, completions, **columns):
    return [1.0] * (len(completions) - 1)


def no_list(prompts, completions, **columns):
    return 1.0


def right(prompts, completions, *, answer, **columns):
    return [float(completion == text) for completion, text in zip(completions, answer, strict=True)]


def process(prompts, completions, **columns):
    return [float(os.getpid())] * len(completions)
