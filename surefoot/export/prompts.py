"""The 32 prompts of the parity verdict: several languages and scripts, code, numbers, white space, questions short and long."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from surefoot.errors import UsageError

PROMPTS = (
    "What is the capital of France?",
    "Name three primary colours and say where each occurs in nature.",
    "Please choose the correct answer to the question: Is the sky green? Answer format: true/false",
    "Which of these melts first in the sun: ice, iron, or granite? Answer1: ice Answer2: iron Answer3: granite",
    "Explain in two sentences why the sea is salty.",
    "Write a polite letter to a neighbour whose dog barks at night.",
    "def fibonacci(n):\n    \"\"\"The n-th Fibonacci number.\"\"\"\n",
    "SELECT name, COUNT(*) FROM visits WHERE year = 2024 GROUP BY",
    "for (int i = 0; i < 10; ++i) {\n\tprintf(\"%d\\n\", i);",
    "{\"name\": \"Ada\", \"born\": 1815, \"fields\": [",
    "17 + 25 = ",
    "What is 12.5 % of 3,840? Show the steps.",
    "1, 1, 2, 3, 5, 8, 13,",
    "A train leaves at 09:45 and arrives at 13:20. How long was it on its way?",
    "Übersetze ins Englische: Der frühe Vogel fängt den Wurm.",
    "Raconte en une phrase l'histoire du petit chaperon rouge.",
    "¿Cuál es la diferencia entre «ser» y «estar»?",
    "Столица Японии — это",
    "请用一句话介绍北京。",
    "日本で一番高い山は何ですか。",
    "한국의 수도는 어디인가요?",
    "ما هي عاصمة مصر؟",
    "भारत की राजधानी क्या है?",
    "Summarise: The committee met on Tuesday, could not agree on a date, and met again on Friday, when it chose the second of May.",
    "Is this review positive or negative? \"The plot was thin, but I laughed from start to end.\"",
    "  Two spaces before, and three   between,\n\nand an empty line.",
    "I'm sure they've said it's what we'd need, haven't they?",
    "Dear Sir or Madam,",
    "Once upon a time, in a valley that no map showed,",
    "https://example.org/path?query=1&page=2#top is",
    "Q: How do I boil an egg?\nA:",
    "List the planets from the sun outwards, one a line.",
)  # fmt: skip


def load(file: str) -> tuple[str, ...]:
    """The 32 above, or the first 32 lines of `file`.

    Raises:
        UsageError: the file cannot be read or is empty.
    """
    if not file:
        return PROMPTS
    try:
        lines = [line for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--prompts={file} cannot be read ({error}): give a text file, one prompt a line") from None
    if not lines:
        raise UsageError(f"--prompts={file} holds no prompt: give a text file, one prompt a line")
    return tuple(lines[: len(PROMPTS)])


def encoded(tokenizer: Any, prompts: tuple[str, ...]) -> list[list[int]]:
    """Each prompt's ids, through the chat template where the tokenizer has one."""
    if not tokenizer.chat_template:
        return [[int(token) for token in tokenizer(prompt)["input_ids"]] for prompt in prompts]
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
        for prompt in prompts
    ]
    return [[int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]] for text in texts]
