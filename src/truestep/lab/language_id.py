"""Which language is this word? 96,000 words in 16 languages, as sparse indicator features.

A task where most parameters are rarely used: of 8,000 n-gram features a word has about 17.
"""

from collections import Counter
from itertools import chain
from math import sqrt
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from truestep.errors import TruestepError
from truestep.lab.task import Split, Splits

__all__ = ["LANGUAGES", "LanguageNetwork", "load_language_id"]

LANGUAGES = (
    ("cs", "Czech"),
    ("da", "Danish"),
    ("de", "German"),
    ("en", "English"),
    ("es", "Spanish"),
    ("fi", "Finnish"),
    ("fr", "French"),
    ("hu", "Hungarian"),
    ("it", "Italian"),
    ("nb", "Norwegian"),
    ("nl", "Dutch"),
    ("pl", "Polish"),
    ("pt", "Portuguese"),
    ("ro", "Romanian"),
    ("sv", "Swedish"),
    ("tr", "Turkish"),
)
WORDS_PER_LANGUAGE = 6_000
FEATURES = 8_000
_ALWAYS_ON = FEATURES  # one more feature that every word has: its row is the layer's bias
_PADDING = FEATURES + 1
_HIDDEN = 32
_VALIDATION = 9_600
_TEST = 9_600


def load_language_id(data_dir: Path | None = None) -> Splits:
    """Builds the task's data from the word lists of the package wordfreq.

    Words are those of wordfreq's small lists with two letters or more and nothing but letters. A
    word that several languages use counts for the one where it is most frequent, and for that one
    alone: every word appears once, so no word is in two splits. Each language gives its 6,000 most
    frequent ones. Features are the n-grams of 2 to 4 characters of the word between boundary marks;
    the 8,000 kept are those in the most training words. Everything is deterministic, with ties
    broken alphabetically.

    Args:
        data_dir: Not used: the words are part of an installed package.

    Returns:
        Inputs [words, length] of int64 feature numbers: those of the word's n-grams in increasing
        order, then the always-on feature, then padding. Targets number `LANGUAGES`.

    Raises:
        TruestepError: The package wordfreq is missing.
    """
    del data_dir
    words, targets = _labelled_words()
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(0)).tolist()
    grams = [_ngrams(words[index]) for index in order]
    end = len(words) - _VALIDATION - _TEST
    inputs = _feature_numbers(grams, _vocabulary(grams[:end]))
    labels = torch.tensor([targets[index] for index in order])
    train, validation, test = (
        Split(inputs[part], labels[part])
        for part in (slice(end), slice(end, end + _VALIDATION), slice(end + _VALIDATION, None))
    )
    source = (
        f"{len(words):,} words in {len(LANGUAGES)} languages "
        f"({', '.join(name for _, name in LANGUAGES)}) from the word lists of wordfreq"
    )
    return Splits(train, validation, test, source)


class LanguageNetwork(nn.Module):
    """A ReLU network 8000-32-16 whose first layer reads feature numbers instead of indicators.

    It computes what `nn.Linear(8000, 32)` on indicator vectors would, bias included, but a step
    touches only the rows of the features that occur. The bias is the row of a feature that every
    word has, not a parameter of its own: so one layer, and one rule for counting the samples that
    contribute, covers both.

    Shapes: [words, length] feature numbers to [words, 16] logits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.EmbeddingBag(FEATURES + 2, _HIDDEN, mode="sum", padding_idx=_PADDING)
        self.activation = nn.ReLU()
        self.output = nn.Linear(_HIDDEN, len(LANGUAGES))
        # nn.Linear's start for weights and bias; nn.EmbeddingBag's own is normal with variance 1
        bound = 1 / sqrt(FEATURES)
        with torch.no_grad():
            self.features.weight.uniform_(-bound, bound)
            self.features.weight[_PADDING] = 0

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits of the languages."""
        logits: Tensor = self.output(self.activation(self.features(inputs)))
        return logits


def _labelled_words() -> tuple[list[str], list[int]]:
    try:
        import wordfreq  # noqa: PLC0415
    except ImportError as error:
        raise TruestepError(
            "The task language-id needs the word lists of the package wordfreq, which is not "
            "installed; run in the clone: pip install '.[lab]'."
        ) from error
    most_frequent: dict[str, tuple[float, int]] = {}
    for target, (code, _) in enumerate(LANGUAGES):
        for word, frequency in wordfreq.get_frequency_dict(code, "small").items():
            if len(word) > 1 and word.isalpha():
                known = most_frequent.get(word)
                if known is None or frequency > known[0]:
                    most_frequent[word] = (frequency, target)
    by_language: list[list[tuple[float, str]]] = [[] for _ in LANGUAGES]
    for word, (frequency, target) in most_frequent.items():
        by_language[target].append((-frequency, word))
    words: list[str] = []
    for candidates in by_language:
        words += [word for _, word in sorted(candidates)[:WORDS_PER_LANGUAGE]]
    return words, [index // WORDS_PER_LANGUAGE for index in range(len(words))]


def _ngrams(word: str) -> set[str]:
    marked = f"<{word}>"
    return {
        marked[start : start + size]
        for size in (2, 3, 4)
        for start in range(len(marked) - size + 1)
    }


def _vocabulary(grams: list[set[str]]) -> dict[str, int]:
    """Numbers the n-grams that most words have."""
    counts = Counter(gram for word in grams for gram in word)
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return {gram: number for number, (gram, _) in enumerate(ranked[:FEATURES])}


def _feature_numbers(grams: list[set[str]], vocabulary: dict[str, int]) -> Tensor:
    rows = [
        [*sorted(vocabulary[gram] for gram in word if gram in vocabulary), _ALWAYS_ON]
        for word in grams
    ]
    lengths = np.array([len(row) for row in rows])
    # filled through a mask: a nested list of this size takes torch.tensor seconds
    numbers = np.full((len(rows), lengths.max()), _PADDING)
    numbers[np.arange(lengths.max()) < lengths[:, None]] = list(chain.from_iterable(rows))
    return torch.from_numpy(numbers)
