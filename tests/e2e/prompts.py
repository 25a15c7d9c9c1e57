"""Fifty varied prompts: chat, mathematics, code, lists, other languages, odd bytes."""

TOPICS = (
    "photosynthesis",
    "the French Revolution",
    "black holes",
    "bread baking",
    "chess openings",
    "the water cycle",
    "jazz music",
    "vaccines",
    "plate tectonics",
    "prime numbers",
)
FORMS = (
    "Explain {} in one sentence.",
    "Write three bullet points about {}.",
    "Write a limerick about {}.",
    "def describe(): # a Python function that returns a string about {}\n",
)
ODD = (
    "What is 17 * 23? Think step by step.",
    "Solve for x: 3x + 7 = 25.",
    "Translate to French: 'The weather is nice today.'",
    "¿Cuál es la capital de España?",
    "请用一句话介绍你自己。",
    "Repeat after me: \U0001f600 \U0001f680 naïve café",
    "a",
    "SELECT name FROM users WHERE",
    "<div><p>Hello</p>",
    "1, 1, 2, 3, 5, 8, 13,",
)
PROMPTS = [form.format(topic) for topic in TOPICS for form in FORMS] + list(ODD)
assert len(PROMPTS) == 50
