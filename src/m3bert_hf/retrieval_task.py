"""A retrieval task: queries, documents, and which documents are right for which query."""

import random
from dataclasses import dataclass, field
from pathlib import Path

from .text_data import read_json_lines


@dataclass
class RetrievalTask:
    """Queries, documents and relevance.

    Attributes:
        queries: Texts.
        documents: Texts.
        relevant: For each query, the indices of its right documents.
        groups: For each query its group, such as its language; empty where there is none.
        name: For reports.

    Raises:
        ValueError: If there are no queries or documents, a text is empty, the lists do not fit one another, or an
            index does not exist.
    """

    queries: list[str]
    documents: list[str]
    relevant: list[set[int]]
    groups: list[str] = field(default_factory=list)
    name: str = ""

    def __post_init__(self) -> None:
        self.groups = self.groups or [""] * len(self.queries)
        if not self.queries or not self.documents:
            raise ValueError(f"Nothing to evaluate: {len(self.queries)} queries, {len(self.documents)} documents.")
        if len(self.relevant) != len(self.queries) or len(self.groups) != len(self.queries):
            raise ValueError("`relevant` and `groups` need one entry for each query.")
        for kind, texts in (("query", self.queries), ("document", self.documents)):
            for index, text in enumerate(texts):
                if not isinstance(text, str) or not text.strip():
                    raise ValueError(f"{kind} {index} is empty: leave it out.")
        for query, right in zip(self.queries, self.relevant, strict=True):
            if not right:
                raise ValueError(f"Query {query!r} has no right document: leave it out.")
            if not all(0 <= index < len(self.documents) for index in right):
                raise ValueError(f"Query {query!r} names document {max(right)} of {len(self.documents)}.")

    def with_duplicates(self) -> list[set[int]]:
        """Return the right documents of each query, those of the same text as a right one included.

        Whoever searches cannot tell them apart, and so the paper's protocol counts them (arXiv 2605.19568).
        """
        same_text: dict[str, set[int]] = {}
        for index, text in enumerate(self.documents):
            same_text.setdefault(text, set()).add(index)
        return [set().union(*(same_text[self.documents[i]] for i in right)) for right in self.relevant]

    def sample(self, size: int, seed: int = 0) -> "RetrievalTask":
        """Return the task with `size` queries drawn at random, and all documents."""
        rows = sorted(random.Random(seed).sample(range(len(self.queries)), min(size, len(self.queries))))
        return RetrievalTask(
            [self.queries[i] for i in rows],
            self.documents,
            [self.relevant[i] for i in rows],
            [self.groups[i] for i in rows],
            self.name,
        )

    def with_pool(self, size: int, seed: int = 0) -> "RetrievalTask":
        """Return the task over `size` documents: all right ones, and others drawn at random."""
        kept = set().union(*self.relevant)
        others = [index for index in range(len(self.documents)) if index not in kept]
        drawn = random.Random(seed).sample(others, max(0, min(len(others), size - len(kept))))
        chosen = sorted([*kept, *drawn])
        places = {index: place for place, index in enumerate(chosen)}
        return RetrievalTask(
            self.queries,
            [self.documents[index] for index in chosen],
            [{places[index] for index in right} for right in self.relevant],
            self.groups,
            self.name,
        )


def load_retrieval_task(query_file: str | Path, document_file: str | Path) -> RetrievalTask:
    """Read a task: documents with `id` and `document`; queries with `query`, `id` and perhaps `lang`.

    The `id` of a query is that of its right document, or a list of several.

    Raises:
        ValueError: If a query names a document that is not there, or a row lacks a field.
    """
    places: dict[str, int] = {}
    documents: list[str] = []
    for row in read_json_lines(document_file):
        if "id" not in row or "document" not in row:
            raise ValueError(f"A row of {document_file} lacks `id` or `document`: {str(row)[:200]}")
        places[str(row["id"])] = len(documents)
        documents.append(row["document"])
    queries, relevant, groups = [], [], []
    for row in read_json_lines(query_file):
        if "id" not in row or "query" not in row:
            raise ValueError(f"A row of {query_file} lacks `id` or `query`: {str(row)[:200]}")
        names = row["id"] if isinstance(row["id"], list) else [row["id"]]
        for name in names:
            if str(name) not in places:
                raise ValueError(f"Query {row['query']!r} of {query_file} names {name!r}, not in {document_file}.")
        queries.append(row["query"])
        relevant.append({places[str(name)] for name in names})
        groups.append(str(row.get("lang", "")))
    return RetrievalTask(queries, documents, relevant, groups, Path(query_file).name.split(".")[0])


def load_question_task(file: str | Path, question: str = "query", paragraph: str = "document") -> RetrievalTask:
    """Read a task from pairs: the pool is the distinct paragraphs, several questions may share one.

    Args:
        file: JSON lines with a question and its paragraph in each row, perhaps `lang`.
        question: Field of the question.
        paragraph: Field of the paragraph.

    Raises:
        ValueError: If a row lacks a field.
    """
    rows = list(read_json_lines(file))
    for row in rows:
        if question not in row or paragraph not in row:
            raise ValueError(f"A row of {file} lacks {question!r} or {paragraph!r}: {str(row)[:200]}")
    documents = list(dict.fromkeys(row[paragraph] for row in rows))
    places = {text: index for index, text in enumerate(documents)}
    return RetrievalTask(
        [row[question] for row in rows],
        documents,
        [{places[row[paragraph]]} for row in rows],
        [str(row.get("lang", "")) for row in rows],
        Path(file).name.split(".")[0],
    )


__all__ = ["RetrievalTask", "load_question_task", "load_retrieval_task"]
