"The table itself."
import json

import table


def test_rows_take_the_place_of_their_own_fault(tmp_path):
    path = tmp_path / "table.json"
    table.merge([table.Row("disk", "full", "stops"), table.Row("saving", "killed", "goes on", points=3)], path)
    table.merge([table.Row("disk", "full", "stops in one line")], path)
    rows = table.read(path)
    assert [(row["group"], row["here"]) for row in rows] == [("saving", "goes on"), ("disk", "stops in one line")]


def test_the_committed_table_is_whole():
    rows = table.read()
    assert len({row["fault"] for row in rows}) == len(rows)
    assert all(row["fault"] and row["here"] and row["test"] and row["versions"]["torch"] for row in rows)
    json.dumps(rows, allow_nan=False)
