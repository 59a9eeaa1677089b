"""Packing of tokenised documents into training rows of one fixed length."""

import random


def pack_documents(documents: list[list[int]], row_tokens: int, seed: int) -> list[list[list[int]]]:
    """Shuffles documents and cuts their stream into rows of exactly `row_tokens` tokens; a row is a list of
    pieces.

    A document that crosses a row's end is continued in the next row as a piece of its own. The last,
    incomplete row is dropped.
    """
    if row_tokens < 1:
        raise ValueError(f"row_tokens must be at least 1, not {row_tokens}")
    shuffled = list(documents)
    random.Random(seed).shuffle(shuffled)
    rows, row, room = [], [], row_tokens
    for document in shuffled:
        while document:
            piece, document = document[:room], document[room:]
            row.append(piece)
            room -= len(piece)
            if room == 0:
                rows.append(row)
                row, room = [], row_tokens
    return rows
