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


def own_socket():
    """The socket to the trainer, which a hostile reward can find."""
    import gc
    import socket

    return next(found for found in gc.get_objects() if isinstance(found, socket.socket) and found.fileno() >= 0)


def hostile(prompts, completions, **columns):
    """Do to the trainer what a completion says."""
    import signal
    import threading

    (completion,) = {*completions}
    if completion == "half":
        own_socket().sendall(b"EGW1" + (100).to_bytes(8, "little") + b'["done", 1, [')
        time.sleep(600)
    if completion == "garbage":
        own_socket().sendall(b"\x80\x04never unpickled")
        time.sleep(600)
    if completion == "huge":
        own_socket().sendall(b"EGW1" + (1 << 40).to_bytes(8, "little"))
        time.sleep(600)
    if completion == "nested":
        text = b"[" * 100_000
        own_socket().sendall(b"EGW1" + len(text).to_bytes(8, "little") + text)
        time.sleep(600)
    if completion == "more":
        text = b'["done", 1, [1.0, 1.0, 1.0]]'
        own_socket().sendall(b"EGW1" + len(text).to_bytes(8, "little") + text)
        time.sleep(600)
    if completion == "stop reading":
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGSTOP)).start()
    if completion == "memory":
        return [float(len(bytearray(3 << 30)))]
    return [1.0] * len(completions)


def spin(prompts, completions, *, file, **columns):
    """Start a child, say who both are, and never end."""
    child = subprocess.Popen(["sleep", "600"])
    with open(file[0], "w") as out:
        out.write(f"{os.getpid()} {child.pid}")
    while True:
        pass


def forks(prompts, completions, **columns):
    """Fork for a completion, as code written by a model may, and let the child run on."""
    for completion in completions:
        if completion == "fork":
            os.fork()
    return [float(len(completion)) for completion in completions]


def trickle(prompts, completions, **columns):
    """Send a long message byte by byte."""
    end = own_socket()
    end.sendall(b"EGW1" + (1 << 20).to_bytes(8, "little"))
    while True:
        end.sendall(b" ")
        time.sleep(0.01)
