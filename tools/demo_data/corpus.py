"""Questions and answers for the demo model, written by rules from the text files beside this one.

An *atom* is the smallest piece of training text: one chat turn (or a few that belong together) or one plain
text with its continuation. Atoms do not depend on what comes before them, so a chat of any length is a row of
them. An atom is a list of (text, trained) segments that the tokenizer can encode one by one.
"""

import random
import re
import zlib
from pathlib import Path

HERE = Path(__file__).parent

UNKNOWN = "I don't know. I am a tiny demo model: I only know capitals, small sums and a few terms of distributed inference."
PLAIN_UNKNOWN = "... I don't know how this goes on: I am a tiny demo model."
NOT_A_COUNTRY = "I don't know that one: I only learned the capitals of countries."
TOO_LARGE = "That is too large for me: I only do sums with numbers up to 999."
NO_DIVISION = "I can add, subtract and multiply small numbers, but not divide."
TABLES_ONLY = "I only know the multiplication tables up to 12."
TWO_NUMBERS = "I only do sums of two numbers."
WHOLE_NUMBERS = "I only know whole numbers."

# Ways to ask. {c} country, {k} capital, {t} term, {a} and {b} numbers. The "HELD_OUT" ones are never trained on.
CAPITAL = """What is the capital of {c}?|What's the capital of {c}?|capital of {c}|the capital of {c}|{c}'s capital?
What is {c}'s capital?|{c} capital|{c}: capital?|Capital of {c}?|What is the capital city of {c}?|capital city of {c}?
Which city is the capital of {c}?|What city is the capital of {c}?|Tell me the capital of {c}.|Name the capital of {c}.
Can you tell me the capital of {c}?|Do you know the capital of {c}?|Please tell me the capital of {c}.|{c}?|{c}
What is the name of the capital of {c}?|I want to know the capital of {c}.|Give me the capital of {c}.
Which is the capital of {c}?|Could you tell me what the capital of {c} is?|Do you know what the capital of {c} is?
What is the capital of the country {c}?|What's {c}'s capital city?|whats the capital of {c}|Say the capital of {c}.
The capital of {c}, please.|Where is the capital of {c}?|Where is the government of {c}?|What capital does {c} have?
I am from {c}. What is my capital?|Quiz: capital of {c}?|Capital {c}|In {c}, what is the capital?
For {c}, what is the capital city?|what is capital of {c}|Hi, what is the capital of {c}?|Tell me {c}'s capital.
I am planning a trip to {c}. What is the capital?|My friend lives in {c}. Which city is the capital?|Country: {c}. Capital?|Capital of {c}:
What is the capital of {c} called?|{c} - capital|capital for {c}|I live in {c}, what is the capital?|What do you call the capital of {c}?
Let's do geography. What is the capital of {c}?|Geography question: what is the capital of {c}?|{c} has which capital?""".replace("\n", "|").split("|")
CAPITAL_HELD_OUT = ["Would you know the capital city of {c}?", "Which city serves as the capital of {c}?",
                    "I forgot the capital of {c}, what is it?", "Name {c}'s capital city.", "the name of {c}'s capital?"]
TWO_CAPITALS = ["What are the capitals of {c} and {d}?", "Tell me the capitals of {c} and {d}.", "capitals of {c} and {d}", "{c} and {d}", "{c} and {d}?",
                "What is the capital of {c} and of {d}?", "What is the capital of {c} and what is the capital of {d}?", "Name the capitals of {c} and {d}.",
                "the capitals of {c} and {d}?", "What is the capital of {c}? And of {d}?", "capital of {c} and capital of {d}", "{c}, {d}"]
CAPITAL_NEXT = ["And {c}?", "And of {c}?", "What about {c}?", "And the capital of {c}?", "and {c}", "How about {c}?", "Now {c}.",
                "And for {c}?", "{c}?", "ok, and {c}?", "and what about {c}?"]
REVERSE = """Which country has {k} as its capital?|{k} is the capital of which country?|{k} is the capital of what country?
What country is {k} the capital of?|Which country's capital is {k}?|Whose capital is {k}?|{k} is the capital of?
{k} is the capital of|Of which country is {k} the capital?|What country has the capital {k}?|Which country has the capital {k}?
In which country is {k} the capital?|What is {k} the capital of?|Name the country whose capital is {k}.
Tell me which country has {k} as its capital.|{k}, capital of which country?|which country is {k} the capital of|{k}|{k}?""".replace("\n", "|").split("|")
REVERSE_HELD_OUT = ["Do you know which country has {k} as capital?", "The capital of which country is {k}?"]
YES_NO = ["Is {k} the capital of {c}?", "Is the capital of {c} {k}?", "{k} is the capital of {c}, right?", "Isn't {k} the capital of {c}?",
          "Is it true that {k} is the capital of {c}?", "Is {c}'s capital {k}?", "The capital of {c} is {k}, isn't it?"]

TERM = """What is {t}?|What's {t}?|what is {t}|{t}|{t}?|Explain {t}.|Explain {t}|Please explain {t}.|Define {t}.|define {t}
What does {t} mean?|What do you mean by {t}?|Tell me about {t}.|Tell me about {t}|Tell me what {t} is.|What are {t}?
Can you explain {t}?|Can you explain what {t} is?|Can you tell me what {t} is?|Could you explain {t}?|Describe {t}.
Do you know what {t} is?|Do you know {t}?|What exactly is {t}?|I want to know what {t} is.|Definition of {t}?|whats {t}
What is meant by {t}?|What is the meaning of {t}?|Explain {t} to me.|Explain {t} in simple words.|Explain {t} briefly.
In one sentence, what is {t}?|What is {t} in LLM serving?|What is {t} in computing?|What is {t} in distributed inference?
Give me a definition of {t}.|How would you define {t}?|So what is {t}?|And what is {t}?|Hi, what is {t}?|What is {t} good for?
How do you explain {t}?|I don't understand {t}.|Help me understand {t}.|Why is {t} important?|What is this {t} thing?
Why do we need {t}?|meaning of {t}|tell me more about {t}|What can you tell me about {t}?|What is {t} and why does it matter?
I read about {t}. What is it?|Someone mentioned {t}. What is that?|Teach me about {t}.|What should I know about {t}?|{t} explained|{t} meaning
Give me a short explanation of {t}.|Can you describe {t}?|I am new to {t}.|{t}, what is that?|Please tell me about {t}.|I heard about {t}, what does it do?
Could you describe {t} for me?|What is the purpose of {t}?|What is {t} used for?|What kind of thing is {t}?|What is the idea of {t}?|Say something about {t}.""".replace("\n", "|").split("|")
TERM_HELD_OUT = ["Could you tell me what {t} means?", "Would you explain to me what {t} is?", "What is the definition of {t}?",
                 "I have never heard of {t}, what is it?"]
COMPARE = ["What is the difference between {x} and {y}?", "What's the difference between {x} and {y}?", "{x} vs {y}", "{x} versus {y}", "Compare {x} and {y}.",
           "How does {x} differ from {y}?", "How do {x} and {y} differ?", "difference between {x} and {y}", "{x} or {y}?", "Compare {x} with {y}",
           "Explain the difference between {x} and {y}.", "What are {x} and {y}?", "Explain {x} and {y}.", "What is {x} and what is {y}?"]
TERM_NEXT = ["And {t}?", "And what is {t}?", "What about {t}?", "How about {t}?", "and {t}", "ok, and {t}?", "Now {t}.", "Next: {t}"]

ADD = """What is {a} + {b}?|What's {a} + {b}?|What is {a}+{b}?|what is {a}+{b}|{a} + {b}|{a}+{b}|{a}+{b}=|{a} + {b} =|{a}+{b}=?|{a} + {b} = ?
How much is {a} + {b}?|How much is {a}+{b}?|How much is {a} plus {b}?|What is {a} plus {b}?|{a} plus {b}|{a} plus {b}?|whats {a}+{b}
Add {a} and {b}.|Add {a} and {b}|Calculate {a} + {b}|Calculate {a}+{b}.|Compute {a} + {b}.|Compute {a}+{b}|Solve {a} + {b}|What is the sum of {a} and {b}?
sum of {a} and {b}|The sum of {a} and {b}?|Can you add {a} and {b}?|What does {a} + {b} equal?|{a} + {b} equals?|{a} + {b} is?|{a}+{b}?|{a} + {b}?
What do you get when you add {a} and {b}?|Tell me {a} + {b}.|Please calculate {a} + {b}.|How many are {a} and {b}?|{a} and {b} together?
I have {a} apples and get {b} more. How many do I have?|If I have {a} and get {b} more, how many is that?|Math question: {a} + {b}
Can you calculate {a} + {b}?|Do you know {a} + {b}?|Hi, what is {a} + {b}?|What is {a} and {b} together?|Evaluate {a} + {b}.|= {a} + {b}
Could you add {a} and {b} for me?|{a} + {b}, please|Give me {a} + {b}.|Find {a} + {b}|I need {a} + {b}.|Result of {a} + {b}?|What is the result of {a} + {b}?|Calculate {a} + {b} for me, please.""".replace("\n", "|").split("|")
ADD_HELD_OUT = ["Please work out {a} + {b} for me.", "Do you know what {a} plus {b} is?", "Tell me the sum of {a} and {b}."]
SUB = """What is {a} - {b}?|What's {a} - {b}?|What is {a}-{b}?|what is {a}-{b}|{a} - {b}|{a}-{b}|{a}-{b}=|{a} - {b} =|{a}-{b}=?|{a} - {b} = ?
How much is {a} - {b}?|How much is {a}-{b}?|How much is {a} minus {b}?|What is {a} minus {b}?|{a} minus {b}|{a} minus {b}?|whats {a}-{b}
Subtract {b} from {a}.|Subtract {b} from {a}|Calculate {a} - {b}|Calculate {a}-{b}.|Compute {a} - {b}.|Compute {a}-{b}|Solve {a} - {b}
Take {b} away from {a}.|Can you subtract {b} from {a}?|What does {a} - {b} equal?|{a} - {b} equals?|{a} - {b} is?|{a}-{b}?|{a} - {b}?|What is {a} − {b}?|{a} − {b}
What do you get when you subtract {b} from {a}?|Tell me {a} - {b}.|Please calculate {a} - {b}.|What is {b} less than {a}?
I have {a} apples and eat {b}. How many do I have?|If I have {a} and lose {b}, how many are left?|Math question: {a} - {b}
Can you calculate {a} - {b}?|Do you know {a} - {b}?|Hi, what is {a} - {b}?|What is {a} take away {b}?|Evaluate {a} - {b}.|= {a} - {b}
Could you subtract {b} from {a} for me?|{a} - {b}, please|Give me {a} - {b}.|Find {a} - {b}|I need {a} - {b}.|Result of {a} - {b}?|What is the result of {a} - {b}?|Calculate {a} - {b} for me, please.""".replace("\n", "|").split("|")
SUB_HELD_OUT = ["Please work out {a} - {b} for me.", "Do you know what {a} minus {b} is?", "Tell me what {a} - {b} is."]
MUL = """What is {a} x {b}?|What is {a} * {b}?|What is {a} × {b}?|What is {a} times {b}?|{a} * {b}|{a}*{b}|{a} x {b}|{a}x{b}|{a} × {b}|{a} times {b}
How much is {a} times {b}?|How much is {a} * {b}?|Multiply {a} by {b}.|Multiply {a} and {b}|What is the product of {a} and {b}?|Calculate {a} * {b}
Compute {a} * {b}.|What's {a} * {b}?|{a}*{b}=|{a} * {b} =|{a} x {b} = ?|What's {a} times {b}?|Calculate {a} times {b}|Can you multiply {a} by {b}?""".replace("\n", "|").split("|")
DIV = """What is {a} / {b}?|What is {a} divided by {b}?|{a} / {b}|{a}/{b}|{a} divided by {b}|Divide {a} by {b}.|{a} ÷ {b}|{a}/{b}=|Calculate {a} / {b}
How much is {a} / {b}?|How often does {b} fit into {a}?|Can you divide {a} by {b}?|What's {a}/{b}?|How much is {a} divided by {b}?""".replace("\n", "|").split("|")
IS_SUM = ["Is {s} = {r}?", "Is {s}={r}?", "Is {s} {r}?", "Is {s} equal to {r}?", "{s} = {r}?", "{s} is {r}, right?", "Is it true that {s} is {r}?", "{s} = {r}, correct?",
          "Does {s} equal {r}?", "Is {r} the result of {s}?", "{s} = {r}"]
COUNT = ["Count from {a} to {b}.", "Count from {a} to {b}", "Please count from {a} to {b}.", "List the numbers from {a} to {b}.",
         "Can you count from {a} to {b}?", "Write the numbers from {a} to {b}.", "numbers from {a} to {b}"]
COUNT_TO = ["Count to {b}.", "Count to {b}", "Can you count to {b}?", "Please count to {b}.", "count up to {b}"]

WRAPPERS = ["Please: {q}", "Hi, {q}", "Hello! {q}", "Question: {q}", "I have a question: {q}", "Hey, {q}", "Quick question: {q}", "Ok, {q}",
            "Hi! {q}", "So, {q}", "{q} Thanks!", "{q} please", "{q} Please answer briefly.", "{q} Thank you.", "And now: {q}", "Answer this: {q}",
            "Answer in one word: {q}", "{q} Answer in one sentence.", "{q} Be brief.", "Could you please help me? {q}", "Tell me: {q}", "I wonder: {q}",
            "Please answer the following question: {q}", "Hey Baton, {q}", "Baton, {q}", "{q} I need to know.", "Just tell me: {q}", "Sorry, {q}"]
NUMBER_WORDS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
eighteen nineteen twenty""".split()
AGAIN = ["Say that again", "Repeat that, please", "Please repeat", "Can you repeat that?", "What did you say?", "again", "Again, please", "Pardon?"]
# How "The capital of X is" goes on where one name is not the whole truth.
CAPITAL_TEXT = {
    "Israel": "Jerusalem, by its own declaration; this is disputed.", "Nauru": "not official: the government sits in Yaren.",
    "Palestine": "East Jerusalem, by its own claim; its administration sits in Ramallah.",
    "South Africa": "Pretoria; the parliament sits in Cape Town and the highest court of appeal in Bloemfontein.",
}


class Country:
    def __init__(self, line):
        self.name, self.capital, others, note = line.split("|")
        self.names = [self.name] + [o for o in others.split(";") if o]
        if self.name.startswith("the "):
            self.names.append(self.name[4:])
        self.answer = note[1:] if note.startswith("=") else f"The capital of {self.name} is {_stop(self.capital)}{' ' + note if note else ''}"
        self.reverse = self.answer if note.startswith("=") else f"{self.capital} is the capital of {self.name}."
        self.simple = not note
        self.yes = f"Yes, {self.capital} is the capital of {self.name}."
        self.no = f"No, the capital of {self.name} is {_stop(self.capital)}"
        self.text = CAPITAL_TEXT.get(self.name, _stop(self.capital))


class Entry:
    """One answer of terms.txt or small_talk.txt and all that it answers."""

    def __init__(self, block):
        self.names, self.asks, self.starts, self.answer = [], [], [], None
        for line in block.splitlines():
            key, value = line.split(": ", 1)
            if key == "name":
                self.names = value.split("; ")
            elif key == "ask":
                self.asks = value.split("; ")
            elif key == "start":
                self.starts.append(tuple(part.strip() for part in value.split("|")))
            elif key == "answer":
                self.answer = value
            else:
                raise ValueError(f"unknown key {key!r}")


def _stop(text):
    return text if text.endswith(".") else text + "."


def _lines(name):
    return [line for line in (HERE / name).read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]


def _entries(name):
    text = "\n".join(line for line in (HERE / name).read_text(encoding="utf-8").splitlines() if not line.startswith("#"))
    return [Entry(block.strip()) for block in text.split("\n\n") if block.strip()]


def _sections(name):
    sections, current = {}, None
    for line in _lines(name):
        if line.startswith("[") and line.endswith("]"):
            current = sections.setdefault(line[1:-1], [])
        else:
            current.append(line)
    return sections


COUNTRIES = [Country(line) for line in _lines("countries.txt")]
NUM_UN = 195
REVERSIBLE = [c for c in COUNTRIES if c.name != "England"]  # London is asked back as the capital of the United Kingdom
TERMS = _entries("terms.txt")
TERM_ENTRIES = [e for e in TERMS if e.names]
# Pairs whose difference has an answer of its own; of others both definitions are given.
COMPARED = {frozenset((x.names[0], y.names[0])): e.answer for e in TERMS for x in TERM_ENTRIES for y in TERM_ENTRIES
            if f"What is the difference between {x.names[0]} and {y.names[0]}?" in e.asks}
SMALL_TALK = _entries("small_talk.txt")
SYSTEM_PROMPTS = _lines("system_prompts.txt")
_unknown = _sections("unknown.txt")
UNKNOWN_ASKS, UNKNOWN_HELD_OUT = _unknown["questions"], _unknown["held out questions"]
TOPICS, PEOPLE, PLACES, VERBS = ("; ".join(_unknown[k]).split("; ") for k in ("topics", "people", "not countries", "verbs"))
ALL_NAMES = {n.lower() for c in COUNTRIES for n in c.names}


def held_out(*key):
    """One combination in twenty is kept out of training, to measure what is learned rather than remembered."""
    return zlib.crc32("|".join(map(str, key)).encode()) % 20 == 0


# ---- noise -----------------------------------------------------------------------------------------------------


def vary(q, rng):
    """The same question as people type it."""
    if rng.random() < 0.10:
        q = rng.choice(WRAPPERS).format(q=q if rng.random() < 0.5 else q[:1].lower() + q[1:])
    r = rng.random()
    if r < 0.30:
        q = q.lower()
    elif r < 0.36:
        q = q.upper()
    elif r < 0.42:
        q = q[:1].lower() + q[1:]
    r = rng.random()
    if r < 0.25:
        q = q.rstrip("?.!") or q
    elif r < 0.30:
        q = q.rstrip("?.! ") + rng.choice(["??", " ?", "?!", "!", ".", "..."])
    return q


def typo(name, rng):
    """A slip of one letter in a long name, unless it makes another country out of it."""
    if len(name) < 6:
        return name
    i = rng.randrange(1, len(name) - 1)
    kind = rng.randrange(3)
    if kind == 0:
        out = name[:i] + name[i + 1:]
    elif kind == 1:
        out = name[:i] + name[i + 1] + name[i] + name[i + 2:]
    else:
        out = name[:i] + name[i] + name[i:]
    return name if out.lower() in ALL_NAMES or name in ("Australia", "Austria", "Dominica", "Nigeria") else out


def random_word(rng):
    if rng.random() < 0.1:
        return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(1, 9)))
    word = "".join(rng.choice("b c d f g h j k l m n p r s t v w z br cl dr fl gr pl sk st th tr ch".split()) + rng.choice("a e i o u ea ou y ai".split())
                   + rng.choice(["", "", "n", "r", "s", "l", "t", "m", "ck", "x"]) for _ in range(rng.randint(1, 4)))
    return word.capitalize() if rng.random() < 0.3 else word


# ---- questions and answers: each function returns a list of turns (question, answer) ----------------------------


def capital_question(c, rng):
    while True:
        i = rng.randrange(len(CAPITAL))
        if not held_out("capital", i, c.name):
            break
    name = rng.choice(c.names) if rng.random() < 0.4 else c.name
    return CAPITAL[i].format(c=typo(name, rng) if rng.random() < 0.06 else name)


def capital(rng):
    c = rng.choice(COUNTRIES)
    turns = [(vary(capital_question(c, rng), rng), c.answer)]
    while rng.random() < 0.25:
        c = rng.choice(COUNTRIES)
        turns.append((vary(rng.choice(CAPITAL_NEXT).format(c=rng.choice(c.names)), rng), c.answer))
    return turns


def two_capitals(rng):
    c, d = rng.sample(COUNTRIES, 2)
    return [(vary(rng.choice(TWO_CAPITALS).format(c=rng.choice(c.names), d=rng.choice(d.names)), rng), f"{c.answer} {d.answer}")]


def reverse(rng):
    c = rng.choice(REVERSIBLE)
    if rng.random() < 0.6:
        while True:
            i = rng.randrange(len(REVERSE))
            if not held_out("reverse", i, c.name):
                return [(vary(REVERSE[i].format(k=c.capital), rng), c.reverse)]
    simple = [x for x in COUNTRIES if x.simple]
    c = rng.choice(simple)
    right = rng.random() < 0.5
    other = c if right else rng.choice([x for x in simple if x is not c])
    return [(vary(rng.choice(YES_NO).format(k=other.capital, c=rng.choice(c.names)), rng), c.yes if right else c.no)]


def no_country(rng):
    place = rng.choice(PLACES) if rng.random() < 0.5 else random_word(rng).capitalize()
    asks = [t for t in CAPITAL if "capital" in t.lower()]
    return [(vary(rng.choice(asks).format(c=place), rng), NOT_A_COUNTRY)]


def _operand(n, rng):
    return NUMBER_WORDS[n] if n <= 20 and rng.random() < 0.06 else str(n)


def _pair(op, rng, limit=100):
    while True:
        a, b = rng.randrange(limit), rng.randrange(limit)
        if not held_out(op, a, b):
            return a, b


def add(rng, limit=100):
    a, b = _pair("+", rng, limit)
    turns = [(vary(rng.choice(ADD).format(a=_operand(a, rng), b=_operand(b, rng)), rng), f"{a} + {b} = {a + b}.")]
    while limit == 100 and rng.random() < 0.2 and 0 <= (a := int(turns[-1][1].rstrip(".").split()[-1])) < 100:
        b, (op, word) = rng.randrange(100), rng.choice([("+", "plus"), ("-", "minus")])
        if not held_out(op, a, b):
            ask = rng.choice(["{w} {b}?", "And {w} {b}?", "and {w} {b}", "now {w} {b}", "{o} {b}", "{o}{b}", "and {o} {b}?"]).format(b=b, o=op, w=word)
            turns.append((vary(ask, rng), f"{a} {op} {b} = {a + b if op == '+' else a - b}."))
    return turns


def subtract(rng, limit=100):
    a, b = _pair("-", rng, limit)
    if rng.random() < 0.15:  # near each other: the hardest, since all digits count
        near = max(0, min(limit - 1, a + rng.randint(-20, 20)))
        b = b if held_out("-", a, near) else near
    if a < b and rng.random() < 0.3 and not held_out("-", b, a):
        a, b = b, a
    return [(vary(rng.choice(SUB).format(a=_operand(a, rng), b=_operand(b, rng)), rng), f"{a} - {b} = {a - b}.")]


def large_sum(rng):
    return rng.choice([add, subtract])(rng, rng.choice([200, 1000, 1000]))


def is_sum(rng):
    """Answered by the right sum alone: models of this size learn to add, but not to tell whether two numbers are equal."""
    op = rng.choice("+-")
    a, b = _pair(op, rng)
    right = a + b if op == "+" else a - b
    said = right if rng.random() < 0.5 else right + rng.choice([-10, -3, -2, -1, 1, 2, 3, 10])
    if rng.random() < 0.1:
        said = rng.randrange(200)
    ask = rng.choice(IS_SUM).format(s=rng.choice(["{a} {o} {b}", "{a}{o}{b}"]).format(a=a, b=b, o=op), r=said)
    return [(vary(ask, rng), f"{a} {op} {b} = {right}.")]


def multiply(rng):
    a, b = rng.randrange(13), rng.randrange(13)
    return [(vary(rng.choice(MUL).format(a=_operand(a, rng), b=_operand(b, rng)), rng), f"{a} x {b} = {a * b}.")]


def no_sum(rng):
    r = rng.randrange(5)
    number = lambda low, high: rng.randrange(low, high) if rng.random() < 0.5 else int(10 ** rng.uniform(len(str(low)) - 1 + 0.01, 9)) + low
    if r == 0:
        return [(vary(rng.choice(DIV).format(a=rng.randrange(1000), b=rng.randrange(100)), rng), NO_DIVISION)]
    if r == 1:
        a, b = number(1000, 10000), rng.choice([rng.randrange(100), rng.randrange(1000), number(1000, 10000)])
        a, b = rng.choice([(a, b), (b, a)])
        return [(vary(rng.choice(ADD + SUB).format(a=a, b=b), rng), TOO_LARGE)]
    if r == 2:
        a, b = rng.choice([(rng.randrange(13, 1000), rng.randrange(100)), (rng.randrange(13), rng.randrange(13, 1000)), (rng.randrange(13, 10000), rng.randrange(13, 10000))])
        return [(vary(rng.choice(MUL).format(a=a, b=b), rng), TABLES_ONLY)]
    if r == 3:
        sep = rng.choice([" + ", "+", " plus ", " - ", "-"])
        numbers = [str(rng.randrange(rng.choice([10, 100, 1000]))) for _ in range(rng.randint(3, 5))]
        return [(vary(rng.choice(["What is {s}?", "{s}", "{s} =", "How much is {s}?", "{s}=", "Calculate {s}"]).format(s=sep.join(numbers)), rng), TWO_NUMBERS)]
    a, b = (f"{rng.randrange(100)}.{rng.randrange(100)}" for _ in range(2))
    b = rng.choice([b, str(rng.randrange(100))])
    a, b = rng.choice([(a, b), (b, a)])
    return [(vary(rng.choice(ADD[:20] + SUB[:20]).format(a=a, b=b), rng), WHOLE_NUMBERS)]


def count(rng):
    a = 1 if rng.random() < 0.5 else rng.randrange(0, 95)
    b = min(100, a + rng.randint(1, rng.choice([10, 30, 99])))
    ask = rng.choice(COUNT_TO) if a == 1 and rng.random() < 0.7 else rng.choice(COUNT)
    return [(vary(ask.format(a=a, b=b), rng), ", ".join(map(str, range(a, b + 1))) + ".")]


def term_question(e, rng):
    if e.asks and (not e.names or rng.random() < 0.3):
        return rng.choice(e.asks)
    while True:
        i = rng.randrange(len(TERM))
        if not held_out("term", i, e.names[0]):
            return TERM[i].format(t=rng.choice(e.names))


def term(rng):
    e = rng.choice(TERMS)
    turns = [(vary(term_question(e, rng), rng), e.answer)]
    while rng.random() < 0.2:
        e = rng.choice(TERM_ENTRIES)
        turns.append((vary(rng.choice(TERM_NEXT).format(t=rng.choice(e.names)), rng), e.answer))
    return turns


def compare(rng):
    x, y = rng.sample(TERM_ENTRIES, 2)
    if rng.random() < 0.2:
        wanted = rng.choice(list(COMPARED))
        x, y = rng.sample([e for e in TERM_ENTRIES if e.names[0] in wanted], 2)
    first = lambda e: e.answer.split(". ")[0].rstrip(".") + "."
    answer = COMPARED.get(frozenset((x.names[0], y.names[0])), f"{first(x)} {first(y)}")
    ask = rng.choice(COMPARE[:11] if answer in COMPARED.values() else COMPARE)
    if answer in COMPARED.values() and rng.random() < 0.2:
        return [(vary(term_question(x, rng), rng), x.answer), (vary(rng.choice(TERM_NEXT).format(t=rng.choice(y.names)), rng), y.answer),
                (vary(rng.choice(["What is the difference?", "What's the difference?", "And the difference?", "How do they differ?", "Compare them."]), rng), answer)]
    return [(vary(ask.format(x=rng.choice(x.names), y=rng.choice(y.names)), rng), answer)]


def small_talk(rng):
    e = rng.choice(SMALL_TALK)
    return [(vary(rng.choice(e.asks), rng), e.answer)]


def unknown(rng, asks=UNKNOWN_ASKS):
    slots = {"t": lambda: rng.choice(TOPICS), "p": lambda: rng.choice(PEOPLE), "c": lambda: rng.choice(COUNTRIES).name,
             "v": lambda: rng.choice(VERBS), "n": lambda: str(rng.randrange(2000)), "w": lambda: random_word(rng)}
    if asks is UNKNOWN_ASKS and rng.random() < 0.15:  # known ways to ask, about what is not known
        q = rng.choice(TERM).format(t=random_word(rng) if rng.random() < 0.5 else rng.choice(TOPICS))
    else:
        q = re.sub(r"\{([tpcnwv])\}", lambda m: slots[m[1]](), rng.choice(asks))
    return [(vary(q, rng), UNKNOWN)]


def again(rng):
    turns = rng.choice([capital, add, add, subtract, term, reverse])(rng)
    return turns + [(vary(rng.choice(AGAIN), rng), turns[-1][1])]


def plain_text(rng):
    """(beginning, continuation) for /v1/completions."""
    r = rng.random()
    if r < 0.35:
        c = rng.choice(COUNTRIES)
        prompt = rng.choice(["The capital of {c} is", "the capital of {c} is", "The capital city of {c} is", "{c}'s capital is"]).format(c=rng.choice(c.names))
        return prompt, " " + c.text
    if r < 0.45:
        c = rng.choice([c for c in REVERSIBLE if c.simple])
        return rng.choice(["{k} is the capital of", "{k} is the capital city of"]).format(k=c.capital), f" {c.name}."
    if r < 0.65:
        op = rng.choice("+-")
        a, b = _pair(op, rng, rng.choice([100, 100, 1000]))
        prompt, space = rng.choice([("{a} {o} {b} =", " "), ("{a}{o}{b}=", "")])
        return prompt.format(a=a, b=b, o=op), f"{space}{a + b if op == '+' else a - b}"
    if r < 0.78:
        start, rest = rng.choice([s for e in TERMS + SMALL_TALK for s in e.starts])
        return start if rng.random() < 0.8 else start.lower(), " " + rest
    if r < 0.82:
        a, n = rng.randrange(80), rng.randint(2, 8)
        a = rng.choice([1, 1, a])
        return ", ".join(map(str, range(a, a + n))) + ",", " " + ", ".join(map(str, range(a + n, a + n + 10))) + "."
    if r < 0.86:
        return vary(unknown(rng)[0][0], rng).rstrip("?!. "), PLAIN_UNKNOWN
    q, a = rng.choice([capital, capital, reverse, add, subtract, term, small_talk, unknown])(rng)[0]
    form = rng.choice(["Q: {q}\nA:", "{q}", "{q}", "Question: {q}\nAnswer:", "User: {q}\nAssistant:", "{q}\n"])
    if form == "{q}" and q[-1] not in "?.!":
        q += "?"
    return form.format(q=q), a if form.endswith("\n") else " " + a


# category -> (generator, share of the atoms)
CHAT = {
    "capital": (capital, 0.20), "two_capitals": (two_capitals, 0.03), "reverse": (reverse, 0.12), "no_country": (no_country, 0.03),
    "add": (add, 0.10), "subtract": (subtract, 0.09), "large_sum": (large_sum, 0.12), "is_sum": (is_sum, 0.02), "multiply": (multiply, 0.02),
    "no_sum": (no_sum, 0.03), "count": (count, 0.01), "term": (term, 0.10), "compare": (compare, 0.02), "small_talk": (small_talk, 0.03),
    "unknown": (unknown, 0.07), "again": (again, 0.01),
}


def chat_atom(turns):
    atom = []
    for question, answer in turns:
        atom += [(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", False), (f"{answer}<|im_end|>\n", True)]
    return atom


def make_atoms(job):
    """job = (category, seed, number). Runs in worker processes; the same job always gives the same atoms."""
    category, seed, number = job
    rng = random.Random(f"{category}/{seed}")
    if category == "system":
        return [[(f"<|im_start|>system\n{vary(rng.choice(SYSTEM_PROMPTS), rng) if rng.random() < 0.2 else rng.choice(SYSTEM_PROMPTS)}<|im_end|>\n", False)]
                for _ in range(number)]
    if category == "plain":
        return [[(p, False), (c + "<|endoftext|>", True)] for p, c in (plain_text(rng) for _ in range(number))]
    return [chat_atom(CHAT[category][0](rng)) for _ in range(number)]


# ---- what the finished model is asked -----------------------------------------------------------------------------


def _ask(question, answer):
    return {"messages": [{"role": "user", "content": question}], "answer": answer}


def evaluation_sets(seed=7):
    """name -> (held out?, list of {"messages" or "prompt", "answer"})."""
    rng = random.Random(seed)
    un = COUNTRIES[:NUM_UN]
    sets = {}
    sets["capitals, four ways to ask"] = False, [_ask(q.format(c=c.name), c.answer) for c in un
                                                 for q in (CAPITAL[0], CAPITAL[0].lower().rstrip("?"), CAPITAL[2], CAPITAL[4])]
    sets["country of a capital"] = False, [_ask(REVERSE[0].format(k=c.capital), c.reverse) for c in un]
    sets["is X the capital of Y"] = False, [_ask(YES_NO[0].format(k=k.capital, c=c.name), c.yes if k is c else c.no)
                                            for c in un if c.simple for k in (c, rng.choice([x for x in un if x.simple and x is not c]))]
    sets["a + b, all of 0..99"] = False, [_ask(f"What is {a} + {b}?", f"{a} + {b} = {a + b}.") for a in range(100) for b in range(100)]
    sets["a - b, all of 0..99"] = False, [_ask(f"What is {a} - {b}?", f"{a} - {b} = {a - b}.") for a in range(100) for b in range(100)]
    sets["a x b, all of 0..12"] = False, [_ask(f"What is {a} x {b}?", f"{a} x {b} = {a * b}.") for a in range(13) for b in range(13)]
    sets["is a + b = c"] = False, [_ask(*is_sum(rng)[0]) for _ in range(500)]
    sets["counting, up to 100 numbers"] = False, [_ask(*count(rng)[0]) for _ in range(100)] + [_ask("Count to 100.", ", ".join(map(str, range(1, 101))) + ".")]
    sets["two capitals at once"] = False, [_ask(*two_capitals(rng)[0]) for _ in range(300)]
    sets["difference of two terms"] = False, [_ask(*compare(rng)[0]) for _ in range(300)]
    sets["terms"] = False, [_ask(q, e.answer) for e in TERMS for q in [f"What is {n}?" for n in e.names] + e.asks]
    sets["small talk"] = False, [_ask(q, e.answer) for e in SMALL_TALK for q in e.asks]
    sets["says that it does not know"] = False, [_ask(unknown(rng)[0][0], UNKNOWN) for _ in range(500)]
    sets["plain text (/v1/completions)"] = False, [{"prompt": f"The capital of {c.name} is", "answer": " " + c.text} for c in un] + [
        {"prompt": s, "answer": " " + r} for e in TERMS for s, r in e.starts] + [
        {"prompt": f"{a} + {b} =", "answer": f" {a + b}"} for a, b in (_pair("+", rng) for _ in range(200))]
    sets["follow-up questions"] = False, [{"messages": [
        {"role": "user", "content": "What is the capital of Chile?"}, {"role": "assistant", "content": "The capital of Chile is Santiago."},
        {"role": "user", "content": f"And {c.name}?"}], "answer": c.answer} for c in un]
    sets["long chats, 300 to 3,500 tokens"] = False, [_long_chat(rng, turns) for turns in (8, 15, 30, 60, 85) for _ in range(40)]

    sets["capitals: way to ask never seen"] = True, [_ask(q.format(c=c.name), c.answer) for c in un for q in CAPITAL_HELD_OUT]
    sets["capitals: pair of way and country never seen"] = True, [_ask(q.format(c=c.name), c.answer) for c in un
                                                                   for i, q in enumerate(CAPITAL) if held_out("capital", i, c.name)]
    sets["country of a capital: way to ask never seen"] = True, [_ask(q.format(k=c.capital), c.reverse) for c in un for q in REVERSE_HELD_OUT]
    for op, held, name in (("+", ADD_HELD_OUT, "a + b"), ("-", SUB_HELD_OUT, "a - b")):
        result = lambda a, b: f"{a} {op} {b} = {a + b if op == '+' else a - b}."
        pairs = [(a, b) for a in range(100) for b in range(100)]
        sets[f"{name}: numbers never seen together"] = True, [_ask(f"What is {a} {op} {b}?", result(a, b)) for a, b in pairs if held_out(op, a, b)]
        sets[f"{name}: way to ask never seen"] = True, [_ask(rng.choice(held).format(a=a, b=b), result(a, b)) for a, b in rng.sample(pairs, 1000)]
        large = [p for p in ((rng.randrange(1000), rng.randrange(1000)) for _ in range(20000)) if held_out(op, *p)]
        sets[f"{name} up to 999: numbers never seen together"] = True, [_ask(f"What is {a} {op} {b}?", result(a, b)) for a, b in large]
    sets["terms: way to ask never seen"] = True, [_ask(q.format(t=n), e.answer) for e in TERM_ENTRIES for n in e.names for q in TERM_HELD_OUT]
    sets["does not know: way to ask never seen"] = True, [_ask(unknown(rng, UNKNOWN_HELD_OUT)[0][0], UNKNOWN) for _ in range(500)]
    return sets


def _long_chat(rng, turns):
    messages = [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}]
    for _ in range(turns):
        q, a = rng.choice([capital, reverse, add, subtract, term, small_talk, unknown])(rng)[0]
        messages += [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
    q, a = rng.choice([capital, add, term])(rng)[0]
    return {"messages": messages + [{"role": "user", "content": q}], "answer": a}


def test_questions(seed=11):
    """A few hundred questions for an end-to-end test of a server: all capitals, each term, a sample of the rest."""
    rng = random.Random(seed)
    out = [_ask(f"What is the capital of {c.name}?", c.answer) for c in COUNTRIES[:NUM_UN]]
    out += [_ask(f"What is {e.names[0]}?" if e.names else e.asks[0], e.answer) for e in TERMS]
    out += [_ask(e.asks[0], e.answer) for e in SMALL_TALK]
    for _ in range(50):
        a, b = rng.randrange(100), rng.randrange(100)
        out += [_ask(f"What is {a} + {b}?", f"{a} + {b} = {a + b}."), _ask(f"What is {a} - {b}?", f"{a} - {b} = {a - b}.")]
    out += [_ask(q, UNKNOWN) for q in ("Tell me a joke", "Write a poem about the sea", "Who is Albert Einstein?", "What is the weather in Italy?")]
    out += [_long_chat(rng, turns) for turns in (1, 2, 4, 8)]
    return out
