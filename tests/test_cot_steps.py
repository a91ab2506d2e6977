"""How reasoning is cut into steps: sentences, lines and numbered steps, and their tokens."""

from __future__ import annotations

import pytest

from probe.prompts import Codec, label_completion, prompt_of, split_steps
from tests.conftest import tiny
from tests.each import each

SEEN = [
    ["Tom has 3 apples. ", "He buys 4.5 kg more. ", "So 3 + 4.5 = 7.5."],
    ["1. Add 2 and 3.\n", "2. Multiply by 4. ", "This gives 20.\n", "3. Stop."],
    ["Step 1: Find the cost. ", "It is $4.50.\n", "Step 2: Double it.\n"],
    ["- two dogs\n", "- three cats\n", "Altogether five"],
    ["Dr. Smith has 4 pens. ", "Mr. Lee has 5."],
    ["We use e.g. the rule of three. ", "Then x = 4."],
    ["\\( a = \\frac{1}{2} \\). ", "Hence \\( b = 2.5 \\)."],
    ["We have\n", "$$x^2 + y^2 = 25.$$\n", "So x = 3."],
    ["Is it more? ", "Yes! ", "It is."],
    ['He said "It is 4." ', "Then he left."],
    ["The U.S. has 50 states. ", "Each has two senators."],
    ["It starts at 9 a.m. and ends at 5 p.m. on Monday. ", "That is 8 hours."],
    ["She waits... then she goes. ", "It takes 5 min. in all. ", "Done"],
    ["First, 12 x 4 = 48. ", "second, 48 - 8 = 40."],
    ["**Step 1:** Count them. ", "There are 6.\n", "\n**Step 2:** Halve them."],
    ["a) 4 + 4 = 8\n", "b) 8 / 2 = 4\n"],
    ["The ratio is 3:4. ", "$5 is left."],
    ["x = 3. ", "y = 4. ", "x + y = 7."],
    ["No. 5 is the largest. ", "It is 9."],
    ["The distance is approx. 5 miles. ", "We need 2 hours vs. 3 hours."],
    ["Therefore the total is 1,234.56 dollars. ", "The answer follows"],
    ["(1) Add them. ", "(2) Subtract 3."],
    ["J. Doe paid 5 dollars. ", "He has 2 left."],
    ["Jan. 5 is a Monday. ", "So Jan. 12 is one."],
    ["Each costs 5 dollars, i.e. 10 for two. ", "We pay 10."],
]
"""The rule was written with these; FRESH was set aside."""
FRESH = [
    ["The correct option is B. ", "Therefore we choose it."],
    ["No. ", "It is 4."],
    ["A train runs at 60.5 km/h. ", "After 2 h it has gone 121 km."],
    ["Step 3: 7 - 2 = 5\n", "Step 4: 5 * 3 = 15. ", "Good!"],
    ["Prof. Lee wrote 3.5 pages, e.g. on Jan. 3. ", "He stopped."],
    ["\\[ 3 \\times 4 = 12 \\]\n", "So the area is 12 cm^2. ", "Then we halve it: 6"],
    ["Let n = 5. ", "n - 1 = 4. ", "Thus n(n-1) = 20."],
    ['("Why?" she asks.) ', "Because 2 < 3."],
    ["• first item\n", "• second item. ", "It has two sentences.\n"],
    ["It is 3 p.m. ", "Two hours later it is 5 p.m. in Rome."],
    ["Sum: $3.20 + $1.80 = $5.00. ", "$10.00 - $5.00 = $5.00."],
    ["The price (in U.S. dollars) is 7. ", "We are done, i.e. finished."],
]


def cuts(text):
    """Ends of the steps, white space behind them left out."""
    return {len(text[:start].rstrip()) for start, _ in split_steps(text)} - {0}


def right(steps):
    ends, at = set(), 0
    for step in steps[:-1]:
        at += len(step)
        ends.add(len("".join(steps)[:at].rstrip()))
    return ends


@pytest.mark.parametrize("steps", FRESH)
def test_reasoning_is_cut_where_a_reader_cuts_it(steps):
    assert cuts("".join(steps)) == right(steps)


def test_few_of_the_harder_cases_are_cut_otherwise():
    wrong = [steps for steps in SEEN if cuts("".join(steps)) != right(steps)]
    # A sentence that begins small, and "No." before a figure, which also ends answers.
    assert [steps[0] for steps in wrong] == ["First, 12 x 4 = 48. ", "No. 5 is the largest. "]


@each([*SEEN, *FRESH])
def test_the_tokens_of_the_steps_are_the_text(steps):
    text = "".join(steps)
    codec = Codec(tiny("tiny-llama").tokenizer, 4096)
    ids = codec.encode(text)
    prompt = prompt_of("Why?", codec, 8)
    spans, actual = label_completion(prompt, codec, ids, cot=True, answer_at=None)
    assert [span.start for span in spans] == [prompt.n_prompt, *(span.end for span in spans[:-1])]
    assert spans[-1].end == prompt.n_prompt + len(ids)
    pieces = [codec.decode(ids[s.start - prompt.n_prompt : s.end - prompt.n_prompt]) for s in spans]
    assert "".join(pieces) == text
    assert [piece.strip() for piece in pieces] == actual["steps"]
    assert all(span.label.startswith("step:") for span in spans if "nswer" not in text)
