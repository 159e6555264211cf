"""The readers of datasets, for `readers`."""

import gzip
import json

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from hypothesis import strategies as st

from kd_jax.data import builder, jsonl, text
from tests.fuzz.mutations import below, changed_bytes, documents, pick


class Jsonl:
    """Damages JSON lines, plain or compressed, and plain text."""

    share = 0.15
    row = {"prompt": "a", "response": "bé", "context": "", "output": ["c", "d"]}
    names = ("rows.jsonl", "rows.jsonl.gz", "rows.txt")

    def base(self, folder):
        folder.mkdir(parents=True)
        for name in self.names:
            (folder / name).write_bytes(b"")

    def inputs(self, folder):
        return self._rows(self)

    @staticmethod
    @st.composite
    def _rows(draw, self):
        row = documents(self.row, keys=tuple(self.row))
        lines = [draw(row) for _ in range(1 + below(draw, 3))]
        content = pick(draw, (b"\n", b"\r\n", b"\n\n", b"", b"\r", b" ")).join(lines)
        name = pick(draw, self.names)
        if name.endswith(".gz"):
            if not below(draw, 100):
                content += pick(draw, (b" ", b"\n", b"[")) * 2**25  # a small compression bomb: 32 MiB in 32 KiB
            # The header has no time, so that an input has the same bytes every time. Level 1 is fast.
            content = gzip.compress(content, 1, mtime=0)
            content = changed_bytes(draw, content) if below(draw, 2) else content
        return {name: content}

    def read(self, folder, files):
        (name,) = files
        if name.endswith(".txt"):
            pieces = text.source(str(folder / name), validation_fraction=0.5)[1]
            assert "".join(row["response"] for split in pieces.values() for row in split()).isascii() in (True, False)
            return
        for row in jsonl.read_references(folder / name, {"prompt": "prompt", "references": "output"}):
            assert all(isinstance(reference, str) for reference in row["references"])
        for rows in jsonl.source(str(folder / name), context_field="context")[1].values():
            for row in rows():
                assert set(row) == {"prompt", "response", "context"}
                "".join(row.values()).encode()


class ArrayRecord:
    """Damages a dataset that tfds has built: the array_record files, dataset_info.json and features.json."""

    share = 0.05
    place = f"{builder.KdJaxRows.name}/jsonl-0/1.0.0"

    def base(self, folder):
        rows = [{"prompt": f"prompt {i}", "response": "é" * i} for i in range(20)]
        config = builder.RowsConfig(name="jsonl-0", splits={"train": lambda: rows})
        builder.open_builder(str(folder), config).download_and_prepare()

    def inputs(self, folder):
        folder = folder / self.place
        (records,) = (file for file in folder.iterdir() if "array_record" in file.name)
        info, features = (
            json.loads((folder / name).read_text(encoding="utf-8")) for name in ("dataset_info.json", "features.json")
        )
        values = (
            "20",
            "19",
            "21",
            "0",
            "-1",
            "9" * 30,
            "../{SPLIT}",
            "{SHARD_X_OF_Y}",
            "tfrecord",
            "validation",
            "os.system",
            20,
        )
        named = lambda name: lambda content: {f"{self.place}/{name}": content}
        return st.one_of(
            self._bytes(records.read_bytes()).map(named(records.name)),
            self._records(records).map(named(records.name)),
            documents(info, ("shardLengths", "filepathTemplate", "name", "splits"), values).map(
                named("dataset_info.json")
            ),
            documents(features, ("pythonClassName", "text", "features"), values).map(named("features.json")),
        )

    @staticmethod
    @st.composite
    def _bytes(draw, content):
        """Draws changes of bytes that are not zero, because most of a file is zero padding."""
        places = [place for place, byte in enumerate(content) if byte]
        changed = bytearray(content)
        for _ in range(1 + below(draw, 3)):
            changed[pick(draw, places)] = below(draw, 256)
        cut = below(draw, 8)
        return bytes(changed[: below(draw, len(content))] if cut == 0 else changed[: -(2**16)] if cut == 1 else changed)

    @staticmethod
    @st.composite
    def _records(draw, file):
        """Draws valid records that are not valid rows."""
        reader = ArrayRecordReader(str(file))
        records = reader.read_all()
        reader.close()
        for _ in range(1 + below(draw, 2)):
            at = below(draw, len(records))
            records[at] = changed_bytes(draw, records[at])
        records = records[: 18 + below(draw, 3)] + records[: below(draw, 2)]
        path = file.parent / "written"
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for record in records:
            writer.write(record)
        writer.close()
        content = path.read_bytes()
        path.unlink()
        return content

    def read(self, folder, files):
        made = builder.open_builder(str(folder), builder.RowsConfig(name="jsonl-0"))
        for row in builder.read_back(made, "train"):
            assert set(row) == set(builder.FIELDS) and all(isinstance(value, str) for value in row.values())
