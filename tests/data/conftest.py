"""A tokenizer small enough to read: word n of `VOCABULARY` is token n; whatever else is token 0."""

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

VOCABULARY = ["<unk>", "<s>", "</s>", "a", "b", "c", "d", "e", "[user]", "[assistant]", "[end]", "[system]"]
CHAT_TEMPLATE = (
    "{{ '<s>' }}{% for m in messages %}{{ ' [' + m['role'] + '] ' + m['content'] + ' [end]' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' [assistant]' }}{% endif %}"
)

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]


@pytest.fixture(scope="session")
def make_tokenizer() -> MakeTokenizer:
    def make(*, bos: bool = False, eos: bool = True, chat_template: str | None = None) -> PreTrainedTokenizerFast:
        inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        if bos:
            inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>" if eos else None
        )
        tokenizer.chat_template = chat_template
        return tokenizer

    return make


@pytest.fixture(scope="session")
def words(make_tokenizer: MakeTokenizer) -> PreTrainedTokenizerFast:
    """Adds nothing round a text, as GPT-2's does."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def words_bos(make_tokenizer: MakeTokenizer) -> PreTrainedTokenizerFast:
    """Puts <s> before a text, as Llama's and Gemma's do."""
    return make_tokenizer(bos=True)


@pytest.fixture(scope="session")
def words_chat(make_tokenizer: MakeTokenizer) -> PreTrainedTokenizerFast:
    return make_tokenizer(bos=True, chat_template=CHAT_TEMPLATE)
