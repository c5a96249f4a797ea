"""The Arrow tables of a LeRobotDataset v3."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa

from fieldtune.data.lerobot_layout import Features


def data_schema(columns: Features) -> pa.Schema:
    """The Arrow types that `datasets` expects for these features."""
    return pa.schema([(name, _arrow(feature)) for name, feature in columns.items()])


def tasks_table(texts: list[str]) -> pa.Table:
    """`meta/tasks.parquet`. lerobot reads it with pandas and wants the texts as its index, which pandas' notes say."""
    index = "__index_level_0__"
    notes = {
        "index_columns": [index],
        "column_indexes": [
            {"name": None, "field_name": None, "pandas_type": "unicode", "numpy_type": "object", "metadata": None}
        ],
        "columns": [
            {
                "name": "task_index",
                "field_name": "task_index",
                "pandas_type": "int64",
                "numpy_type": "int64",
                "metadata": None,
            },
            {"name": None, "field_name": index, "pandas_type": "unicode", "numpy_type": "object", "metadata": None},
        ],
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.2.0",
    }
    schema = pa.schema([("task_index", pa.int64()), (index, pa.string())], metadata={"pandas": json.dumps(notes)})
    return pa.table({"task_index": list(range(len(texts))), index: texts}, schema=schema)


def _arrow(feature: dict[str, Any]) -> pa.DataType:
    if feature["dtype"] == "image":
        return pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    kind = {
        "float32": pa.float32(),
        "int64": pa.int64(),
        "bool": pa.bool_(),
        "string": pa.string(),
    }[feature["dtype"]]
    shape = feature["shape"]
    if shape == [1]:
        return kind
    return pa.list_(kind, shape[0]) if len(shape) == 1 else pa.list_(pa.list_(kind))
