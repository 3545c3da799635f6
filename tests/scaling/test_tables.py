import json
import sys

import numpy as np
import pytest

from scaling.rows import RowError
from scaling.tables import read_csv, read_rows

# Every file holds these three runs.
PARAMS, TOKENS, LOSS = [1.2e9, 3e8, 5e6], [2.4e10, 6e9, 1e8], [2.5, 3.0, 4.0]
OBJECTS = [{"params": n, "tokens": d, "loss": y} for n, d, y in zip(PARAMS, TOKENS, LOSS, strict=True)]
FILES = {
    "plain.csv": "params, tokens,loss,model\n1.2e9,2.4e10,2.5,a\n\n3e8,6e9,3,b\n5e6,1e8,4,c\n",
    "units.csv": "params,tokens,loss\n1.2B,24B,2.5\n300M,6 b,3\n5m,0.1G,4\n",
    "tabs.tsv": "params\ttokens\tloss\n1.2e9\t2.4e10\t2.5\n3e8\t6e9\t3\n5e6\t1e8\t4\n",
    "semicolons.csv": "params;tokens;loss\n1.2e9;2.4e10;2.5\n3e8;6e9;3\n5e6;1e8;4\n",
    "above.csv": "\n# exported on a Monday\nparams,tokens,loss\n1.2e9,2.4e10,2.5\n3e8,6e9,3\n,,\n5e6,1e8,4\n",
    "trailing.csv": "params,tokens,loss,\n1.2e9,2.4e10,2.5,\n3e8,6e9,3,\n5e6,1e8,4,\n",
    "runs.jsonl": "\n".join(map(json.dumps, OBJECTS)),
    "runs.json": json.dumps(OBJECTS),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_the_same_runs_from_every_format(tmp_path, name, encoding):
    (tmp_path / name).write_text(FILES[name], encoding=encoding)
    rows = read_rows(tmp_path / name)
    for column, values in {"params": PARAMS, "tokens": TOKENS, "loss": LOSS}.items():
        np.testing.assert_allclose(rows[column], values, rtol=1e-12)
    assert len(rows.columns) == (5 if name == "plain.csv" else 4)


@pytest.mark.parametrize("order", ["loss,final,params,tokens", "final,params,tokens,loss"])
def test_a_named_column_is_taken_wherever_the_files_own_stands(tmp_path, order):
    values = {"loss": "9", "final": "2.5", "params": "1e6", "tokens": "1e8"}
    (tmp_path / "runs.csv").write_text(f"{order}\n" + ",".join(values[name] for name in order.split(",")) + "\n")
    assert read_rows(tmp_path / "runs.csv", {"loss": "final"})["loss"].tolist() == [2.5]


def test_parquet_without_its_extra_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "runs.parquet").touch()
    with pytest.raises(ImportError, match="runs.parquet: Parquet needs the extra `data`"):
        read_rows(tmp_path / "runs.parquet")


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "runs.parquet"
    table = {"parameter_count": ["1.2B", "300M", "5M"], "tokens": TOKENS, "loss": pyarrow.array(LOSS, "float32")}
    parquet.write_table(pyarrow.table(table), path)
    rows = read_rows(path, {"params": "parameter_count"})
    for name, values in (("params", PARAMS), ("tokens", TOKENS), ("loss", LOSS)):
        np.testing.assert_allclose(rows[name], values)
    parquet.write_table(pyarrow.table(table | {"loss": [2.5, None, 4.0]}), path)
    with pytest.raises(RowError, match="(?s)runs.parquet: 1 value.*row 2, column 'loss': empty"):
        read_rows(path, {"params": "parameter_count"})
    path.write_bytes(b"params,tokens,loss")
    with pytest.raises(ValueError, match="runs.parquet: not a Parquet file"):
        read_rows(path)


def test_columns_are_mapped(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text("parameter_count,tokens,loss,loss_c4\n1e6,1e8,9,3.0\n2e6,1e8,9,2.9\n")
    rows = read_csv(path, {"params": "parameter_count", "loss": "loss_c4"})
    assert rows["loss"].tolist() == [3.0, 2.9] and set(rows.columns) == {"params", "tokens", "flops", "loss"}
    with pytest.raises(RowError, match="columns names 'n' for it, which is not there; there are parameter_count"):
        read_csv(path, {"params": "n"})


@pytest.mark.parametrize(
    "text, says",
    [
        ("parameter_count,tokens,loss\n1,1,1\n", "--config.columns.params='parameter_count'"),
        ("N,D,val_loss\n1,1,1\n", "params='N'.*tokens='D'|loss='val_loss'.*params='N'.*tokens='D'"),
        ("params,tokens (B),loss\n1,1,1\n", "columns.tokens=.tokens .B."),
        ("params;tokens;loss\n1,2e6;1e8;3\n", "line 2, column 'params': '1,2e6' .* decimal comma. write 1.2e6"),
        ("params;tokens;loss\n1e6;1e8;3,05\n", "line 2, column 'loss': '3,05' .* decimal comma. write 3.05"),
        ('params,tokens,loss\n"1,200,000",1e8,3\n', "separators of thousands. write 1200000"),
        ("params,tokens,loss\n1e6,1e8,3.1 nats\n", "a unit. write 3.1"),
        ("1e6,6e14,3\n2e6,6e14,2.9\n", "line 1: 1e6, 6e14, 3 are numbers .*the file has no header.*params,tokens,loss"),
        ("# log\n1.2B; 24B; 2.5\n", "line 2: 1.2B, 24B, 2.5 are numbers where names of columns are wanted"),
        ("params,flops,loss\n1e6,6e14,3\n\n1e6,6e14\n", "line 4.*2 values where the header has 3"),
        ("params,flops,loss\n", "no rows"),
        ("", "loss.*the column is missing; there are none"),
        ("params,,tokens,loss\n1,1,1,1\n", "column 2 of 4 has no name"),
        ("params,params,tokens,loss\n1,1,1,1\n", "given twice"),
    ],
)
def test_what_cannot_be_read_is_told_with_the_guess_a_person_would_make(tmp_path, text, says):
    path = tmp_path / "runs.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"(?s)runs.csv.*({says})"):
        read_rows(path)


@pytest.mark.parametrize(
    "header, factor, units",
    [
        ("Weights (M)", 1e6, {}),
        ("N (billions)", 1e9, {}),
        ("params [1e9]", 1e9, {}),
        ("size (in 10^6)", 1e6, {}),
        ("weights in millions", 1e6, {}),
        ("model size (M params)", 1e6, {}),
        ("params_K", 1e3, {}),
        ("size_B", 1e9, {}),
        ("params_m", 1, {}),  # of no known meaning
        ("weights (non-embedding)", 1, {}),
        ("weights (M)", 1e9, {"params": 1e9}),
        ("weights", 1e6, {"params": 1e6}),
        ("run_B", 1e9, {"params": 1e9}),
    ],
)
def test_units_of_a_named_column_are_those_of_numbers_without_one(tmp_path, header, factor, units):
    cells = ["1.2B", *(f"{n / factor:g}" for n in PARAMS[1:])]
    lines = [f"{header};tokens;loss", *(f"{n};{d};{y}" for n, d, y in zip(cells, TOKENS, LOSS, strict=True))]
    (tmp_path / "runs.csv").write_text("\n".join(lines))
    rows = read_rows(tmp_path / "runs.csv", {"params": header}, units)
    np.testing.assert_allclose(rows["params"], PARAMS, rtol=1e-12)
    assert len(rows.notes) == (factor > 1 and not units) and rows.completed == "flops"
    assert rows.take(rows["loss"] < 3.5).notes == rows.notes


@pytest.mark.parametrize(
    "text, columns, units, says",
    [
        (
            "id,# weights (M),tokens,loss\n1,1,1,1",
            {"param": "# weights (M)"},
            {},
            "columns.param is none of ours; did you mean",
        ),
        ("id,# weights (M),tokens,loss\n1,1,1,1", {}, {}, "--config.columns.params='# weights .M.'$"),
        ("a,b,loss\n1,1,1", {}, {}, "there are a, b, loss; say which is the params with --config.columns.params=NAME$"),
        ("a,b,loss\n1,1,1", {"params": "a"}, {}, "there are a, b, loss; say which is the tokens"),
        (
            "params,tokens,val loss\n1,1,nan",
            {"loss": "val loss"},
            {},
            "line 2, column 'loss' .the file's 'val loss'.: nan",
        ),
        (
            "data_B,params,loss\n1,1,1",
            {"tokens": "data_B"},
            {},
            "'data_B' in units of 1e9 .*--config.units.tokens=1e9 if",
        ),
        (
            "n (M),tokens,loss\n1e9,1,1",
            {"params": "n (M)"},
            {},
            "look like counts.*--config.units.params=1 if it is not",
        ),
        ("params,tokens,loss\n1,1,1", {}, {"param": 1e6}, "column 'param': units names it.*there are params, tokens"),
    ],
)
def test_columns_and_units_are_asked_for_by_the_setting_that_answers(tmp_path, text, columns, units, says):
    (tmp_path / "runs.csv").write_text(text)
    with pytest.raises(RowError, match=f"(?s)runs.csv.*{says}"):
        read_rows(tmp_path / "runs.csv", columns, units)


def test_files_that_are_no_tables_are_named(tmp_path):
    for name, content, says in (
        ("latin.csv", "params,tokens,loss\n1,1,1\n# Größe".encode("latin-1"), "latin.csv: byte 0xf6 in line 3 is not"),
        ("book.xlsx", b"PK", "book.xlsx: .xlsx is not read; save it as CSV"),
        ("bad.jsonl", b'{"params": 1}\n{oops\n', "bad.jsonl, line 2: not JSON"),
        ("list.json", b"[1, 2]", "list.json: a JSON object a line"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=says):
            read_rows(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="none.csv: no such file"):
        read_csv(tmp_path / "none.csv")
    with pytest.raises(FileNotFoundError, match="is a directory"):
        read_csv(tmp_path)
