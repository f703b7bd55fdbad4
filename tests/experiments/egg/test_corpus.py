"""The byte corpus: documents, split, cache, streams, errors; references against hand-computed values."""

import itertools
import json
import os

import numpy as np
import pytest

from eggroll.experiments.egg.data import corpus, references


def folder_of(tmp_path, **texts):
    root = tmp_path / "texts"
    for name, text in texts.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
    return root


def ten(tmp_path):
    return folder_of(tmp_path, **{f"d{i}": bytes([65 + i]) * (i + 3) for i in range(10)})


def load(tmp_path, root, **options):
    return corpus.load([root], cache=tmp_path / "cache", **options)


def test_documents_begin_with_a_separator(tmp_path):
    root = folder_of(tmp_path, b=b"two", a__x=b"\xff\xfe one", empty=b"", c=b"three")
    root.joinpath(".hidden").write_bytes(b"no")
    root.joinpath("__pycache__").mkdir()
    root.joinpath("__pycache__", "x").write_bytes(b"no")
    got = load(tmp_path, root, validation_fraction=0.3)
    pieces = [bytes(part).split(b"\0")[1:] for part in (got.train, got.validation)]
    assert sorted(pieces[0] + pieces[1]) == [b"three", b"two", b"\xff\xfe one"]
    assert got.documents == (len(pieces[0]), len(pieces[1])) and min(got.documents) >= 1
    assert got.train.dtype == np.uint8 and got.train[0] == got.validation[0] == 0
    assert [document.name for document in corpus.find([root])] == ["a/x", "b", "c"]


def test_a_file_that_several_paths_lead_to_is_one_document(tmp_path):
    """It would be held out by one name, and trained on by another."""
    root = folder_of(tmp_path, **{f"more__d{i}": bytes([65 + i]) * (i + 3) for i in range(10)})
    root.joinpath("link").symlink_to(root / "more" / "d3")
    for paths in ([root, root / "more"], [root / "more", root], [root / "more" / "d1", root, root]):
        found = corpus.find(paths)
        assert len({document.path for document in found}) == len(found) == 10
    assert [document.name for document in corpus.find([root / "more", root])] == [f"d{i}" for i in range(10)]


def test_split_is_by_name_alone(tmp_path):
    names = [document.name for document in corpus.find([ten(tmp_path)])]
    held = dict(zip(names, corpus._split(corpus.find([ten(tmp_path)]), 0.4), strict=True))
    assert 1 <= sum(held.values()) <= 9
    root = folder_of(tmp_path / "elsewhere", **{name: b"other" for name in reversed(names[:5])})
    for name, part in zip(names[:5], corpus._split(corpus.find([root]), 0.4), strict=True):
        assert part == held[name]
    for fraction in (1e-9, 1 - 1e-9):  # never all, never none
        assert len(set(corpus._split(corpus.find([root]), fraction))) == 2


def test_written_once_and_anew_after_a_change(tmp_path):
    root = ten(tmp_path)
    first = load(tmp_path, root)
    assert load(tmp_path, root).opened == first.opened and isinstance(first.train, np.memmap)
    manifest = json.loads(first.path.with_suffix(".json").read_text())
    assert manifest["train_bytes"] == len(first.train) and len(manifest["documents"]) == 10
    root.joinpath("d3").write_bytes(b"changed")
    second = load(tmp_path, root)
    assert second.path != first.path and second.fingerprint != first.fingerprint
    first.check()
    assert sorted(os.listdir(tmp_path / "cache")) == sorted(
        path.name for got in (first, second) for path in (got.path, got.path.with_suffix(".json"))
    )


def test_a_kill_while_writing_leaves_no_corpus(tmp_path, monkeypatch):
    root = ten(tmp_path)
    read = corpus._read
    monkeypatch.setattr(corpus, "_read", lambda d: read(d) if d.name != "d5" else (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        load(tmp_path, root)
    assert os.listdir(tmp_path / "cache") == []
    monkeypatch.undo()
    assert len(load(tmp_path, root).train) > 0


def test_streams_are_contiguous_and_functions_of_the_generation(tmp_path):
    got = load(tmp_path, ten(tmp_path))
    text = bytes(got.train)
    pieces = [corpus.streams(got, generation, groups=3, length=5) for generation in range(2 * len(text))]
    assert pieces[0].shape == (3, 6) and pieces[0].dtype == np.uint8
    for group in range(3):
        start = group * (len(text) // 3)
        expected = (text[start:] + text * 20)[: 5 * len(pieces)]
        assert b"".join(bytes(piece[group, :5]) for piece in pieces)[: len(expected)] == expected
    for before, after in itertools.pairwise(pieces):
        np.testing.assert_array_equal(before[:, -1], after[:, 0])
    np.testing.assert_array_equal(pieces[7], corpus.streams(load(tmp_path, ten(tmp_path)), 7, groups=3, length=5))
    held = corpus.streams(got, 0, groups=1, length=2, part="validation")
    np.testing.assert_array_equal(held[0], got.validation[:3])


def test_default_corpus_is_the_standard_library(tmp_path):
    names = [document.name for document in corpus.find()]
    assert {"os.py", "json/decoder.py"} <= set(names) and names == sorted(names)
    assert not any({"site-packages", "test", "tests", "__pycache__"} & set(name.split("/")) for name in names)
    assert all(name.endswith(".py") for name in names)


def test_too_small(tmp_path):
    root = folder_of(tmp_path, empty=b"")
    with pytest.raises(ValueError, match=r"the corpus is too small: 0 files with text in .*, expected at least 2"):
        load(tmp_path, root)
    with pytest.raises(ValueError, match="the corpus is too small: 1 files"):
        load(tmp_path, folder_of(tmp_path, one=b"text"))
    with pytest.raises(FileNotFoundError, match=r"the path .*nowhere of the corpus does not exist"):
        load(tmp_path, tmp_path / "nowhere")
    for fraction in (0, 1, float("nan")):
        with pytest.raises(ValueError, match=f"validation_fraction must be between 0 and 1, got {fraction}"):
            load(tmp_path, ten(tmp_path), validation_fraction=fraction)


def test_files_that_vanish_or_change_while_read(tmp_path, monkeypatch):
    root = ten(tmp_path)
    documents = corpus.find([root])
    monkeypatch.setattr(corpus, "find", lambda paths: documents)
    root.joinpath("d4").write_bytes(b"another length")
    with pytest.raises(ValueError, match=r"the file .*d4 changed while the corpus was read; start again"):
        load(tmp_path, root)
    root.joinpath("d4").unlink()
    with pytest.raises(ValueError, match=r"the file .*d4 vanished while the corpus was read"):
        load(tmp_path, root)
    assert os.listdir(tmp_path / "cache") == []
    with pytest.raises(ValueError, match="vanished"):
        corpus._document(root / "d4", "d4")


def test_a_corpus_file_that_vanishes_or_changes(tmp_path):
    got = load(tmp_path, ten(tmp_path))
    whole = got.path.read_bytes()
    got.path.write_bytes(whole[:10])
    with pytest.raises(ValueError, match=r"the corpus file .* vanished or changed while it was read"):
        corpus.streams(got, 0, groups=1, length=2)
    got.path.unlink()
    with pytest.raises(ValueError, match="vanished or changed"):
        got.check()


@pytest.mark.parametrize("damage", ["cut", "missing", "flip", "manifest", "number", "field"])
def test_a_damaged_cache_is_written_anew(tmp_path, damage, capsys):
    got = load(tmp_path, ten(tmp_path))
    manifest, whole, listed = got.path.with_suffix(".json"), got.path.read_bytes(), got.path.with_suffix(".json").read_bytes()
    if damage == "cut":
        got.path.write_bytes(whole[:10])
    elif damage == "missing":
        got.path.unlink()
    elif damage == "flip":
        got.path.write_bytes(whole[:7] + bytes([whole[7] ^ 4]) + whole[8:])
        os.utime(got.path, ns=(0, got.opened[1]))  # the damage of a disk leaves the time as it was
        corpus._verified.clear()  # as another process
    elif damage == "manifest":
        manifest.write_bytes(listed[:40])
    elif damage == "number":
        manifest.write_bytes(listed.replace(b'"validation_documents": 1', b'"validation_documents": 3'))
    else:
        manifest.write_text('{"train_bytes": 3}')
    again = load(tmp_path, tmp_path / "texts")
    assert again.path.read_bytes() == whole and manifest.read_bytes() == listed and again.documents == got.documents
    assert "It is written anew." in capsys.readouterr().out
    load(tmp_path, tmp_path / "texts")
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generation": -1}, "generation >= 0 and length >= 1, got -1 and 5"),
        ({"length": 0}, "generation >= 0 and length >= 1, got 0 and 0"),
        ({"groups": 0}, "groups must be between 1 and the bytes of the text"),
        ({"groups": 10**6}, "groups must be between 1 and the bytes of the text, .*, got 1000000"),
    ],
)
def test_bad_streams(tmp_path, options, message):
    arguments = {"generation": 0, "groups": 2, "length": 5} | options
    with pytest.raises(ValueError, match=message):
        corpus.streams(load(tmp_path, ten(tmp_path)), **arguments)


def test_references():
    train, text = (np.frombuffer(text, np.uint8) for text in (b"abababac", b"abca"))
    assert references.unigram(text) == pytest.approx(1.5)
    single = {b: (n + 1) / (8 + 256) for b, n in zip(b"abc", (4, 3, 1), strict=True)}
    a, b, c = b"abc"
    pairs = [(3 + single[b]) / (4 + 1), (0 + single[c]) / (3 + 1), (0 + single[a]) / (0 + 1)]
    expected = -(np.log2(single[a]) + np.log2(pairs).sum()) / 4
    assert references.bigram(train, text) == pytest.approx(expected)
    got = {reference.name: reference for reference in references.references(train, np.tile(text, 500))}
    assert list(got) == ["unigram", "bigram", "gzip", "xz"]
    assert (
        got["gzip"].bits_per_byte < 0.2 and got["xz"].bits_per_byte < 0.5 and got["unigram"].bits_per_byte == pytest.approx(1.5)
    )
    assert all(reference.seconds >= 0 and reference.cost for reference in got.values())
    with pytest.raises(ValueError, match="expected two texts with bytes, got 8 and 0"):
        references.references(train, text[:0])


def test_counts_cross_their_pieces(monkeypatch):
    text = np.random.default_rng(0).integers(97, 100, 1000).astype(np.uint8)
    whole = references.unigram(text), references.bigram(text, text)
    monkeypatch.setattr(references, "_PIECE", 7)
    assert (references.unigram(text), references.bigram(text, text)) == pytest.approx(whole)
    assert whole[1] < whole[0] + 0.1 and references._pairs(text).sum() == 999
