"""Mutations of valid checkpoint files, and what their loaders make of them."""

import json
import shutil
import signal
import time
import traceback
from collections import Counter
from pathlib import Path

import eggroll
from eggroll.llm import hf
from eggroll.llm.chat import ChatTemplate
from eggroll.llm.models.families import family_of
from eggroll.llm.tokenizers import load_tokenizer
from tests.eggroll.llm.language_models import OPT, RWKV7, TRANSFORMERS, save_without_sums

LIBRARY = Path(eggroll.__file__).parent.resolve()
FAMILIES = {"opt": OPT, "rwkv7": RWKV7} | {name: TRANSFORMERS[name] for name in ("qwen3-yarn", "llama-tied-llama3", "qwen2")}
LIMIT = 20.0  # seconds of one load
VALUES = (
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    2**31,
    10**400,
    1e30,
    -1e30,
    1e-320,
    "",
    "x",
    "16",
    [],
    [1],
    {},
    {"a": 1},
    [[]],
    "\ud800",
)
TEXTS = (b"1" * 5000, b"[" * 100_000, b'{"a":' * 100_000, b"NaN", b"Infinity", b"", b"\0", b"\xff\xfe", b"null", b"[]", b'"x"')
TEMPLATES = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ lipsum(n=10**9) }}",
    "{{ lipsum(n=999999999) }}",
    "{{ 10 ** 10 ** 10 }}",
    "{{ 'a' * 10000000000000 }}",
    "{{ messages[0].content.x.y }}",
    "{% for %}",
    "{{ messages | map(attribute='__class__') | list }}{{ ().__class__.__mro__ }}",
    "{{ '%999999999999d' % 1 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ raise_exception('no') }}",
    "{% include 'x' %}",
    "{{ range(10000000000) }}",
)


class Hang(BaseException):
    """A load took too long."""


def make_tokenizer(folder):
    import tokenizers

    words = {word: index for index, word in enumerate(["<unk>", "<s>", "a", "b", "ab", "user", "2", "+"])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(words, [("a", "b")], unk_token="<unk>"))
    made.add_special_tokens(["<s>"])
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.save(str(folder / "tokenizer.json"))


def make_folders(root):
    """A folder for every family, one in shards; each with a tokenizer, and a chat template."""
    for name, config in FAMILIES.items():
        folder = root / name
        save_without_sums(folder, config)
        if name == "qwen2":
            hf.save(folder, config, hf.load(folder)[2], max_shard_bytes=4000)
            (folder / "SHA256SUMS").unlink()
        make_tokenizer(folder)
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
        (folder / "chat_template.jinja").write_text("{{ messages[0].content }}{% for a in range(2) %}{{ a }}{% endfor %}")


def replace_values(rng, value):
    """Replace one value, at any depth, of a JSON value; sometimes remove it."""
    if isinstance(value, dict | list) and value and rng.random() < 0.9:
        places = list(value) if isinstance(value, dict) else range(len(value))
        place = rng.choice(list(places))
        changed = value.copy()
        if isinstance(value, dict) and rng.random() < 0.1:
            del changed[place]
        else:
            changed[place] = replace_values(rng, value[place])
        return changed
    return rng.choice(VALUES)


def mutate(rng, content, *, is_json):
    """Flip bits, cut, replace a JSON value, or replace everything."""
    how = rng.choice(("flip", "cut", "value", "value", "text") if is_json else ("flip", "flip", "cut", "header"))
    data = bytearray(content)
    if how == "flip":
        for _ in range(rng.choice((1, 1, 2, 8))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del data[rng.randrange(len(data)) :]
    elif how == "text":
        data = rng.choice(TEXTS)
    elif how == "header":  # the JSON of a safetensors file
        size = int.from_bytes(content[:8], "little")
        text = json.dumps(replace_values(rng, json.loads(content[8 : 8 + size]))).encode()
        data = len(text).to_bytes(8, "little") + text + content[8 + size :]
    else:
        text = json.dumps(replace_values(rng, json.loads(content)))
        data = text.replace('"\\ud800"', rng.choice(TEXTS).decode("latin1") if rng.random() < 0.3 else '"x"').encode("latin1")
    return bytes(data)


def load_model(folder):
    config, decoder, params = hf.load(folder)
    family_of(config).leaves(config)


def load_config(folder):
    config = hf.read_config(folder)
    family_of(config).leaves(config)
    hf.make_decoder(config)


def load_text(folder):
    load_tokenizer(folder, vocab_size=50).encode("ab user")


def load_template(folder):
    return ChatTemplate(folder)("2+2")


LOADERS = {  # files to change, and how to load them; shares of the inputs
    "config": (("config.json",), load_config, 5),
    "model": (("model*.safetensors", "model.safetensors.index.json", "config.json"), load_model, 3),
    "tokenizer": (("tokenizer.json",), load_text, 3),
    "template": (("chat_template.jinja", "tokenizer_config.json", "tokenizer.json"), load_template, 1),
}


def outcome(load, folder):
    """What a loader makes of a folder: "loaded", "clear", "unclear" or "hang", and the error."""

    def stop(*args):
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    start = time.perf_counter()
    try:
        load(folder)
    except Hang as error:
        return "hang", error
    except BaseException as error:
        if time.perf_counter() - start >= LIMIT:
            return "hang", error
        place = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
        words = str(error)
        is_clear = isinstance(error, ValueError | FileNotFoundError) and 20 < len(words) < 600 and "\n" not in words
        return "clear" if is_clear and place.is_relative_to(LIBRARY) else "unclear", error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return "loaded", None


def fuzz(root, rng, inputs, loaders=tuple(LOADERS)):
    """Load `inputs` mutated folders; return the counts and descriptions of what was not clear."""
    folders, counts, bad = sorted(root.iterdir()), Counter(), []
    work = root.parent / "work"
    for _ in range(inputs):
        name = rng.choices(loaders, [LOADERS[loader][2] for loader in loaders])[0]
        patterns, load, _ = LOADERS[name]
        folder = rng.choice(folders)
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(folder, work)
        path = rng.choice(sorted(path for pattern in patterns for path in work.glob(pattern)))
        if path.suffix == ".jinja":
            path.write_bytes(flip_text(rng, path.read_bytes()))
        else:
            path.write_bytes(mutate(rng, path.read_bytes(), is_json=path.suffix == ".json"))
        result, error = outcome(load, work)
        counts[result] += 1
        if result in ("unclear", "hang"):
            bad.append(f"{name} {folder.name} {path.name}: {type(error).__name__}: {str(error)[:300]}")
    return counts, bad


def flip_text(rng, text):
    data = bytearray(text)
    for _ in range(rng.choice((1, 2, 5))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)
