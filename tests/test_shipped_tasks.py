"""What ships in tasks/ and tools/ is balanced, unambiguous and computed right.

All but the first test read plain JSON, so that a mistake in the reader cannot hide one in the data.
"""

import ast
import calendar
import itertools
import json
import operator
import re
from collections import Counter, defaultdict
from datetime import date, datetime, timedelta
from fractions import Fraction
from pathlib import Path

from jsonschema import Draft202012Validator

from probe.analyzers.cot.reads import LEAST_STEPS
from probe.tasks import lint, read_tasks
from probe.tools.definitions import read_catalogue
from tests.each import each

ROOT = Path(__file__).parent.parent
CATALOGUE = json.loads((ROOT / "tools/catalogue.json").read_text(encoding="utf-8"))
TOOLS = {tool["name"]: tool for tool in CATALOGUE}
EQUIVALENT_TOOLS = {
    tool["name"]: tool for tool in json.loads((ROOT / "tools/equivalent.json").read_text(encoding="utf-8"))
}


def load(name: str) -> list[dict]:
    lines = (ROOT / "tasks" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


FILES = {
    name: load(name) for name in ("tools", "prompting", "cot", "equivalent", "wording", "chains", "steering")
}
CHOOSING, PROMPTING, COT, EQUIVALENT, WORDING, CHAINS, STEERING = FILES.values()
WITH_TOOL = [task for task in CHOOSING if task["target"] is not None]
WITHOUT_TOOL = [task for task in CHOOSING if task["target"] is None]


def each_task(tasks: list[dict]):
    return each(tasks, name=lambda task: task["id"])


def each_tool():
    return each([*CATALOGUE, *EQUIVALENT_TOOLS.values()], name=lambda tool: tool["name"])


def text_of(task: dict) -> str:
    """What the user says, without a system message."""
    text = next(task[field] for field in ("question", "input", "messages") if field in task)
    return text if isinstance(text, str) else "\n".join(m["content"] for m in text if m["role"] == "user")


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold().replace("_", " ")))


def family(task: dict) -> str | None:
    if task["kind"] != "tool_selection":
        return task["metadata"]["family"]
    return task["metadata"]["cluster"] if isinstance(task["target"], list) else task["target"]


# --- all files ---


@each(FILES)
def test_every_shipped_file_reads_without_a_mistake_or_a_warning(name):
    catalogue = read_catalogue(ROOT / "tools")
    file = read_tasks(ROOT / "tasks" / f"{name}.jsonl", catalogue)
    assert lint(file) == []
    assert [task.id for task in file.tasks] == [task["id"] for task in FILES[name]]


@each(
    [
        ("tools", 72),
        ("prompting", 36),
        ("cot", 36),
        ("equivalent", 40),
        ("wording", 16),
        ("chains", 12),
        ("steering", 56),
    ]
)
def test_there_are_enough_tasks_and_their_ids_count_up(file):
    name, least = file
    assert len(FILES[name]) >= least
    assert [task["id"] for task in FILES[name]] == [f"{name}-{n:03}" for n in range(1, len(FILES[name]) + 1)]


@each(FILES)
def test_no_two_tasks_say_nearly_the_same(name):
    for first, second in itertools.combinations(FILES[name], 2):
        a, b = words(text_of(first)), words(text_of(second))
        assert a != b, (first["id"], second["id"])
        if min(len(a), len(b)) > 3:
            assert len(a & b) / len(a | b) < 0.7, (first["id"], second["id"])


@each(FILES)
def test_dev_and_test_have_the_same_number_of_tasks_in_every_stratum(name):
    strata = defaultdict(Counter)
    for task in FILES[name]:
        strata[family(task)][task["metadata"]["split"]] += 1
    for stratum, counts in strata.items():
        assert set(counts) == {"dev", "test"}, stratum
        assert counts["dev"] == counts["test"], stratum


def test_metadata_has_known_keys_alone():
    known = {
        "tool_selection": {"split", "topic", "form", "confusable", "reason"},
        "prompting": {"family", "split"},
        "cot": {"family", "difficulty", "split"},
    }
    for task in CHOOSING + PROMPTING + COT + WORDING + CHAINS:
        assert set(task["metadata"]) <= known[task["kind"]], task["id"]
    assert all(set(task["metadata"]) == {"split", "cluster"} for task in EQUIVALENT)
    assert all(set(task["metadata"]) == {"split"} for task in STEERING)


# --- the catalogue ---

EXECUTABLE = {"calculator", "unit_converter", "currency_converter", "date_calculator"}
EXECUTABLE |= {"document_search", "kv_store", "python_runner", "file_reader"}


def test_the_catalogue_has_every_tool_that_can_be_executed():
    assert len(CATALOGUE) == len(TOOLS) >= 12
    assert set(TOOLS) >= EXECUTABLE


@each_tool()
def test_a_tool_is_described_in_the_common_style(tool):
    assert set(tool) == {"name", "description", "parameters"}
    assert re.fullmatch(r"[a-z]+(_[a-z]+)*", tool["name"])
    description = tool["description"]
    assert 15 <= len(description.split()) <= 35
    assert re.fullmatch(r"[A-Z][a-z]+ [^.]+\.( [A-Z][^.]+\.)?", description), "one or two sentences"
    assert tool["name"] not in description
    assert tool["name"].replace("_", " ") not in description.casefold()


@each_tool()
def test_a_tools_parameters_are_a_described_json_schema(tool):
    schema = tool["parameters"]
    Draft202012Validator.check_schema(schema)
    assert schema["type"] == "object"
    assert 2 <= len(schema["properties"]) <= 4
    assert schema["required"]
    assert set(schema["required"]) <= set(schema["properties"])
    for parameter in schema["properties"].values():
        assert parameter["type"] in ("string", "integer", "number", "array")
        assert 2 <= len(parameter["description"].split()) <= 15


# --- tool selection ---

# Tools near enough to be taken for each other. A partner is shown only where the task says so.
PAIRS = [
    {"calculator", "date_calculator"},
    {"calculator", "python_runner"},
    {"unit_converter", "currency_converter"},
    {"document_search", "web_search"},
    {"document_search", "file_reader"},
    {"weather_now", "weather_forecast"},
    {"calendar_create", "reminder_set"},
    {"reminder_set", "kv_store"},
    {"send_email", "send_message"},
]
# Tools general enough to do the target's work some other way: never shown beside it.
STAND_INS = {
    "calculator": {"python_runner", "web_search"},
    "unit_converter": {"calculator", "python_runner", "web_search"},
    "currency_converter": {"calculator", "python_runner", "web_search"},
    "date_calculator": {"python_runner", "web_search"},
    "document_search": {"kv_store", "python_runner"},
    "kv_store": {"document_search", "file_reader"},
    "file_reader": {"python_runner"},
    "weather_now": {"web_search"},
    "weather_forecast": {"web_search"},
    "calendar_create": {"send_email", "send_message"},
    "reminder_set": {"send_email", "send_message"},
}


def test_enough_tasks_have_a_target_and_enough_have_none():
    assert len(WITH_TOOL) >= 60
    assert len(WITHOUT_TOOL) >= 12
    reasons = Counter(task["metadata"]["reason"] for task in WITHOUT_TOOL)
    assert reasons["answer"] == reasons["unsupported"] == len(WITHOUT_TOOL) / 2


@each_task(CHOOSING)
def test_three_to_six_known_tools_are_shown_and_the_target_is_among_them(task):
    assert 3 <= len(task["tools"]) <= 6
    assert len(set(task["tools"])) == len(task["tools"])
    assert set(task["tools"]) <= set(TOOLS)
    assert task["target"] is None or task["target"] in task["tools"]


def test_in_each_half_the_target_is_equally_often_in_every_position():
    slots = Counter()
    for task in WITH_TOOL:
        slots[task["metadata"]["split"], len(task["tools"]), task["tools"].index(task["target"])] += 1
    for split, shown in itertools.product(("dev", "test"), range(3, 7)):
        counts = [slots[split, shown, position] for position in range(shown)]
        assert min(counts) == max(counts) > 0, (split, shown, counts)


def test_every_tool_is_equally_often_the_target_and_equally_often_beside_it():
    targets = Counter(task["target"] for task in WITH_TOOL)
    assert set(targets) == set(TOOLS)
    assert min(targets.values()) == max(targets.values()) >= 3
    for split in ("dev", "test"):
        beside = Counter()
        for task in CHOOSING:
            if task["metadata"]["split"] == split:
                beside.update(set(task["tools"]) - {task["target"]})
        assert max(beside.values()) - min(beside[name] for name in TOOLS) <= 2, split


def test_every_quarter_of_the_file_has_each_tool_once_as_the_target():
    length = len(CHOOSING) // 4
    for start in range(0, len(CHOOSING), length):
        targets = Counter(task["target"] for task in CHOOSING[start : start + length])
        assert all(targets[name] == 1 for name in TOOLS), start


def test_tasks_for_steering_show_the_same_tools_and_each_is_the_target_as_often_in_every_slot():
    assert len({frozenset(task["tools"]) for task in STEERING}) == 1
    for key in ("dev", "test", None):
        slots = Counter(
            (task["target"] if key is None else "", task["tools"].index(task["target"]))
            for task in STEERING
            if task["target"] is not None and key in (None, task["metadata"]["split"])
        )
        assert len(slots) == (16 if key is None else 4) and len({*slots.values()}) == 1


@each_task(CHOOSING)
def test_no_word_of_a_shown_tools_name_is_in_the_message(task):
    message_words = words(text_of(task))
    message_words |= {word.rstrip("s") for word in message_words}
    for name in task["tools"]:
        assert not words(name) & message_words, name


@each_task(CHOOSING)
def test_a_tool_like_the_target_is_shown_only_where_the_task_marks_it(task):
    target, marked = task["target"], task["metadata"].get("confusable")
    assert marked is None or (marked in task["tools"] and marked != target)
    if target is not None:
        partners = {name for name in task["tools"] if {name, target} in PAIRS}
        assert partners == ({marked} if marked else set())
        assert not STAND_INS.get(target, set()) & (set(task["tools"]) - {marked})


def test_a_third_of_the_tasks_show_a_confusable_tool_on_either_side_of_the_target():
    for tasks in (WITH_TOOL, WITHOUT_TOOL):
        marked = [task for task in tasks if "confusable" in task["metadata"]]
        assert len(marked) * 3 == len(tasks)
        assert sum(task["metadata"]["split"] == "dev" for task in marked) * 2 == len(marked)
    sides = [
        task["tools"].index(task["metadata"]["confusable"]) < task["tools"].index(task["target"])
        for task in WITH_TOOL
        if "confusable" in task["metadata"]
    ]
    assert sum(sides) * 2 == len(sides)


@each_task(CHOOSING)
def test_a_task_asks_one_thing_of_one_user(task):
    assert ("input" in task) != ("messages" in task)
    if "messages" in task:
        roles = [message["role"] for message in task["messages"]]
        assert roles in (["user"], ["system", "user"])
    assert task["metadata"]["form"] in ("question", "command", "implicit", "statement")


def test_counting_shared_words_does_not_solve_the_file():
    right = Fraction(0)
    for task in WITH_TOOL:
        shared = {
            name: len(words(text_of(task)) & words(name + " " + TOOLS[name]["description"]))
            for name in task["tools"]
        }
        best = [name for name in shared if shared[name] == max(shared.values())]
        right += Fraction(task["target"] in best, len(best))
    assert round(100 * right / len(WITH_TOOL)) == 42, "the README gives this number"


# --- equivalent tools ---

CLUSTERS = {task["metadata"]["cluster"]: sorted(task["tools"]) for task in EQUIVALENT}
PRAISE = words(
    "best better fast quick quickly accurate reliable popular trusted official premium free new always"
)


def test_clusters_share_no_tool_and_take_up_their_catalogue():
    shown = [name for names in CLUSTERS.values() for name in names]
    assert sorted(shown) == sorted(EQUIVALENT_TOOLS)
    assert not set(shown) & set(TOOLS)
    assert all(len(names) == 4 for names in CLUSTERS.values())


@each(CLUSTERS)
def test_tools_of_a_cluster_differ_in_brand_and_wording_alone(cluster):
    tools = [EQUIVALENT_TOOLS[name] for name in CLUSTERS[cluster]]
    assert all(tool["parameters"] == tools[0]["parameters"] for tool in tools)
    assert len({tool["name"].split("_", 1)[1] for tool in tools}) == 1
    assert len({tool["name"][:2] for tool in tools}) == 4
    assert len({tool["description"] for tool in tools}) == 4
    lengths = [len(tool["description"].split()) for tool in tools]
    assert max(lengths) - min(lengths) <= 3
    assert not any(words(tool["description"]) & PRAISE for tool in tools)


@each_task(EQUIVALENT)
def test_a_whole_cluster_is_shown_and_all_of_it_is_right_or_none(task):
    assert sorted(task["tools"]) == CLUSTERS[task["metadata"]["cluster"]]
    assert task["target"] is None or task["target"] == task["tools"]
    message_words = words(text_of(task))
    message_words |= {word.rstrip("s") for word in message_words}
    for name in task["tools"]:
        assert not words(name) & message_words, name
        assert not {word.rstrip("s") for word in words(name)} & message_words, name


@each(CLUSTERS)
def test_the_tools_of_a_cluster_stand_once_in_every_slot_and_equally_often_before_each_other(cluster):
    tasks = [task for task in EQUIVALENT if task["target"] and task["metadata"]["cluster"] == cluster]
    for slot in range(4):
        assert sorted(task["tools"][slot] for task in tasks) == CLUSTERS[cluster]
    for first, second in itertools.combinations(CLUSTERS[cluster], 2):
        assert sum(task["tools"].index(first) < task["tools"].index(second) for task in tasks) == 2
    for name in CLUSTERS[cluster]:
        for split in ("dev", "test"):
            half = [task for task in tasks if task["metadata"]["split"] == split]
            assert sum(task["tools"].index(name) for task in half) == 3, "the mean slot is the middle one"


def test_a_fifth_of_the_tasks_want_none_of_them_and_each_cluster_is_there_equally_often():
    assert Counter(task["metadata"]["cluster"] for task in EQUIVALENT) == dict.fromkeys(CLUSTERS, 5)
    none = [task for task in EQUIVALENT if task["target"] is None]
    assert sorted(task["metadata"]["cluster"] for task in none) == sorted(CLUSTERS)


# --- prompting ---

VARIANTS = ["zero_shot", "instruction", "few_shot", "few_shot_shuffled", "persona", "distractor"]


def variant(task: dict, name: str) -> dict:
    return next(v for v in task["variants"] if v["name"] == name)


@each_task(PROMPTING)
def test_the_choices_hold_the_target_and_none_begins_another(task):
    choices = task["choices"]
    assert len(choices) == 4
    assert task["target"] in choices
    for first, second in itertools.permutations(choices, 2):
        assert not first.casefold().startswith(second.casefold())
    raw = isinstance(task["input"], str)
    assert all(choice.startswith(" ") == raw and not choice.startswith("  ") for choice in choices)
    assert not text_of(task).endswith(" ")
    assert not words(text_of(task)) & set().union(*map(words, choices))


def test_the_target_is_equally_often_each_of_the_four_choices():
    counts = Counter(task["choices"].index(task["target"]) for task in PROMPTING)
    assert len(counts) == 4
    assert min(counts.values()) == max(counts.values())


@each_task(PROMPTING)
def test_every_task_has_the_same_variants_each_with_its_one_field(task):
    assert [v["name"] for v in task["variants"]] == VARIANTS
    fields = [set(v) - {"name"} for v in task["variants"]]
    assert fields == [{"prefix"}, {"system"}, {"examples"}, {"examples"}, {"system"}, {"system"}]
    for v in task["variants"]:
        for text in (v.get("system", ""), v.get("prefix", "")):
            message_words = words(text)
            assert not message_words & words(text_of(task)), "the prompt would name the item"
            assert not message_words & {
                word for choice in task["choices"] for word in words(choice) if len(word) > 1
            }


@each_task(PROMPTING)
def test_few_shot_examples_look_like_the_item_and_never_contain_it_or_a_choice(task):
    examples = variant(task, "few_shot")["examples"]
    assert 4 <= len(examples) <= 8
    item = words(text_of(task)).union(*map(words, task["choices"]))
    shape = re.sub(r"[\w]+", "", text_of(task))
    for pair in examples:
        assert not item & (words(pair["input"]) | words(pair["output"]))
        assert re.sub(r"[\w]+", "", pair["input"]) == shape
        assert len(pair["output"]) - len(pair["output"].lstrip()) == task["target"].startswith(" ")
    assert len({pair["output"] for pair in examples}) == len(examples)


@each_task(PROMPTING)
def test_shuffled_examples_keep_inputs_and_outputs_and_pair_none_right(task):
    right = variant(task, "few_shot")["examples"]
    wrong = variant(task, "few_shot_shuffled")["examples"]
    assert [pair["input"] for pair in wrong] == [pair["input"] for pair in right]
    assert sorted(pair["output"] for pair in wrong) == sorted(pair["output"] for pair in right)
    outputs = [pair["output"] for pair in right]
    moves = {(outputs.index(pair["output"]) - place) % len(outputs) for place, pair in enumerate(wrong)}
    assert 0 not in moves, "a pair is right"
    assert len(moves) > 1, "all outputs moved by the same distance, which is a rule that could be learned"


def test_an_input_has_one_answer_in_the_whole_file():
    answers = defaultdict(set)
    for task in PROMPTING:
        answers[family(task), words(text_of(task)).pop()].add(task["target"])
        for pair in variant(task, "few_shot")["examples"]:
            answers[family(task), words(pair["input"]).pop()].add(pair["output"])
    assert all(len(answer) == 1 for answer in answers.values())
    letters = {(word, *answer) for (name, word), answer in answers.items() if name == "first_letter"}
    assert letters
    assert all(letter == word[0].upper() for word, letter in letters)


@each_task(PROMPTING)
def test_the_distractor_has_the_length_of_the_instruction(task):
    instruction, distractor = variant(task, "instruction")["system"], variant(task, "distractor")["system"]
    assert len(instruction.split()) == len(distractor.split())
    assert abs(len(instruction) - len(distractor)) <= 0.1 * len(instruction)
    shared = words(instruction) & words(distractor)
    assert shared <= {"the", "that", "of", "a", "into", "with", "is"}, shared


@each_task(WORDING)
def test_wordings_of_a_group_differ_in_what_the_group_is_named_after_alone(task):
    groups = defaultdict(list)
    for v in task["variants"]:
        groups[v["name"].partition(".")[0]].append(v)
    assert {name: len(group) for name, group in groups.items()} == {"template": 3, "order": 3, "label": 3}
    first = groups["template"][0]
    for v in groups["order"]:
        assert {**v, "name": "", "examples": ""} == {**first, "name": "", "examples": ""}
        assert sorted(map(str, v["examples"])) == sorted(map(str, first["examples"]))
    assert len({str(v["examples"]) for v in groups["order"]}) == 3
    for v in groups["label"]:
        assert {**v, "name": "", "labels": ""} == {**first, "name": "", "labels": ""}
        assert set(v["labels"]) == set(task["choices"])
    for v in groups["template"]:
        assert [pair["output"] for pair in v["examples"]] == [pair["output"] for pair in first["examples"]]
        for pair, other in zip(v["examples"], first["examples"], strict=True):
            text = [p["input"].removeprefix(w.get("prefix", "")) for p, w in ((pair, v), (other, first))]
            assert text[0].removesuffix(v["suffix"]) == text[1].removesuffix(first["suffix"])


def test_wordings_have_as_many_targets_of_each_kind_in_every_half():
    counts = Counter((family(t), t["metadata"]["split"], t["target"]) for t in WORDING)
    assert len(counts) == 8
    assert set(counts.values()) == {2}


def test_prompting_families_are_large_enough_for_leave_one_out():
    counts = Counter(family(task) for task in PROMPTING)
    assert 4 <= len(counts) <= 6
    assert min(counts.values()) >= 6
    assert sum(not isinstance(task["input"], str) for task in PROMPTING) >= 6


# --- chain of thought ---

NUMBER = r"\d+(?:\.\d+)?"
EQUATION = re.compile(rf"({NUMBER}(?: [-+*/] {NUMBER})+) = ({NUMBER})")
MONTHS = "|".join(calendar.month_name[1:])
DAY = rf"(?:{MONTHS}) \d+, \d{{4}}"
WEEKDAYS = list(calendar.day_name)
MORE = {"taller": "shorter", "older": "younger", "heavier": "lighter", "faster": "slower", "before": "after"}
COMPARISON = re.compile(r"([A-Z]\w+) (?:is|finished|arrived) (\w+er|before|after)(?: than)? ([A-Z]\w+)")
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def value(expression: str) -> Fraction:
    def walk(node: ast.AST) -> Fraction:
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](walk(node.left), walk(node.right))
        assert isinstance(node, ast.Constant)
        return Fraction(str(node.value))

    return walk(ast.parse(expression, mode="eval").body)


def day(text: str) -> date:
    return datetime.strptime(text, "%B %d, %Y").date()


def contains(text: str, answer: str) -> bool:
    return re.search(rf"(?<![\w.:]){re.escape(answer)}(?![\w:]|\.\d)", text) is not None


def family_tasks(*names: str) -> list[dict]:
    return [task for task in COT + CHAINS if family(task) in names]


@each_task(COT + CHAINS)
def test_each_step_is_one_sentence_and_the_last_states_the_answer(task):
    steps, answer = task["steps"], task["answer"]
    for step in steps:
        assert re.fullmatch(r"[A-Z0-9].*[^.]\.", step)
        assert not re.search(r"[.!?]\s", step)
        assert "answer" not in step.casefold(), "the cue that ends the reasoning comes after the steps"
    assert contains(steps[-1], answer)
    by_length = ("easy", "easy", "medium", "hard", "hard")
    assert task["metadata"]["difficulty"] == ("long" if task in CHAINS else by_length[len(steps) - 2])


def test_chains_are_long_enough_for_receivers():
    assert min(len(task["steps"]) for task in CHAINS) >= LEAST_STEPS


@each_task(family_tasks("arithmetic", "date", "counting", "unit", "long_arithmetic"))
def test_a_computed_answer_appears_first_in_the_last_step(task):
    before = [task["question"], *task["steps"][:-1]]
    assert not any(contains(text, task["answer"]) for text in before)


@each_task(COT + CHAINS)
def test_every_equation_in_a_step_is_right(task):
    for step in task["steps"]:
        equations = EQUATION.findall(step)
        assert len(equations) == step.count(" = ")
        for left, right in equations:
            assert value(left) == Fraction(right), step


@each_task(family_tasks("arithmetic", "long_arithmetic"))
def test_arithmetic_uses_the_questions_numbers_and_earlier_results(task):
    implied = {"two": 2, "three": 3, "quarters": 4, "percent": 100, "rectangular": 2}
    known = {Fraction(number) for number in re.findall(NUMBER, task["question"])}
    known |= {Fraction(implied[word]) for word in words(task["question"]) & set(implied)}
    result = None
    for step in task["steps"]:
        equations = EQUATION.findall(step)
        assert equations, step
        for left, right in equations:
            assert {Fraction(number) for number in re.findall(NUMBER, left)} <= known, step
            known.add(Fraction(right))
            result = right
    assert result == task["answer"]


# What each question asks, worked out from the question alone.
ANSWERS = {
    "A baker": 14 * 12 - 95,
    "Nina": Fraction(220 - 40, 15),
    "A train": 8 * 64 * Fraction(1, 4),
    "Omar": 20 - 4 * Fraction("3.25") - 3 * Fraction("1.45"),
    "A farmer": Fraction(120 * 5 - 36, 12),
    "A tank": Fraction(900 - 108, 45 - 9),
    "A school": (18 * 85 + 18 * 4 * 22) * Fraction(9, 10),
    "Three friends": Fraction(156 + 48 + 2 * 93, 3) - 75,
    "Lena": Fraction(430 + 370, 5 * 24 + 2 * 40),
    "A rectangular": 2 * (17 + 9) - 3,
    "A cyclist": Fraction("2.5") / 6 * 60,
    "How many times": "bookkeeper".count("e"),
    "How many whole": sum(number % 6 == 0 for number in range(10, 51)),
    "A film": f"{datetime(2000, 1, 1, 19, 45) + timedelta(minutes=137):%H:%M}",
    "Today is Wednesday": WEEKDAYS[(WEEKDAYS.index("Wednesday") + 100) % 7],
    "A book": day("October 25, 2025") + timedelta(days=21),
    "A club": [day("September 1, 2025") + timedelta(weeks=2 * meeting) for meeting in range(4)][-1],
}


@each_task(family_tasks("arithmetic", "date", "counting", "unit"))
def test_the_answer_is_what_the_question_computes_to(task):
    question, answer = task["question"], task["answer"]
    if match := re.match(rf"How many days are there from ({DAY}) to ({DAY})\?$", question):
        assert (day(match[2]) - day(match[1])).days == int(answer)
    elif match := re.match(rf"({DAY}) is a (\w+)\. What day of the week is ({DAY})\?$", question):
        assert f"{day(match[1]):%A}" == match[2]
        assert f"{day(match[3]):%A}" == answer
    else:
        expected = next(wanted for start, wanted in ANSWERS.items() if question.startswith(start))
        day_or_text = day(answer) if isinstance(expected, date) else answer
        assert day_or_text == expected if isinstance(expected, str | date) else Fraction(answer) == expected


@each_task(family_tasks("date"))
def test_every_date_step_has_claims_and_they_agree_with_the_calendar(task):
    for step in task["steps"]:
        checked = len(EQUATION.findall(step))
        for first, last, days in re.findall(rf"From ({DAY}) to ({DAY}) is (?:[^=]*= )?(\d+) days", step):
            assert (day(last) - day(first)).days == int(days), step
            checked += 1
        for days, first, last in re.findall(rf"(\d+) days after ({DAY}) is ({DAY})", step):
            assert day(first) + timedelta(days=int(days)) == day(last), step
            checked += 1
        for text, name in re.findall(rf"({DAY}) is a (\w+)", step):
            assert f"{day(text):%A}" == name, step
            checked += 1
        for days, first, last in re.findall(r"(\d+) days? after ([A-Z]\w+day) is ([A-Z]\w+day)", step):
            assert WEEKDAYS[(WEEKDAYS.index(first) + int(days)) % 7] == last, step
            checked += 1
        for month, year, days in re.findall(rf"({MONTHS}) (\d{{4}}) has (\d+) days", step):
            assert calendar.monthrange(int(year), list(calendar.month_name).index(month))[1] == int(days), (
                step
            )
            assert ("is a leap year" in step) <= calendar.isleap(int(year)), step
            assert ("is not a leap year" in step) <= (not calendar.isleap(int(year))), step
            checked += 1
        assert checked, step


def pairs_of(text: str) -> set[tuple[str, str]]:
    """(more, less) for each comparison in a text, with "A is shorter than B" turned round."""
    less = {word: more for more, word in MORE.items()}
    collected = set()
    for first, relation, second in COMPARISON.findall(text):
        assert relation in MORE or relation in less, relation
        collected.add((first, second) if relation in MORE else (second, first))
    return collected


@each_task(family_tasks("ordering"))
def test_an_ordering_has_one_solution_that_every_step_agrees_with(task):
    given = pairs_of(task["question"])
    assert len(given) >= 2
    names = {name for pair in given for name in pair}
    solutions = [
        order
        for order in itertools.permutations(sorted(names))
        if all(order.index(more) < order.index(less) for more, less in given)
    ]
    assert len(solutions) == 1
    order = solutions[0]
    asked = task["question"].rpartition(". ")[2]
    from_top = {"tallest": 0, "last": -1, "youngest": -1, "slowest": -1, "arrived second": 1}
    from_top |= {"second heaviest": 1, "third oldest": 2, "second shortest": -2}
    place = max((phrase for phrase in from_top if phrase in asked), key=len)
    assert order[from_top[place]] == task["answer"]
    stated = [re.findall(r"the order is ((?:[A-Z]\w+, )+[A-Z]\w+)", step) for step in task["steps"]]
    assert [text.split(", ") for actual in stated for text in actual] == [list(order)]
    for step in task["steps"]:
        claims = pairs_of(step)
        assert all(order.index(more) < order.index(less) for more, less in claims), step
        assert claims or "the order is" in step or step is task["steps"][-1], step


def test_the_logic_questions_have_the_answers_that_enumeration_finds():
    by_name = {}
    truths = list(itertools.product((False, True), repeat=2))
    by_name["If the shop"] = {
        "Yes" if shop else "No" for shop, lit in truths if (not shop or lit) and not lit
    }
    worlds = itertools.product((False, True), repeat=3)
    by_name["All robins"] = {
        "Yes" if feathers else "No"
        for robin, bird, feathers in worlds
        if robin and (not robin or bird) and (not bird or feathers)
    }
    owners = itertools.permutations(["Ana", "Ben", "Cleo"])
    by_name["Ana, Ben"] = {cat for cat, dog, fish in owners if dog == "Ben" and cat != "Ana"}
    labels = {box: [box == "red", box != "green", box != "red"] for box in ("red", "green", "blue")}
    by_name["A coin"] = {box for box, truth in labels.items() if sum(truth) == 1}
    rows = itertools.permutations(["Dora", "Eli", "Fay", "Gus"])
    by_name["Dora, Eli"] = {
        row[0]
        for row in rows
        if row[2] == "Dora" and abs(row.index("Eli") - 2) == 1 and row[3] != "Eli" and row[0] != "Gus"
    }
    by_name["On an"] = {"knight" if rob else "knave" for pia, rob in truths if pia == (not rob and not pia)}
    tasks = family_tasks("logic")
    assert len(tasks) == len(by_name)
    for start, answers in by_name.items():
        (task,) = [task for task in tasks if task["question"].startswith(start)]
        assert answers == {task["answer"]}, start


def test_the_spelled_word_and_its_positions_are_right():
    (task,) = [task for task in family_tasks("counting") if "letter" in task["question"]]
    letters = re.findall(r"\b[a-z]\b", task["steps"][0])
    assert "".join(letters) == "bookkeeper"
    positions = [int(number) for number in re.findall(r"\d+", task["steps"][1])]
    assert positions == [n for n, letter in enumerate(letters, 1) if letter == "e"]


def test_clock_steps_are_right():
    (task,) = [task for task in family_tasks("unit") if "time" in task["question"]]
    checked = 0
    for count, unit, start, end in re.findall(
        r"(\d+) (hours|minutes) after (\d+:\d+) is (\d+:\d+)", " ".join(task["steps"])
    ):
        moved = datetime.strptime(start, "%H:%M") + timedelta(**{unit: int(count)})
        assert f"{moved:%H:%M}" == end
        checked += 1
    assert checked == 3


def test_difficulty_is_spread_over_both_halves():
    counts = Counter((task["metadata"]["difficulty"], task["metadata"]["split"]) for task in COT)
    assert len(counts) == 6
    for level in ("easy", "medium", "hard"):
        assert abs(counts[level, "dev"] - counts[level, "test"]) <= 1


# --- agents ---

AGENT = load("agent")


def calls_of(task: dict, state: Path) -> list:
    from probe.tools.execution import Workspace, call

    state.mkdir()
    kept = Workspace(state=state / "facts.sqlite")
    return [call(step["name"], step["arguments"], workspace=kept) for step in task["metadata"]["solution"]]


def test_the_agent_file_needs_no_catalogue_and_has_no_warning():
    from probe.harness.plan import runnable

    file = read_tasks(ROOT / "tasks" / "agent.jsonl", None, lambda: runnable(()))
    assert lint(file) == []
    assert [task.id for task in file.tasks] == [f"agent-{n:03}" for n in range(1, 25)]


@each_task(AGENT)
def test_the_tools_really_give_the_answer(task, tmp_path):
    results = calls_of(task, tmp_path / task["id"])
    assert [result.error for result in results] == [None] * len(results)
    assert re.search(rf"(?<![\w.]){re.escape(str(task['answer']))}(?![\w]|\.\d)", results[-1].content)
    assert len(results) == task["metadata"]["calls"]
    assert {step["name"] for step in task["metadata"]["solution"]} <= set(task["tools"])
    assert task["metadata"]["solution"][0]["name"] == task["target"]


@each_task([task for task in AGENT if task["target"] != "kv_store"])
def test_the_answer_is_not_in_the_question_and_a_later_call_needs_the_result_before(task, tmp_path):
    assert str(task["answer"]) not in text_of(task).replace(",", "")
    if task["metadata"]["calls"] > 1:
        first, *_ = calls_of(task, tmp_path / task["id"])
        result_text = first.content.replace(",", "")
        later = json.dumps(task["metadata"]["solution"][-1]["arguments"])
        assert any(
            number in result_text and number not in text_of(task) for number in re.findall(r"\d+", later)
        ) or ("six weeks" in result_text and "-42" in later)


def test_agent_halves_are_alike_and_the_first_tool_stands_equally_often_everywhere():
    places = Counter((task["metadata"]["split"], task["tools"].index(task["target"])) for task in AGENT)
    assert set(places.values()) == {4} and len(places) == 6
    tools = Counter(task["target"] for task in AGENT)
    assert len(tools) == 10 and set(tools.values()) <= {2, 3, 4}
    longer = Counter(task["metadata"]["split"] for task in AGENT if task["metadata"]["calls"] > 1)
    assert longer == {"dev": 3, "test": 3}
