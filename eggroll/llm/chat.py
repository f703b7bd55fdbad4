"""The chat template of a checkpoint: what a model that was tuned on conversations reads of a prompt. Needs jinja2.

    text = template(messages=[{"role": "user", "content": prompt}], add_generation_prompt=True, bos_token=..., ...)

A template is a program of the checkpoint's author; it runs in jinja2's sandbox, with the names that transformers gives it, but
for the clock (`strftime_now`): what a run reads must not depend on its day, and templates that can do without use a fixed date.
"""

import json
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from eggroll.llm.shards import read_object

FILE, SETTINGS = "chat_template.jinja", "tokenizer_config.json"


class Chat:
    """The template of a folder, called with a prompt.

    Args:
        folder: of a checkpoint with chat_template.jinja, or with "chat_template" in tokenizer_config.json.

    Raises:
        ValueError: there is no template, or it is not one that jinja2 reads.
    """

    def __init__(self, folder: Path):
        settings = read_object(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
        self._tokens = _special_tokens(settings)
        self._folder, source = folder, _source(folder, settings)
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise self._wrong(error) from None

    def __call__(self, prompt: str) -> str:
        """Return what the model reads: the prompt as the user's turn, then the beginning of the model's.

        Raises:
            ValueError: the template fails.
        """
        messages = [{"role": "user", "content": prompt}]
        try:
            return self._template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=True, **self._tokens
            )
        except Exception as error:  # it is a program, which can fail in any way
            raise self._wrong(error) from None

    def _wrong(self, error: Exception) -> ValueError:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return ValueError(f"the chat template of {self._folder} cannot be used: {reason.rstrip('.')}.")


class _Generation(jinja2.ext.Extension):
    """{% generation %} and {% endgeneration %} mark what the model says, which only training on conversations asks for."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _source(folder: Path, settings: dict[str, Any]) -> str:
    if (folder / FILE).is_file():
        return (folder / FILE).read_text(encoding="utf-8")
    found = settings.get("chat_template")
    if isinstance(found, list):  # several, with names
        found = next((one["template"] for one in found if one["name"] == "default"), None)
    if not isinstance(found, str):
        raise ValueError(f"{folder} has no chat template, neither {FILE} nor in {SETTINGS}; give --template with {{prompt}}.")
    return found


def _special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """The tokens that a template may name, such as bos_token; those with settings of their own by their text."""
    given = {name: value for name, value in settings.items() if name.endswith("_token")}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in given.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, **options: Any) -> str:
    """As jinja2's filter, without its escapes of HTML."""
    return json.dumps(value, **{"ensure_ascii": False, **options})
