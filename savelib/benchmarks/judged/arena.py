"""Arena-Hard v2.0 (arXiv 2406.11939; lmarena/arena-hard-auto): a policy's score against a baseline, in percent.

A judge sees the two answers twice: in game 1 the baseline is A, in game 2 the model is. A strong verdict (>>) counts as
three battles, a draw as half a battle won. A question of which one game has no verdict is dropped and counted.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import statsmodels.api as sm
from scipy.special import expit

from savelib.benchmarks.judged.judge import LABELS, read_label
from savelib.benchmarks.statistics import Result, Stratum, bootstrap, interval, percentiles
from savelib.config import ConfigError, shown
from savelib.data.files import Record, at, checked, column, file_rows, label, number, text

T = TypeVar("T")
BASELINES = {"hard_prompt": "o3-mini-2025-01-31", "creative_writing": "gemini-2.0-flash-001"}
QUESTIONS = {"hard_prompt": 500, "creative_writing": 250}
STRONG = 3
# verdict -> (what A gets, battles)
VERDICTS = {"A>>B": (1.0, STRONG), "A>B": (1.0, 1), "A=B": (0.5, 1), "B>A": (0.0, 1), "B>>A": (0.0, STRONG)}
STYLE = ("token_len", "header_count", "list_count", "bold_count")
STYLE_RESAMPLES = 100  # as the official script
COUNTS = ("questions", "dropped_questions", "games_without_verdict", "battles", "strong_verdicts", "draws")


@dataclass(frozen=True)
class Judged:
    """One question of one model: what the model gets in each game (0 to 1) and the battles it counts as."""

    uid: str
    model: str
    baseline: str
    gets: tuple[float, float]
    battles: tuple[int, int]

    @property
    def score(self) -> float:
        return sum(g * b for g, b in zip(self.gets, self.battles, strict=True)) / sum(self.battles)


def read_files(given: str | Path | list[str | Path], field: str, convert: Callable[[Record, str], T]) -> list[T]:
    """The rows of one file or of several, each converted. Raises ConfigError."""
    files = given if isinstance(given, list) else [given]
    rows = [row for file in files for row in checked(file_rows(file, field), convert, f"{field} = {str(file)!r}")]
    if not rows:
        raise ConfigError(f"{field} = {', '.join(map(repr, map(str, files)))} has no rows")
    return rows


def read_questions(path: str | Path) -> dict[str, str]:
    """uid -> category of the benchmark's questions (750: hard_prompt 500, creative_writing 250)."""
    rows = read_files(path, "questions", lambda row, _: [text(row, name) for name in ("uid", "category", "prompt")])
    out = {uid: category for uid, category, _ in rows}
    if len(out) < len(rows):
        raise ConfigError(f"questions = {str(path)!r}: {len(rows) - len(out)} uids are there twice; give each once")
    return out


def as_judgment(row: Record, _: str = "") -> Record:
    """A record {uid, model, games [2]} of arena-hard-auto. Raises ConfigError naming the field of another one."""
    for name in ("uid", "model"):
        text(row, name)
    for name in ("category", "baseline", "judge"):
        if row.get(name) is not None:
            text(row, name)
    if not isinstance(column(row, "games"), list) or len(row["games"]) != 2:
        raise ConfigError(f"column 'games' must be a list of two games, not {shown(row['games'])}")
    for place, game in enumerate(row["games"]):
        with at(f"column 'games[{place}]'"):
            _verdict_of(game)
    return row


def _verdict_of(game: Any) -> str | None:
    """The label of a game: its `score`, else what the text of its `judgment` says; None where the judge gave none."""
    if game is None:
        return None
    if not isinstance(game, dict):
        raise ConfigError(f"it is {shown(game)}, not an object with score or judgment")
    score, said = game.get("score"), game.get("judgment")
    if score is not None:
        if not isinstance(score, str) or set(score) - set("AB<>="):
            raise ConfigError(f"score is {shown(score)}, no verdict such as A>B")
        return LABELS.get(score)
    said = said.get("answer") if isinstance(said, dict) else said
    if said is not None and not isinstance(said, str):
        raise ConfigError(f"judgment is {shown(said)}, not a text")
    return read_label(said or "")[0]


def read_judgments(
    rows: list[Record], questions: dict[str, str] | None = None
) -> tuple[dict[str, dict[str, list[Judged]]], dict[str, dict[str, Counter]], list[str]]:
    """(category -> model -> judged questions, category -> model -> counts, notes) of records as `as_judgment` checks.

    Raises ConfigError for a question twice, one that is not among `questions` or, of a category and model that are
    there, one of `questions` that is missing.
    """
    keys = Counter((row["uid"], row["model"]) for row in rows)
    judges = {str(row.get("judge")) for row in rows}
    if len(judges) > 1:
        raise ConfigError(f"judgments are of several judges, {sorted(judges)}; score those of one")
    twice = [key for key, count in keys.items() if count > 1]
    unknown = [row["uid"] for row in rows if questions is not None and row["uid"] not in questions]
    if twice or unknown:
        raise ConfigError(
            f"judgments: {len(twice)} questions are there twice {twice[:1]}, {len(unknown)} are not "
            f"among the {len(questions or ())} questions {unknown[:1]}; give each question once"
        )
    judged: dict[str, dict[str, list[Judged]]] = {}
    counts: dict[str, dict[str, Counter]] = {}
    for row in rows:
        category = (questions or {}).get(row["uid"]) or row.get("category") or "uncategorised"
        model, verdicts = row["model"], [_verdict_of(game) for game in row["games"]]
        count = counts.setdefault(category, {}).setdefault(model, Counter())
        kept = judged.setdefault(category, {}).setdefault(model, [])
        count["questions"] += 1
        if None in verdicts:
            count["dropped_questions"] += 1
            count["games_without_verdict"] += verdicts.count(None)
            continue
        (first, n_first), (second, n_second) = (VERDICTS[verdict] for verdict in verdicts)
        baseline = row.get("baseline") or BASELINES.get(category, "baseline")
        kept.append(Judged(row["uid"], model, baseline, (1 - first, second), (n_first, n_second)))
        count["battles"] += n_first + n_second
        count["strong_verdicts"] += (n_first > 1) + (n_second > 1)
        count["draws"] += (first == 0.5) + (second == 0.5)
    notes = _whole(rows, questions, counts)
    for category, models in judged.items():
        baselines = {j.baseline for kept in models.values() for j in kept}
        if len(baselines) > 1:
            raise ConfigError(f"judgments of {category} have several baselines, {sorted(baselines)}; give those of one")
        if empty := [model for model, kept in models.items() if not kept]:
            raise ConfigError(
                f"judgments: no question of {category} has two verdicts for {empty}; the judge failed, run it again"
            )
    return judged, counts, notes


def _whole(
    rows: list[dict[str, Any]], questions: dict[str, str] | None, counts: dict[str, dict[str, Counter]]
) -> list[str]:
    """Notes on categories that are not whole as far as can be known; ConfigError where `questions` says so."""
    notes = []
    for category, models in counts.items():
        for model, count in models.items():
            if questions is not None:
                there = {row["uid"] for row in rows if row["model"] == model}
                missing = [uid for uid, of in questions.items() if of == category and uid not in there]
                if missing:
                    raise ConfigError(
                        f"judgments of {model!r}: {len(missing)} of {list(questions.values()).count(category)} "
                        f"questions of {category} are missing, the first {missing[0]!r}; a part has no total"
                    )
            elif count["questions"] != QUESTIONS.get(category, count["questions"]):
                notes.append(f"{model}: {count['questions']} judged questions, {category} has {QUESTIONS[category]}")
            if count["dropped_questions"]:
                notes.append(
                    f"{model}: {count['dropped_questions']} of {count['questions']} questions of {category} are "
                    f"dropped, {count['games_without_verdict']} games have no verdict"
                )
    return notes


def _mean_of_battles(credit: np.ndarray) -> float:
    return float((credit[:, 0] * credit[:, 1]).sum() / credit[:, 1].sum())


def result(judged: list[Judged], name: str = "score") -> Result:
    """One model's score as a Result over questions, to be compared with another model's on the same ones."""
    credit = np.array([[j.score, sum(j.battles)] for j in judged], float)
    stratum = Stratum(name, 1.0, [j.uid for j in judged], credit, _mean_of_battles)
    return Result([stratum], {name: 100 * stratum.value()}, {"questions": len(judged)})


def figures(judged: list[Judged]) -> dict[str, Any]:
    """score; ci90: 5 to 95% where each battle is drawn by itself, as officially; ci95: where questions are drawn.

    Pitfall: the copies of a strong verdict and the two games of a question are not independent, so ci90 is narrower
    than its name says; ci95 is the one to judge differences by. The official score is the mean of 100 unseeded
    resamples, whose limit this mean is.
    """
    whole = result(judged)
    battles = np.array([g for j in judged for g, b in zip(j.gets, j.battles, strict=True) for _ in range(b)])
    alone = Stratum("battles", 1.0, [], battles[:, None])
    return {
        "score": whole.overall,
        "ci90": list(percentiles(bootstrap([alone])[0], 0.9)),
        "ci95": list(interval(whole)),
    }


# ---- style control


def as_style(row: Record, _: str = "") -> tuple[tuple[str, str], list[float] | None]:
    """((model, uid), token length and counts of headers, lists and bold) of an answer; None without them or any token.

    Raises ConfigError naming the field for what is no count.
    """
    name, metadata = (text(row, "model"), label(row, "uid")), row.get("metadata")
    if metadata is None:
        return name, None
    if not isinstance(metadata, dict):
        raise ConfigError(f"column 'metadata' is {shown(metadata)}, not an object")
    counts = []
    for field in STYLE:
        parts = metadata.get(field)
        for part in parts.values() if isinstance(parts, dict) else () if parts is None else [parts]:
            if number(part, f"column 'metadata.{field}'") < 0:
                raise ConfigError(f"column 'metadata.{field}' is {part}, below 0")
        counts.append(sum(parts.values()) if isinstance(parts, dict) else parts)
    return name, counts if None not in counts and counts[0] > 0 else None


def read_style(answers: list[tuple[tuple[str, str], list[float] | None]]) -> dict[tuple[str, str], list[float]]:
    """(model, uid) -> style, of `as_style`'s answers that have one. Raises ConfigError for one that is there twice."""
    twice = [name for name, count in Counter(name for name, _ in answers).items() if count > 1]
    if twice:
        raise ConfigError(f"answers: {len(twice)} are there more than once, the first {twice[0]}; give each once")
    return {name: style for name, style in answers if style is not None}


def style_differences(models: np.ndarray, baselines: np.ndarray) -> np.ndarray:
    """(a - b) / (a + b) of token lengths, (a - b) / (a + b + 1) of counts a token; [n, 4] of two [n, 4]."""
    length, other = models[:, :1], baselines[:, :1]
    a, b = models[:, 1:] / length, baselines[:, 1:] / other
    return np.hstack([(length - other) / (length + other), (a - b) / (a + b + 1)])


def style_controlled(
    judged: dict[str, list[Judged]], style: dict[tuple[str, str], list[float]]
) -> dict[str, dict[str, Any]]:
    """model -> style-controlled score, its 5 to 95% interval, and the score at equal style; {} from too few questions.

    Bradley-Terry, one strength a model and 4 style features, over the battles of all models together. Officially the
    features are standardised over those battles: the score is that at their mean style. With one model that is the
    model's own, so little is controlled; `equal_style_score` is the same fit where the two answers do not differ.
    """
    names = list(judged)
    all_games = [(j, g, b) for kept in judged.values() for j in kept for g, b in zip(j.gets, j.battles, strict=True)]
    gets, battles = (np.array([game[k] for game in all_games], float) for k in (1, 2))
    ours, theirs = ([style[getattr(j, side), j.uid] for j, *_ in all_games] for side in ("model", "baseline"))
    raw = style_differences(np.array(ours, float), np.array(theirs, float))
    mean = np.average(raw, axis=0, weights=battles)
    std = np.sqrt(((raw - mean) ** 2 * battles[:, None]).sum(0) / (battles.sum() - 1))
    varies = std > 1e-12
    features = (raw - mean)[:, varies] / std[varies]
    design = np.hstack([[[j.model == name for name in names] for j, *_ in all_games], features])
    if np.linalg.matrix_rank(design) < design.shape[1]:
        return {}

    def fit(weights: np.ndarray) -> np.ndarray:
        drawn = weights > 0
        model = sm.GLM(gets[drawn], design[drawn], family=sm.families.Binomial(), freq_weights=weights[drawn])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # battles that are all won: the score is 100
            return model.fit().params

    best = fit(battles)
    equal = best[: len(names)] - (mean[varies] / std[varies]) @ best[len(names) :]
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(int(battles.sum()), battles / battles.sum(), size=STYLE_RESAMPLES)
    resampled = np.array([fit(weights.astype(float))[: len(names)] for weights in drawn])
    percent = lambda logit: 100 * expit(logit)  # noqa: E731
    return {
        name: {
            "style_controlled_score": float(percent(best[k])),
            "style_controlled_ci90": list(percentiles(percent(resampled[:, k]), 0.9)),
            "equal_style_score": float(percent(equal[k])),
        }
        for k, name in enumerate(names)
    }


def arena_json(
    judgments: str | Path | list[str | Path],
    questions: str | Path | None = None,
    answers: str | Path | list[str | Path] | None = None,
    category: str = "hard_prompt",
) -> tuple[dict[str, Any], list[str]]:
    """(figures, notes) of judgment files: score, intervals, counts of `category`; all of them under `categories`.

    answers: files of the model's and the baseline's answers with `metadata`, for style control. With several models
    the figures are under `models`, by name.
    """
    judged, counts, notes = read_judgments(
        read_files(judgments, "judgments", as_judgment), read_questions(questions) if questions else None
    )
    if category not in judged:
        raise ConfigError(f"category = {category!r}: there are judgments of {', '.join(judged)}")
    style = read_style(read_files(answers, "answers", as_style)) if answers else {}
    out: dict[str, dict[str, Any]] = {}
    for name, models in judged.items():
        needed = {(m, j.uid) for kept in models.values() for j in kept for m in (j.model, j.baseline)}
        missing = sorted(needed - style.keys())
        controlled = {} if missing else style_controlled(models, style)
        if missing:
            notes.append(
                f"style_controlled_score of {name} is left out: {len(missing)} of {len(needed)} answers "
                f"have no style metadata or no token ({', '.join(STYLE)}), the first {missing[0]}"
            )
        elif not controlled:
            notes.append(f"style_controlled_score of {name} is left out: too few questions to fit 4 style features")
        elif len(models) == 1:
            notes.append(
                f"style_controlled_score of {name}: one model's battles are centred on its own style, which "
                "controls little; see equal_style_score, or give the judgments of more models"
            )
        for model, kept in models.items():
            count = {k: counts[name][model][k] for k in COUNTS}
            found = {"baseline": kept[0].baseline} | figures(kept) | controlled.get(model, {}) | {"counts": count}
            out.setdefault(model, {})[name] = found
    flat = {}
    for model, categories in out.items():
        if category not in categories:
            raise ConfigError(f"category = {category!r}: of {model!r} there are judgments of {', '.join(categories)}")
        flat[model] = {"model": model, "category": category} | categories[category] | {"categories": categories}
    return (next(iter(flat.values())) if len(flat) == 1 else {"models": flat}), notes
