"""Random input: whatever a config, a file of rows or a file of scores holds, it ends in a value or in one ConfigError.

The suite draws the same 1,000 inputs each time; `pytest -m fuzz tests/test_fuzz.py` draws 20,000 others.
"""

import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from savelib.benchmarks.scores import score_file
from savelib.config import Config, ConfigError, make_config
from savelib.data.pairs_and_prompts import load_preferences, load_prompts

FIELDS = {name: field.annotation for name, field in Config.model_fields.items()}
ANY_TEXT = st.text(st.characters(), max_size=8)  # with half characters, which are no text
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT
JSON = st.recursive(
    SCALARS, lambda s: st.lists(s, max_size=3) | st.dictionaries(st.text(max_size=5), s, max_size=3), max_leaves=6
)
WORDS = ("0123", "a #b", "1_000", "yes", "~", "save", "auto", "12:30:00", "cpu", "é", "'", "null", "1e3", "- a")
FITTING = {  # by type: what has a chance
    int: st.integers(1, 40) | st.integers(0, 2**33),
    float: st.floats(0.01, 0.4) | st.floats(0, 1) | st.sampled_from(["1e-6", ".5"]),
    bool: st.booleans() | st.sampled_from(["yes", "off", 0, 1, "True"]),
    str: ANY_TEXT | st.sampled_from(WORDS),
}


def good_ones(check, count, **strategies):
    """How many of `count` inputs `check` calls good; for the marker `fuzz` others each time."""
    good = []

    @settings(
        max_examples=count, derandomize=count < 1000, database=None, deadline=None, suppress_health_check=HealthCheck
    )
    @given(**strategies)
    def each(**drawn):
        good.append(bool(check(**drawn)))

    each()
    return sum(good)


def inputs(count):
    return pytest.mark.parametrize("count", [count, pytest.param(20 * count, marks=pytest.mark.fuzz)])


@st.composite
def fields(draw):
    names = draw(st.lists(st.sampled_from(list(FIELDS)), max_size=3, unique=True))
    likely = draw(st.booleans())
    return {n: draw(FITTING.get(FIELDS[n], SCALARS) if likely else SCALARS | JSON) for n in names}


@inputs(300)
def test_config_values(tmp_path, count):
    """What is a config has finite numbers, and is the same one when it is read from its YAML."""

    def check(values):
        try:
            config = make_config(**values)
        except ConfigError as error:
            assert len(str(error).encode()) < 4000
            assert len(values) != 1 or next(iter(values)) in str(error)
            return False
        assert all(math.isfinite(v) for v in config.model_dump().values() if isinstance(v, float))
        file = tmp_path / "config.yaml"
        file.write_text(config.to_yaml(), encoding="utf-8")
        assert make_config(file) == config
        return len(values)

    assert good_ones(check, count, values=fields()) > count / 10


@inputs(100)
def test_config_files(tmp_path, count):
    def check(content):
        file = tmp_path / "any.yaml"
        file.write_bytes(content)
        try:
            return make_config(file)
        except ConfigError as error:
            assert len(str(error).encode()) < 4000

    names = st.sampled_from(list(FIELDS)) | st.text(max_size=8)
    mappings = st.dictionaries(names, JSON, max_size=2).map(lambda values: json.dumps(values).encode())
    lines = st.lists(
        st.tuples(st.sampled_from(list(FIELDS)), st.text(max_size=6) | st.integers(0, 9).map(str)), max_size=3
    )
    mine = lines.map(lambda pairs: "".join(f"{name}: {text}\n" for name, text in pairs).encode())
    assert good_ones(check, count, content=st.binary(max_size=60) | mappings | mine) > count / 20


TEXT = st.text(max_size=8) | st.sampled_from(["Say hi.", "\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a", " "])
ROLES = st.sampled_from(["user", "assistant", "system"]) | JSON
MESSAGES = st.lists(st.fixed_dictionaries({"role": ROLES, "content": TEXT | JSON}) | JSON, max_size=3)
CELL = TEXT | TEXT | MESSAGES | JSON
CHECKS = st.lists(st.fixed_dictionaries({"kind": TEXT | JSON}) | JSON, max_size=2) | JSON
MORE = {"instruction": CELL, "checks": CHECKS, "completions": st.lists(CELL, max_size=2) | JSON, "id": JSON}
ROWS = st.fixed_dictionaries(
    {"prompt": CELL}, optional={"chosen": CELL, "rejected": CELL} | MORE
) | st.fixed_dictionaries({"prompt": TEXT, "chosen": CELL, "rejected": CELL})


@inputs(350)
def test_rows(tmp_path, count):
    """Pairs and prompts that are read have roles and contents that are texts; an error names field and file."""

    def check(rows, end, skip, pairs):
        file = tmp_path / "rows.jsonl"
        lines = [json.dumps(row, ensure_ascii=skip).encode(errors="surrogatepass") + b"\n" for row in rows]
        file.write_bytes(b"".join(lines) + end)
        config = make_config(bad_rows="skip" if skip else "error", policy_model="embedded")
        load, field = (load_preferences, "preferences") if pairs else (load_prompts, "prompts")
        try:
            found = load(str(file), config)
        except ConfigError as error:
            assert str(file) in str(error) and field in str(error) and len(str(error)) < 4000
            return False
        for row in found:
            for message in row.prompt if pairs else row.messages:
                (message["role"] + message["content"]).encode()
        return found

    rows, end = st.lists(ROWS | ROWS | ROWS | JSON, min_size=1, max_size=3), st.just(b"") | st.binary(max_size=9)
    drawn = dict(rows=rows, end=end, skip=st.booleans(), pairs=st.booleans())
    assert good_ones(check, count, **drawn) > count / 20


@inputs(250)
def test_scores(tmp_path, count):
    """Figures that come out are strict JSON; an error names the file."""
    data, file = tmp_path / "judgebench.jsonl", tmp_path / "scores.jsonl"
    same = dict(question="q", response_A="a", response_B="b", label="A>B")
    rows = [dict(pair_id=i, source=f"{s}-x", **same) for i, s in zip("ab", ("mmlu-pro", "livebench-math"), strict=True)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def check(rows):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        try:
            figures = score_file("judgebench", str(data), str(file))
        except ConfigError as error:
            assert "scores" in str(error), error
            return False
        json.dumps(figures, allow_nan=False)
        return True

    numbers = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-9, 9)
    scores = st.lists(numbers, min_size=2, max_size=2) | st.lists(st.floats() | JSON, max_size=3) | JSON
    row = st.fixed_dictionaries({"pair_id": st.sampled_from("ab") | JSON, "scores": scores})
    whole = st.tuples(*(st.fixed_dictionaries({"pair_id": st.just(i), "scores": scores}) for i in "ab")).map(list)
    assert good_ones(check, count, rows=whole | st.lists(row | JSON, max_size=3)) > count / 20
