"""Scores of generated texts against references.

Every function takes the predictions and, for each, one reference or several::

    metric(["a cat"], ["a cat"])
    metric(["a cat"], [["a cat", "one cat"]])

and raises ``ValueError`` if the numbers do not match or there is nothing to score. None of them
knows of models: the predictions are what :func:`~idefics_qlora.generate` returned.

They can be given to ``train`` and ``evaluate`` as they are; :func:`field_match` with its fields::

    metrics={"cider": cider_d, "right": functools.partial(field_match, fields=my_fields)}
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, TypeAlias

References: TypeAlias = Sequence[str] | Sequence[Sequence[str]]
"""One reference per prediction, or several."""

MAX_NGRAM = 4
CIDER_SIGMA = 6.0
"""Words of difference in length that CIDEr-D tolerates (of its Gaussian)."""

ANLS_THRESHOLD = 0.5
"""Share of a text's characters that may be wrong before ANLS gives nothing."""

HUMANS_NEEDED = 3
"""Humans who must have given an answer for the VQA accuracy to be 1."""


def exact_match(predictions: Sequence[str], references: References) -> float:
    """Share of predictions equal to a reference, white space at both ends aside (0 to 1)."""
    pairs = _pairs(predictions, references)
    hits = [text.strip() in {known.strip() for known in several} for text, several in pairs]
    return sum(hits) / len(pairs)


def field_match(
    predictions: Sequence[str],
    references: References,
    fields: Callable[[str], Mapping[str, Any]],
) -> dict[str, float]:
    """For each field of a structured text, how often the prediction has it right.

    Args:
        predictions: Texts to score.
        references: As for every metric. Of several, one with the same value suffices.
        fields: Reads a text: ``"Name: Pikachu"`` may become ``{"name": "Pikachu"}``. What it leaves
            out of a prediction is wrong there; what it leaves out of a reference is not asked for.

    Returns:
        Share of right predictions (0 to 1) among the examples whose references have the field.
    """
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for prediction, several in _pairs(predictions, references):
        found = fields(prediction)
        expected = [fields(reference) for reference in several]
        for name in dict.fromkeys(name for known in expected for name in known):
            asked[name] += 1
            right[name] += name in found and any(
                name in known and found[name] == known[name] for known in expected
            )
    if not asked:
        raise ValueError("fields() found no field in any reference: nothing can be compared")
    return {name: right[name] / number for name, number in asked.items()}


def bleu(predictions: Sequence[str], references: References) -> float:
    """Corpus BLEU by ``sacrebleu`` in its default settings (0 to 100)."""
    pairs = _pairs(predictions, references)
    metric = _sacrebleu(bleu).BLEU()
    return float(metric.corpus_score([text for text, _ in pairs], _streams(pairs)).score)


def chrf(predictions: Sequence[str], references: References) -> float:
    """Corpus chrF2 by ``sacrebleu`` in its default settings (0 to 100)."""
    pairs = _pairs(predictions, references)
    metric = _sacrebleu(chrf).CHRF()
    return float(metric.corpus_score([text for text, _ in pairs], _streams(pairs)).score)


def cider_d(predictions: Sequence[str], references: References) -> float:
    """CIDEr-D of captions (0 to 10), after Vedantam, Zitnick and Parikh (2015).

    The mean similarity of a caption to its references: cosines of tf-idf vectors over n-grams of
    one to four words, clipped to the reference's counts, lowered by a Gaussian of the difference
    in length, and multiplied by 10. How rare an n-gram is, is taken from the given references,
    so scores of different sets cannot be compared, and a set needs at least two examples.

    Words are lowercased and punctuation between them is dropped. The official scores were computed
    on words split by the Penn Treebank's rules ("do n't"); for those, pass texts split like that.
    """
    pairs = _pairs(predictions, references)
    if len(pairs) < 2:
        raise ValueError(
            "cider_d got 1 example: expected at least 2, because an n-gram's weight is the "
            "logarithm of the share of examples that have it"
        )
    counted = [(_words(text), [_words(known) for known in several]) for text, several in pairs]
    frequency: Counter[tuple[str, ...]] = Counter()
    for _, several_words in counted:
        frequency.update({ngram for words in several_words for ngram in _ngrams(words)})

    def vectors(words: list[str]) -> list[dict[tuple[str, ...], float]]:
        by_length: list[dict[tuple[str, ...], float]] = [{} for _ in range(MAX_NGRAM)]
        for ngram, count in _ngrams(words).items():
            rarity = math.log(len(pairs) / max(1, frequency[ngram]))
            by_length[len(ngram) - 1][ngram] = count * rarity
        return by_length

    def similarity(words: list[str], known: list[str]) -> float:
        cosines = map(_clipped_cosine, vectors(words), vectors(known))
        penalty = math.exp(-((len(words) - len(known)) ** 2) / (2 * CIDER_SIGMA**2))
        return penalty * sum(cosines) / MAX_NGRAM

    scores = [
        sum(similarity(words, known) for known in several) / len(several)
        for words, several in counted
    ]
    return 10.0 * sum(scores) / len(scores)


def vqa_accuracy(predictions: Sequence[str], references: References) -> float:
    """VQA accuracy (0 to 1): an answer is right if three humans gave it.

    For each question the mean of ``min(humans with this answer / 3, 1)`` over all ways to leave one
    human out, so that ten humans give 0.3, 0.6, 0.9 and 1 for one, two, three and more of them.
    Predictions and references are normalised by :func:`normalize_answer`. (The official script
    leaves both as they are where all humans gave the same answer.)

    Args:
        predictions: Answers to score.
        references: The humans' answers to each question, at least four; usually ten.
    """
    accuracies = []
    for index, (prediction, several) in enumerate(_pairs(predictions, references)):
        if len(several) <= HUMANS_NEEDED:
            raise ValueError(
                f"references[{index}] has {len(several)} answers: expected the answers of at least "
                f"{HUMANS_NEEDED + 1} humans (usually 10), one of whom is left out in turn; with "
                "fewer, use exact_match"
            )
        answer = normalize_answer(prediction)
        same = [normalize_answer(human) == answer for human in several]
        others = [sum(same) - left_out for left_out in same]
        accuracies.append(sum(min(n / HUMANS_NEEDED, 1.0) for n in others) / len(others))
    return sum(accuracies) / len(accuracies)


def anls(predictions: Sequence[str], references: References) -> float:
    """Average normalised Levenshtein similarity (0 to 1), after Biten et al. (2019).

    For each prediction the best of ``1 - edits / length of the longer text`` over its references,
    or 0 where half of the characters or more are wrong. Upper and lower case are the same, and so
    is any amount of white space, but not its absence.
    """
    scores = []
    for prediction, several in _pairs(predictions, references):
        text = _folded(prediction)
        wrong = [_share_of_edits(text, _folded(known)) for known in several]
        scores.append(max(1 - share if share < ANLS_THRESHOLD else 0.0 for share in wrong))
    return sum(scores) / len(scores)


BY_NAME = {
    "anls": anls,
    "bleu": bleu,
    "chrf": chrf,
    "cider": cider_d,
    "exact_match": exact_match,
    "vqa_accuracy": vqa_accuracy,
}
"""Those that need nothing but texts, as a command line calls them."""

GREATER_IS_BETTER = (exact_match, field_match, bleu, chrf, cider_d, vqa_accuracy, anls)
"""The metrics of which more is better."""


# --- normalisation of the VQA challenge ----------------------------------------------------------

_ARTICLES = {"a", "an", "the"}
_NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'  # apostrophes and colons stay: girl's, 2:50

_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't
    mightn't've must've mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
    someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll
    you're you've
"""

_CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word
    for word in _CONTRACTED.split()
    for at, character in enumerate(word)
    if character == "'"
}
"""Each with one apostrophe missing. Words of their own, such as "were" and "shed", stay."""


def normalize_answer(answer: str) -> str:
    """An answer as the VQA challenge compares it.

    Lower case, punctuation and articles removed, number words up to ten as digits, missing
    apostrophes put back: ``"The 2 dogs, dont they?"`` becomes ``"2 dogs don't they"``.
    """
    text = " ".join(answer.split())
    # As in the official script, one such mark decides for all: "1,000 a/b" becomes "1000 ab".
    between_digits = re.search(r"\d,\d", text) is not None
    result = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if beside_space or between_digits else " ")
    result = re.sub(r"\.(?!\d)", "", result)  # not the point of a decimal
    words = [_NUMBERS.get(word, word) for word in result.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


# --- helpers -------------------------------------------------------------------------------------


def _pairs(predictions: Sequence[str], references: References) -> list[tuple[str, Sequence[str]]]:
    """Each prediction with its references, checked."""
    for name, texts in (("predictions", predictions), ("references", references)):
        if isinstance(texts, str):
            raise ValueError(f"{name} is a single text: expected a sequence with one per example")
    if len(predictions) != len(references):
        raise ValueError(
            f"there are {len(predictions)} predictions, but {len(references)} references: expected "
            "one reference, or one list of references, for each prediction"
        )
    if not predictions:
        raise ValueError("there are no predictions: nothing to score")
    pairs: list[tuple[str, Sequence[str]]] = []
    for index, (prediction, known) in enumerate(zip(predictions, references, strict=True)):
        several = [known] if isinstance(known, str) else list(known)
        if not isinstance(prediction, str):
            raise ValueError(f"predictions[{index}] is {prediction!r}: expected a text")
        if not several or not all(isinstance(reference, str) for reference in several):
            raise ValueError(
                f"references[{index}] is {known!r}: expected a text, or a list of at least one text"
            )
        pairs.append((prediction, several))
    return pairs


def missing_package(metric: Any) -> str | None:
    """What a metric of ours needs and is not installed, with the way out."""
    if metric in (bleu, chrf) and find_spec("sacrebleu") is None:
        name = metric.__name__
        return f'{name} needs the package sacrebleu: pip install "idefics_qlora[metrics]"'
    return None


def _sacrebleu(metric: Callable[..., float]) -> Any:
    if missing := missing_package(metric):
        raise ImportError(missing)
    from sacrebleu import metrics

    return metrics


def _streams(pairs: list[tuple[str, Sequence[str]]]) -> list[list[str | None]]:
    """References as sacrebleu takes them: first all first ones, then all second ones, ..."""
    most = max(len(several) for _, several in pairs)
    return [[s[n] if n < len(s) else None for _, s in pairs] for n in range(most)]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+(?:[-'.,]\w+)*", text.lower())


def _ngrams(words: list[str]) -> Counter[tuple[str, ...]]:
    return Counter(
        tuple(words[start : start + length])
        for length in range(1, MAX_NGRAM + 1)
        for start in range(len(words) - length + 1)
    )


def _clipped_cosine(
    vector: dict[tuple[str, ...], float], known: dict[tuple[str, ...], float]
) -> float:
    norms = math.hypot(*vector.values()) * math.hypot(*known.values())
    if norms == 0:
        return 0.0
    # An n-gram repeated more often than in the reference counts as often as there.
    return (
        sum(min(weight, known.get(n, 0.0)) * known.get(n, 0.0) for n, weight in vector.items())
        / norms
    )


def _folded(text: str) -> str:
    return " ".join(text.lower().split())


def _share_of_edits(a: str, b: str) -> float:
    """Levenshtein distance over the length of the longer text, 0 for two empty ones."""
    distances = list(range(len(b) + 1))
    for row, character in enumerate(a, 1):
        diagonal, distances[0] = distances[0], row
        for column, other in enumerate(b, 1):
            substituted = diagonal + (character != other)
            diagonal = distances[column]
            distances[column] = min(substituted, diagonal + 1, distances[column - 1] + 1)
    return distances[-1] / max(len(a), len(b), 1)
