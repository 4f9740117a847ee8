"""The form `sequences`: interactions of the user's own, order of ties, splits, batches, ranking, errors."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch

from counterpoint.data import load
from counterpoint.data.histories import HistoryData, HistorySplit, Lists, leave_one_out
from counterpoint.engine.loading import Position
from counterpoint.errors import CounterpointError, DataError
from counterpoint.experiment import Experiment
from counterpoint.tasks.histories import Beginnings

ROWS = [
    ("ann", "a", 3),
    ("ann", "b", 1),
    ("ann", "c", 2),
    ("bob", "b", 1),
    ("bob", "d", 1),
    ("bob", "a", 1),
    ("bob", "c", 0),
]


def table(folder, rows=ROWS, name="visits.csv", columns="user,item,time") -> str:
    text = "\n".join([columns, *(",".join(map(str, row)) for row in rows)])
    (folder / name).write_text(text + "\n")
    return f"interactions:{folder / name}"


def histories(data: HistoryData) -> dict[str, list[str]]:
    split = data.test
    return {split.names[n]: [data.items[i] for i in (*split.known[n], *split.wanted[n])] for n in range(len(split))}


# ------------------------------------------------------------------------------------------------------------------ data


def test_histories_are_in_order_of_time_and_the_last_items_are_held_out(tmp_path):
    data = load(table(tmp_path))
    assert histories(data) == {"ann": ["b", "c", "a"], "bob": ["c", "b", "d", "a"]}
    assert [len(data.train.known[n]) for n in range(2)] == [1, 2]
    assert [data.items[int(data.valid.wanted[n][0])] for n in range(2)] == ["c", "d"]
    assert data.notes == [
        f"{data.name}: 1 of 2 users have a last item whose time others share; its order is ?ties=file"
    ]


def test_the_order_of_equal_times_is_chosen_and_recorded(tmp_path):
    spec = table(tmp_path)
    assert histories(load(f"{spec}?ties=item"))["bob"] == ["c", "a", "b", "d"]
    drawn = {tuple(histories(load(f"{spec}?ties=random&seed={seed}"))["bob"]) for seed in range(9)}
    assert len(drawn) > 2
    one = load(f"{spec}?ties=random&seed=4")
    assert histories(one) == histories(load(f"{spec}?ties=random&seed=4"))
    assert "ties=random&seed=4" in one.notes[-1]


def test_parquet_dates_and_columns_of_other_names_are_read(tmp_path):
    import pandas as pd

    frame = pd.DataFrame(
        {"who": ["x"] * 3, "what": ["p", "q", "r"], "day": pd.to_datetime(["2026-01-03", "2026-01-01", "2026-01-02"])}
    )
    frame.to_parquet(tmp_path / "log.parquet")
    data = load(f"interactions:{tmp_path / 'log.parquet'}?user=who&item=what&time=day")
    assert histories(data) == {"x": ["q", "r", "p"]}
    rows = [("x", "p", "2026-01-03T10:00"), ("x", "q", "2026-01-03T09:00"), ("x", "r", "2026-01-03T11:00:00+00:00")]
    assert histories(load(table(tmp_path, rows)))["x"] == ["q", "p", "r"]


def test_without_times_rows_are_in_order(tmp_path):
    data = load(table(tmp_path, [(u, i) for u, i, _ in ROWS], columns="customer,product"))
    assert histories(data)["bob"] == ["b", "d", "a", "c"]
    assert any("no column of times" in note for note in data.notes)


def test_repeated_rows_count_once_and_repeated_items_stay(tmp_path):
    data = load(table(tmp_path, [*ROWS, ROWS[0], ("ann", "b", 9)]))
    assert histories(data)["ann"] == ["b", "c", "a", "b"]
    assert any("1 of 9 interactions occur twice" in note for note in data.notes)


def test_rare_users_and_items_are_left_out_until_none_is_left(tmp_path):
    rows = [("u1", i, n) for n, i in enumerate("abc")] + [("u2", i, n) for n, i in enumerate("abcd")] + [("u3", "a", 0)]
    data = load(f"{table(tmp_path, rows)}?least=2")
    assert set(data.items) == {"a", "b", "c"}
    assert set(histories(data)) == {"u1", "u2"}
    assert histories(load(f"{table(tmp_path, rows)}?last=3"))["u2"] == ["b", "c", "d"]


def test_short_histories_are_for_training_alone(tmp_path):
    data = load(table(tmp_path, [*ROWS, ("eve", "a", 1)]))
    assert len(data.train) == 3
    assert len(data.test) == 2
    assert any("1 of 3 histories have fewer than 3 items" in note for note in data.notes)


@pytest.mark.parametrize(
    ("rows", "columns", "query", "said"),
    [
        (ROWS, "who,item,time", "", r"no column of users among who.*\?user=COLUMN"),
        (ROWS, "user,item,time", "?item=film", "no column 'film'; it has user, item, time"),
        (ROWS, "user,item,time", "?ties=newest", "order of ties"),
        (ROWS, "user,item,time", "?least=9", "lower .least="),
        (ROWS, "user,item,time", "?last=2", "last 0 or at least 3"),
        ([("ann", "", 1)], "user,item,time", "", "none of 1 row has a user and an item"),
        ([("ann", "a", 1), ("ann", "b", 2)], "user,item,time", "", "none of 1 history has 3 items"),
    ],
)
def test_tables_that_cannot_be_used_name_the_remedy(rows, columns, query, said, tmp_path):
    with pytest.raises(CounterpointError, match=said):
        load(table(tmp_path, rows, columns=columns) + query)


def test_rows_without_user_item_or_time_are_counted(tmp_path):
    rows = [*ROWS, *[("ann", f"x{n}", 4 + n) for n in range(300)], ("", "a", 3), ("bob", "a", "soon")]
    data = load(table(tmp_path, rows))
    assert any("2" in note and "309" in note for note in data.notes), data.notes


def test_contract_refuses_numbers_out_of_range_and_empty_questions():
    one = HistorySplit(Lists.of([[0, 1]]), Lists.of([[2]]))
    with pytest.raises(DataError, match=r"item numbers of train must lie in 0\.\.1"):
        HistoryData("x", ["a", "b"], HistorySplit(Lists.of([[0, 2]]), Lists.of([[]])), one, one)
    empty = HistorySplit(Lists.of([[0, 1]]), Lists.of([[]]))
    with pytest.raises(DataError, match="without an item to find"):
        HistoryData("x", ["a", "b", "c"], empty, empty, one)
    with pytest.raises(DataError, match="a row for each item"):
        HistoryData("x", ["a", "b", "c"], empty, one, one, features={"text": np.zeros((2, 4), np.float32)})


def test_movielens_is_read_from_grouplens_files_too(tmp_path):
    (tmp_path / "u.data").write_text(
        "".join(f"{u}\t{i}\t5\t{t}\n" for u, i, t in [(1, 1, 9), (1, 2, 8), (1, 3, 10), (2, 2, 1)])
    )
    (tmp_path / "u.item").write_text("1|Alpha (1995)|x\n2|Beta (1996)|x\n3|G\xe9nie|x\n", "latin-1")
    data = load(f"movielens:{tmp_path}")
    assert histories(data) == {"1": ["Beta (1996)", "Alpha (1995)", "G\xe9nie"]}
    with pytest.raises(DataError, match=r"neither ml-100k\.inter nor u\.data"):
        load(f"movielens:{tmp_path / 'none'}")


def test_the_bundled_movielens_has_the_known_size_and_ties():
    if find_spec("recbole") is None:
        pytest.skip("the package recbole, which has the file, is not installed")
    data = load("movielens")
    assert (len(data.train), len(data.items)) == (943, 1682)
    assert int(data.counts.sum()) + 2 * 943 == 100_000
    assert "415 of 943 users" in data.notes[0]


# ---------------------------------------------------------------------------------------------------------------- batches


def test_every_beginning_has_its_next_item():
    lists = Lists.of([[5, 6, 7, 8], [1], [2, 3]])
    found = Beginnings(HistorySplit(lists, Lists.of([[], [], []])))
    assert len(found) == 4
    batch = found.at(np.arange(4), 2)
    assert batch["ids"].tolist() == [[6, 0], [6, 7], [7, 8], [3, 0]]
    assert batch["lengths"].tolist() == [1, 2, 2, 1]
    assert batch["target"].tolist() == found.targets.tolist() == [6, 7, 8, 3]


def test_an_epoch_has_every_beginning_or_one_of_each_user():
    for whole, count in ((False, None), (True, 40)):
        experiment = Experiment.resolve(
            "mclrec", "visits?users=40&items=24&groups=3", overrides={"batch_size": 16, "whole_histories": whole}
        )
        task = experiment.task()
        seen = [n for batch in task.train_loader(0, Position()) for n in batch["index"].tolist()]
        assert len(seen) == (count or len(task.beginnings))
        users = np.searchsorted(task.beginnings.firsts, seen, side="right") - 1
        assert len(set(seen)) == len(seen)
        assert len(set(users)) == 40


def test_known_items_are_candidates_only_if_asked(tmp_path):
    experiment = Experiment.resolve("mclrec", "visits?users=9&items=24&groups=3", overrides={"mask_seen": False})
    task = experiment.task()
    found = {}
    for mask in (True, False):
        evaluator = task.evaluator("test")
        evaluator.mask_seen = mask
        for batch in task.evaluation_loader("test"):
            query = torch.nn.functional.one_hot(batch["known"][:, 0], 24).float() + 0.5
            query[torch.arange(9), batch["wanted"][:, 0]] += 0.1
            evaluator.update(batch, {"query": query, "items": torch.eye(24)})
        found[mask] = evaluator.ranks[0]
    assert (found[True] == 1).all()
    assert (found[False] == 2).any()


def test_fewer_items_to_find_in_some_sets_and_fewer_items_than_a_cut_keep_recall_a_share():
    asked = HistorySplit(Lists.of([[0], [1]]), Lists.of([[2, 3], [4]]))
    learnt = HistorySplit(Lists.of([[0, 1]]), Lists.of([[]]))
    data = HistoryData("sets", list("abcdefg"), learnt, asked, asked, ordered=False)
    evaluator = Experiment.resolve("clhe", "themed-bundles").measured(data).evaluator("test")
    at = torch.arange(2)
    wanted = torch.tensor([[2, 3], [4, -1]])
    evaluator.update(
        {"known": at[:, None], "wanted": wanted, "index": at}, {"query": torch.eye(7)[[2, 4]], "items": torch.eye(7)}
    )
    found = evaluator.compute()
    assert {name: found[name] for name in ("recall_10", "recall_50")} == {"recall_10": 1.0, "recall_50": 1.0}
    assert found["ndcg_50"] == pytest.approx((1 + (1 + 1 / np.log2(7)) / (1 + 1 / np.log2(3))) / 2)


def test_one_user_alone_is_named(tmp_path):
    long = [("ann", item, time) for time, item in enumerate("abcde")]
    with pytest.raises(DataError, match=r"needs at least 2 users with 3 items, .* has 1"):
        Experiment.resolve("mclrec", table(tmp_path, long)).task()


def test_another_number_of_items_and_data_without_histories_are_refused():
    experiment = Experiment.resolve("mclrec", "visits?users=9&items=24&groups=3")
    with pytest.raises(DataError, match="knows its own items alone"):
        experiment.task().check_facts({"items": 30})
    with pytest.raises(CounterpointError, match="sequences"):
        Experiment.resolve("mclrec", "digits").task()


def test_leave_one_out_needs_a_history_of_three():
    with pytest.raises(DataError, match="none of 1 history has 3 items"):
        leave_one_out("x", Lists.of([[0, 1]]), ["a", "b"])


@pytest.mark.parametrize("query", ["users=1", "items=3", "noise=2", "shortest=2"])
def test_visits_out_of_range_are_named(query):
    with pytest.raises(DataError, match="visits: users must be"):
        load(f"visits?{query}")
