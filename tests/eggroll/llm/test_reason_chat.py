"""The chat template of a checkpoint: texts and tokens of transformers, wherever it is kept, and what is said without one."""

import json

import pytest

from eggroll.experiments.reason.problem import check_template, encode_prompt
from eggroll.llm.chat import ChatTemplate
from eggroll.llm.tokenizers import FileTokenizer
from tests.eggroll.llm.language_models import CHATML, write_tokenizer

pytest.importorskip("jinja2")
pytest.importorskip("transformers")

PROMPTS = ["2+2=", "  Make 7 out of [1, 6].\n\n", "{prompt} {{ 1 }} <|im_end|> é"]
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set given = messages[0]['content'] %}{% else %}{% set given = 0 %}{% endif %}"
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('roles') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
MARKED = (
    "{%- for message in messages %}\n    {%- if loop.index > 1 %}{% break %}{% endif %}\n"
    "    {%- if tools is defined and tools %}{{ tools | tojson }}{% endif %}\n"
    "    {{- '<|im_start|>' + message.role + '\\n' + message | tojson + '<|im_end|>\\n' }}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}{% generation %}<|im_start|>assistant\n{% endgeneration %}{% endif %}"
)


@pytest.mark.slow
@pytest.mark.parametrize("template", [CHATML, LLAMA2, MARKED], ids=["chatml", "llama2", "marked"])
def test_texts_and_tokens_are_those_of_transformers(template, tmp_path):
    theirs = write_tokenizer(tmp_path, chat_template=template)
    chat, ours = ChatTemplate(tmp_path), FileTokenizer(tmp_path)
    check_template(chat, ours)
    for prompt in PROMPTS:
        messages, options = [{"role": "user", "content": prompt}], {"add_generation_prompt": True}
        assert chat(prompt) == theirs.apply_chat_template(messages, tokenize=False, **options)
        tokens = theirs.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
        assert encode_prompt(ours, chat, prompt) == tokens
    assert chat("a") != chat("b")


def write(folder, **settings):
    """Write a tokenizer and its settings, without the file of a template."""
    write_tokenizer(folder, chat_template="replaced")
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_where_a_template_may_be(tmp_path):
    start = {"__type": "AddedToken", "content": "<s>", "lstrip": False}
    write(tmp_path, chat_template="{{ bos_token }}{{ messages[0].content }}", bos_token=start)
    assert ChatTemplate(tmp_path)("a") == "<s>a"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "[{{ messages[0].content }}]"}]
    assert ChatTemplate(write(tmp_path, chat_template=named))("a") == "[a]"
    (tmp_path / "chat_template.jinja").write_text(
        "({{ messages[0].content }}){{ strftime_now('%d') if strftime_now is defined }}"
    )
    assert ChatTemplate(tmp_path)("a") == "(a)"  # a file of its own comes first; there is no date


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({}, "has no chat template, neither chat_template.jinja nor in tokenizer_config.json; give --template with {prompt}."),
        ({"chat_template": "{% if %}"}, "cannot be used: Expected an expression, got 'end of statement block'."),
        ({"chat_template": "{{ raise_exception('no system') }}"}, "cannot be used: no system."),
        ({"chat_template": "{{ strftime_now('%d') }}"}, "cannot be used: 'todays_date' is undefined."),
        ({"chat_template": "{{ messages.append(1) }}"}, "cannot be used: "),  # jinja2's sandbox
        ({"chat_template": "{{ 1 / 0 }}"}, "cannot be used: division by zero."),
    ],
)
def test_without_a_template_that_works_it_is_refused_by_a_clear_error(settings, sentence, tmp_path):
    with pytest.raises(ValueError, match="chat template") as told:
        ChatTemplate(write(tmp_path, **settings))("a")
    assert sentence in str(told.value) and "\n" not in str(told.value)


@pytest.mark.slow
def test_a_template_that_leaves_out_the_prompt_is_refused(tmp_path):
    write_tokenizer(tmp_path, chat_template="hello")
    with pytest.raises(ValueError, match=r"template must contain {prompt}, the place of the task's prompt, got 'hello'"):
        check_template(ChatTemplate(tmp_path), FileTokenizer(tmp_path))
