"""The token cache: complete, resumable, shared by processes, and honest about damage."""

import importlib.util
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from chasm.errors import CacheError, DataError
from chasm.features import extract as extraction
from chasm.features.backbones import BackboneSpec, create_backbone
from chasm.features.cache import CHECKS, CLS, MANIFEST, PATCHES, TokenCache, cache_folder
from chasm.features.extract import extract

WORKER = Path(__file__).with_name("extract_worker.py")
_spec = importlib.util.spec_from_file_location("extract_worker", WORKER)
worker = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(worker)
Images, TinyBackbone, N_IMAGES = worker.Images, worker.TinyBackbone, worker.N_IMAGES
ALL = np.arange(N_IMAGES)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(extraction, "BLOCK_ROWS", 16)


@pytest.fixture
def one_thread():
    """As many threads as the worker has: sums depend on it in the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def filled(tmp_path):
    return extract(Images(), TinyBackbone(), ALL, tmp_path / "tokens", batch_size=8)


def start(root, log, kind, first=0, last=N_IMAGES, together=1):
    return subprocess.Popen(
        [sys.executable, WORKER, root, log, kind, str(first), str(last), str(together)],
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors


def contents(folder):
    return {name: (folder / name).read_bytes() for name in (CLS, PATCHES, CHECKS)}


def flip_byte(path, offset):
    with path.open("r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([byte ^ 0x10]))


def test_cache_holds_what_the_backbone_says(filled):
    backbone, images = TinyBackbone(), Images()
    cls, patches = backbone(backbone.preprocess(images.read(ALL)))
    np.testing.assert_array_equal(filled.cls, cls.half().numpy())
    np.testing.assert_array_equal(filled.patches, patches.half().numpy())
    assert filled.cls.shape == (N_IMAGES, 2, 5)
    assert filled.patches.shape == (N_IMAGES, 4, 6)
    assert not filled.cls.flags.writeable
    assert filled.weights_label == "UNTRAINED"
    filled.verify()


def test_only_missing_images_are_computed(tmp_path, monkeypatch):
    monkeypatch.setattr(extraction, "PIXEL_SAMPLE", 0)
    log = tmp_path / "log"
    some = np.array([90, 3, 17, 18, 3])
    cache = extract(Images(log), TinyBackbone(), some, tmp_path, batch_size=2)
    assert sorted(cache.missing(ALL)) == sorted(set(ALL) - set(some))
    assert not np.asarray(cache.cls)[cache.missing(ALL)].any()
    extract(Images(log), TinyBackbone(), ALL, tmp_path)
    reads = Counter(int(line.split()[1]) for line in log.read_text().splitlines())
    assert reads == Counter(ALL.tolist())


def test_complete_cache_reads_a_sample_of_images_only(filled, tmp_path, monkeypatch):
    monkeypatch.setattr(extraction, "_compute", None)  # a call would raise
    log = tmp_path / "log"
    again = extract(Images(log), TinyBackbone(), ALL, tmp_path / "tokens")
    read = {int(line.split()[1]) for line in log.read_text().splitlines()}
    assert len(read) == extraction.PIXEL_SAMPLE < N_IMAGES
    assert {0, N_IMAGES - 1} <= read
    assert again.folder == filled.folder


def test_fresh_computes_again(filled, tmp_path):
    flip_byte(filled.folder / CLS, 7)
    again = extract(Images(), TinyBackbone(), ALL, tmp_path / "tokens", fresh=True)
    again.verify(ALL)


def test_fresh_keeps_the_tokens_of_other_images(filled, tmp_path):
    row = filled.patches[0].nbytes
    flip_byte(filled.folder / PATCHES, 20 * row)
    flip_byte(filled.folder / PATCHES, 70 * row)
    log, wanted = tmp_path / "log", np.array([3, 20, 40])
    again = extract(Images(log), TinyBackbone(), wanted, tmp_path / "tokens", fresh=True)
    assert sorted(int(line.split()[1]) for line in log.read_text().splitlines()) == [3, 20, 40]
    assert not again.missing(ALL).size
    again.verify(ALL[ALL != 70])
    with pytest.raises(CacheError, match="image 70 "):
        again.verify(ALL)


@pytest.mark.parametrize("damage", ["manifest", "size"])
def test_fresh_makes_an_unusable_cache_anew(filled, tmp_path, damage):
    if damage == "manifest":
        (filled.folder / MANIFEST).write_bytes(b"\xff{")
    else:
        os.truncate(filled.folder / PATCHES, 10)
    with pytest.raises(CacheError, match="--fresh"):
        extract(Images(), TinyBackbone(), ALL[:3], tmp_path / "tokens")
    made = extract(Images(), TinyBackbone(), ALL[:3], tmp_path / "tokens", fresh=True)
    made.verify(ALL[:3])
    assert made.missing(ALL).size == N_IMAGES - 3


def test_extract_reports_damaged_tokens(filled, tmp_path):
    flip_byte(filled.folder / CLS, 50 * filled.cls[0].nbytes)
    with pytest.raises(CacheError, match=rf"{CLS}.*image 50 .*--fresh"):
        extract(Images(), TinyBackbone(), ALL, tmp_path / "tokens")
    extract(Images(), TinyBackbone(), ALL[ALL != 50], tmp_path / "tokens")


class Repainted(Images):
    """The same source (same fingerprint), some of whose images have other pixels now."""

    def __init__(self, changed):
        super().__init__()
        self.changed = changed

    def read(self, image_ids):
        images = super().read(image_ids)
        return [255 - p if i in self.changed else p for i, p in zip(image_ids, images, strict=True)]


def test_changed_pixels_are_noticed(filled, tmp_path):
    with pytest.raises(CacheError, match=r"2 of 2 sampled .* images 7, 30\. .*--fresh"):
        extract(Repainted({7, 30}), TinyBackbone(), np.array([7, 30]), tmp_path / "tokens")
    with pytest.raises(CacheError, match=r"32 of 32 sampled .* images 0, .* …\."):
        extract(Repainted(set(ALL)), TinyBackbone(), ALL, tmp_path / "tokens")
    extract(Repainted({7}), TinyBackbone(), ALL[ALL != 7], tmp_path / "tokens")
    again = extract(Repainted({7}), TinyBackbone(), ALL[:9], tmp_path / "tokens", fresh=True)
    extraction.check_pixels(again, Repainted({7}), ALL[:9])
    with pytest.raises(CacheError, match="1 of 9 sampled"):
        extraction.check_pixels(again, Images(), ALL[:9])


def test_changed_pixels_are_noticed_before_an_unfinished_cache_goes_on(tmp_path):
    extract(Images(), TinyBackbone(), ALL[:20], tmp_path)
    with pytest.raises(CacheError, match="images 5"):
        extract(Repainted({5}), TinyBackbone(), ALL[:25], tmp_path)
    assert TokenCache.open(next(tmp_path.glob("tiny-*"))).missing(ALL).size == N_IMAGES - 20


def test_two_processes_end_complete_and_compute_nothing_twice(tmp_path):
    log = tmp_path / "log"
    both = [start(tmp_path / "tokens", log, "tiny", together=2) for _ in range(2)]
    for process in both:
        finish(process)
    lines = [line.split() for line in log.read_text().splitlines()]
    assert Counter(int(image) for _, image in lines) == Counter(ALL.tolist())
    assert len({pid for pid, _ in lines}) == 2
    alone = extract(Images(), TinyBackbone(), ALL, tmp_path / "alone", batch_size=8)
    shared = tmp_path / "tokens" / alone.folder.name
    assert contents(shared) == contents(alone.folder)


@pytest.mark.slow
def test_two_processes_with_overlapping_requests(tmp_path):
    log = tmp_path / "log"
    both = [
        start(tmp_path / "tokens", log, "tiny", 0, 70),
        start(tmp_path / "tokens", log, "tiny", 23, N_IMAGES),
    ]
    for process in both:
        finish(process)
    reads = Counter(int(line.split()[1]) for line in log.read_text().splitlines())
    assert reads == Counter(ALL.tolist())


def test_killed_run_continues_to_the_same_bytes(tmp_path, one_thread):
    log = tmp_path / "log"
    killed = start(tmp_path / "tokens", log, "vit")
    deadline = time.monotonic() + 60
    while not (log.exists() and len(log.read_text().splitlines()) >= 40):
        assert time.monotonic() < deadline
        assert killed.poll() is None
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    backbone = worker.vit()
    folder = cache_folder(tmp_path / "tokens", Images.fingerprint, backbone.key)
    left = TokenCache.open(folder)
    assert 0 < left.missing(ALL).size < N_IMAGES
    left.verify()
    continued = extract(Images(), backbone, ALL, tmp_path / "tokens", batch_size=8)
    unbroken = extract(Images(), backbone, ALL, tmp_path / "unbroken", batch_size=8)
    assert continued.folder == folder
    assert contents(folder) == contents(unbroken.folder)


def test_tokens_without_checksum_do_not_count(tmp_path, monkeypatch):
    put = extraction._Writer._put

    def full_disk(self, name, row, values, rows=1):
        if name == CHECKS and row >= 16:
            raise self._full(name, "No space left on device")
        put(self, name, row, values, rows)

    monkeypatch.setattr(extraction._Writer, "_put", full_disk)
    with pytest.raises(CacheError, match="No space left"):
        extract(Images(), TinyBackbone(), ALL, tmp_path)
    folder = cache_folder(tmp_path, Images.fingerprint, TinyBackbone().key)
    cache = TokenCache.open(folder)
    np.testing.assert_array_equal(cache.missing(ALL), ALL[16:])
    monkeypatch.undo()
    extract(Images(), TinyBackbone(), ALL, tmp_path).verify(ALL)


@pytest.mark.parametrize(("name", "row_bytes"), [(CLS, 20), (PATCHES, 48)])
def test_flipped_byte_is_named(filled, name, row_bytes):
    flip_byte(filled.folder / name, 37 * row_bytes + 11)
    cache = TokenCache.open(filled.folder)
    with pytest.raises(CacheError, match=rf"{name}.*image 37 .*--fresh"):
        cache.verify(ALL)
    cache.verify(ALL[ALL != 37])


def test_swapped_rows_are_found(filled):
    tokens = np.memmap(filled.folder / CLS, "<f2", mode="r+", shape=(N_IMAGES, 2, 5))
    tokens[[4, 5]] = tokens[[5, 4]]
    tokens.flush()
    with pytest.raises(CacheError, match="image 4 "):
        TokenCache.open(filled.folder).verify()


def test_missing_images_do_not_verify(tmp_path):
    cache = extract(Images(), TinyBackbone(), ALL[:5], tmp_path)
    cache.verify()
    with pytest.raises(CacheError, match="image 5 and 1 others"):
        cache.verify(ALL[:7])


@pytest.mark.parametrize("name", [CLS, PATCHES, CHECKS])
def test_wrong_size_is_an_error_and_not_a_rebuild(filled, tmp_path, name):
    os.truncate(filled.folder / name, 10)
    with pytest.raises(CacheError, match=f"{name}: 10 bytes; [0-9]+ bytes expected"):
        TokenCache.open(filled.folder)
    with pytest.raises(CacheError, match=name):
        extract(Images(), TinyBackbone(), ALL, tmp_path / "tokens")
    (filled.folder / name).unlink()
    with pytest.raises(CacheError, match=f"{name}: missing"):
        TokenCache.open(filled.folder)


def _edit(manifest, **changes):
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 99}, "found 99"),
        ({"format": "other"}, "manifest.json:format"),
        ({"backbone": {"model": "tiny", "weights": "others"}}, "was changed"),
        ({"images": {"fingerprint": "other", "count": N_IMAGES}}, "was changed"),
        ({"weights_label": "hub"}, "was changed"),
        ({"sizes": None}, "was changed"),
    ],
)
def test_edited_manifest_is_refused(filled, changes, message):
    _edit(filled.folder / MANIFEST, **changes)
    with pytest.raises(CacheError, match=message):
        TokenCache.open(filled.folder)


def test_unreadable_manifest_is_refused(filled):
    (filled.folder / MANIFEST).write_text("{")
    with pytest.raises(CacheError, match="JSON"):
        TokenCache.open(filled.folder)
    (filled.folder / MANIFEST).write_text('{"format": "chasm-token-cache", "format_version": 2}')
    with pytest.raises(CacheError, match="images"):
        TokenCache.open(filled.folder)


def test_no_cache_says_how_to_make_one(tmp_path):
    with pytest.raises(CacheError, match="chasm extract"):
        TokenCache.open(tmp_path / "nothing")


def test_ids_outside_the_source(tmp_path):
    with pytest.raises(CacheError, match=r"image id 96 is outside 0\.\.95"):
        extract(Images(), TinyBackbone(), np.array([1, 96]), tmp_path)


def test_value_beyond_float16_names_layer_and_image(tmp_path):
    with pytest.raises(CacheError, match=r"tiny:patch tokens of block 2: image 0 .* 65504"):
        extract(Images(), TinyBackbone(scale=1e6), ALL, tmp_path)
    folder = cache_folder(tmp_path, Images.fingerprint, TinyBackbone().key)
    assert TokenCache.open(folder).missing(ALL).size == N_IMAGES


def test_cache_is_pickled_without_its_arrays(filled):
    filled.verify()
    data = pickle.dumps(filled)
    assert len(data) < 2000
    np.testing.assert_array_equal(pickle.loads(data).patches, filled.patches)


def test_find_by_spec(tmp_path):
    spec = BackboneSpec("vit_tiny_patch16_224", "untrained", 32, (-1,), (12,))
    made = extract(Images(), create_backbone(spec), ALL[:2], tmp_path)
    same = BackboneSpec("vit_tiny_patch16_224", "untrained", 32, (12,), (-1,))
    assert TokenCache.find(tmp_path, Images.fingerprint, same).folder == made.folder
    assert TokenCache.find(tmp_path, "other-images", spec) is None
    assert TokenCache.find(tmp_path, Images.fingerprint, BackboneSpec()) is None
    other = BackboneSpec("vit_tiny_patch16_224", "untrained", 32, (11,), (-1,))
    assert TokenCache.find(tmp_path, Images.fingerprint, other) is None
    assert TokenCache.find(tmp_path / "nothing", Images.fingerprint, spec) is None


def _spoil(folder, how):
    manifest = folder / MANIFEST
    if how == "newer":
        _edit(manifest, format_version=99)
    elif how == "older":
        _edit(manifest, format_version=1)
    else:
        manifest.write_bytes(b"\xff not json")


@pytest.mark.parametrize("how", ["newer", "unreadable", "older"])
def test_find_skips_what_is_not_looked_for(tmp_path, how, caplog):
    spec = BackboneSpec("vit_tiny_patch16_224", "untrained", 32)
    made = extract(Images(), create_backbone(spec), ALL[:2], tmp_path)
    other = extract(Images(), TinyBackbone(), ALL[:2], tmp_path)
    _spoil(other.folder, how)
    assert TokenCache.find(tmp_path, Images.fingerprint, spec).folder == made.folder
    assert other.folder.name in caplog.text
    assert TokenCache.find(tmp_path, "other-images", spec) is None


@pytest.mark.parametrize("how", ["newer", "unreadable"])
def test_find_names_a_remedy_that_works(tmp_path, how):
    spec = BackboneSpec("vit_tiny_patch16_224", "untrained", 32)
    made = extract(Images(), create_backbone(spec), ALL[:2], tmp_path)
    _spoil(made.folder, how)
    with pytest.raises(CacheError, match=rf"{made.folder.name}.*Delete this folder"):
        TokenCache.find(tmp_path, Images.fingerprint, spec)
    shutil.rmtree(made.folder)
    assert TokenCache.find(tmp_path, Images.fingerprint, spec) is None


def test_find_does_not_use_or_mind_an_older_format(tmp_path):
    spec = BackboneSpec("vit_tiny_patch16_224", "untrained", 32)
    _spoil(extract(Images(), create_backbone(spec), ALL[:2], tmp_path).folder, "older")
    assert TokenCache.find(tmp_path, Images.fingerprint, spec) is None


def test_unreadable_image_keeps_what_is_finished(tmp_path):
    class Broken(Images):
        def read(self, image_ids):
            if 40 in image_ids:
                raise DataError("0040.png", "not an image", "Replace it.")
            return super().read(image_ids)

    with pytest.raises(DataError, match=r"0040\.png"):
        extract(Broken(), TinyBackbone(), ALL, tmp_path, batch_size=8)
    cache = extract(Images(), TinyBackbone(), ALL[:40], tmp_path)
    assert cache.missing(ALL).size == N_IMAGES - 40
