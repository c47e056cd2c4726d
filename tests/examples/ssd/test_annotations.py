"""Annotations: read as they are meant, or refused in one sentence that names the file."""

from __future__ import annotations

import codecs
from pathlib import Path

import numpy as np
import pytest

from annotations import inside, read_annotation
from data_voc import VOC_CLASSES
from errors import InputError

BOX = {"xmin": "11", "ymin": "21", "xmax": "31", "ymax": "51"}


def xml(head: str = "", size: str = "", name: str = "<name>cat</name>", more: str = "", **edges: str) -> str:
    box = "".join(f"<{edge}>{text}</{edge}>" for edge, text in (BOX | edges).items())
    body = f"<object>{name}{more}<bndbox>{box}</bndbox></object>"
    return f"{head}<annotation>{size}{body}</annotation>"


def size(width: object, height: object) -> str:
    return f"<size><width>{width}</width><height>{height}</height></size>"


@pytest.fixture
def read(tmp_path):
    def read(content: str | bytes):
        path = tmp_path / "a.xml"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return read_annotation(path, VOC_CLASSES)

    return read


def refuses(read, content: str | bytes, words: str = "") -> None:
    with pytest.raises(InputError) as error:
        read(content)
    sentence = str(error.value)
    assert "a.xml is damaged (" in sentence
    assert sentence.endswith("): restore or mend it.")
    assert words in sentence
    assert "\n" not in sentence


def test_boxes_count_from_0_and_flags_are_read(read):
    objects, found = read(xml(size=size(80, 60), more="<difficult>1</difficult>"))
    np.testing.assert_array_equal(objects.bbox, [[20, 10, 50, 30]])
    assert objects.label.tolist() == [VOC_CLASSES.index("cat")]
    assert objects.difficult.tolist() == [True]
    assert found == (60, 80)


@pytest.mark.parametrize("text", ["31.9", " 31 ", "3.1e1", "+31"])
def test_numbers_of_any_spelling_are_cut_to_pixels(read, text):
    assert read(xml(xmax=text)).objects.bbox[0, 3] == 30


def test_a_tool_that_counts_from_0_loses_nothing(read):
    np.testing.assert_array_equal(read(xml(xmin="0", ymin="0")).objects.bbox, [[0, 0, 50, 30]])


@pytest.mark.parametrize("edge", BOX)
@pytest.mark.parametrize(
    "text",
    ["nan", "inf", "-inf", "1e999", "-1e999", "4,5", "4 5", "", "many", "-3", "1e30", "16777216", "0x10"],
)
def test_a_coordinate_that_is_no_place_is_refused(read, edge, text):
    refuses(read, xml(**{edge: text}))


@pytest.mark.parametrize(
    "edges", [{"xmax": "11"}, {"ymax": "21"}, {"xmax": "5"}, {"ymax": "3"}, {"xmin": "31.2", "xmax": "31.8"}]
)
def test_an_empty_or_inverted_box_is_refused(read, edges):
    refuses(read, xml(**edges), "the box of a cat is empty")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "no element found"),
        ("\0", "unclosed token"),
        ("<annotation>", "no element found"),
        ("<annotation><object></annotation>", "mismatched tag"),
        ("{'boxes': []}", "not well-formed"),
        ("<html></html>", "its root is <html> and not <annotation>"),
        ("<object><name>cat</name></object>", "its root is <object>"),
        (xml(name=""), "an object has no name"),
        (xml(name="<name/>"), "no class is called ''"),
        (xml(name="<name>unicorn</name>"), "no class is called 'unicorn'"),
        ("<annotation><object><name>cat</name></object></annotation>", "an object has no bndbox/ymin"),
        (xml(more="<difficult>maybe</difficult>"), "difficult is 'maybe', neither 0 nor 1"),
        (xml(size=size("wide", 60)), "could not convert"),
        (xml(size=size("inf", 60)), "infinity"),
        (xml(head='<?xml version="1.0" encoding="utf8mb4"?>'), "unknown encoding: utf8mb4"),
        (xml(head='<?xml version="1.0" encoding="utf-32"?>'), "encoding"),
        (xml(head='<?xml version="1.0" encoding="gb18030"?>'), "multi-byte encodings"),
        (xml(name="<name>&cat;</name>"), "undefined entity"),
        (b"\xff\xfe" + xml().encode(), "not well-formed"),
        (xml().replace("cat", "c\udce9t").encode(errors="surrogateescape"), "not well-formed"),
    ],
)
def test_what_is_no_annotation_is_refused(read, content, words):
    refuses(read, content, words)


@pytest.mark.parametrize("levels", [9, 40])
def test_entities_that_would_grow_without_end_are_refused(read, levels):
    entities = '<!ENTITY e0 "ha">' + "".join(
        f'<!ENTITY e{i} "{f"&e{i - 1};" * 10}">' for i in range(1, levels)
    )
    bomb = f"<!DOCTYPE a [{entities}]>" + xml(name=f"<name>&e{levels - 1};</name>")
    refuses(read, bomb)
    flat = f'<!DOCTYPE a [<!ENTITY e "{"x" * 50_000}">]>' + xml(name=f"<name>{'&e;' * 50_000}</name>")
    refuses(read, flat)


def test_files_outside_are_not_read(read, tmp_path):
    (tmp_path / "secret").write_text("cat")
    refuses(read, f'<!DOCTYPE a [<!ENTITY e SYSTEM "{tmp_path}/secret">]>' + xml(name="<name>&e;</name>"))


def test_deep_nesting_is_no_trouble(read):
    assert len(read(xml(more="<a>" * 100_000 + "</a>" * 100_000)).objects.label) == 1


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1", "windows-1252"])
def test_encodings_that_are_known_are_read(read, encoding):
    declared = encoding.removesuffix("-sig")
    head = f'<?xml version="1.0" encoding="{declared}"?>'
    content = xml(head=head, name="<name>cat</name><!-- ü -->").replace("\n", "\r\n").encode(encoding)
    assert content.startswith(codecs.BOM_UTF8) == (encoding == "utf-8-sig")
    assert len(read(content).objects.label) == 1


def test_an_image_without_objects_has_none(read):
    objects, found = read("<annotation/>")
    assert [len(array) for array in objects] == [0, 0, 0]
    assert objects.bbox.shape == (0, 4)
    assert found is None


def test_a_size_of_0_is_none(read):
    assert read(xml(size=size(0, 0))).size is None


def test_a_missing_annotation_is_refused(tmp_path):
    for path in (tmp_path / "a.xml", tmp_path, tmp_path / f"{'a' * 300}.xml"):
        with pytest.raises(InputError) as error:
            read_annotation(path, VOC_CLASSES)
        assert str(path) in str(error.value)


def test_an_annotation_of_an_image_of_another_size_is_refused(read):
    annotation = read(xml(size=size(80, 60)))
    assert inside(Path("a.xml"), annotation, (60, 80)).bbox.tolist() == [[20, 10, 50, 30]]
    for other in ((80, 60), (60, 81), (30, 40)):
        with pytest.raises(
            InputError, match=f"80x60 pixels, and its image, upright, is of {other[1]}x{other[0]}"
        ):
            inside(Path("a.xml"), annotation, other)


@pytest.mark.parametrize(
    ("shape", "bbox"),
    [
        ((51, 31), [20, 10, 50, 30]),
        ((50, 30), [20, 10, 50, 30]),
        ((49, 29), [20, 10, 49, 29]),
        ((48, 31), None),
        ((51, 28), None),
        ((15, 31), None),
    ],
)
def test_a_box_may_end_a_pixel_beyond_its_image_and_no_further(read, shape, bbox):
    annotation = read(xml())
    if bbox:
        assert inside(Path("a.xml"), annotation, shape).bbox.tolist() == [bbox]
    else:
        with pytest.raises(
            InputError, match=f"a box ends outside of its image of {shape[1]}x{shape[0]} pixels"
        ):
            inside(Path("a.xml"), annotation, shape)
