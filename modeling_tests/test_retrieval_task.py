import json

import pytest

from m3bert_hf.retrieval_task import RetrievalTask, load_question_task, load_retrieval_task


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_queries_and_documents(tmp_path):
    documents = write(tmp_path / "d.jsonl", [{"id": "x", "document": "one"}, {"id": 7, "document": "two"}])
    queries = write(tmp_path / "q.jsonl", [{"id": 7, "query": "zwei", "lang": "de"}, {"id": ["x", 7], "query": "all"}])
    task = load_retrieval_task(queries, documents)
    assert (task.relevant, task.groups, task.name) == ([{1}, {0, 1}], ["de", ""], "q")
    for row, message in (
        ({"id": 77, "query": "x"}, "names 77"),
        ({"query": "x"}, "lacks `id`"),
        ({"id": 7, "query": " "}, "query 0 is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            load_retrieval_task(write(tmp_path / "bad.jsonl", [row]), documents)
    with pytest.raises(ValueError, match="lacks `id` or `document`"):
        load_retrieval_task(queries, queries)


def test_questions_share_paragraphs(tmp_path):
    rows = [{"query": "a?", "document": "p"}, {"query": "b?", "document": "q"}, {"query": "c?", "document": "p"}]
    task = load_question_task(write(tmp_path / "t.jsonl", rows))
    assert task.documents == ["p", "q"] and task.relevant == [{0}, {1}, {0}]
    with pytest.raises(ValueError, match="lacks 'question'"):
        load_question_task(tmp_path / "t.jsonl", question="question")


def test_duplicates_and_samples():
    task = RetrievalTask(["q", "r", "s"], ["a", "b", "a"], [{0}, {1}, {2}], ["x", "y", "x"])
    assert task.with_duplicates() == [{0, 2}, {1}, {0, 2}]
    part = task.sample(2, seed=1)
    assert len(part.queries) == 2 and part.documents == task.documents
    assert [task.relevant[task.queries.index(q)] for q in part.queries] == part.relevant
    assert part.queries == task.sample(2, seed=1).queries


def test_a_smaller_pool_keeps_every_right_document():
    documents = [f"d{i}" for i in range(20)]
    task = RetrievalTask(["q", "r"], documents, [{3}, {7, 19}], ["x", "y"], "t")
    part = task.with_pool(5)
    assert len(part.documents) == 5 and part.groups == ["x", "y"]
    for before, after in zip(task.relevant, part.relevant, strict=True):
        assert {documents[i] for i in before} == {part.documents[i] for i in after}
    assert part.documents == task.with_pool(5).documents and len(task.with_pool(1).documents) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], ["d"], []), "Nothing to evaluate"),
        ((["q"], ["d"], []), "one entry for each query"),
        ((["q"], ["d"], [set()]), "no right document"),
        ((["q"], ["d"], [{3}]), "names document 3 of 1"),
        ((["q"], [""], [{0}]), "document 0 is empty"),
    ],
)
def test_bad_tasks_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        RetrievalTask(*arguments)
