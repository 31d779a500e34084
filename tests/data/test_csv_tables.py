"""A csv as people save it is read; what is none says what it is instead."""

import csv
import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from derm_compress.data import tables
from derm_compress.errors import DermError

CELLS = st.text(st.characters(codec="cp1252", exclude_categories=["Cc"]), max_size=8)
ROWS = st.lists(st.lists(CELLS, min_size=3, max_size=3), max_size=5)


class Memory:
    """A file that holds these bytes."""

    def __init__(self, content):
        self.read_bytes = lambda: content


def read(content):
    return tables.read_table(Memory(content), "labels.csv")


def failure(content):
    with pytest.raises(DermError) as caught:
        read(content)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@settings(max_examples=60, deadline=None)
@given(ROWS, st.sampled_from(",;\t|"), st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]))
def test_what_is_written_is_read_back(rows, separator, encoding):
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=separator)
    writer.writerows([["image", "label", "note"], *rows])
    table = read(text.getvalue().encode(encoding))
    cells = [tuple(cell.strip() for cell in row) for row in rows]
    assert table.columns == ("image", "label", "note")
    assert list(table.rows) == [row for row in cells if any(row)]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "utf-16-le", "utf-16-be"])
def test_encodings_and_ends_of_lines(encoding, end):
    text = end.join(["image;label", "Müller.jpg;Rosacea", ""])
    table = read(text.encode(encoding))
    assert table.rows == (("Müller.jpg", "Rosacea"),)
    assert ("Windows-1252" in table.form) == (encoding == "cp1252")
    assert table.form.startswith("semicolon")


@pytest.mark.parametrize(
    "text",
    [
        "sep=;\nimage;label\na,b.jpg;x\n",
        '"image";"label, of sorts"\n"a.jpg";"x"\n',
        "image; label\n a.jpg ; x \n",
        "image;label;\na.jpg;x;\n\n;;\n",  # as Excel leaves it
    ],
)
def test_what_excel_adds_does_not_matter(text):
    table = read(text.encode())
    assert len(table.columns[1]) >= 5 and len(table.rows) == 1 and table.rows[0][1] == "x"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"PK\x03\x04rest", "is an Excel workbook; save it as csv"),
        (b"\xd0\xcf\x11\xe0rest", "is an Excel workbook"),
        (b"image,label\n\x81\x8d,x\n", "is no text in UTF-8"),
        (b"image,label\na\0b,x\n", "is no text in UTF-8"),
        (b"image,label\na.jpg,x\nb.jpg,x,y\n", "row 3 has 3 cells, the first row 2; put quotes"),
        (b'image,label\n"a.jpg,x\nb.jpg,x\n', "breaks at line"),
    ],
)
def test_the_right_cause_is_named(content, message):
    assert message in failure(content)


def test_columns_are_matched_as_people_write_them():
    table = read(b"Lesion ID,image_id,Label ,label_id,x\n1,a,b,c,d\n")
    for asked, found in {
        "lesion": "Lesion ID",
        "LESION-ID": "Lesion ID",
        "image": "image_id",
        "label": "Label",  # before label_id, which is the same without id
        "label_id": "label_id",
        " X ": "x",
    }.items():
        assert table.columns[table.place(asked)] == found, asked
    with pytest.raises(DermError, match="no column 'dx'; its columns: Lesion ID, image_id"):
        table.place("dx")
    with pytest.raises(DermError, match="more than once: 'patient_id', 'Patient ID'"):
        read(b"patient_id,Patient ID\n1,2\n").place("patient")


def test_a_join_keeps_rows_and_refuses_repeats():
    left = read(b"image,label\na,x\nb,y\n")
    joined = tables.join(left, read(b"image,sex,label\nb,f,other\nc,m,other\n"), "image")
    assert joined.columns == ("image", "label", "sex")
    assert joined.rows == (("a", "x", ""), ("b", "y", "f"))
    with pytest.raises(DermError, match="row 3 repeats image 'b'"):
        tables.join(left, read(b"image,sex\nb,f\nb,m\n"), "image")
