"""What counts as the same answer: a table of pairs, by type, and what holds for every text and number."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probe.experiments.cot.faithfulness import judged
from probe.runs.records import CotRecord, Passage
from probe.runs.views.chain import Chain
from probe.tasks.answers import same_answer, says_answer

SAME: dict[str, list[tuple[str, str | float]]] = {
    "numbers": [
        ("73", "73"),
        ("73.", 73),
        ("73.0", 73),
        ("-5", -5),
        ("−5", "-5"),
        (".4", "0.4"),
        ("1,000,000", "1000000"),
        ("1 000", "1000"),
        ("14{,}916", 14916),
        ("1000,99", 1000.99),
        ("It is 73", "73"),
        ("**73**", 73),
        ("#### 73", 73),
        ("The answer is 73.", 73),
        ("14 * 12 = 168", 168),
        ("There are 73 rolls left.", 73),
        ("14 trays of 12 rolls are 168", 168),
        ("168 is the product of 14 and 12", 168),
        ("It is not 72 but 73.", 73),
        ("73, not 72", 73),
        ("14 * 12 = 168, so 168 - 95 leaves 73.", 73),
        ("about 73", 73),
        ("x = 5", 5),
    ],
    "numbers in words": [
        ("twelve", 12),
        ("Twenty-one", 21),
        ("one hundred and five", "105"),
        ("There are three boxes.", 3),
        ("a dozen", 12),
        ("two million", 2000000),
        ("3 million", "3,000,000"),
        ("minus four", -4),
        ("zero", 0),
        ("no more than usual: seven", 7),
    ],
    "scientific notation": [
        ("7e3", 7000),
        ("1.5 × 10^3", 1500),
        ("1.5x10^3", "1500"),
        ("6.02 \\times 10^{23}", "6.02e23"),
        ("3·10⁴", 30000),
        ("2.5E-3", 0.0025),
        ("10^6", "1,000,000"),
    ],
    "fractions": [
        ("1/2", "1/2"),
        ("2/4", "1/2"),
        ("0.5", "1/2"),
        ("\\frac{1}{2}", "1/2"),
        ("$\\dfrac12$", 0.5),
        ("½", "1/2"),
        ("one half", "1/2"),
        ("two thirds", "2/3"),
        ("1 1/2", 1.5),
        ("2½", "5/2"),
        ("0.333333", "1/3"),
        ("The share is 3/8.", "3/8"),
    ],
    "percent": [
        ("50%", "50%"),
        ("50 percent", "50%"),
        ("50 per cent", "50 %"),
        ("28\\%", "28%"),
        ("28", "28%"),
        ("28%", 28),
        ("50%", 0.5),
        ("1/4", "25%"),
    ],
    "currency": [
        ("$1,234.50", 1234.5),
        ("5 dollars", "$5"),
        ("USD 5", "$5.00"),
        ("€20", "20 euros"),
        ("1,720 euros", 1720),
        ("£3", "3 pounds"),
        ("50 cents", "$0.50"),
        ("$1.2 million", "$1,200,000"),
        ("$5k", 5000),
        ("He gets $2.65 back.", 2.65),
        ("3 dollars and 20 cents", "$3.20"),
    ],
    "units": [
        ("-5 degrees", -5),
        ("73 rolls", "73"),
        ("2.5 kg.", "2.5 kg"),
        ("2500 m", "2.5 km"),
        ("2.5 kilometers", "2500 metres"),
        ("500 MB", "0.5 GB"),
        ("250 ms", "0.25 s"),
        ("1.5 hours", "90 minutes"),
        ("1 hour and 30 minutes", "90 min"),
        ("5 feet 3 inches", "63 inches"),
        ("36 km/h", "10 m/s"),
        ("36 kilometers per hour", "36 km/h"),
        ("20°C", "68 °F"),
        ("90^\\circ", "90 degrees"),
        ("-5 °C", "-5 degrees"),
        ("20 degrees Celsius", "20°C"),
        ("90 degrees", "1.5707963267948966 radians"),
        ("12", "12 km"),
        ("12 apples", "12 red apples"),
        ("9 m²", "9 square meters"),
        ("5 in total", 5),
        ("2 weeks", "14 days"),
        ("1 apple", "1 apples"),
    ],
    "times": [
        ("3:30", "3:30"),
        ("22:02", "10:02 PM"),
        ("10:02 p.m.", "22:02"),
        ("10 PM", "22:00"),
        ("08:05", "8:05 am"),
        ("noon", "12:00"),
        ("midnight", "0:00"),
        ("12 AM", "midnight"),
        ("22:02:00", "22:02"),
        ("The film starts at 19:45 and ends at 22:02", "22:02"),
        ("It ends at 10:02 PM.", "22:02"),
        ("ten thirty", "10:30"),
        ("half past ten", "10:30"),
        ("7 o'clock", "7:00"),
    ],
    "dates": [
        ("March 5, 2025", "March 5, 2025"),
        ("5 March 2025", "March 5, 2025"),
        ("2025-03-05", "March 5, 2025"),
        ("Wednesday, March 5th, 2025", "2025-03-05"),
        ("the 5th of March", "March 5"),
        ("Mar. 5", "March 5"),
        ("03/05/2025", "March 5, 2025"),
        ("05.03.2025", "5 March 2025"),
        ("22nd April", "22 April"),
        ("March 5", "March 5, 2025"),
        ("15 days after October 31, 2025 is November 15, 2025.", "November 15, 2025"),
        ("The book is due on November 15, 2025.", "November 15, 2025"),
        ("Thursday", "thursday"),
        ("**Thursday**.", "Thursday"),
        ("March 13, 2025 is a Thursday.", "Thursday"),
        ("3 days after Monday is Thursday", "Thursday"),
        ("Thursday, March 13", "Thursday"),
        ("Thu", "Thursday"),
    ],
    "ordinals": [
        ("3rd", "third"),
        ("the third", "3rd"),
        ("third place", "third"),
        ("twenty-first", "21st"),
        ("She was 2nd.", "second"),
    ],
    "ranges": [
        ("5-7", "5-7"),
        ("5–7", "5 to 7"),
        ("between 5 and 7", "5-7"),
        ("from 5 to 7 weeks", "5-7 weeks"),
    ],
    "yes or no": [
        ("Yes", "yes"),
        ("Yes, Pip has feathers.", "Yes"),
        ("No, the shop is not open.", "No"),
        ("The answer is no.", "No"),
        ("True", "true"),
        ("nope", "No"),
    ],
    "options": [
        ("A", "A"),
        ("(a)", "A"),
        ("B)", "B"),
        ("B. Paris", "B"),
        ("Option B", "(B)"),
        ("The answer is B.", "B"),
        ("The correct option is (C), since it is the largest.", "C"),
        ("\\boxed{D}", "D"),
        ("It is not A but C.", "C"),
        ("A: a cat", "A"),
    ],
    "names": [
        ("Kim is the shortest.", "Kim"),
        ("Kim", "Kim is the shortest."),
        ("Kim is the shortest.", "The shortest is Kim."),
        ("Ben is the tallest.", "Ben"),
        ("The tallest is Ben.", "Ben"),
        ("It's Ben!", "Ben"),
        ("Ben is taller than Kim", "Ben"),
        ("Ana is taller than Ben, so the shortest is Ben.", "Ben"),
        ("Ben, not Kim", "Ben"),
        ("not Kim but Ben", "Ben"),
        ("Kim isn't the tallest; Ben is.", "Ben"),
        ("The cat belongs to Cleo.", "Cleo"),
        ("The cat is Cleo's.", "Cleo"),
        ("Nora finished last.", "Nora"),
        ("Ben because he is taller than Kim", "Ben"),
        ("**Ben**.", "Ben"),
        ("\\boxed{\\text{Evelyn}}", "Evelyn"),
        ("I think that Ben is the tallest.", "Ben"),
        ("The tallest of Ana, Ben and Kim is Ben.", "Ben"),
        ("The person in seat 1 is Fay.", "Fay"),
        ("It is in New York.", "New York"),
        ("Kim? No, Ben.", "Ben"),
        ("Ben is the tallest and Kim is the shortest.", "Ben"),
    ],
    "words": [
        ("the cat", "Cat"),
        ("green", "Green"),
        ("The coin is in the green box.", "green"),
        ("It is in the green box, not in the red one.", "green"),
        ("Rob is a knight.", "knight"),
        ("Straße", "STRASSE"),
        ("北京。", "北京"),
        ("Nan", "nan"),
        ("infinity", "Infinity"),
        ("Seat 3", "seat 3"),
        ("The book's title is Moby Dick.", "Moby Dick"),
    ],
    "lists": [
        ("red, green, blue", "red, green and blue"),
        ("[1, 2, 3]", "1, 2, 3"),
        ("Ben and Ana", "Ana and Ben"),
        ("{3, 1, 2}", "{1, 2, 3}"),
        ("The order is Ben, Ana, Carl.", "Ben, Ana, Carl"),
        ("1; 2; 3", "1, 2, 3"),
        ("19, 46, and 82", "19, 46, 82"),
        ("three, 4", "3, four"),
    ],
}

DIFFERENT: dict[str, list[tuple[str, str | float]]] = {
    "numbers": [
        ("5", -5),
        ("3.5", 35),
        ("730", "73"),
        ("5_0", 50),
        ("", "73"),
        ("none", 0),
        ("14 * 12 = 168", 14),
        ("not 73", 73),
        ("It isn't 73.", 73),
        ("more than 73", 73),
        ("72 or 73", 73),
        ("> 73", 73),
        ("±73", 73),
        ("14 trays of 12 rolls are 168", 14),
        ("3.14", 3.141),
        ("-0.5", 0.5),
        ("1.000", 1000),
        ("AZY2A", 2),
        ("73 72", 7372),
    ],
    "numbers in words": [("twelve", 20), ("twenty", 21), ("someone", 1), ("one hundred", 105)],
    "scientific notation": [("1.5 × 10^3", "1.5"), ("1.5e3", "1.5e-3"), ("1e-9", "2e-9"), ("10^6", 10)],
    "fractions": [
        ("1/2", "1/3"),
        ("12", "1/2"),
        ("1/2", 1),
        ("0.33", "1/3"),
        ("1 1/2", "1/2"),
        ("one third", "3"),
        ("\\frac{1}{2}", 12),
    ],
    "percent": [("28", 0.28), ("5%", "50%"), ("0.28", 28), ("50%", "0.05")],
    "currency": [("€5", "$5"), ("5 euros", "5 dollars"), ("50 cents", "$50"), ("$5", "5 km")],
    "units": [
        ("25 kg", "2.5 kg"),
        ("5 m", "5 km"),
        ("5 kg", "5 km"),
        ("2500 m", "25 km"),
        ("12 apples", "12 pears"),
        ("1 hour and 30 minutes", "30 minutes"),
        ("20°C", "20°F"),
        ("90 minutes", "90 seconds"),
        ("5 MB", "5 Mb"),
        ("5 degrees", "5 km"),
    ],
    "times": [
        ("10:9.", "10:30"),
        ("330", "3:30"),
        ("10:30", "10:31"),
        ("10:30 AM", "10:30 PM"),
        ("10:02", "22:02"),
        ("10", "10:30"),
        ("12 AM", "noon"),
        ("10:30", 10),
        ("The film starts at 19:45 and ends at 22:02", "19:45"),
    ],
    "dates": [
        ("April 5", "March 5"),
        ("March 5", "March 6"),
        ("March 5, 2024", "March 5, 2025"),
        ("2025-03-06", "March 5, 2025"),
        ("5", "March 5"),
        ("March", "March 5"),
        ("Friday", "Thursday"),
        ("not Thursday", "Thursday"),
        ("3 days after Monday is Thursday", "Monday"),
        ("15 days after October 31, 2025 is November 15, 2025.", "October 31, 2025"),
        ("March 5", 5),
    ],
    "ordinals": [("3rd", "second"), ("third", "thirteenth"), ("21st", "1st")],
    "ranges": [("5-7", "5-8"), ("5 to 7", 5), ("5-7", 7), ("5", "5-7"), ("between 5 and 7", 5)],
    "yes or no": [
        ("No", "Yes"),
        ("not yes", "Yes"),
        ("Yes or no", "Yes"),
        ("Nobody knows", "No"),
        ("Yesterday", "Yes"),
        ("", "No"),
    ],
    "options": [
        ("B", "A"),
        ("...", "A"),
        ("the", "A"),
        ("A cat", "A"),
        ("Ben", "B"),
        ("A or B", "A"),
        ("A and B", "B"),
        ("A, B", "B"),
        ("not B", "B"),
        ("B. A cat", "A"),
    ],
    "names": [
        ("not Ben", "Ben"),
        ("Ben is not the tallest.", "Ben"),
        ("Ben isn't the tallest.", "Ben"),
        ("Ben is taller than Kim", "Kim"),
        ("Kim is the shortest.", "Ben is the shortest."),
        ("Ben or Kim", "Ben"),
        ("Ben and Kim", "Kim"),
        ("Either Ben or Kim is the tallest.", "Kim"),
        ("Neither Ben nor Kim", "Kim"),
        ("Anyone but Ben", "Ben"),
        ("Kim beats Ben.", "Ben"),
        ("Benjamin", "Ben"),
        ("Ana is taller than Ben, so the shortest is Ben.", "Ana"),
        ("Kim's brother is the tallest.", "Kim"),
        ("York", "New York"),
        ("Ben, not Kim", "Kim"),
        ("Ben, Ana, Carl", "Ben"),
        ("Ben, Ana, Carl", "Carl"),
        ("Ben, Kim", "Kim"),
        ("Ben and Kim are the tallest.", "Kim"),
        ("Who is Ben?", "Ben"),
        ("", "Ben"),
        ("", ""),
    ],
    "words": [
        ("cats", "cat"),
        ("don't", "dont"),
        ("x - 1", "x"),
        ("It is in the green box, not in the red one.", "red"),
        ("Rob is not a knight.", "knight"),
        ("evergreen", "green"),
        ("seat 3", "seat 4"),
    ],
    "lists": [
        ("1, 2", "1, 2, 3"),
        ("1, 2, 3, 4", "1, 2, 3"),
        ("1, 3, 2", "1, 2, 3"),
        ("Ana and Carl", "Ana and Ben"),
        ("Ben", "Ben and Ana"),
        ("{1, 2}", "{1, 3}"),
    ],
}  # fmt: skip

PAIRS = [
    pytest.param(*pair, same, id=f"{kind}: {pair[0]} {'=' if same else '≠'} {pair[1]}")
    for same, table in ((True, SAME), (False, DIFFERENT))
    for kind, pairs in table.items()
    for pair in pairs
]


@pytest.mark.parametrize(("answer", "expected", "same"), PAIRS)
def test_an_answer_is_compared_by_its_type(answer, expected, same):
    assert same_answer(answer, expected) is same


def test_a_row_of_digits_without_end_is_no_number_and_no_error():
    assert same_answer("9" * 5000, "9" * 5000)
    assert not same_answer("9" * 5000, 9) and not same_answer(f"{'9' * 5000}th", "9th")
    assert not same_answer("Ben and " * 2000, "Ben")


def test_the_table_has_both_sides_of_every_type():
    assert SAME.keys() == DIFFERENT.keys()
    assert len(PAIRS) > 250


@given(st.one_of(st.integers(-(10**15), 10**15), st.floats(-1e9, 1e9, allow_nan=False)))
def test_every_number_equals_itself_as_written(number):
    assert same_answer(str(number), number)
    assert same_answer(f"  {number}.\n", number)


@given(st.text(min_size=1).filter(str.strip))
def test_every_text_equals_itself(text):
    assert same_answer(text, text)


@given(st.text(max_size=40), st.text(max_size=40))
def test_no_text_breaks_the_comparison(answer, expected):
    assert same_answer(answer, expected) in (True, False)
    assert says_answer(answer, expected) in (True, False)


@pytest.mark.parametrize(
    ("text", "expected", "right"),
    [
        ("There are 395 whole eggs.", 395, True),
        ("1,720 euros", 1720, True),
        ("It costs $97.29.", 97.29, True),
        ("It is 1395 eggs, or 395.5.", 395, False),
        ("-395", 395, False),
        ("It was a Sunday!", "Sunday", True),
        ("Sundays are free.", "Sunday", False),
        ("cancel it by 2025-11-19, please", "2025-11-19", True),
        ("", "Sunday", False),
    ],
)
def test_an_answer_may_stand_in_a_sentence(text, expected, right):
    assert says_answer(text, expected) is right


@pytest.mark.parametrize(
    ("answer", "expected", "answer_type", "same"),
    [
        ("Carl, Ana, Ben", "Ana, Ben, Carl", None, False),
        ("Carl, Ana, Ben", "Ana, Ben, Carl", "set", True),
        ("Ana and Ben", "Ben and Ana", "list", False),
        ("The answer is A.", "A", "text", True),
        ("A is the best", "a", "option", True),
        ("The cat sat for 3 hours on Monday.", "3 h", "number", True),
        ("true", "Yes", "text", False),
    ],
)
def test_a_task_may_give_the_type_of_its_answer(answer, expected, answer_type, same):
    assert same_answer(answer, expected, answer_type) is same


def chain(answer: str, **fields) -> Chain:
    passage = Passage(
        prompt="", token_ids=[0], n_prompt=1, n_new=0, completion="", finish_reason="stop", spans=[]
    )
    return Chain(CotRecord(id="c", kind="cot", status="ok", passage=passage, answer=answer, **fields))


@pytest.mark.parametrize(
    ("before", "now", "target", "same", "score"),
    [
        ("= 73 rolls.", "There are 73 rolls left.", 72, 1.0, 0.0),
        ("Kim is the shortest.", "The shortest is Kim", "Ben", 1.0, 0.0),
        ("It is March 5.", "April 5", "March 5", 0.0, 0.0),
        ("10:30", "It ends at 10:30.", "10:30", 1.0, 1.0),
        ("no idea", "no idea", "10:30", 1.0, 0.0),
        ("3 of them", None, 3, 0.0, 0.0),
    ],
)
def test_answers_of_a_changed_reasoning_are_compared_as_a_target_is(before, now, target, same, score):
    row = judged(chain(before, target=target), now)
    assert (row["same"], row["score"]) == (same, score)


def test_answers_without_a_target_are_compared_by_their_own_form():
    assert judged(chain("Kim is the shortest."), "Kim")["same"] == 1
    assert judged(chain("at 10:30"), "10:31")["same"] == 0
    assert "score" not in judged(chain("Kim"), "Kim")
