"""Several texts in one decode: what they begin with in common is evaluated once, and the matrices are wide.

Each text is a sequence of llama.cpp's, a token that several share belongs to all of theirs. On two cores a token of a
batch of a hundred takes two thirds of what one of a batch of ten takes, and prompts and probes are that short.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

TOKENS = 128  # in a batch: wider ones are no quicker
ROWS = 64  # of logits in a batch: one can be a megabyte
SEQUENCES = 32  # at most in a batch, for who opens a model to measure it
_WORTH = 8  # tokens in common, from which on they are evaluated first and kept for every batch


@dataclass(frozen=True)
class Text:
    """Tokens to evaluate, and the first of those whose rows are wanted; all behind it are."""

    tokens: Sequence[int]
    wanted: int

    def behind(self, count: int) -> Text:
        """Without its first `count` tokens."""
        return Text(self.tokens[count:], self.wanted - count)


@dataclass
class TokenTree:
    """Texts as one batch: what several begin with stands there once, and the last token of each at the end, in their
    order.

    sequences: of each token, the numbers of the texts that it belongs to. rows: of each text, which tokens' rows are
    wanted, as numbers among all that are wanted.
    """

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    sequences: list[list[int]] = field(default_factory=list)
    wanted: list[bool] = field(default_factory=list)
    rows: list[list[int]] = field(default_factory=list)

    @classmethod
    def of(cls, texts: Sequence[Text], begin: int = 0) -> TokenTree:
        """begin: the position of their first tokens."""
        tree = cls()
        children: dict[tuple[int, int], int] = {}  # by a token's place in the tree, -1 for the root, and its next token
        paths: list[list[int]] = [[] for _ in texts]
        for number, text in enumerate(texts):
            for depth, token in enumerate(text.tokens[:-1]):
                key = (paths[number][-1] if depth else -1, token)
                if key not in children:
                    children[key] = tree._append(token, begin + depth)
                paths[number].append(children[key])
        for path, text in zip(paths, texts, strict=True):  # never shared: it is the text's own, and at the end
            path.append(tree._append(text.tokens[-1], begin + len(path)))
        for number, (path, text) in enumerate(zip(paths, texts, strict=True)):
            for depth, place in enumerate(path):
                tree.sequences[place].append(number)
                tree.wanted[place] |= depth >= text.wanted
        order = {place: row for row, place in enumerate(place for place, asked in enumerate(tree.wanted) if asked)}
        tree.rows = [[order[place] for place in path[text.wanted :]] for path, text in zip(paths, texts, strict=True)]
        return tree

    @classmethod
    def head(cls, tokens: Sequence[int], sequences: int) -> TokenTree:
        """What so many texts begin with; the last row is wanted, since a decode without any is none of llama.cpp's."""
        count = len(tokens)
        every = [list(range(sequences)) for _ in tokens]
        return cls(list(tokens), list(range(count)), every, [at == count - 1 for at in range(count)])

    def _append(self, token: int, position: int) -> int:
        self.tokens.append(token)
        self.positions.append(position)
        self.sequences.append([])
        self.wanted.append(False)
        return len(self.tokens) - 1


def head_length(texts: Sequence[Text]) -> int:
    """How many tokens all texts begin with, none of them wanted; 0 where it is not worth a decode of its own."""
    count = min(text.wanted for text in texts)
    first = texts[0].tokens
    for _, text in pairwise(texts):
        differ = (at for at in range(count) if text.tokens[at] != first[at])
        count = next(differ, count)
    return count if count >= _WORTH else 0


def batches(texts: Sequence[Text], tokens: int, sequences: int) -> Iterator[list[Text]]:
    """The texts in their order, as many in a batch as have no more than so many tokens, ROWS rows and sequences."""
    batch: list[Text] = []
    for text in texts:
        longer = [*batch, text]
        rows = sum(len(each.tokens) - each.wanted for each in longer)
        if batch and (sum(len(each.tokens) for each in longer) > tokens or rows > ROWS or len(longer) > sequences):
            yield batch
            longer = [text]
        batch = longer
    if batch:
        yield batch
