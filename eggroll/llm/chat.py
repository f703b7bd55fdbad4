r"""The chat template of a checkpoint: the text that a model tuned on conversations reads for a prompt.

    ChatTemplate("Qwen2.5-0.5B-Instruct")("2+2=")  ->  "<|im_start|>user\n2+2=<|im_end|>\n<|im_start|>assistant\n"

transformers renders the template in jinja2's sandbox, without torch. Templates cannot read today's date (`strftime_now`),
unlike there: the prompts of a run must not depend on its day; many templates have a fixed date to fall back on.
"""

from pathlib import Path

FILE = "chat_template.jinja"
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
            message = f"a chat template needs transformers and jinja2: pip install 'eggroll-jax[chat]' ({error})."
            raise ImportError(message) from None
        self._folder = folder
        try:
            self._tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # files of others, which can be wrong in any way
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
            return self._tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template is a program, which can fail in any way
            raise self._error(error) from None

    def _error(self, error: Exception) -> ValueError:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return ValueError(f"the chat template of {self._folder} cannot be used: {reason.rstrip('.')}.")
