r"""The chat template of a checkpoint: the text that a model tuned on conversations reads for a prompt.

    ChatTemplate("Qwen2.5-0.5B-Instruct")("2+2=")  ->  "<|im_start|>user\n2+2=<|im_end|>\n<|im_start|>assistant\n"

transformers renders the template in jinja2's sandbox, without torch. Templates cannot read today's date (`strftime_now`),
unlike there: the prompts of a run must not depend on its day; many templates have a fixed date to fall back on.

A template is a program of whoever made the checkpoint: it may use `SECONDS` for a prompt, and no powers, whose computation
cannot be interrupted. Its files are compared with SHA256SUMS, if the folder has one.
"""

import contextlib
import ctypes
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eggroll.llm.sums import verify

FILE = "chat_template.jinja"
READ = (FILE, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
SECONDS = 10.0
NO_DATE = "{% set strftime_now = todays_date %}"  # an undefined name, so that `strftime_now is defined` is false


class ChatTemplate:
    """The template of a folder, called with a prompt.

    Args:
        folder: of a checkpoint with a tokenizer.json and a chat template.

    Raises:
        ImportError: transformers or jinja2 is not installed.
        ValueError: the folder has no template, or a tokenizer that transformers cannot read.
    """

    def __init__(self, folder: str | Path):
        try:
            import jinja2  # noqa: F401  transformers renders with it
            import transformers
        except ImportError as error:
            message = f"a chat template needs the extra chat: pip install transformers jinja2 ({error})."
            raise ImportError(message) from None
        self._folder = folder
        for name in READ:
            verify(Path(folder) / name)
        try:
            self._tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        except BaseException as error:  # files of others, which can be wrong in any way
            raise self._error(error) from None
        if not self._tokenizer.chat_template:
            raise ValueError(
                f"{folder} has no chat template, neither {FILE} nor in tokenizer_config.json; give --template with {{prompt}}."
            )

    def __call__(self, prompt: str) -> str:
        """Return what the model reads: the prompt as the user's turn, then the beginning of the model's turn.

        Raises:
            ValueError: the template fails.
        """
        messages = [{"role": "user", "content": prompt}]
        try:
            template = NO_DATE + self._tokenizer.get_chat_template()
            _check_no_powers(template)
            with _time_limit(SECONDS):
                return self._tokenizer.apply_chat_template(
                    messages, chat_template=template, tokenize=False, add_generation_prompt=True
                )
        except BaseException as error:  # a template is a program, which can fail in any way
            raise self._error(error) from None

    def _error(self, error: BaseException) -> BaseException:
        """The error to raise: what a user or the system stopped stays what it is."""
        if isinstance(error, KeyboardInterrupt | SystemExit):
            return error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return ValueError(f"the chat template of {self._folder} cannot be used: {reason.rstrip('.')}.")


class _TooSlow(BaseException):
    """A template took too long; not an Exception, which it might catch."""


def _check_no_powers(template: str) -> None:
    """Raise ValueError where a template computes a power: of large numbers it takes years, in one step of the interpreter."""
    import jinja2

    if "**" not in template:
        return
    if jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template).find(jinja2.nodes.Pow) is not None:
        raise ValueError("it computes a power (**)")


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise _TooSlow in this thread after some time, at its next step of Python."""
    lock, ended, thread = threading.Lock(), False, threading.get_ident()

    def stop() -> None:
        with lock:
            if not ended:
                _raise_in(thread, _TooSlow)

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    except _TooSlow:
        raise ValueError(f"it took more than {seconds:g} seconds for a prompt") from None
    finally:
        timer.cancel()
        with lock:
            ended = True


def _raise_in(thread: int, error: Any) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(error))
