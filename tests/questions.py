"""Rows of two small tasks."""

QUESTIONS = [
    {"query": "Question: Which metal is liquid?", "choices": ["mercury", "iron, when it is cold"], "gold": 0},
    {
        "query": "Question: What do bees make?\n",
        "choices": ["a very large hole in the ground", "honey", "oil"],
        "gold": 1,
    },
    {"query": "To open a tin", "choices": ["use a tin opener and turn it", "shout", "wait"], "gold": 0},
    {"query": "Question: Is ice cold?\nAnswer:", "choices": ["yes", "no, never", "only in some towns"], "gold": 0},
    {"query": "The sun rises in the", "choices": ["east", "west, as everybody knows"], "gold": 0},
]
LETTERS = [
    {"context": f"The letter after {a} is", "continuation": b} for a, b in zip("abcdefgh", "bcdefghi", strict=True)
]
