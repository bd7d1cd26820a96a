from __future__ import annotations

from geohooks import zoo
from geohooks.zoo.exercises import exercises
from geohooks.zoo.text import Document

TOKENIZER = zoo.load("qwen3-moe-tiny-base").tokenizer
CODE = Document(
    "code",
    "arithmetic.py",
    'def silent(x):\n    return x\n\nclass Sum:\n    def add(self, x):\n        """Add a number.\n\n        More.\n'
    '        """\n        self.total += x\n        return self.total\n',
)
PROSE = Document("prose", "sums", "Sums\n****\n\nToo short.\n\n" + "A sum is what adding gives. " * 20)


def decoded(ids: tuple[int, ...]) -> str:
    return TOKENIZER.decode(ids)


def test_functions_lose_their_docstring_and_are_answered_by_it() -> None:
    (found,) = exercises(TOKENIZER, [CODE], limit=256)
    assert decoded(found.answer_ids) == "Add a number.\n<|endoftext|>"
    asked = decoded(found.ids[: found.answer_start])
    assert asked.startswith("<|user|>\n")
    assert asked.endswith("def add(self, x):\n    self.total += x\n    return self.total\n<|assistant|>\n"), (
        "the class's indentation goes too"
    )


def test_topics_are_named() -> None:
    (found,) = exercises(TOKENIZER, [PROSE], limit=256)
    assert decoded(found.answer_ids) == "Sums\n<|endoftext|>"
    assert "A sum is what adding gives." in decoded(found.ids[: found.answer_start])


def test_the_limit_cuts_the_text_and_not_the_answer() -> None:
    (whole,), (cut,) = (exercises(TOKENIZER, [PROSE], limit) for limit in (256, 80))
    assert 78 <= len(cut.ids) <= 82 < len(whole.ids)
    assert cut.answer_ids == whole.answer_ids
    assert exercises(TOKENIZER, [PROSE], limit=30) == []


def test_an_exercise_reads_like_a_chat() -> None:
    (found,) = exercises(TOKENIZER, [CODE], limit=256)
    question = decoded(found.ids[: found.answer_start]).removeprefix("<|user|>\n").removesuffix("\n<|assistant|>\n")
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": "Add a number."}]
    assert TOKENIZER.apply_chat_template(chat, tokenize=False) == decoded(found.ids) + "\n"
